"""A clip becomes what it became when ENCODING_VERSION was raised last: what was stored then.

Whoever changes that raises data.schema.ENCODING_VERSION and stores new ones. Code that only moves
or gets faster passes.
"""

import json

import numpy as np
import pytest

from data.clips.cut import CutSpec
from data.clips.decode import read_cut
from data.manifest import read_manifest
from data.prepare import Encoders
from data.reasons import Rejected
from data.schema import ENCODING_VERSION, TEXT_FILE, load_metadata, load_text_states
from data.stored import iter_samples
from tests.support.encoded import CHANGED, FIXTURES, assert_close, assert_same_sample

STORED = {1: FIXTURES / "bfb3d05"}  # version -> what was stored of it


@pytest.fixture(scope="module")
def folder():
    assert ENCODING_VERSION in STORED, (
        f"nothing is stored of ENCODING_VERSION={ENCODING_VERSION}: tests/fixtures/README.md")
    return STORED[ENCODING_VERSION]


def test_pictures_and_sound_are_cut_as_before(folder):
    arrays = np.load(folder / "cuts.npz")
    for name, (values, t0, view) in json.loads((folder / "cuts.json").read_text()).items():
        spec = CutSpec(**{"fps": 20.0, "frames": 9, "height": 24, "width": 32,
                          "sample_rate": 16000, "hop": 512} | values)
        cut = read_cut(folder / "clip.mp4", spec, t0, view)
        assert_close(f"{name}: t0", cut.facts.t0, arrays[f"{name}/t0"], 1e-6)
        assert_close(f"{name}: pictures", cut.frames, arrays[f"{name}/frames"], 1)
        assert_close(f"{name}: sound", cut.audio[::8], arrays[f"{name}/sound"], 1e-4)


def test_samples_are_encoded_as_before(folder):
    root = folder / "prepared"
    metadata = load_metadata(root)
    encoders = Encoders.load(str(folder / "weights/wan"), str(folder / "weights/tangoflux"), "cpu",
                             metadata.video_text_length)
    assert encoders.fingerprints == metadata.fingerprints
    spec = CutSpec(fps=metadata.fps, frames=metadata.frames, height=metadata.height,
                   width=metadata.width, sample_rate=metadata.sample_rate, hop=metadata.audio_hop)
    stored = {sample["id"]: sample for split in metadata.counts
              for sample in iter_samples(root, split)}
    rejected = {}
    for record in read_manifest(folder / "manifest.jsonl", "train")[0]:
        try:
            cut = read_cut(folder / record["path"], spec, record.get("t0"))
        except Rejected as error:
            rejected[record["id"]] = error.reason
        else:
            assert_same_sample(encoders.encode(cut, record), stored.pop(record["id"]))
    assert not stored and rejected == {"n6": "too_short"}, CHANGED
    texts = load_text_states(root)
    for name, states in encoders.text_states().items():
        assert_close(f"{TEXT_FILE}: {name}", states.float(), texts[name].float(), 0.03)
