"""Ceilings of the card, and every attention kernel against float64 at the model's shapes.

    python -m benchmarks.gpu.kernels RESULT.json [--rehearse]

Times are CUDA events around single calls, medians of 20. Errors are ||x - ref|| / ||ref|| against
the same bf16 numbers in float64, forward and backward.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.common import PEAK_TFLOPS, Record, relative, timed
from model.towers.attention import PACKAGES, Attention, fastest, installed

HEADS, HEAD_DIM = 24, 128
# Name -> queries and keys of one call. The joint attention of a joint block is three calls.
ATTENTIONS = {
    "2s": {"joint, one call": (824, 824), "joint, video": (780, 824), "joint, audio": (44, 889),
           "joint, caption": (65, 109), "self": (780, 780), "caption": (780, 512)},
    "5s": {"joint, one call": (1969, 1969)},
}
LINEARS = {"q, k, v, o": (3072, 3072), "ffn up": (3072, 14336), "ffn down": (14336, 3072)}


def ceilings(device: torch.device, size: int, rows: int, divide: int = 1) -> dict[str, Any]:
    """TFLOP/s of a square bf16 product and TB/s of a copy, read and write counted.

    Args:
        rows: of the model's Linears. divide: makes their widths smaller.
    """
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = timed(lambda: left @ right, device, 30, 5)
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, 30, 5)
    moved = 2 * source.numel() * source.element_size()
    rate = 2 * size**3 / product["median"] / 1e9
    return {
        "product": {"size": size, "ms": product, "tflops": rate, "of_peak": rate / PEAK_TFLOPS},
        "copy": {"bytes": moved, "ms": copy, "tb_per_s": moved / copy["median"] / 1e9},
        "linears": {name: linear(device, rows, inner // divide, columns // divide)
                    for name, (inner, columns) in LINEARS.items()},
    }


def linear(device: torch.device, rows: int, inner: int, columns: int) -> dict[str, float]:
    """TFLOP/s of a Linear's three products at the model's own sizes, with the bias."""
    x, grad = (torch.randn(rows, n, device=device).bfloat16() for n in (inner, columns))
    weight = torch.randn(columns, inner, device=device).bfloat16()
    bias = torch.randn(columns, device=device).bfloat16()
    flops = 2 * rows * inner * columns
    calls = {"forward": lambda: F.linear(x, weight, bias), "grad of input": lambda: grad @ weight,
             "grad of weight": lambda: grad.T @ x}
    return {name: flops / timed(call, device, 20)["median"] / 1e9 for name, call in calls.items()}


def backends() -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> (B, L, H, D) attention: what `model.attention` offers and has, and efficient SDPA."""
    names = ["sdpa", "cudnn", "sdpa_flash", "sdpa_math", *(n for n in PACKAGES if installed(n))]
    return {name: Attention(name) for name in names} | {"efficient (not offered)": _efficient}


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def draw(shape: tuple[int, int], batch: int, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, bf16."""
    queries, keys = shape
    lengths = (queries, keys, keys, queries)
    return [torch.randn(batch, n, HEADS, HEAD_DIM, device=device).bfloat16() for n in lengths]


def exact(drawn: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of q, k, v in float64, sample by sample: logits are large."""
    parts = []
    for sample in zip(*(x.split(1) for x in drawn), strict=True):
        query, key, value, grad = (x.double().transpose(1, 2) for x in sample)
        for x in (query, key, value):
            x.requires_grad_()
        weights = (query @ key.mT * HEAD_DIM**-0.5).softmax(dim=-1)
        output = weights @ value
        gradients = torch.autograd.grad(output, (query, key, value), grad)
        parts.append([x.detach().transpose(1, 2) for x in (output, *gradients)])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def compare(attend: Callable[..., torch.Tensor], drawn: list[torch.Tensor],
            reference: list[torch.Tensor], repeats: int) -> dict[str, Any]:
    """Errors, times and TFLOP/s of one backend at one shape; backward is five products to two."""
    *inputs, grad = drawn
    inputs = [x.clone().requires_grad_() for x in inputs]
    device = grad.device
    output = attend(*inputs)
    gradients = torch.autograd.grad(output, inputs, grad)
    values: dict[str, Any] = {
        name: relative(x, ref) for name, x, ref in
        zip(("output", "dq", "dk", "dv"), (output, *gradients), reference, strict=True)}
    with torch.no_grad():
        forward = timed(lambda: attend(*inputs), device, repeats)
    both = timed(lambda: torch.autograd.grad(attend(*inputs), inputs, grad), device, repeats)
    batch, queries = grad.shape[:2]
    flops = 4 * batch * queries * inputs[1].shape[1] * HEADS * HEAD_DIM
    backward = both["median"] - forward["median"]
    return values | {
        "forward_ms": forward, "forward_and_backward_ms": both,
        "forward_tflops": flops / forward["median"] / 1e9,
        "backward_tflops": 2.5 * flops / max(backward, 1e-9) / 1e9,
    }


def kernel_names(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that one call launches, longest first."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    spent = {event.name(): event.duration_ns() for event in events}
    return [f"{name[:90]} {ns / 1e3:.0f} us" for name, ns in
            sorted(spent.items(), key=lambda item: -item[1])][:4]


def attention(record: Record, device: torch.device, batch: int, clip: str, repeats: int,
              divide: int = 1) -> None:
    """Record every backend at the shapes of one clip length, which ``divide`` shortens."""
    for shape_name, (queries, keys) in ATTENTIONS[clip].items():
        torch.manual_seed(0)
        drawn = draw((queries // divide, keys // divide), batch, device)
        reference = exact(drawn)
        for name, attend in backends().items():
            if name != "sdpa" and device.type == "cpu":
                continue
            record.attempt(f"attention {clip} {shape_name}: {name}",
                           partial(compare, attend, drawn, reference, repeats))


def chosen(device: torch.device, batch: int) -> dict[str, Any]:
    """What `auto` is here, and which kernels `sdpa` and `auto` launch at the joint shape."""
    query, key, value, grad = draw((780, 824), batch, device)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    values: dict[str, Any] = {"auto": fastest(device), "cudnn": torch.backends.cudnn.version()}
    for name in ("sdpa", "auto"):
        values[f"kernels of {name}"] = kernel_names(partial(_both, Attention(name), inputs, grad))
    biased = partial(Attention("auto"), key_bias=torch.zeros(824, device=device))
    values["kernels of auto with a bias"] = kernel_names(partial(_both, biased, inputs, grad))
    return values


def _both(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor
          ) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(attend(*inputs), inputs, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    input()  # the driver says when the device is free
    record = Record(arguments.result)
    if arguments.rehearse:
        device = torch.device("cpu")
        record.attempt("ceilings", partial(ceilings, device, 64, 8, 64))
        attention(record, device, 1, "2s", 1, 16)
        return
    device = torch.device("cuda")
    record.attempt("ceilings", partial(ceilings, device, 8192, 8 * 780))
    record.attempt("choice", partial(chosen, device, 8))
    attention(record, device, 8, "2s", 20)
    attention(record, device, 4, "5s", 20)


if __name__ == "__main__":
    main()
