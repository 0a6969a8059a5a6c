"""FLOPs from shapes equal what torch counts while the model really runs."""

from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import AVFullDiT, AVFullDiTConfig
from model.flops import (
    Shape,
    forward_flops,
    peak_tflops,
    shape_of,
    training_flops,
    training_work,
)
from tests.support.models.towers import CONFIG, EARLY_SINGLE, T2V, joint_inputs, video_inputs

VARIANTS = {
    "t2av": CONFIG,
    "t2v": T2V,
    "early single": EARLY_SINGLE,
    "double joint": replace(CONFIG, num_joint_blocks=3),
    "stream": replace(CONFIG, audio_text="stream"),
    "cross": replace(CONFIG, fusion="cross"),
    "cross stream": replace(CONFIG, fusion="cross", audio_text="stream"),
}


@pytest.mark.parametrize("length", [None, 12])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_torchs_flop_counter(name, length):
    config = VARIANTS[name]
    model = AVFullDiT(config, attention="sdpa_math")
    inputs = video_inputs() if config.task == "t2v" else joint_inputs()
    inputs["video_text_length"] = length
    shape = shape_of(config, inputs)
    assert model.attention_kernel == "sdpa_math"  # tried now, not while we count
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        video, audio = model(**inputs)
    assert forward_flops(config, shape) == forward.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        (video.sum() + (0 if audio is None else audio.sum())).backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert training_flops(config, shape) == total == training_work(config, inputs).flops


def test_tokens_of_a_batch():
    work = training_work(CONFIG, joint_inputs() | {"video_text_length": 12})
    assert work.video_tokens == 2 * 3 * 2 * 3
    assert work.audio_tokens == 2 * 10
    assert work.text_tokens == 2 * (7 + 5 + 1)


def test_the_released_sizes_match_the_design():
    """23.6 and 55.9 TFLOP a sample with 512 caption rows; 117 rows, which is usual, are fewer."""
    config = AVFullDiTConfig()
    short = Shape(1, 780, 512, 512, 44, 65)
    long = Shape(1, 1860, 512, 512, 109, 65)
    assert training_flops(config, short) / 1e12 == pytest.approx(23.6, rel=0.003)
    assert training_flops(config, long) / 1e12 == pytest.approx(55.9, rel=0.003)
    assert training_flops(config, short._replace(video_rows=117)) / 1e12 == pytest.approx(
        22.2, rel=0.003)
    assert training_flops(config, short._replace(samples=3)) == 3 * training_flops(config, short)


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H200", 989.5), ("NVIDIA H20", 148.0),
     ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 PCIe", 756.0), ("a CPU", None)],
)
def test_peak_is_the_named_devices(device, peak):
    assert peak_tflops(device) == peak
