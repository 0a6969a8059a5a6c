"""Captions: what the models are shown and asked, Tarsier2's names, resuming, refusals."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from data import caption
from data.caption_files import appending
from data.captioners import AudioCaptioner, VideoCaptioner, evenly, frames_at, spread
from data.decode import Cut, CutSpec, read_cut
from data.manifest import read_captions
from model.files import read_json
from tests import captioning
from tests.media import noise, number, numbered, write_media

SIZE = ["--fps", "20", "--height", "56", "--width", "84", "--video-frames", "4"]
SETTINGS = [*SIZE, "--max-new-tokens", "8", "--batch", "2", "--device", "cpu"]
SPEC = CutSpec(
    fps=20, frames=10, height=56, width=84, sample_rate=16000, hop=160, keep_silent=True
)
VIDEO_PROMPT = "Describe the video in detail."
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # OpenAI's, as Qwen2-VL normalises
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


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


@pytest.fixture(scope="module")
def tarsier2(models) -> VideoCaptioner:
    return VideoCaptioner.from_folder(models / "tarsier2", VIDEO_PROMPT, "cpu", 4, 8)


@pytest.fixture(scope="module")
def omni(models) -> AudioCaptioner:
    return AudioCaptioner.from_folder(models / "omni", "What is heard?", "cpu", 4.0, 20.0, 8)


def cuts(manifest: Path, *indices: int) -> list[Cut]:
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    return [caption.read_record(records[i], manifest.parent, SPEC) for i in indices]


def run(manifest: Path, out: Path, *arguments: str | Path) -> int:
    return caption.main([str(manifest), "--out", str(out), *SETTINGS, *map(str, arguments)])


def both(models: Path) -> list[str | Path]:
    return ["--video-model", models / "tarsier2", "--audio-model", models / "omni"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# What the models read


def test_chat_texts(tarsier2, omni, models):
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    assert tarsier2.text == CHAT.format(video + VIDEO_PROMPT)
    assert omni.text == CHAT.format("<|vision_bos|><|VIDEO|><|vision_eos|>What is heard?")
    own = VideoCaptioner.from_folder(models / "qwen2_vl", VIDEO_PROMPT, "cpu", 4, 8)
    assert own.text == tarsier2.text  # by the released template; Tarsier2's are written here
    pictures = VideoCaptioner.from_folder(models / "llava", "Say.", "cpu", 3, 8)
    assert pictures.text == "USER: <image><image><image>Say. ASSISTANT:"


def test_chat_text_as_tokens(tarsier2, omni, manifest):
    seen = tarsier2.inputs(cuts(manifest, 0))["input_ids"][0]
    pads = 4 * (56 // 28) * (84 // 28)  # each frame once, 28 x 28 pixels a token
    text = tarsier2.processor.tokenizer.decode(seen)
    assert text == tarsier2.text.replace("<|video_pad|>", "<|video_pad|>" * pads)
    inputs = omni.inputs(cuts(manifest, 1))
    text = omni.processor.tokenizer.decode(inputs["input_ids"][0])
    # 0.5 s: 4 frames make 2 x 140 tokens, 50 feature frames make 12; all in the first 2 s chunk.
    woven = f"<|vision_bos|><|audio_bos|>{'<|VIDEO|>' * 280}{'<|AUDIO|>' * 12}"
    assert text == CHAT.format(f"{woven}<|audio_eos|><|vision_eos|>What is heard?")


def test_shipped_prompts():
    assert caption.read_prompt(caption.PROMPTS / "video.txt") == VIDEO_PROMPT
    audio = caption.read_prompt(caption.PROMPTS / "audio.txt")
    assert "\n" not in audio and "only what can be heard" in audio


@pytest.mark.parametrize(
    "total, count, indices",
    [(49, 16, [0, 3, 6, 10, 13, 16, 19, 22, 26, 29, 32, 35, 38, 42, 45, 48]),
     (5, 8, [0, 1, 2, 3, 4]), (5, 1, [0]), (121, 2, [0, 120])],
)
def test_frames_of_the_video_model(total, count, indices):
    assert spread(total, count) == indices


@pytest.mark.parametrize(
    "total, fps, count", [(49, 24.0, 4), (121, 24.0, 10), (12, 24.0, 4), (3, 24.0, 2)]
)
def test_frames_of_the_audio_model(total, fps, count):
    assert frames_at(total, fps, 2.0) == count
    chosen = evenly(total, count)
    assert (len(chosen), chosen[0], chosen[-1]) == (count, 0, total - 1)


def frame_levels(inputs, grid: tuple[int, int, int]) -> np.ndarray:
    """(T, 2, 3) mean colour of both copies in every temporal patch, denormalised to 0..255."""
    assert inputs["video_grid_thw"].tolist() == [list(grid)]
    patches = inputs["pixel_values_videos"].view(grid[0], grid[1] * grid[2], 3, 2, 14, 14)
    colours = patches.permute(0, 3, 1, 4, 5, 2) * STD + MEAN  # (T, 2, patches, 14, 14, 3)
    return (255 * colours.mean(dim=(2, 3, 4))).numpy()


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Path:
    """Frame k, shown from k / 20 s, is 3 * k everywhere; a click at 0.9 s."""
    sound = np.zeros((96000, 2))
    sound[round(0.9 * 48000) :][:48] = 0.9
    path = tmp_path_factory.mktemp("media") / "counted.mkv"
    return write_media(path, numbered(40), np.arange(40) / 20, audio=sound)


def test_pixels_of_the_video_model(tarsier2, counted):
    record = {"path": counted.name, "t0": 0.5, "t1": 1.25}
    cut = caption.read_record(record, counted.parent, SPEC)
    assert [number(frame) for frame in cut.frames] == list(range(10, 25))
    levels = frame_levels(tarsier2.inputs([cut]), (4, 4, 6))
    shown = 3 * np.array([10, 15, 19, 24])  # evenly, first and last included, each one twice
    assert np.abs(levels - shown[:, None, None]).max() < 1.5


def test_pixels_of_the_audio_model(omni, counted):
    cut = read_cut(counted, replace(SPEC, frames=15), 0.5)
    levels = frame_levels(omni.inputs([cut]), (2, 20, 28))  # its class wants 128 tokens and more
    shown = 3 * np.array([[10, 15], [19, 24]])  # pairs of neighbours in time
    assert np.abs(levels - shown[..., None]).max() < 1.5


def test_sound_of_the_audio_model(omni, counted):
    cut = read_cut(counted, replace(SPEC, frames=15), 0.5)
    inputs = omni.inputs([cut])
    length = int(inputs["feature_attention_mask"].sum())
    assert length == 75  # 0.75 s at 10 ms
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=6)
    expected = extractor(cut.audio.mean(axis=1), sampling_rate=16000)["input_features"]
    assert np.array_equal(inputs["input_features"].numpy(), expected)
    loudest = int(inputs["input_features"][0, :, :length].mean(dim=0).argmax())
    assert abs(loudest - 40) <= 1  # the click at 0.9 s, 0.4 s into the cut


# Tarsier2


def test_tarsier2_is_qwen2_vl(tarsier2):
    model, _ = captioning.qwen2_vl()
    loaded = tarsier2.model.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(m.config, part).to_dict() for m in (tarsier2.model, model))
        assert {k: v for k, v in ours.items() if theirs.get(k) != v} == {"dtype": "float32"}
    for key in ("image_token_id", "video_token_id", "vision_start_token_id"):
        assert getattr(tarsier2.model.config, key) == getattr(model.config, key)


def test_tarsier2_answers_as_image_tokens_would(tarsier2, manifest):
    """Its own code puts the features at image tokens; the logits are the same."""
    inputs = tarsier2.inputs(cuts(manifest, 2))
    config = tarsier2.model.config
    ids = inputs["input_ids"].clone()
    ids[ids == config.video_token_id] = config.image_token_id
    with torch.no_grad():
        ours = tarsier2.model(**inputs).logits
        theirs = tarsier2.model(
            input_ids=ids, attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values_videos"], image_grid_thw=inputs["video_grid_thw"],
        ).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fault, word", [("missing", "missing"), ("extra", "unknown")])
def test_tarsier2_is_loaded_strictly(tmp_path, manifest, capsys, fault, word):
    from safetensors.torch import load_file, save_file

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


# Answers


@pytest.mark.parametrize("name", ["tarsier2", "omni"])
def test_a_batch_answers_as_single_clips_do(request, name, manifest):
    captioner = request.getfixturevalue(name)
    several = cuts(manifest, 0, 1, 2, 3)  # of two lengths, so half of them are padded
    single = [captioner.caption([cut])[0] for cut in several]
    assert captioner.caption(several) == single
    assert len({answer.text for answer in single}) > 1
    assert captioner.caption(several) == captioner.caption(several)


def test_the_audio_model_hears(omni, manifest):
    (cut,) = cuts(manifest, 0)
    logits = []
    for audio in (cut.audio, np.zeros_like(cut.audio)):
        with torch.no_grad():
            inputs = omni.inputs([replace(cut, audio=audio)])
            logits.append(omni.model(**inputs, use_audio_in_video=True).logits[0, -1])
    assert not torch.allclose(*logits, atol=1e-3)


def test_the_thinker_alone(omni, models, manifest, tmp_path):
    folder = captioning.write_omni(tmp_path / "thinker")  # for its processor
    omni.model.save_pretrained(folder)
    assert read_json(folder / "config.json")["model_type"] == "qwen2_5_omni_thinker"
    alone = AudioCaptioner.from_folder(folder, "What is heard?", "cpu", 4.0, 20.0, 8)
    assert alone.caption(cuts(manifest, 1)) == omni.caption(cuts(manifest, 1))


@pytest.mark.parametrize("name", ["tarsier2", "omni"])
def test_half_precision(request, name, manifest):
    """As on a GPU: what the processors make in float32 is cast where it must be."""
    captioner = copy.deepcopy(request.getfixturevalue(name))
    captioner.model.to(torch.bfloat16)
    assert len(captioner.caption(cuts(manifest, 0, 1))) == 2


@pytest.mark.parametrize("name", ["tarsier2", "omni"])
def test_answers_are_greedy_and_stop(request, name):
    captioner = request.getfixturevalue(name)
    settings = captioner.model.generation_config
    assert (settings.do_sample, settings.repetition_penalty) == (False, 1.0)
    tokenizer = captioner.processor.tokenizer
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert set(settings.eos_token_id) == set(stops)


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
    command = [sys.executable, "-m", "data.caption", str(manifest), "--out", str(out)]
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
        records.append({"id": name, "path": f"{name}.mkv", "t0": 0.0, "t1": 0.5})
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
    assert reasons["audio"] == never | {"mute": "no_audio", "still": "silent"}
    found = {line["id"]: sorted(k for k in line if k.endswith("caption")) for line in lines(out)}
    only = ["video_caption"]
    assert found == {"clip 0": ["audio_caption", *only], "mute": only, "still": only}
    assert "too_short 1" in capsys.readouterr().out


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
    assert f"{part}:6: damaged" in one_error(capsys)
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
