"""Tiny random captioning models on disk, of the real classes, and a manifest of clips to caption.

Tokenizers are Qwen's class over single characters; processors have Qwen's own settings but for the
size limits and the length that sound is padded to.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.support.inputs.media import noise, numbered, write_media

QWEN2_VL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
OMNI_TOKENS = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}
# The template that Qwen2-VL is released with, for one text or picture at a time.
QWEN2_VL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = {"shortest_edge": 28 * 28, "longest_edge": 448 * 448}
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
# What must be overridden: a released folder samples, and names no end.
SAMPLING = {"do_sample": True, "temperature": 5.0, "top_k": 50, "repetition_penalty": 1.05}


def build_tokenizer(special: tuple[str, ...], **named: str) -> Qwen2TokenizerFast:
    """The printable characters of ASCII, blank and line end, then the special tokens."""
    alphabet = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # as byte-level tokenizers write the last two
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
    return tokenizer


def _ids(tokenizer: Qwen2TokenizerFast, **names: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}


def qwen2_vl(seed: int = 0) -> tuple[Qwen2VLForConditionalGeneration, Qwen2TokenizerFast]:
    tokenizer = build_tokenizer(QWEN2_VL_TOKENS)
    ids = _ids(
        tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
    )
    torch.manual_seed(seed)
    text = TEXT | {"vocab_size": len(tokenizer)}
    config = Qwen2VLConfig(text_config=text, vision_config=VISION, **ids)
    return _louder(Qwen2VLForConditionalGeneration(config)), tokenizer


def _louder(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that the answer depends on what is seen and heard."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.ndim > 1 else None
    return model.eval()


def write_qwen2_vl(folder: Path) -> Path:
    """As Qwen2-VL-7B-Instruct is released."""
    model, tokenizer = qwen2_vl()
    model.save_pretrained(folder)
    tokenizer.chat_template = QWEN2_VL_TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(size=SIZE).save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["processor_class"] = "Qwen2VLProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    return folder


TARSIER2_NAMES = {
    "model.visual.": "vision_tower.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def write_tarsier2(folder: Path) -> Path:
    """As Tarsier2 is released: the same network as `qwen2_vl`, under its names."""
    model, tokenizer = qwen2_vl()
    folder.mkdir(parents=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix = next(p for p in TARSIER2_NAMES if name.startswith(p))
        tensors[TARSIER2_NAMES[prefix] + name.removeprefix(prefix)] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = TEXT | {"model_type": "qwen2_vl", "vocab_size": len(tokenizer),
                   "attn_implementation": "flash_attention_2",
                   "auto_map": {"AutoConfig": "models--modeling_qwen2_vl_fast.Qwen2VLConfig"}}
    config = {
        "architectures": ["TarsierForConditionalGeneration"], "model_type": "llava",
        "projection_head": None, "text_config": text,
        "vision_config": VISION | {"model_type": "qwen2_vl"},
        "image_token_index": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.chat_template = "{{ raise_exception('this template wants its own processor') }}"
    tokenizer.save_pretrained(folder)
    pixels = {"min_pixels": SIZE["shortest_edge"], "max_pixels": SIZE["longest_edge"]}
    picture = {"image_processor_type": "Qwen2VLImageProcessor", "size": pixels,
               "processor_class": "TarsierProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    return folder


def write_omni(folder: Path) -> Path:
    """As Qwen2.5-Omni is released: Thinker and (here one tensor of) Talker in one folder."""
    tokenizer = build_tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *OMNI_TOKENS.values()), **OMNI_TOKENS
    )
    names = {
        "image_token_index": "<|IMAGE|>", "audio_token_index": "<|AUDIO|>",
        "video_token_index": "<|VIDEO|>", "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>", "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
    }
    hearing = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
               "encoder_ffn_dim": 64, "output_dim": 32, "n_window": 50}
    sight = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
             "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    torch.manual_seed(0)
    thinker = Qwen2_5OmniThinkerConfig(
        audio_config=hearing, vision_config=sight,
        text_config=TEXT | {"vocab_size": len(tokenizer)}, **_ids(tokenizer, **names),
    )
    model = _louder(Qwen2_5OmniThinkerForConditionalGeneration(thinker))
    folder.mkdir(parents=True)
    tensors = {f"thinker.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["talker.codec_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Qwen2_5OmniConfig(thinker_config=thinker.to_dict()).save_pretrained(folder)
    Qwen2_5OmniProcessor(
        pictures := Qwen2VLImageProcessor(size=SIZE), Qwen2VLVideoProcessor(size=SIZE),
        sound := WhisperFeatureExtractor(
            feature_size=128, chunk_length=6, return_attention_mask=True
        ),
        tokenizer, chat_template="{{ raise_exception('the chat text is written out') }}",
    ).save_pretrained(folder)
    # One file holds both kinds of settings in the release; save_pretrained keeps the last only.
    settings = pictures.to_dict() | sound.to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    return folder


def write_llava(folder: Path) -> Path:
    """A class that knows pictures and no video."""
    tokenizer = build_tokenizer(("<|endoftext|>", "<|im_end|>", "<image>"))
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "image_size": 28,
                       "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
                       "patch_size": 14, "projection_dim": 32},
        text_config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
                     "num_attention_heads": 2, "num_hidden_layers": 2,
                     "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )
    torch.manual_seed(0)
    _louder(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="USER: {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}"
        "<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:",
    ).save_pretrained(folder)
    return folder


def write_clips(folder: Path, count: int = 5) -> Path:
    """A manifest of cuts of 10 or 15 frames; frame k of every clip shows 3 * k."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(count):
        frames = numbered(40)
        frames[:, :24, : 10 * index] = 200  # so that clips differ
        sound = noise(2.0) * (1 + np.sin(np.arange(96000) / (40 + 30 * index)))[:, None]
        write_media(folder / f"{index}.mkv", frames, np.arange(40) / 20, audio=sound)
        end = 0.5 + (10 if index % 2 else 15) / 20
        lines.append({"id": f"clip {index}", "path": f"{index}.mkv", "t0": 0.5, "t1": end})
    return write_manifest(folder / "manifest.jsonl", lines)


def write_manifest(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
