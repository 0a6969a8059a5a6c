"""What is in a data set twice, and the reasons that a clip gives by itself."""

import dataclasses

import numpy as np
import pytest

from data.clips.decode import CutSpec, Rejected, digital_silence, read_cut
from data.manifest.duplicates import build_print, find_duplicates, find_near_duplicates
from data.reasons import reject
from tests.support.inputs.media import noise, numbered, write_media

RATE = 16000


def window(clip_id: str, begin: float, origin: str = "tube", **more) -> dict:
    return {"id": clip_id, "path": clip_id, "split": "train", "origin": origin,
            "origin_start": begin, "seconds": 10.02} | more


@pytest.mark.parametrize(
    ("mode", "gone"),
    [("exact", ["again"]), ("overlap", ["again", "second", "later"]),
     ("id", ["again", "second", "next", "later", "far"])],
)
def test_duplicates_by_metadata(mode, gone):
    records = [window("first", 0), window("far", 100), window("again", 0), window("second", 1),
               window("next", 10), window("later", 19.5), window("other", 0, origin="lake")]
    twins = find_duplicates(records, mode)
    assert sorted(records[twin.later]["id"] for twin in twins) == sorted(gone)
    for twin in twins:
        assert records[twin.first]["id"] in twin.detail and "tube" in twin.detail


def test_a_chain_of_overlaps_keeps_every_other_clip():
    records = [window(str(begin), begin) for begin in (0, 6, 12, 18, 24)]
    assert [twin.later for twin in find_duplicates(records, "overlap")] == [1, 3]


def test_the_held_out_one_of_two_stays():
    records = [window("train", 0), window("test", 0, split="validation")]
    [twin] = find_duplicates(records, "exact")
    assert (twin.first, twin.later) == (1, 0)


def test_unknown_recordings_are_told_apart_by_their_bytes():
    records = [{"id": name, "path": name, "sha256": digest, "t0": t0, "t1": t0 + 2.0,
                "split": "train", "seconds": 9.0}
               for name, digest, t0 in (("a", "x", 0.0), ("b", "x", 0.0), ("c", "x", 1.0),
                                        ("d", "y", 0.0))]
    assert [twin.later for twin in find_duplicates(records, "exact")] == [1]
    assert [twin.later for twin in find_duplicates(records, "overlap")] == [1, 2]


def scene(seed: int, shift: int = 0) -> np.ndarray:
    """(24, 48, 80, 3) uint8: blobs that wander."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (24, 6, 10)).astype(np.uint8)
    frames = np.repeat(np.repeat(small, 8, axis=1), 8, axis=2)[..., None].repeat(3, axis=3)
    return np.clip(frames.astype(int) + shift, 0, 255).astype(np.uint8)


def beats(seed: int, gain: float = 1.0) -> np.ndarray:
    """(RATE, 2): bursts of noise at random times."""
    generator = np.random.default_rng(seed)
    level = 0.003 + (generator.random(20) > 0.6).repeat(RATE // 20)
    sound = 0.1 * gain * level[:, None] * generator.standard_normal((RATE, 2))
    return sound.astype(np.float32)


def test_near_duplicates_look_and_sound_alike():
    clips = {
        "first": (scene(0), beats(0)),
        "other": (scene(1), beats(1)),
        "brighter, louder": (scene(0, 9), beats(0, 2.0)),
        "same scene, other sound": (scene(0), beats(2)),
        "other scene, same sound": (scene(2), beats(0)),
        "again": (scene(1), beats(1)),
        "third of it": (scene(0), beats(0)),
    }
    prints = [build_print(frames, audio, 1.0, RATE) for frames, audio in clips.values()]
    names = list(clips)
    assert [(names[t.first], names[t.later]) for t in find_near_duplicates(prints)] == [
        ("first", "brighter, louder"), ("other", "again"), ("first", "third of it")]
    assert find_near_duplicates([]) == [] == find_near_duplicates(prints[:1])


def test_still_and_silent_scenes_are_not_all_the_same():
    """Black pictures agree in every bit: sound must decide."""
    black = np.zeros((24, 48, 80, 3), np.uint8)
    prints = [build_print(black, beats(seed), 1.0, RATE) for seed in range(4)]
    assert find_near_duplicates(prints) == []
    hiss = [build_print(black, 0.01 * noise(1, RATE)[:RATE].astype(np.float32), 1.0, RATE)] * 2
    assert len(find_near_duplicates(hiss)) == 1


def test_every_pair_is_compared():
    """Blocks of numpy against plain Python."""
    generator = np.random.default_rng(0)
    base = build_print(scene(0), beats(0), 1.0, RATE)
    flips = [generator.permutation(256)[: generator.integers(0, 80)] for _ in range(60)]
    prints = []
    for flip in flips:
        bits = np.unpackbits(base.bits.view(np.uint8))
        bits[flip] ^= 1
        prints.append(base._replace(bits=np.packbits(bits).view(np.uint64)))
    gone: set[int] = set()
    for first in range(60):
        for later in range(first + 1, 60):
            apart = len(set(flips[first]) ^ set(flips[later]))
            if first not in gone and apart <= 40:
                gone.add(later)
    assert {twin.later for twin in find_near_duplicates(prints)} == gone and gone


SPEC = CutSpec(frames=9, height=48, width=64, sample_rate=RATE, hop=512)


def test_streams_of_other_lengths(tmp_path):
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, noise(1.8, RATE), RATE)
    with pytest.raises(Rejected, match="length_mismatch: picture .* sound from 0.000 to 1.8"):
        read_cut(path, SPEC, 0.5)
    read_cut(path, dataclasses.replace(SPEC, max_length_mismatch=1.25), 0.5)
    late = write_media(tmp_path / "b.mkv", numbered(72), np.arange(72) / 24, noise(1.8, RATE), RATE,
                       audio_start=1.2)
    with pytest.raises(Rejected, match="length_mismatch.*sound from 1.2"):
        read_cut(late, SPEC, 1.5)


def test_share_of_digital_silence_over_the_cut(tmp_path):
    sound = noise(3, RATE)
    sound[RATE : RATE + RATE // 2] = 0  # half a second from 1 s on
    path = write_media(tmp_path / "a.mkv", numbered(72), np.arange(72) / 24, sound, RATE)
    strict = dataclasses.replace(SPEC, max_digital_silence=0.5)
    assert digital_silence(read_cut(path, strict, 2.0).audio) < 0.01
    with pytest.raises(Rejected, match="[67][0-9.]+% of the cut's sound is exact zeros") as found:
        read_cut(path, strict, 1.25)
    assert found.value.reason == "digital_silence"
    read_cut(path, SPEC, 1.25)  # not by default: between synthetic sounds there is nothing


def test_a_reason_that_nobody_knows_is_not_given():
    with pytest.raises(AssertionError, match="odd"):
        Rejected("odd", "")
    with pytest.raises(AssertionError, match="odd"):
        reject({"id": "a"}, "odd", "")
