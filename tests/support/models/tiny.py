"""Tiny random backbones on disk in the released layouts, and tiny clips; shared by the tests.

`write_wan` and `write_tangoflux` go through the diffusers and transformers classes themselves, so
that names and shapes are theirs, not ours. Both towers share head_dim 16.
Every weight is off its start: norms of one would hide one that is in another's place.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    AutoencoderOobleck,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

CAPTIONS = [
    "a red ball of rubber falls on the floor and bounces twice",
    "two blue balls of metal ring as they hit the left wall",
    "rain falls softly while the wind blows; café & naïve",
]
WIDTH = 32  # of both text encoders, joint attention and pooled projection
SAMPLE_RATE, HOP = 16000, 512

VIDEO_VAE = {
    "base_dim": 3,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "latents_mean": [0.1 * (i - 24) for i in range(48)],
    "latents_std": [0.5 + 0.05 * i for i in range(48)],
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
}
AUDIO_VAE = {
    "encoder_hidden_size": 12,
    "downsampling_ratios": [4, 8, 16],
    "channel_multiples": [1, 1, 1],
    "decoder_channels": 12,
    "decoder_input_channels": 6,
    "audio_channels": 2,
    "sampling_rate": SAMPLE_RATE,
}
VIDEO_DIT = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": WIDTH,
    "freq_dim": 256,
    "ffn_dim": 128,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
AUDIO_DIT = {
    "patch_size": 1,
    "in_channels": 6,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": False,
}
TANGOFLUX_CONFIG = {
    "num_layers": 1,
    "num_single_layers": 2,
    "in_channels": 6,
    "attention_head_dim": 16,
    "joint_attention_dim": WIDTH,
    "num_attention_heads": 2,
    "audio_seq_len": 40,
    "max_duration": 30,
    "uncondition": False,
    "text_encoder_name": "text_encoder",
    "vae": AUDIO_VAE,
    "axes_dims_rope": [4, 4, 8],
    "pooled_projection_dim": WIDTH,
}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def write_wan(folder: Path, seed: int = 0, shards: bool = False) -> Path:
    """Wan2.2 layout: transformer, vae, text_encoder, tokenizer, scheduler (all random)."""
    torch.manual_seed(seed)
    transformer = moved(WanTransformer3DModel(**VIDEO_DIT))
    transformer.save_pretrained(folder / "transformer", max_shard_size="300KB" if shards else "5GB")
    moved(AutoencoderKLWan(**VIDEO_VAE)).save_pretrained(folder / "vae")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = UMT5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **T5)
    moved(UMT5EncoderModel(config)).save_pretrained(folder / "text_encoder")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ).save_pretrained(folder / "scheduler")
    return folder


def write_tangoflux(folder: Path, seed: int = 0) -> Path:
    """TangoFlux layout: tangoflux.safetensors, vae.safetensors, config.json, text_encoder/."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "text_encoder")
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **T5)
    config.save_pretrained(folder / "text_encoder")
    encoder = moved(T5EncoderModel(config))
    frequencies, duration = torch.randn(128), nn.Linear(257, WIDTH)
    fc = nn.Linear(WIDTH, WIDTH)
    parts = {
        "transformer": moved(FluxTransformer2DModel(**AUDIO_DIT)).state_dict(),
        "fc.0": fc.state_dict(),
        "duration_emebdder.time_positional_embedding.1": duration.state_dict(),
        "text_encoder": encoder.state_dict(),
    }
    tensors = {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()}
    tensors["duration_emebdder.time_positional_embedding.0.weights"] = frequencies
    tensors.pop("text_encoder.encoder.embed_tokens.weight", None)  # tied: the release has one
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "tangoflux.safetensors")
    vae = moved(AutoencoderOobleck(**AUDIO_VAE))
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, folder / "vae.safetensors")
    (folder / "config.json").write_text(json.dumps(TANGOFLUX_CONFIG, indent=2))
    return folder


@torch.no_grad()
def moved(module: nn.Module) -> Any:
    """The module itself, no weight left at the constant it starts with."""
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A small unigram tokenizer with T5's special tokens and a final EOS.

    The vocabulary is listed, not trained: training is not reproducible.
    """
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    pieces = [f"▁{word}" for word in words] + letters
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    tokenizer = Tokenizer(
        models.Unigram(vocabulary + [(piece, -float(i + 1)) for i, piece in enumerate(pieces)], 2)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
