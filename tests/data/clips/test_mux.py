"""Picture and sound of a written clip come back at the time they were given."""

import av
import numpy as np
import pytest

from data.clips.mux import write_clip

FPS = 24


def demux_audio(path) -> tuple[np.ndarray, int]:
    """Sound (N,2) whose sample 0 is time 0, placed by each frame's own timestamp."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        rate = stream.rate
        blocks = [(float(f.pts * f.time_base), f.to_ndarray().T) for f in container.decode(stream)]
    length = max(round(t * rate) + len(b) for t, b in blocks)
    sound = np.zeros((length, 2), np.float32)
    for time, block in blocks:
        start = round(time * rate)
        skip = max(0, -start)  # priming samples lie before time 0
        sound[start + skip:start + len(block)] = block[skip:]
    return sound, rate


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0.25, 0.9, 1.5])
def test_impulse_comes_back_within_a_millisecond(tmp_path, rate, seconds):
    audio = np.zeros((2 * rate, 2), np.float32)
    audio[round(seconds * rate)] = 0.9
    write_clip(tmp_path / "clip.mp4", np.zeros((48, 32, 48, 3), np.uint8), FPS, audio, rate)
    sound, out_rate = demux_audio(tmp_path / "clip.mp4")
    peak = np.abs(sound).max(axis=1).argmax() / out_rate
    assert out_rate == rate
    assert abs(peak - seconds) < 1e-3


def test_frames_keep_time_and_content(tmp_path):
    frames = np.repeat(np.linspace(20, 235, 30).astype(np.uint8)[:, None], 32 * 48 * 3, axis=1)
    frames = frames.reshape(30, 32, 48, 3)
    write_clip(tmp_path / "clip.mp4", frames, FPS, None, 48_000)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert not container.streams.audio
        decoded = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    times = [float(f.pts * f.time_base) for f in decoded]
    np.testing.assert_allclose(times, np.arange(30) / FPS, atol=1e-4)
    means = [f.to_ndarray(format="rgb24").mean() for f in decoded]
    np.testing.assert_allclose(means, frames.mean(axis=(1, 2, 3)), atol=3)


def test_wrong_shapes_are_named(tmp_path):
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    with pytest.raises(ValueError, match="even H, W"):
        write_clip(tmp_path / "a.mp4", frames[:, :31], FPS, None, 48_000)
    with pytest.raises(ValueError, match="duplicate mono"):
        write_clip(tmp_path / "a.mp4", frames, FPS, np.zeros(100, np.float32), 48_000)
