"""The tracker that judges samples: right on real clips, and it sees what can be wrong."""

import json
import sys

import numpy as np
import pytest

from data.clips.mux import write_clip
from playground.backbones.audio_vae import window_of
from playground.backbones.clips import FIRST_FRAME, SAMPLE_RATE, WINDOW_FRAMES, small_clip
from playground.quality.recognise import G, agreement, hear, judge, look, main
from playground.world.clip import describe, make_clip
from playground.world.drawing import COLOURS as RGB

CLIPS = 16


@pytest.fixture(scope="module")
def clips():
    """Tight held-out clips: facts, frames of the window, its sound."""
    found = []
    for index in range(3 * CLIPS):
        if describe(2, index).clip_class == "tight" and len(found) < CLIPS:
            clip = make_clip(2, index)
            frames, audio = small_clip(clip)
            frames = frames[FIRST_FRAME : FIRST_FRAME + WINDOW_FRAMES]
            found.append((clip.facts, frames, window_of(audio)[0].numpy()))
    return found


@pytest.fixture(scope="module")
def real(clips):
    return judge(clips)


def test_real_clips_are_recognised(real):
    assert real["clips"] == CLIPS
    assert real["both_right"] == real["colours_right"] == real["count_right"] == 1
    assert real["wrong"] == []


def test_real_balls_fall_as_fast_as_the_world_says(real):
    assert abs(real["gravity"]["median"] / G - 1) < 0.05
    assert real["gravity"]["clips_that_fall"] == 1
    assert real["gravity"]["moments"] > 100


def test_real_sound_belongs_to_its_own_picture(real):
    assert real["lag"]["own_ms"] < 60 < 100 < real["lag"]["shuffled_ms"]
    assert real["lag"]["p"] < 0.01


def test_another_clips_captions_are_wrong(clips, real):
    asked = [facts for facts, _, _ in clips]
    shuffled = judge([(facts, frames, wave) for facts, (_, frames, wave)
                      in zip(asked[1:] + asked[:1], clips, strict=True)])
    assert shuffled["colours_right"] < 0.4
    assert len(shuffled["wrong"]) > CLIPS / 2


def test_exchanged_sounds_show(clips):
    waves = [wave for _, _, wave in clips]
    exchanged = judge([(facts, frames, wave) for (facts, frames, _), wave
                       in zip(clips, waves[5:] + waves[:5], strict=True)])
    assert exchanged["lag"]["p"] > 0.05


def test_a_late_sound_is_late_by_as_much(clips):
    """In most clips: one whose impacts come regularly may fit a period off."""
    moved = []
    for _, frames, wave in clips:
        seen = look(frames).impacts
        late = np.roll(wave, SAMPLE_RATE // 10, axis=1)  # 100 ms
        moved.append(agreement(seen, hear(late))[0] - agreement(seen, hear(wave))[0])
    assert abs(float(np.median(moved)) - 0.1) <= 0.01


def test_balls_that_fly_upwards_do_not_fall(clips):
    """Played upside down, the picture's balls are pulled to its top."""
    turned = judge([(facts, frames[:, ::-1], wave) for facts, frames, wave in clips])
    assert turned["gravity"]["median"] < 0
    assert turned["gravity"]["clips_that_fall"] < 0.2


def test_an_empty_picture_and_silence_are_judged_too(clips):
    facts, frames, wave = clips[0]
    empty = judge([(facts, np.full_like(frames, 128), np.zeros_like(wave))])
    assert empty["both_right"] == 0
    assert empty["gravity"]["median"] is None
    assert empty["lag"] is None


def test_a_second_ball_of_one_colour_is_counted(clips):
    facts, frames, _ = next(clip for clip in clips if len(clip[0].colours) == 1)
    both = np.maximum(frames, np.roll(frames, 48, axis=2)) if frames.mean() < 100 else (
        np.minimum(frames, np.roll(frames, 48, axis=2)))
    seen = look(both)
    assert seen.colours == facts.colours
    assert seen.balls == 2


def draw(*discs):
    """Frames (49,64,96,3) of discs (colour, x, y, radius) that stand still before a grey wall."""
    y, x = np.mgrid[:64, :96] + 0.5
    picture = np.full((64, 96, 3), 0.4)
    for colour, centre_x, centre_y, radius in discs:
        picture[np.hypot(x - centre_x, y - centre_y) < radius] = RGB[colour]
    return np.repeat((255 * picture).astype(np.uint8)[None], 49, axis=0)


def test_a_rim_of_another_colour_is_no_ball():
    """A blue ball with a turquoise rim beside a turquoise one: decoded glass balls have such."""
    seen = look(draw(("turquoise", 30, 40, 7), ("blue", 28.5, 40, 6.5), ("turquoise", 70, 40, 6)))
    assert set(seen.colours) == {"blue", "turquoise"} and seen.balls == 2


def test_balls_that_touch_are_counted_each():
    seen = look(draw(("turquoise", 30, 40, 8), ("blue", 43, 40, 5.5), ("red", 54, 40, 5.5)))
    assert set(seen.colours) == {"blue", "turquoise", "red"} and seen.balls == 3


def test_the_command_judges_a_folder_of_mp4(clips, tmp_path, monkeypatch, capsys):
    facts, frames, wave = clips[0]
    write_clip(tmp_path / f"{facts.id}.mp4", frames, 24, wave.T.astype(np.float32), SAMPLE_RATE)
    monkeypatch.setattr(sys, "argv", ["recognise", str(tmp_path)])
    assert main() == 0
    told = json.loads(capsys.readouterr().out)
    assert told["both_right"] == 1 and told["lag"]["clips"] == 1
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(sys, "argv", ["recognise", str(tmp_path / "none")])
    assert main() == 78
    assert "holds no sampled tight clip" in capsys.readouterr().err
