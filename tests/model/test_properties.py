"""Properties that hold whatever the input (hypothesis), for every kind of joint block."""

from dataclasses import replace
from functools import lru_cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import AVFullDiT
from model.joint import Coupling
from model.towers.rope import Rope, fusion_ropes, joint_audio_rope, video_axes, video_rope
from model.weights.names import released_name
from tests.support.models import tiny, towers

CPU = torch.device("cpu")
FEW = settings(max_examples=12, deadline=None)
VARIANTS = st.sampled_from([
    ("full", "native", "masked"), ("full", "hybrid", "masked"), ("full", "wan", "stream"),
    ("cross", "native", "masked"), ("cross", "wan", "stream"),
])
SEEDS = st.integers(0, 2**31)


@lru_cache(maxsize=16)
def model(variant, num_joint=3, task="t2av"):
    fusion, layout, text = variant
    config = replace(
        towers.CONFIG, fusion=fusion, rope_layout=layout, audio_text=text, audio_hop=300,
        num_joint_blocks=num_joint,
    )
    if task == "t2v":
        config = replace(config, task="t2v", audio=None)
    torch.manual_seed(0)
    return towers.randomise_new(towers.fill(AVFullDiT(config), *towers.build_released()))


def inputs(seed, batch, frames=2, width=2, num_audio=5, num_text=3):
    torch.manual_seed(seed)
    return {
        "noisy_video": torch.randn(batch, 48, frames, 4, 2 * width),
        "t": torch.rand(batch),
        "video_text": torch.randn(batch, 6, tiny.WIDTH),
        "noisy_audio": torch.randn(batch, num_audio, 6),
        "audio_text": torch.randn(batch, num_text, tiny.WIDTH),
        "audio_text_mask": torch.rand(batch, num_text) > torch.linspace(-0.5, 0.9, num_text),
        "duration": 30 * torch.rand(batch),
    }


@FEW
@given(VARIANTS, SEEDS, st.integers(2, 4), st.integers(1, 3), st.integers(1, 7))
@torch.no_grad()
def test_a_batch_is_its_samples(variant, seed, batch, frames, num_audio):
    many = inputs(seed, batch, frames=frames, num_audio=num_audio)
    together = model(variant)(**many)
    for index in range(batch):
        alone = model(variant)(**{key: value[index:index + 1] for key, value in many.items()})
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[index], atol=2e-5, rtol=1e-4)


@FEW
@given(VARIANTS, SEEDS, st.sampled_from([0, 1]))
@torch.no_grad()
def test_permuted_tokens_with_their_positions(variant, seed, index):
    """A joint block (double at 0, single at 1) knows order only through RoPE."""
    stitched = model(variant)
    example = inputs(seed, 2)
    video, video_context = stitched.video.embed(*(example[key] for key in (
        "noisy_video", "t", "video_text")))
    stream, context = stitched.audio.embed(
        example["noisy_audio"], *(example[key] for key in (
            "t", "audio_text", "audio_text_mask", "duration")), stitched.config.avsync_tau)
    context, ropes = stitched._joint_positions(video_context, context)
    ropes = ropes or (video_context.rope, context.rope)
    coupling = Coupling(True, 0.0, ropes)
    block = stitched.joint_blocks[index]
    plain = block(video, stream, video_context, context, coupling)

    order = torch.randperm(video.shape[1])
    audio, text = torch.randperm(context.num_audio), torch.randperm(context.num_text)
    stream_order = torch.cat((audio, context.num_audio + text))

    def move(rope, places):
        return Rope(*(table[places] for table in rope))

    moved = block(
        video[:, order], stream[:, stream_order],
        video_context._replace(rope=move(video_context.rope, order)),
        context._replace(rope=move(context.rope, stream_order)),
        Coupling(True, 0.0, (move(ropes[0], order), move(ropes[1], stream_order))),
    )
    torch.testing.assert_close(moved[0], plain[0][:, order], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(moved[1], plain[1][:, stream_order], atol=2e-5, rtol=1e-4)


@FEW
@given(st.integers(2, 6), st.integers(1, 12), st.sampled_from(["wan", "hybrid"]),
       st.sampled_from([32, 64, 128]))
def test_equal_time_is_equal_angle(tau, frame, layout, head_dim):
    """Eq. 12: audio index tau p and video index p turn alike under wan and hybrid alone."""
    axes = (head_dim // 4, head_dim // 4, head_dim // 2)
    pairs = video_axes(head_dim)[0] // 2
    video = video_rope(frame + 1, 1, 1, head_dim, CPU)

    def audio(layout):
        rope = joint_audio_rope(tau * frame + 1, 1, axes, float(tau), CPU, layout, 2, 3)
        tables = [table[tau * frame] for table in rope]
        return [table if table.dim() == 1 else table[2] for table in tables]  # a new head

    for ours, theirs in zip(audio(layout), video, strict=True):
        torch.testing.assert_close(ours[:pairs], theirs[frame, :pairs], atol=1e-6, rtol=0)
    still = audio(layout)
    assert (still[0][pairs:] == 1).all() and (still[1][pairs:] == 0).all()
    assert not torch.allclose(audio("native")[0][:pairs], video.cos[frame, :pairs], atol=1e-3)


@FEW
@given(st.integers(2, 6), st.integers(1, 8), st.sampled_from(["native", "wan"]),
       st.sampled_from(["shrink_audio", "expand_video"]))
def test_the_baseline_meets_in_time_too(tau, frame, layout, mode):
    """fusion=cross: either side scaled, a video frame and the sound of its time share an angle."""
    scale, divisor = (1.0, float(tau)) if mode == "shrink_audio" else (float(tau), 1.0)
    video, stream = fusion_ropes(
        (frame + 1, 2, 3), tau * frame + 1, 2, (4, 4, 8), scale, divisor, CPU, layout)
    for ours, theirs in zip(stream, video, strict=True):
        torch.testing.assert_close(ours[tau * frame], theirs[6 * frame + 5], atol=1e-6, rtol=0)


@FEW
@given(VARIANTS, SEEDS, st.integers(1, 3))
def test_masked_t2av_teaches_the_video_what_t2v_does(variant, seed, num_joint):
    joint, alone = model(variant, num_joint), model(variant, num_joint, "t2v")
    example = inputs(seed, 1)
    gradients = []
    for network in (joint, alone):
        network.zero_grad()
        given_ = example if network is joint else {
            key: example[key] for key in ("noisy_video", "t", "video_text")}
        network(**given_, cross_modal=False)[0].square().mean().backward()
        gradients.append({
            name: parameter.grad for own, parameter in network.named_parameters()
            if (name := released_name(own, network.config)) and name[0] == "wan"
        })
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-3)


@FEW
@given(VARIANTS, SEEDS, st.integers(2, 4), st.sampled_from([0.0, -1.5]), st.data())
@torch.no_grad()
def test_video_of_a_clip_without_sound_hears_nothing(variant, seed, batch, bias, data):
    """As with V <-> A masked; and a batch of both kinds is what each gives alone."""
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    many = inputs(seed, batch)
    mixed, _ = model(variant)(**many, audio_present=present, cross_modal_bias=bias)
    heard, _ = model(variant)(**many, cross_modal_bias=bias)
    masked, _ = model(variant)(**many, cross_modal=False)
    expected = torch.where(present[:, None, None, None, None], heard, masked)
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(heard, masked, atol=1e-3)
    # What the silent clip's audio stream holds is of no consequence.
    noise = torch.where(present[:, None, None], 0.0, 100 * torch.randn_like(many["noisy_audio"]))
    other = many | {"noisy_audio": many["noisy_audio"] + noise}
    again, _ = model(variant)(**other, audio_present=present, cross_modal_bias=bias)
    torch.testing.assert_close(again, mixed, atol=2e-5, rtol=1e-4)
