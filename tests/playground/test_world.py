"""The built-in world: deterministic, physical, audible when visible, truthfully captioned."""

import json
import re

import numpy as np
import pytest

from playground.world.__main__ import write_clips
from playground.world.clip import COLOURS, MATERIALS, describe, make_clip
from playground.world.impacts import SAMPLE_RATE
from playground.world.physics import AUDIBLE_SPEED, GRAVITY, HEIGHT
from playground.world.wording import ADJECTIVES, HITS, LOOKS, NUMBERS

SEED = 7
CLIPS = 14
CAPTIONS = 400
SOUND_WORDS = re.compile(
    r"\b(sound|hear|loud|soft|quiet|noise|thud|thump|knock|clack|tap|clang|ring|chime|clink|tinkle"
    r"|ping|patter|hiss|howl|chirp|song|bird|breeze|fading)s?\b", re.IGNORECASE,
)
SIGHT_WORDS = re.compile(
    r"\b(" + "|".join(COLOURS) + r"|grey|beige|slate|white|sky|ball|wall|box|room|floor|left|right"
    r"|shiny|matte|clear|striped|see|seen|reed|grass|cloud|drift)s?\b", re.IGNORECASE,
)


@pytest.fixture(scope="module")
def clips():
    return [make_clip(SEED, index) for index in range(CLIPS)]


def _tight(clips):
    return [clip for clip in clips if clip.facts.clip_class == "tight"]


def test_a_clip_is_a_function_of_seed_and_index(clips):
    again = make_clip(SEED, 3)
    assert again.facts == clips[3].facts == describe(SEED, 3)
    np.testing.assert_array_equal(again.frames, clips[3].frames)
    np.testing.assert_array_equal(again.audio, clips[3].audio)
    assert not np.array_equal(make_clip(SEED + 1, 3).audio, clips[3].audio)


def test_shapes_and_levels(clips):
    for clip in clips:
        assert clip.frames.shape == (72, 128, 192, 3) and clip.frames.dtype == np.uint8
        assert clip.audio.shape == (144_000, 2) and clip.audio.dtype == np.float32
        assert 0.005 < np.abs(clip.audio).max() < 1.0


def test_energy_never_grows(clips):
    """Contacts only lose energy; pushing overlapping balls apart may lift them by a hair."""
    for clip in _tight(clips):
        slack = 0.01 * clip.energy[0]
        assert (np.diff(clip.energy) < slack).all()
        assert clip.energy[-1] < clip.energy[0]


def test_free_fall_follows_gravity(clips):
    """Between impacts the second difference of the height is g / fps^2."""
    clip = next(c for c in _tight(clips) if c.facts.events[0].time > 0.3)
    heights = clip.positions[:6, 0, 1]
    np.testing.assert_allclose(np.diff(heights, 2), GRAVITY / 24**2, rtol=1e-6)
    assert (clip.positions[..., 1] < HEIGHT).all()


def onset_rise(audio: np.ndarray, rate: int) -> np.ndarray:
    """Rise (dB) of each millisecond above 9 kHz over the two before it; index = milliseconds.

    All modes lie below 8 kHz, so what is left up there is the click of each contact, however
    loudly an earlier impact still rings.
    """
    spectrum = np.fft.rfft(audio, axis=0)
    spectrum[np.fft.rfftfreq(len(audio), 1 / rate) < 9000] = 0
    clicks = np.abs(np.fft.irfft(spectrum, len(audio), axis=0)).max(axis=1)
    step = rate // 1000
    level = clicks[: len(clicks) // step * step].reshape(-1, step).max(axis=1)
    before = np.maximum(np.roll(level, 1), np.roll(level, 2))
    return 20 * np.log10((level + 1e-4) / (before + 1e-4))


def test_every_impact_is_heard_when_it_happens(clips):
    """Within 5 ms of each listed impact the sound jumps; impacts in quick succession may share."""
    checked = 0
    for clip in _tight(clips):
        rise = onset_rise(clip.audio, SAMPLE_RATE)
        for event in clip.facts.events:
            now = round(event.time * 1000)
            assert rise[max(now - 5, 0):now + 6].max() > 2.0, (clip.facts.id, event)
            checked += 1
    assert checked > 30


def test_no_impact_is_heard_before_the_first(clips):
    for clip in _tight(clips):
        first = round(clip.facts.events[0].time * SAMPLE_RATE)
        assert np.abs(clip.audio[: max(first - 5, 0)]).max(initial=0) < 5e-3


def test_sound_pans_with_position(clips):
    for clip in _tight(clips):
        event = max(clip.facts.events, key=lambda e: e.impulse)
        start = round(event.time * SAMPLE_RATE)
        if any(0 < abs(e.time - event.time) < 0.05 for e in clip.facts.events):
            continue
        left, right = np.square(clip.audio[start:start + 480]).sum(axis=0)
        if abs(event.x - 96) > 40:
            assert (right > left) == (event.x > 96)


def test_impacts_are_real_contacts(clips):
    for clip in _tight(clips):
        times = [event.time for event in clip.facts.events]
        assert times == sorted(times) and times[0] > 0
        assert all(event.impulse > 0.2 * AUDIBLE_SPEED for event in clip.facts.events)


def test_captions_name_the_truth_and_keep_to_their_sense():
    for index in range(CAPTIONS):
        facts = describe(SEED, index)
        assert not SOUND_WORDS.search(facts.video_caption), facts.video_caption
        assert not SIGHT_WORDS.search(facts.audio_caption), facts.audio_caption
        video, audio = facts.video_caption.lower(), facts.audio_caption.lower()
        if facts.clip_class == "loose":
            continue
        named = {colour for colour in COLOURS if re.search(rf"\b{colour}\b", video)}
        assert named == set(facts.colours)
        assert facts.scene in video
        assert any(look in video for look in LOOKS[facts.material])
        if len(facts.colours) > 1:
            assert any(word in video for word in NUMBERS[len(facts.colours)])
        assert ADJECTIVES[facts.material].replace("en", "") in audio
        assert any(hit in audio for hit in HITS[facts.material])


def test_the_world_is_varied():
    facts = [describe(SEED, index) for index in range(CAPTIONS)]
    tight = [f for f in facts if f.clip_class == "tight"]
    assert 0.65 < len(tight) / len(facts) < 0.85
    assert {f.material for f in tight} == set(MATERIALS) and len(MATERIALS) >= 4
    assert {c for f in tight for c in f.colours} == set(COLOURS) and len(COLOURS) >= 6
    assert {len(f.colours) for f in tight} == {1, 2, 3}
    assert {f.scene for f in facts if f.clip_class == "loose"} == {"rain", "wind", "clouds"}
    assert len({f.video_caption for f in facts}) > 0.75 * len(tight)


def test_materials_look_and_sound_different():
    """Mean spectrum and mean ball colour contrast separate every pair of materials."""
    centroid: dict[str, list[float]] = {name: [] for name in MATERIALS}
    for index in range(40):
        clip = make_clip(SEED + 2, index) if describe(SEED + 2, index).material else None
        if clip is None or not clip.facts.events:
            continue
        spectrum = np.abs(np.fft.rfft(clip.audio.mean(axis=1)))
        frequency = np.fft.rfftfreq(len(clip.audio), 1 / SAMPLE_RATE)
        centre = (spectrum**2 * frequency).sum() / (spectrum**2).sum()
        centroid[clip.facts.material].append(float(centre))
    order = ("rubber", "wood", "metal", "glass")
    ranges = [(min(centroid[name]), max(centroid[name])) for name in order]
    assert all(low[1] < high[0] for low, high in zip(ranges, ranges[1:], strict=False)), ranges


def test_command_writes_clips_and_manifest(tmp_path):
    write_clips(tmp_path, clips=2, validation=1, seed=SEED)
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [r["split"] for r in records] == ["train", "train", "validation"]
    assert all((tmp_path / r["path"]).stat().st_size > 1000 for r in records)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 3


def test_processes_side_by_side_write_the_same_clips_in_the_same_order(tmp_path):
    written = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        write_clips(folder, clips=10, validation=1, seed=SEED, processes=processes)
        texts = [(folder / name).read_text() for name in ("manifest.jsonl", "events.jsonl")]
        clips = {path.name for path in (folder / "clips").iterdir() if path.stat().st_size > 1000}
        written.append((texts, clips))
    assert written[0] == written[1]
    assert len(written[0][1]) == 11
