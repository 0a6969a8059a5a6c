"""The captioning models: one sees silent frames, the other sees frames and hears their sound.

Video: Tarsier2 (`data.captions.tarsier2`), or any image-text-to-text class of transformers by its
config and with its own chat template. Audio: the Thinker of Qwen2.5-Omni, the part that answers
in text; the Talker's weights are not loaded. Greedy, so the same cut gives the same caption.
Called by `data.captions`.

Sources: chat texts, vllm-project/vllm:examples/offline_inference/vision_language.py
(run_tarsier2) and qwen2_5_omni/only_thinker.py, the system text for tasks other than talk as in
Lliar-liar/Daily-Omni issue 1; frames of the audio model and sound inside the video (16 kHz mono,
use_audio_in_video), qwen-omni-utils; the Thinker that never stops, QwenLM/Qwen2.5-Omni issue 312.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from data.captions import tarsier2
from data.captions.tarsier2 import HUB_ID, load_strictly
from data.clips.decode import Cut
from data.schema import DataError
from model.weights.hub import read_json, require_file, resolve_folder, weight_files

OMNI_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
OMNI_HUB_ID = "Qwen/Qwen2.5-Omni-7B"
MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
TALKER_PREFIXES = ("talker.", "token2wav.")

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{video}{prompt}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN2_VL_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
OMNI_VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"  # the processor weaves the sound into it
STOPS = ("<|im_end|>", "<|endoftext|>")  # Thinker's own settings name none: it would chatter on


@dataclass(frozen=True)
class Answer:
    """One caption in one line; `truncated` if it ran into the limit of new tokens."""

    text: str
    truncated: bool


class VideoCaptioner:
    """Captions silent frames."""

    def __init__(
        self, model: Any, processor: Any, chat: str | None, prompt: str, num_frames: int,
        copies: int, max_new_tokens: int,
    ) -> None:
        self.model, self.processor = _ready(model, processor, max_new_tokens), processor
        self.num_frames, self.copies = num_frames, copies
        self.takes_video = getattr(processor, "video_processor", None) is not None
        self.text = chat.format(video=QWEN2_VL_VIDEO, prompt=prompt) if chat else self._chat(prompt)

    @classmethod
    def from_folder(
        cls, source: str | Path, prompt: str, device: str, num_frames: int, max_new_tokens: int
    ) -> "VideoCaptioner":
        """Load what `open_video_model` accepts."""
        folder, config = open_video_model(source)
        dtype = _dtype(device)
        if tarsier2.is_tarsier2(config):
            model = tarsier2.load_model(folder, config, dtype)
            processor = tarsier2.load_processor(folder)
            chat, copies = CHAT, tarsier2.FRAME_COPIES
        else:
            model = load_strictly(AutoModelForImageTextToText, folder, folder, dtype=dtype)
            processor, chat, copies = AutoProcessor.from_pretrained(folder), None, 1
        return cls(model.to(device), processor, chat, prompt, num_frames, copies, max_new_tokens)

    def _chat(self, prompt: str) -> str:
        """The model's own chat template around one video, or around the single frames."""
        kind, count = ("video", 1) if self.takes_video else ("image", self.num_frames)
        content = [*[{"type": kind}] * count, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def inputs(self, cuts: Sequence[Cut]) -> Any:
        """What the model reads: token ids, mask, pixel values and grid of the whole batch."""
        chosen = [cut.frames[spread(len(cut.frames), self.num_frames)] for cut in cuts]
        videos = [_channels_first(np.repeat(frames, self.copies, axis=0)) for frames in chosen]
        texts, common = [self.text] * len(cuts), {"padding": True, "return_tensors": "pt"}
        if self.takes_video:
            return self.processor(text=texts, videos=videos, do_sample_frames=False, **common)
        if any(len(video) != self.num_frames for video in videos):
            raise DataError(
                f"video_frames={self.num_frames}: a cut has fewer, and this model (model_type "
                f"{self.model.config.model_type!r}) reads a fixed number of pictures; lower it"
            )
        return self.processor(text=texts, images=[list(video) for video in videos], **common)

    def caption(self, cuts: Sequence[Cut]) -> list[Answer]:
        return _answer(self.model, self.processor, self.inputs(cuts))


class AudioCaptioner:
    """Captions the sound of a cut; it sees the frames too, to know what makes the sound."""

    def __init__(
        self, model: Any, processor: Any, prompt: str, fps: float, cut_fps: float,
        max_new_tokens: int,
    ) -> None:
        self.model, self.processor = _ready(model, processor, max_new_tokens), processor
        self.fps, self.cut_fps = fps, cut_fps
        self.text = CHAT.format(video=OMNI_VIDEO, prompt=prompt)

    @classmethod
    def from_folder(
        cls, source: str | Path, prompt: str, device: str, fps: float, cut_fps: float,
        max_new_tokens: int,
    ) -> "AudioCaptioner":
        """Load what `open_audio_model` accepts."""
        folder, config = open_audio_model(source)
        whole = config["model_type"] == "qwen2_5_omni"
        thinker = (
            Qwen2_5OmniConfig.from_pretrained(folder).thinker_config if whole
            else Qwen2_5OmniThinkerConfig.from_pretrained(folder)
        )
        model = load_strictly(
            Qwen2_5OmniThinkerForConditionalGeneration, folder, folder, TALKER_PREFIXES,
            config=thinker, dtype=_dtype(device),
        )
        processor = Qwen2_5OmniProcessor.from_pretrained(folder)
        return cls(model.to(device), processor, prompt, fps, cut_fps, max_new_tokens)

    def inputs(self, cuts: Sequence[Cut]) -> Any:
        """Token ids and mask, pixel values and grid, log-mel features and their mask."""
        counts = [frames_at(len(cut.frames), self.cut_fps, self.fps) for cut in cuts]
        videos = [
            _channels_first(cut.frames[evenly(len(cut.frames), count)])
            for cut, count in zip(cuts, counts, strict=True)
        ]
        return self.processor(
            text=[self.text] * len(cuts),
            videos=videos,
            audio=[cut.audio.mean(axis=1) for cut in cuts],  # (N,) mono
            fps=self.fps,
            use_audio_in_video=True,
            padding=True,
            return_tensors="pt",
        )

    def caption(self, cuts: Sequence[Cut]) -> list[Answer]:
        return _answer(self.model, self.processor, self.inputs(cuts), use_audio_in_video=True)


def spread(total: int, count: int) -> list[int]:
    """Tarsier2's indices: evenly from the first to the last frame, all where there are fewer."""
    if count == 1 or total <= count:
        return list(range(min(total, count)))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def frames_at(total: int, cut_fps: float, fps: float) -> int:
    """qwen-omni-utils' number of frames: an even one, at least 4, at most what the cut has."""
    most = total // 2 * 2
    return max(2, math.floor(min(max(total / cut_fps * fps, 4), most) / 2) * 2)


def evenly(total: int, count: int) -> list[int]:
    """qwen-omni-utils' indices: evenly from the first to the last frame."""
    return torch.linspace(0, total - 1, count).round().long().tolist()


def open_video_model(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """(folder, its config.json) of a folder or hub id that a VideoCaptioner can be made of."""
    folder, config = _open(source, "video_model", HUB_ID)
    kind, architectures = config.get("model_type"), config.get("architectures")
    # The first Tarsier calls itself llava too, but no class of transformers can hold it.
    known = architectures != ["TarsierForConditionalGeneration"]
    if not tarsier2.is_tarsier2(config) and not (
        known and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):
        raise DataError(
            f"video_model={source}: model_type {kind!r}, architectures {architectures} is no "
            f"image-text-to-text class of transformers {transformers.__version__}; give {HUB_ID} "
            "or Qwen/Qwen2-VL-7B-Instruct"
        )
    return folder, config


def open_audio_model(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """(folder, its config.json) of a folder or hub id of Qwen2.5-Omni, whole or its Thinker."""
    folder, config = _open(source, "audio_model", OMNI_HUB_ID)
    if config.get("model_type") not in OMNI_TYPES:
        raise DataError(
            f"audio_model={source}: model_type {config.get('model_type')!r} is not one of "
            f"{', '.join(OMNI_TYPES)}, the class that hears and answers in text; give {OMNI_HUB_ID}"
        )
    return folder, config


def _open(source: str | Path, key: str, hub_id: str) -> tuple[Path, dict[str, Any]]:
    folder = resolve_folder(source, key, hub_id, MODEL_FILES)
    config = read_json(require_file(folder / "config.json", key, hub_id))
    weight_files(folder)
    return folder, config


def _ready(model: Any, processor: Any, max_new_tokens: int) -> Any:
    """Greedy whatever the folder's generation_config.json says; prompts padded on the left."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    vocabulary, own = tokenizer.get_vocab(), model.generation_config.eos_token_id
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    stops |= {vocabulary[name] for name in STOPS if name in vocabulary}
    ids = sorted(stop for stop in stops if stop is not None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ids[0]
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ids, pad_token_id=pad
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _answer(model: Any, processor: Any, inputs: Any, **extra: bool) -> list[Answer]:
    inputs = inputs.to(model.device)
    if "input_features" in inputs:
        inputs["input_features"] = inputs["input_features"].to(model.dtype)
    tokens = model.generate(**inputs, **extra)[:, inputs["input_ids"].shape[1] :]  # (B, n)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    stops = torch.tensor(model.generation_config.eos_token_id, device=tokens.device)
    stopped = torch.isin(tokens, stops).any(dim=1).tolist()
    return [
        Answer(" ".join(text.split()), not stop)
        for text, stop in zip(texts, stopped, strict=True)
    ]


def _channels_first(frames: np.ndarray) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
