"""One profiled step: kernels by kind and phase, launches, and the time the device is idle."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

SPIN = 2000  # cycles of the marker kernel, about 1 us
MARKER = "spin_kernel"
PHASES = ("other", "forward", "backward", "update")
# The first pattern that is part of a kernel's name counts.
KINDS = (
    ("marker", MARKER),
    ("attention", r"fmha|flash|sdpa|fort_native|attention"),
    ("product", r"gemm|nvjet|cutlass|xmma|cublas|splitKreduce|gemv"),
    ("convolution", r"conv|cudnn|nchw|nhwc"),
    ("AdamW", r"[Aa]dam"),
    ("NCCL", r"nccl"),
    ("compiled elementwise", r"^triton_"),
    ("copy or fill", r"^Memcpy|^Memset|copy_kernel|FillFunctor|CatArray|direct_copy|bfloat16_copy"),
    ("norm or sum", r"reduce_kernel|layer_norm|LayerNorm|RMS|rms_norm|softmax|lpnorm|GammaBeta"),
    ("elementwise", r""),
)


def kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


def profile(step: Callable[[], Any], phases: Any) -> dict[str, Any]:
    """Profile one step, cut into phases by marker kernels.

    Returns: milliseconds of kernels per phase and kind, the time in which at least one kernel ran,
    launches, and the 15 kernels that took longest.
    """
    phases.spin = True
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
        result = step()
    phases.spin = False
    assert traced.profiler is not None
    events = [(e.start_ns(), e.duration_ns(), e.name())
              for e in traced.profiler.kineto_results.events()
              if e.device_type() == torch.autograd.DeviceType.CUDA and e.duration_ns() > 0]
    return summary(sorted(events)) | {"seconds_profiled": result["seconds"]}


def summary(events: list[tuple[int, int, str]]) -> dict[str, Any]:
    """Sort (start ns, duration ns, name) by phase and kind.

    The marks of a step are: other, forward, backward, other, update, other, (repeated when
    accumulating), other.
    """
    order = ("forward", "backward", "other", "update", "other")
    table: dict[str, dict[str, float]] = {p: defaultdict(float) for p in PHASES}
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    phase, marks, launches = "other", 0, 0
    for _, duration, name in events:
        if MARKER in name:
            phase = "other" if marks == 0 else order[(marks - 1) % len(order)]
            marks += 1
            continue
        launches += 1
        table[phase][kind(name)] += duration / 1e6
        names[name][0] += duration / 1e6
        names[name][1] += 1
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:15]
    kinds: dict[str, float] = defaultdict(float)
    for row in table.values():
        for key, value in row.items():
            kinds[key] += value
    return {
        "ms_by_kind": dict(kinds), "ms_by_phase": {p: dict(row) for p, row in table.items()},
        "busy_ms": busy([e for e in events if MARKER not in e[2]]), "launches": launches,
        "marks": marks,
        "longest": [{"name": n[:160], "kind": kind(n), "ms": ms, "launches": count}
                    for n, (ms, count) in longest],
    }


def busy(events: list[tuple[int, int, str]]) -> float:
    """Milliseconds in which at least one of the sorted events ran."""
    total, end = 0, 0
    for start, duration, _ in events:
        total += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total / 1e6
