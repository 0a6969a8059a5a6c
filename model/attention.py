"""Scaled dot-product attention behind one signature: (B, L, H, D) in, (B, L, H, D) out.

Every attention of the model (video self- and cross-attention, audio double and single blocks,
AVFull-Attention of Eq. 7) calls one shared `Attention` object, so that the kernel is chosen once,
can be printed once, and never differs between blocks. No call takes a mask: AVFull-Attention
slices keys instead, which every kernel runs at full speed.
"""

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F

KERNELS = ("auto", "flash_attn", "sdpa")


class QKV(NamedTuple):
    """Queries, keys and values of one token stream, normalised and rotated."""

    query: torch.Tensor  # (B, L, H, D)
    key: torch.Tensor  # (B, L, H, D)
    value: torch.Tensor  # (B, L, H, D)


class Attention:
    """One attention kernel for the whole model; ``kernel`` is its name once it is resolved.

    ``requested`` is "auto" (flash_attn where it is installed and the tensors are half precision
    on a GPU, else sdpa), "flash_attn" or "sdpa" (PyTorch's own scaled_dot_product_attention).
    """

    def __init__(self, requested: str = "auto") -> None:
        if requested not in KERNELS:
            raise ValueError(f"attention={requested!r} is unknown; use one of {', '.join(KERNELS)}")
        if requested == "flash_attn" and not flash_attn_installed():
            raise ImportError(
                "attention='flash_attn' but the package flash-attn is not installed; run "
                "`pip install flash-attn --no-build-isolation` (extra [flash] of setup.py), "
                "or use attention=auto or attention=sdpa"
            )
        self.requested = requested
        self.kernel: str | None = None

    def resolve(self, device: torch.device, dtype: torch.dtype) -> str:
        """Choose the kernel for tensors of ``dtype`` on ``device``; later calls keep the choice."""
        if self.kernel is None:
            self.kernel = self._choose(device, dtype)
        return self.kernel

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:  # query (B, Lq, H, D), key and value (B, Lk, H, D) -> (B, Lq, H, D)
        if self.resolve(query.device, query.dtype) == "flash_attn":
            from flash_attn import flash_attn_func

            return flash_attn_func(query, key, value)
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )  # (B, H, Lq, D)
        return output.transpose(1, 2)  # (B, Lq, H, D)

    def _choose(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.requested == "sdpa":
            return "sdpa"
        usable = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        if self.requested == "auto":
            return "flash_attn" if usable and flash_attn_installed() else "sdpa"
        if not usable:
            raise ValueError(
                f"attention='flash_attn' needs bfloat16 or float16 on a GPU, but the model runs in "
                f"{dtype} on {device}; use attention=sdpa here"
            )
        return "flash_attn"


def flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
