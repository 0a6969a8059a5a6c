"""The captioning command: joined by id, resumed after any kill, a ledger, one-line refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.captions import __main__ as caption
from data.captions.caption_files import appending
from data.manifest import read_captions
from data.manifest.doctor import main as doctor
from model.weights.hub import read_json
from tests.support.inputs import captioning
from tests.support.inputs.media import noise, numbered, write_media

SIZE = ["--fps", "20", "--height", "56", "--width", "84", "--video-frames", "4"]
SETTINGS = [*SIZE, "--max-new-tokens", "8", "--batch", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    captioning.write_tarsier2(root / "tarsier2")
    captioning.write_qwen2_vl(root / "qwen2_vl")
    captioning.write_omni(root / "omni")
    captioning.write_llava(root / "llava")
    return root


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return captioning.write_clips(tmp_path_factory.mktemp("clips") / "clips")


def run(manifest: Path, out: Path, *arguments: str | Path) -> int:
    return caption.main([str(manifest), "--out", str(out), *SETTINGS, *map(str, arguments)])


def both(models: Path) -> list[str | Path]:
    return ["--video-model", models / "tarsier2", "--audio-model", models / "omni"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_shipped_prompts():
    assert caption.read_prompt(caption.PROMPTS / "video.txt") == "Describe the video in detail."
    audio = caption.read_prompt(caption.PROMPTS / "audio.txt")
    assert "\n" not in audio and "only what can be heard" in audio


# The command


@pytest.fixture(scope="module")
def undisturbed(models, manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "captions.jsonl"
    assert run(manifest, out, *both(models)) == 0
    return out


def test_joined_by_id(undisturbed, manifest):
    joined = lines(undisturbed)
    assert [line["id"] for line in joined] == [line["id"] for line in lines(manifest)]
    for kind, model in (("video", "tarsier2"), ("audio", "omni")):
        part = lines(undisturbed.with_suffix(f".{kind}.jsonl"))
        assert [line[f"{kind}_caption"] for line in joined] == [line["caption"] for line in part]
        assert {line[f"{kind}_model"] for line in joined} == {model}
        assert {len(line[f"{kind}_prompt"]) for line in joined} == {12}
    assert len(joined[0]) == 7
    found = read_captions(undisturbed)
    assert found["clip 3"]["audio_caption"] == joined[3]["audio_caption"]


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_other_classes_by_config(models, manifest, tmp_path, name):
    assert run(manifest, tmp_path / "c.jsonl", "--video-model", models / name) == 0
    assert [sorted(line) for line in lines(tmp_path / "c.jsonl")] == [
        ["id", "video_caption", "video_model", "video_prompt"]
    ] * 5


def test_slices_cover_the_manifest(models, manifest, tmp_path, undisturbed):
    found = []
    for number_ in range(2):
        out = tmp_path / f"{number_}.jsonl"
        options = ["--audio-model", models / "omni", "--slice", f"{number_}/2", "--batch", "1"]
        assert run(manifest, out, *options) == 0
        found += lines(out)
    expected = {line["id"]: line["audio_caption"] for line in lines(undisturbed)}
    assert {line["id"]: line["audio_caption"] for line in found} == expected and len(found) == 5


def test_resumes_after_any_cut(models, manifest, tmp_path, undisturbed):
    """The file of a killed run, cut at an arbitrary byte: no id twice, none lost."""
    whole = undisturbed.with_suffix(".video.jsonl").read_bytes()
    part = tmp_path / "captions.video.jsonl"
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, 1, ends[0] - 1, ends[0], ends[1] + 40, ends[3] - 2, len(whole)):
        part.write_bytes(whole[:size])
        options = ["--video-model", models / "tarsier2"]
        assert run(manifest, tmp_path / "captions.jsonl", *options) == 0
        assert part.read_bytes() == whole, size


def test_resumes_after_kill(models, manifest, tmp_path, undisturbed):
    out = tmp_path / "captions.jsonl"
    command = [sys.executable, "-m", "data.captions", str(manifest), "--out", str(out)]
    command += [*SETTINGS, "--max-new-tokens", "8", *map(str, both(models)), "--batch", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        part = out.with_suffix(".video.jsonl")
        limit = time.monotonic() + 60
        while not (part.is_file() and part.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    assert 0 < len(part.read_bytes().splitlines())
    assert run(manifest, out, *both(models), "--batch", "1") == 0
    assert lines(out) == lines(undisturbed)
    assert len(lines(part)) == 5


def test_unusable_clips_go_to_the_ledger(models, tmp_path, capsys):
    folder = tmp_path / "clips"
    manifest = captioning.write_clips(folder, 1)
    times = np.arange(40) / 20
    write_media(folder / "mute.mkv", numbered(40), times)
    write_media(folder / "still.mkv", numbered(40), times, audio=np.zeros((96000, 2)))
    write_media(folder / "short.mkv", numbered(8), times[:8], audio=noise(0.4))
    (folder / "broken.mkv").write_bytes(b"no video")
    records = [json.loads(manifest.read_text())]
    for name in ("mute", "still", "short", "broken", "absent"):
        records.append({"id": name, "path": f"{name}.mkv", "t0": 0.0, "t1": 0.75})
    records.append({"id": "backwards", "path": "0.mkv", "t0": 1.0, "t1": 0.5})
    captioning.write_manifest(manifest, records)
    with manifest.open("a") as file:
        file.write("no JSON\n")
    out = tmp_path / "captions.jsonl"
    assert run(manifest, out, *both(models)) == 0
    reasons = {
        kind: {r["id"]: r["reason"] for r in lines(out.with_suffix(f".{kind}.rejects.jsonl"))}
        for kind in ("video", "audio")
    }
    never = {"short": "too_short", "broken": "undecodable", "absent": "undecodable",
             "backwards": "invalid_record", "line 8": "invalid_record"}
    assert reasons["video"] == never
    assert reasons["audio"] == never
    found = {line["id"]: sorted(k for k in line if k.endswith("caption")) for line in lines(out)}
    assert found == dict.fromkeys(("clip 0", "mute", "still"), ["audio_caption", "video_caption"])
    assert [line["audio_caption"] for line in lines(out)][1:] == ["", ""]  # known: no sound
    shown = capsys.readouterr().out
    assert "no_audio 1" in shown and "silent 1" in shown and "too_short 1" in shown
    usable = captioning.write_manifest(folder / "usable.jsonl", records[:3])
    for options, count in (((), 1), (("--keep-silent",), 3)):
        assert doctor([str(usable), "--captions", str(out), "--fps", "20", "--frames", "15",
                       "--workers", "1", "--min-source-fps", "1", *options]) == 0
        assert f"usable   {count} of 3" in capsys.readouterr().out


# Refusals


def one_error(capsys) -> str:
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    return error[0]


def test_refuses_what_cannot_work(models, manifest, tmp_path, capsys):
    out, empty = tmp_path / "c.jsonl", tmp_path / "empty.jsonl"
    empty.write_text("")
    text_only = tmp_path / "text_only"
    captioning.write_llava(text_only)
    config = read_json(text_only / "config.json") | {"model_type": "bert"}
    (text_only / "config.json").write_text(json.dumps(config))
    first = captioning.write_llava(tmp_path / "tarsier1")
    config = read_json(first / "config.json")
    config["architectures"] = ["TarsierForConditionalGeneration"]
    (first / "config.json").write_text(json.dumps(config))
    cases = [
        (manifest, ["--video-model", tmp_path / "none"], ["video_model=", "no such folder"]),
        (manifest, ["--audio-model", tmp_path / "none"], ["audio_model=", "Qwen2.5-Omni-7B"]),
        (manifest, ["--video-model", models], ["no file", "config.json"]),
        (manifest, ["--video-model", text_only], ["model_type 'bert'", "Tarsier2-Recap-7b"]),
        (manifest, ["--video-model", first], ["TarsierForConditionalGeneration", "no image"]),
        (manifest, ["--audio-model", models / "llava"], ["'llava'", "qwen2_5_omni_thinker"]),
        (manifest, [], ["--video-model"]),
        (empty, both(models), ["manifest=", "empty"]),
        (tmp_path / "no.jsonl", both(models), ["manifest=", "no such file"]),
        (manifest, [*both(models), "--batch", "0"], ["batch=0", "above 0"]),
        (manifest, [*both(models), "--audio-prompt", empty], ["prompt=", "empty"]),
        (manifest, ["--video-model", models / "llava", "--video-frames", "12"],
         ["video_frames=12", "lower it"]),
    ]
    for path, options, words in cases:
        assert run(path, out, *options) == 1, options
        error = one_error(capsys)
        assert all(word in error for word in words), error
        assert not out.exists()
    assert run(manifest, tmp_path / "c.csv", *both(models)) == 1
    assert "must end in .jsonl" in one_error(capsys)


def test_refuses_to_mix(models, manifest, tmp_path, capsys, undisturbed):
    part = tmp_path / "captions.video.jsonl"
    out = tmp_path / "captions.jsonl"
    kept = undisturbed.with_suffix(".video.jsonl").read_bytes()
    part.write_bytes(kept)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Describe the video in one sentence.")
    tarsier2 = ["--video-model", models / "tarsier2"]
    for options, word in (
        (["--video-model", models / "qwen2_vl"], "'tarsier2', this run has 'qwen2_vl'"),
        ([*tarsier2, "--video-prompt", prompt], "made with prompt"),
        ([*tarsier2, "--video-frames", "3"], "'4 frames of 56x84 at 20 fps'"),
    ):
        assert run(manifest, out, *options) == 1
        error = one_error(capsys)
        assert word in error and "give another --out" in error
    part.write_bytes(kept + b"{half\n")
    assert run(manifest, out, *tarsier2) == 1
    assert f"{part}:6: not a JSON object" in one_error(capsys)
    part.write_bytes(kept)
    with appending(part):
        assert run(manifest, out, *tarsier2) == 1
    assert "another process" in one_error(capsys)
    assert part.read_bytes() == kept


@pytest.mark.parametrize("text", ["2/2", "x", "1", "-1/2"])
def test_refuses_a_wrong_slice(text, capsys):
    with pytest.raises(SystemExit):
        caption.parse(["m.jsonl", "--out", "c.jsonl", f"--slice={text}"])
    assert "K from 0 to N-1" in capsys.readouterr().err


@pytest.mark.parametrize("fault, word", [("missing", "missing"), ("extra", "unknown")])
def test_tarsier2_is_loaded_strictly(tmp_path, manifest, capsys, fault, word):
    folder = captioning.write_tarsier2(tmp_path / "tarsier2")
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        del tensors["vision_tower.merger.ln_q.weight"]
    else:
        tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(manifest, tmp_path / "out.jsonl", "--video-model", folder) == 1
    error = one_error(capsys)
    assert str(folder) in error and word in error
