"""What the captioning models are shown and asked: chat texts, pixels, sound; Tarsier2's names."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from data.captions.__main__ import read_record
from data.captions.captioners import AudioCaptioner, VideoCaptioner, evenly, frames_at, spread
from data.clips.decode import Cut, CutSpec, read_cut
from model.weights.hub import read_json
from tests.support.inputs import captioning
from tests.support.inputs.media import number, numbered, write_media

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
    return [read_record(records[i], manifest.parent, SPEC) for i in indices]


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
    cut = read_record(record, counted.parent, SPEC)
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
