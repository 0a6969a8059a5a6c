"""The stitch self-check passes where the stitch is right, and only there."""

from dataclasses import replace

import pytest
import torch

from model import AVFullDiT
from model.weights.load import load_pretrained
from model.weights.selfcheck import StitchError, check_stitch
from tests.support.models import tiny, towers

CPU = torch.device("cpu")
VARIANTS = [
    {}, {"num_joint_blocks": 1}, {"num_joint_blocks": 3}, {"init": "normal"}, {"fusion": "cross"},
    {"rope_layout": "hybrid"}, {"rope_layout": "wan", "num_joint_blocks": 3},
    {"rope": "expand_video"}, {"rope": "vanilla", "audio_text": "stream"},
    {"task": "t2v", "audio": None},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("released")
    return tiny.write_wan(root / "wan", shards=True), tiny.write_tangoflux(root / "tangoflux")


def stitched(folders, **changes):
    audio = replace(towers.AUDIO, audio_seq_len=40)
    config = replace(towers.CONFIG, audio=audio, audio_hop=300)
    model = AVFullDiT(replace(config, **changes))
    load_pretrained(model, *folders)
    return model


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_right_stitch_passes(folders, changes):
    model = stitched(folders, **changes)
    deviations = check_stitch(model, model, *folders, CPU)
    assert deviations.keys() == ({"video"} if changes.get("task") else {"video", "audio"})
    assert max(deviations.values()) < 1e-5


def test_bfloat16(folders):
    model = stitched(folders).bfloat16()
    assert max(check_stitch(model, model, *folders, CPU).values()) < 5e-2


def test_the_mute_ends_with_the_check(folders):
    model = stitched(folders, init="normal")
    inputs = towers.joint_inputs(1)
    with torch.no_grad():
        before = model(**inputs)
        check_stitch(model, model, *folders, CPU)
        assert all(torch.equal(a, b) for a, b in zip(before, model(**inputs), strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [("joint_blocks.0.video.ffn", "joint_blocks.1.video.ffn"),
     ("joint_blocks.0.video.norm2", "joint_blocks.1.video.norm2"),
     ("joint_blocks.0.audio.attn.norm_q", "joint_blocks.1.audio.attn.norm_q"),
     ("joint_blocks.0.audio.proj_mlp", "joint_blocks.1.audio.proj_mlp")],
)
def test_blocks_in_the_wrong_place_are_refused(folders, first, second):
    model = stitched(folders)
    one, other = model.get_submodule(first), model.get_submodule(second)
    kept = {name: value.clone() for name, value in one.state_dict().items()}
    one.load_state_dict(other.state_dict())
    other.load_state_dict(kept)
    with pytest.raises(StitchError, match="self-check failed.*deviates.*set self_check=false"):
        check_stitch(model, model, *folders, CPU)


def test_not_a_number_is_refused(folders):
    model = stitched(folders)
    with torch.no_grad():
        model.audio.proj_out.bias.fill_(float("nan"))
    with pytest.raises(StitchError, match="audio nan"):
        check_stitch(model, model, *folders, CPU)
