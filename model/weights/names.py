"""Parameter names: ours <-> the released checkpoints'. No tensors and no files.

Wan exists under two sets of names, diffusers' and its own (where `norm2` and `norm3` are swapped);
TangoFlux under one. Every released tensor has one parameter of equal shape here; what we add is
recognised by a name part that starts with `new_`. Called by model.weights.load and the tests.
"""

import re
from collections.abc import Iterable, Mapping

from model.variants import AVFullDiTConfig

TANGOFLUX_NAMES = {  # ours -> released, spelled as released
    "duration_embedder.frequencies.": "duration_emebdder.time_positional_embedding.0.",
    "duration_embedder.projection.": "duration_emebdder.time_positional_embedding.1.",
    "fc.": "fc.",
}
# Wan's own names -> diffusers', one pattern per group of tensors.
WAN_ORIGINAL = [
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"head\.head\.", "proj_out."),
    (r"head\.modulation$", "scale_shift_table"),
    (r"(blocks\.\d+\.)modulation$", r"\1scale_shift_table"),
    # The affine norm before cross-attention: third of Wan's own names, second of diffusers'.
    (r"(blocks\.\d+\.)norm3\.", r"\1norm2."),
    (r"(blocks\.\d+\.)ffn\.0\.", r"\1ffn.net.0.proj."),
    (r"(blocks\.\d+\.)ffn\.2\.", r"\1ffn.net.2."),
    (r"(blocks\.\d+\.)self_attn\.(norm_[qk])\.", r"\1attn1.\2."),
    (r"(blocks\.\d+\.)cross_attn\.(norm_[qk])\.", r"\1attn2.\2."),
    (r"(blocks\.\d+\.)self_attn\.([qkv])\.", r"\1attn1.to_\2."),
    (r"(blocks\.\d+\.)cross_attn\.([qkv])\.", r"\1attn2.to_\2."),
    (r"(blocks\.\d+\.)self_attn\.o\.", r"\1attn1.to_out.0."),
    (r"(blocks\.\d+\.)cross_attn\.o\.", r"\1attn2.to_out.0."),
]
SHOWN = 10  # offenders listed in one error


def is_new(name: str) -> bool:
    """Whether no backbone has this parameter."""
    return any(part.startswith("new_") for part in name.split("."))


def released_name(name: str, config: AVFullDiTConfig) -> tuple[str, str] | None:
    """Our parameter name -> ("wan" | "tangoflux", released name); None for a new parameter.

    Wan's is the diffusers name.
    """
    if is_new(name):
        return None
    tower, rest = name.split(".", 1)
    if tower == "joint_blocks":
        index, tower, rest = rest.split(".", 2)
        rest = _joint_block(tower, int(index), config) + rest
    if tower == "video":
        return "wan", rest.replace("modulation.scale_shift_table", "scale_shift_table")
    for ours, released in TANGOFLUX_NAMES.items():
        if rest.startswith(ours):
            return "tangoflux", released + rest.removeprefix(ours)
    return "tangoflux", "transformer." + rest


def uses_original_names(names: Iterable[str]) -> bool:
    """Whether a Wan file has Wan's own names, which no diffusers name matches."""
    return any(name.startswith("head.") or ".self_attn." in name for name in names)


def diffusers_name(original: str) -> str:
    """Wan's own tensor name -> diffusers'; an unknown name comes back as it is."""
    for pattern, replacement in WAN_ORIGINAL:
        name, count = re.subn(f"^{pattern}", replacement, original)
        if count:
            return name
    return original


def differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One line for each tensor that is missing, extra or of another shape, with both shapes."""
    return [
        f"{name}: model {wanted.get(name, 'has none')}, file {found.get(name, 'has none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def first_ten(faults: list[str]) -> str:
    """The first ones in one line, and how many more there are."""
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "; ".join((*faults[:SHOWN], *more))


def _joint_block(tower: str, index: int, config: AVFullDiTConfig) -> str:
    """Prefix of the released block that is this half of joint block ``index``."""
    if tower == "video":
        return f"blocks.{config.num_video_blocks + index}."
    assert config.audio is not None
    if index < config.num_joint_double:
        return f"transformer_blocks.{config.audio.num_layers - config.num_joint_double + index}."
    from_the_end = config.num_joint_blocks - index
    return f"single_transformer_blocks.{config.audio.num_single_layers - from_the_end}."


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: what the gauges of a run are split by.

    A pretrained weight belongs to its tower also inside a joint block.
    """
    if is_new(name):
        return "joint_new"
    towers = [part for part in name.split(".") if part in ("video", "audio")]
    return f"{towers[0]}_tower"
