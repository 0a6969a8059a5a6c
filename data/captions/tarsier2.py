"""Tarsier2 as Qwen2-VL: its config, tensor names, picture settings and frames.

Tarsier2 (Apache-2.0, built on Qwen2-VL-7B) calls itself `llava`, class
TarsierForConditionalGeneration, which transformers does not have. Its config.json holds a Qwen2-VL
`text_config` and `vision_config`; its network is Qwen2-VL's, tensor by tensor, under the names of
KEYS. So it is loaded into Qwen2VLForConditionalGeneration, strictly.

Sources: vllm-project/vllm:vllm/model_executor/models/qwen2_vl.py (Tarsier2ForConditionalGeneration
and Tarsier2ImageProcessor) and bytedance/tarsier, branch tarsier2: models/modeling_tarsier.py,
models/modeling_qwen2_vl_fast.py, dataset/utils.py, configs/tarser2_default_config.yaml. There a
video's features take the places of image tokens, here of video tokens: in both the features
replace the embeddings and the positions come from the grid, so the network reads the same.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from model.weights.hub import check_loaded, iter_tensors, read_json, require_file, weight_files

HUB_ID = "omni-research/Tarsier2-Recap-7b"
# Its names -> Qwen2VLForConditionalGeneration's.
KEYS = {
    "vision_tower.": "model.visual.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
# What its nested configs say about its own code, not about the network.
CODE_KEYS = ("auto_map", "architectures", "model_type", "attn_implementation", "vision_config")
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
FRAME_COPIES = 2  # the vision tower merges 2 frames; a pair of equal ones keeps each moment
EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}


def is_tarsier2(config: dict[str, Any]) -> bool:
    """The first Tarsier has the same class name, but a Llama inside."""
    return (
        config.get("architectures") == ["TarsierForConditionalGeneration"]
        and config.get("text_config", {}).get("model_type") == "qwen2_vl"
    )


def load_model(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Qwen2VLForConditionalGeneration with Tarsier2's tensors; ValueError unless all fit.

    Renamed here, not by from_pretrained's key_mapping: that takes a checkpoint without any name
    that begins with `model.` for one without a head, and refuses `lm_head.`.
    """
    tensors = {translate_name(k): tensor for k, tensor in iter_tensors(weight_files(folder))}
    return load_strictly(
        Qwen2VLForConditionalGeneration, None, folder, config=translate_config(folder, config),
        state_dict=tensors, dtype=dtype,
    )


def translate_name(name: str) -> str:
    """Qwen2-VL's name of a tensor; one that has none keeps its own, and is refused as unknown."""
    for theirs, ours in KEYS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def translate_config(folder: Path, config: dict[str, Any]) -> Qwen2VLConfig:
    """Tarsier2's config as Qwen2-VL's; the ids of the vision tokens are the tokenizer's."""
    text, vision = (
        {
            key: value for key, value in config[part].items()
            if key not in (*CODE_KEYS, *TOKENS) and not key.startswith("_")
        }
        for part in ("text_config", "vision_config")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {key: tokenizer.convert_tokens_to_ids(name) for key, name in TOKENS.items()}
    return Qwen2VLConfig(
        text_config=text, vision_config=vision,
        tie_word_embeddings=text.get("tie_word_embeddings", False), **ids,
    )


def load_processor(folder: Path) -> Qwen2VLProcessor:
    """Qwen2-VL's processor with Tarsier2's picture settings and tokenizer.

    Its preprocessor_config.json may bound a picture's size by min_pixels and max_pixels inside
    `size`, where the pinned class wants shortest_edge and longest_edge.
    """
    path = require_file(folder / "preprocessor_config.json", "video_model", HUB_ID)
    settings = {k: v for k, v in read_json(path).items() if not k.endswith(("_type", "_class"))}
    size = settings.pop("size", {})
    bounds = {edge: size.get(edge, size.get(pixels)) for edge, pixels in EDGES.items()}
    if None not in bounds.values():
        settings["size"] = bounds
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        video_processor=Qwen2VLVideoProcessor(**settings),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


def load_strictly(
    cls: Any, folder: Path | None, source: Path, ignore: tuple[str, ...] = (), **options: Any
) -> Any:
    """from_pretrained; ValueError on a missing, unknown or mis-shaped tensor, but for `ignore`d
    prefixes. It names `source`; `folder` is None where the tensors are among the options."""
    model, info = cls.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    faults = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name} is unknown" for name in sorted(info["unexpected_keys"])
               if not name.startswith(ignore)]
    faults += [f"{name} is of another shape" for name in sorted(info["mismatched_keys"])]
    check_loaded(source, faults)
    return model
