"""Floating point operations of one training step, exactly, from the shapes alone.

A multiply-add is two operations; only products count (linear layers, patches, attention), forward
and backward, recomputation not. Captions are credited for the rows that are computed, not for
their padding. Equal to torch.utils.flop_counter (tests/model/test_flops.py). Called by train.py for
TFLOP/s and MFU.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from model.towers.audio_blocks import MLP_RATIO, AudioDiTConfig
from model.towers.audio_dit import SINUSOID_DIM
from model.towers.layers import DURATION_FREQUENCIES
from model.towers.video_dit import VideoDiTConfig
from model.variants import AVFullDiTConfig

# Dense bf16 peak of one device in TFLOP/s, from the makers' data sheets; the first name that is
# part of the device's own name counts.
PEAK_TFLOPS = {
    "H200": 989.5,
    "GH200": 989.5,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "H800": 989.5,
    "H20": 148.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Peak of the named device, e.g. "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    words = device_name.replace("-", " ")
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), None)


class Shape(NamedTuple):
    """What the operations of one forward depend on; every sample of a batch has this shape."""

    samples: int
    video_tokens: int
    video_text: int  # keys of the video's cross-attention
    video_rows: int  # of them computed; the rest repeat the last
    audio_tokens: int = 0
    audio_text: int = 0  # the caption's tokens and the duration token


class Work(NamedTuple):
    """What one forward and its backward amount to, over all samples of a batch."""

    flops: int
    video_tokens: int
    audio_tokens: int
    text_tokens: int


def shape_of(config: AVFullDiTConfig, inputs: Mapping[str, Any]) -> Shape:
    """Shape of one call from the keyword arguments of AVFullDiT.forward."""
    video, text = inputs["noisy_video"], inputs["video_text"]
    patch = config.video.patch_size
    tokens = 1
    for size, part in zip(video.shape[2:], patch, strict=True):
        tokens *= size // part
    rows = text.shape[1]
    length = inputs.get("video_text_length") or rows
    if config.task == "t2v":
        return Shape(video.shape[0], tokens, length, rows)
    return Shape(
        video.shape[0], tokens, length, rows,
        inputs["noisy_audio"].shape[1], inputs["audio_text"].shape[1] + 1,
    )


def training_work(config: AVFullDiTConfig, inputs: Mapping[str, Any]) -> Work:
    """Operations and tokens of one forward and backward with these inputs of AVFullDiT.forward."""
    shape = shape_of(config, inputs)
    samples = shape.samples
    return Work(
        training_flops(config, shape), samples * shape.video_tokens, samples * shape.audio_tokens,
        samples * (shape.video_rows + shape.audio_text),
    )


def training_flops(config: AVFullDiTConfig, shape: Shape) -> int:
    """Forward and backward: each product costs two more, but for inputs that need no gradient."""
    return 3 * forward_flops(config, shape) - shape.samples * _first_layers(config, shape)


def forward_flops(config: AVFullDiTConfig, shape: Shape) -> int:
    """Forward of a whole batch."""
    video = config.video
    flops = _video_ends(video, shape) + video.num_layers * _video_block(video, shape)
    flops += config.num_video_blocks * _attention(shape.video_tokens**2, video.hidden_dim)
    if config.task == "t2v":
        return shape.samples * flops
    audio = config.audio
    assert audio is not None
    stream = shape.audio_tokens + shape.audio_text
    flops += _audio_ends(audio, shape)
    joint_double = config.num_joint_double
    joint_single = config.num_joint_blocks - joint_double
    new = config.new_heads * audio.attention_head_dim
    for double, total, joint in (
        (True, audio.num_layers, joint_double), (False, audio.num_single_layers, joint_single)
    ):
        alone = _audio_block(audio, stream, 0, double) + _attention(stream**2, audio.hidden_dim)
        flops += (total - joint) * alone + joint * _audio_block(audio, stream, new, double)
    return shape.samples * (flops + config.num_joint_blocks * _joint_attention(config, shape))


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _attention(pairs: int, width: int) -> int:
    """Logits and weighted values of ``pairs`` (query, key) pairs over all heads."""
    return 4 * pairs * width


def _video_block(config: VideoDiTConfig, shape: Shape) -> int:
    """All of a Wan block but its self-attention's pairs."""
    dim, tokens = config.hidden_dim, shape.video_tokens
    return (
        _product(tokens, dim, 6 * dim)  # q, k, v, o; q, o of the cross-attention
        + _product(shape.video_rows, dim, 2 * dim)  # its k, v
        + _attention(tokens * shape.video_text, dim)
        + _product(tokens, dim, 2 * config.ffn_dim)
    )


def _video_ends(config: VideoDiTConfig, shape: Shape) -> int:
    """Patches, timestep, caption and head."""
    dim, patch = config.hidden_dim, _patch_volume(config)
    return (
        _product(shape.video_tokens, config.in_channels * patch, dim)
        + _product(shape.video_tokens, dim, config.out_channels * patch)
        + _product(1, config.freq_dim + dim + 6 * dim, dim)
        + _product(shape.video_rows, config.text_dim + dim, dim)
    )


def _audio_block(config: AudioDiTConfig, stream: int, new: int, double: bool) -> int:
    """All of a TangoFlux block but its attention's pairs; ``new`` columns are the joint block's."""
    dim = config.hidden_dim
    modulation = _product(1, dim, (12 if double else 3) * dim)
    heads = _product(stream, dim, 4 * (dim + new))  # q, k, v and their way back
    return modulation + heads + _product(stream, dim, 2 * MLP_RATIO * dim)


def _audio_ends(config: AudioDiTConfig, shape: Shape) -> int:
    dim, text, pooled = (
        config.hidden_dim, config.joint_attention_dim, config.pooled_projection_dim
    )
    return (
        _product(1, text, pooled)
        + _product(1, SINUSOID_DIM + dim + pooled + dim, dim)
        + _product(1, 2 * DURATION_FREQUENCIES + 1, text)
        + _product(shape.audio_text, text, dim)
        + _product(shape.audio_tokens, config.in_channels, 2 * dim)  # in and out
        + _product(1, dim, 2 * dim)
    )


def _joint_attention(config: AVFullDiTConfig, shape: Shape) -> int:
    """The attention of one joint layer: AVFull-Attention, or two and a fusion on top."""
    assert config.audio is not None
    dim, audio_dim = config.video.hidden_dim, config.audio.hidden_dim
    video, audio, text = shape.video_tokens, shape.audio_tokens, shape.audio_text
    stream, masked = audio + text, config.audio_text == "masked"
    if config.fusion == "full":
        if not masked:
            return _attention((video + stream) ** 2, dim)
        return _attention(
            video * (video + audio) + audio * (video + stream) + text * stream, dim
        )
    heard = audio if masked else stream
    to_video = _product(video, dim, 2 * dim) + _product(heard, audio_dim, 2 * dim)
    to_stream = _product(heard, audio_dim, 2 * audio_dim) + _product(video, dim, 2 * audio_dim)
    fusion = to_video + to_stream + _attention(video * heard, dim + audio_dim)
    return _attention(video**2, dim) + _attention(stream**2, audio_dim) + fusion


def _first_layers(config: AVFullDiTConfig, shape: Shape) -> int:
    """Products whose input is data: the backward pass computes no gradient for it."""
    video = config.video
    dim = video.hidden_dim
    flops = (
        _product(shape.video_tokens, video.in_channels * _patch_volume(video), dim)
        + _product(1, video.freq_dim, dim)
        + _product(shape.video_rows, video.text_dim, dim)
    )
    if config.task == "t2v":
        return flops
    audio = config.audio
    assert audio is not None
    # The caption's states reach `context_embedder` next to the duration token, which is learned.
    return (
        flops
        + _product(1, audio.joint_attention_dim, audio.pooled_projection_dim)
        + _product(1, SINUSOID_DIM, audio.hidden_dim)
        + _product(shape.audio_tokens, audio.in_channels, audio.hidden_dim)
    )


def _patch_volume(config: VideoDiTConfig) -> int:
    first, second, third = config.patch_size
    return first * second * third
