"""Scaled dot-product attention behind one signature: (B, L, H, D) in, (B, L, H, D) out.

Every attention of the model (video self- and cross-attention, audio double and single blocks,
AVFull-Attention of Eq. 7) calls one shared `Attention` object, so that the kernel is chosen once,
can be printed once, and never differs between blocks. No call takes a mask while every clip has
sound: AVFull-Attention slices keys instead, which every kernel runs at full speed.

diffusers' dispatcher is not used: the model must run with torch alone, the dispatcher reaches
flash-attn 4 only through a hub download, and it warns and goes on where we want an error.
"""

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Kernels of packages: where their flash_attn_func is, and how to get it.
PACKAGES = {
    "flash_attn": (
        "flash_attn", "flash_attn_interface",
        "run `pip install flash-attn --no-build-isolation` (extra [flash] of setup.py; needs nvcc)",
    ),
    "flash_attn_3": (
        "flash_attn_interface", "",
        "build it from the folder hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attn_4": (
        "flash_attn", "cute", "run `pip install flash-attn-4` (extra [flash4] of setup.py)"
    ),
}
SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
KERNELS = ("auto", *PACKAGES, *SDPA_BACKENDS, "sdpa")
ANYWHERE = ("sdpa", "sdpa_math")  # any device and dtype; sdpa leaves the choice to PyTorch
# Fastest first, by major compute capability: what `auto` goes through on a GPU.
FASTEST = {
    8: ("flash_attn", "sdpa"),
    9: ("cudnn", "flash_attn_3", "flash_attn", "flash_attn_4", "sdpa"),
    10: ("flash_attn_4", "cudnn", "flash_attn", "sdpa"),
}
FAST_CUDNN = 91500  # from 9.15 on cuDNN beats the flash kernels on Hopper


class QKV(NamedTuple):
    """Queries, keys and values of one token stream, normalised and rotated."""

    query: torch.Tensor  # (B, L, H, D)
    key: torch.Tensor  # (B, L, H, D)
    value: torch.Tensor  # (B, L, H, D)


class Attention:
    """One attention kernel for the whole model; ``kernel`` is its name once it is resolved.

    ``requested`` is one of KERNELS. "auto" is the fastest that this machine has for half precision
    on a GPU, else "sdpa" (PyTorch's own choice). Asking for an absent one is an ImportError.
    """

    def __init__(self, requested: str = "auto") -> None:
        if requested not in KERNELS:
            raise ValueError(f"attention={requested!r} is unknown; use one of {', '.join(KERNELS)}")
        if requested in PACKAGES and not installed(requested):
            raise ImportError(
                f"attention={requested!r} but its package is not installed; {_remedy(requested)}"
            )
        self.requested = requested
        self.kernel: str | None = None
        self._flash: Any = None

    def resolve(self, device: torch.device, dtype: torch.dtype) -> str:
        """Choose the kernel for tensors of ``dtype`` on ``device``; later calls keep the choice."""
        if self.kernel is None:
            kernel = self._choose(device, dtype)
            if kernel in PACKAGES:
                self._flash = _flash_attn_func(kernel)
            self.kernel = kernel
        return self.kernel

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query (B, Lq, H, D), key and value (B, Lk, H, D) -> (B, Lq, H, D).

        ``key_bias`` (Lk,) or (B, Lk) is added to the logits: init=bias_warmup's in its first few
        hundred steps, and -inf on the audio of clips without sound. No flash kernel takes it, so
        those calls go to PyTorch's SDPA whatever was chosen.
        """
        kernel = self.resolve(query.device, query.dtype)
        if kernel in PACKAGES and key_bias is None:
            output = self._flash(query, key, value, softmax_scale=query.shape[-1] ** -0.5)
            # Versions differ in whether the log-sum-exp comes along.
            return output[0] if isinstance(output, tuple) else output
        mask = None
        if key_bias is not None:
            mask = key_bias.to(query.dtype).reshape(-1, 1, 1, key.shape[1])  # (1 or B, 1, 1, Lk)
        inputs = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        if kernel == "sdpa_math" or (kernel in SDPA_BACKENDS and mask is None):
            with sdpa_kernel(SDPA_BACKENDS[kernel]):
                output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        else:
            output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)  # (B, H, Lq, D)
        return output.transpose(1, 2)  # (B, Lq, H, D)

    def _choose(self, device: torch.device, dtype: torch.dtype) -> str:
        half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        if self.requested == "auto":
            return fastest(device) if half_on_gpu else "sdpa"
        on_cpu = self.requested == "sdpa_flash" and device.type == "cpu"  # PyTorch has one there
        if not (half_on_gpu or on_cpu or self.requested in ANYWHERE):
            raise ValueError(
                f"attention={self.requested!r} needs bfloat16 or float16 on a GPU, but the model "
                f"runs in {dtype} on {device}; use attention=sdpa here"
            )
        if self.requested in SDPA_BACKENDS:
            _try_backend(self.requested, device, dtype)
        return self.requested


def installed(kernel: str) -> bool:
    """Whether the package of ``kernel`` is there, without importing it.

    flash-attn 2 and 4 share the name `flash_attn`, so the member decides. flash-attn 2's own source
    holds flash-attn 4's files too, but not the package `cutlass` that they are written in.
    """
    package, member, _ = PACKAGES[kernel]
    if member == "cute" and importlib.util.find_spec("cutlass") is None:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None or not member:
        return spec is not None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    return any((p / member).is_dir() or (p / f"{member}.py").is_file() for p in places)


def fastest(device: torch.device) -> str:
    """The first kernel of FASTEST that is installed, for half precision on the GPU ``device``."""
    capability = compute_capability(device)
    if capability < min(FASTEST):  # no flash kernel supports these
        return "sdpa"
    order = FASTEST[min(capability, max(FASTEST))]
    return next(kernel for kernel in order if _available(kernel))


def compute_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _available(kernel: str) -> bool:
    if kernel == "cudnn":
        return (torch.backends.cudnn.version() or 0) >= FAST_CUDNN
    return kernel not in PACKAGES or (installed(kernel) and _importable(kernel))


def _try_backend(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError if this PyTorch has no such kernel for ``device``.

    Its own error comes at the first forward, and names neither the key nor a remedy.
    """
    tiny = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)
    try:
        with sdpa_kernel(SDPA_BACKENDS[kernel]):
            F.scaled_dot_product_attention(tiny, tiny, tiny)
    except RuntimeError as error:
        raise ValueError(
            f"attention={kernel!r} is not in this PyTorch {torch.__version__} for {device} "
            f"({error}); use attention=auto or attention=sdpa"
        ) from error


def _importable(kernel: str) -> bool:
    """Whether an installed package works; warns if not, for `auto` would only be slower."""
    try:
        _flash_attn_func(kernel)
    except ImportError as error:
        warnings.warn(f"attention=auto takes another kernel: {error}", stacklevel=2)
        return False
    return True


def _remedy(kernel: str) -> str:
    return f"{PACKAGES[kernel][2]}, or use attention=auto or attention=sdpa"


def _flash_attn_func(kernel: str) -> Any:
    """`flash_attn_func` of one package: (B, L, H, D), half precision, softmax_scale by name.

    ImportError if the package is broken: built for another torch, or without what it needs.
    """
    package, member, _ = PACKAGES[kernel]
    # flash-attn 2 exports it from the package itself, the others from where they live.
    module = package if member != "cute" else f"{package}.{member}"
    try:
        return importlib.import_module(module).flash_attn_func
    except ImportError as error:
        raise ImportError(
            f"attention={kernel!r} is installed but its import fails ({error}); {_remedy(kernel)}"
        ) from error
