"""Build models plainly and under deepspeed.zero.Init: parameters, dtypes, and memory of loading.

Run by tests/model/test_zero_init.py in a process of its own, because zero.Init patches torch.
Prints one JSON object: parameters compared, partitioned ones, differing ones, the dtype table, and
host memory while a synthetic checkpoint streams in.
"""

import json
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[3]))

import deepspeed  # noqa: E402
import torch  # noqa: E402

from model import AVFullDiT  # noqa: E402
from model.towers import audio_blocks, audio_dit, video_dit  # noqa: E402
from model.towers.layers import layer_norm, timestep_sinusoid  # noqa: E402
from model.towers.rope import audio_rope, joint_audio_rope, rotate, video_rope  # noqa: E402
from model.weights.load import export_wan, load_pretrained  # noqa: E402
from tests.support.models import towers  # noqa: E402
from training.engine import write_parameter  # noqa: E402

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # No tensor is small enough to stay whole, so that every parameter is really partitioned.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


BF16 = CONFIG | {"bf16": {"enabled": True}}
MIB = 2**20


def build(config=towers.EARLY_SINGLE, seed: int = 7) -> AVFullDiT:
    torch.manual_seed(seed)
    return AVFullDiT(config)


def gathered(model: AVFullDiT) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def compare(config) -> dict:
    """Plain build against zero.Init build of one config."""
    plain = build(config)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        sharded = build(config)
    shapes = {name: tuple(p.ds_shape) for name, p in sharded.named_parameters()}
    partitioned = sum(parameter.numel() == 0 for parameter in sharded.parameters())
    expected, found = plain.state_dict(), gathered(sharded)
    differing = [
        name for name in expected
        if name not in found or not torch.equal(expected[name], found[name])
        or tuple(expected[name].shape) != shapes[name]
    ]
    return {"parameters": len(expected), "found": len(found), "partitioned": partitioned,
            "differing": differing}


def dtypes(model: torch.nn.Module, bare: AVFullDiT) -> dict[str, str | float]:
    """What the arithmetic runs in, seen from inside one forward."""
    table: dict[str, str | float] = {}

    def note(name):
        def hook(module, args, output):
            table[name] = names([output[0] if isinstance(output, tuple) else output])
        return hook

    block = bare.joint_blocks[0]
    for name, module in {
        "time embedding": bare.video.condition_embedder.time_embedder,
        "wan modulation": block.video.modulation,
        "wan affine norm": block.video.norm2,
        "wan qk norm": block.video.attn1.norm_q,
        "flux qk norm": block.audio.attn.norm_q,
        "duration angles": bare.audio.duration_embedder.frequencies,
        "projection": block.video.attn1.to_q,
    }.items():
        module.register_forward_hook(note(name))
    for rope in (audio_rope, joint_audio_rope, video_rope):
        rope.cache_clear()  # or the tables of the build before would be seen
    inputs, seen = towers.joint_inputs(), Seen()
    with torch.no_grad(), seen.functions(inputs["t"]):
        outputs = model(**inputs)
    table |= {"velocities": names(outputs), "parameters": names(bare.parameters())}
    table |= {name: names(tensors) for name, tensors in seen.tensors.items()} | seen.errors
    table["long rope error"] = rope_error()
    table["buffers"] = ", ".join(str(buffer.dtype) for buffer in bare.buffers()) or "none"
    return table


def names(tensors) -> str:
    """Dtypes of tensors, each once."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


class Seen:
    """What a forward computes in functions, where no module's hook sees it.

    ``errors`` are the largest ones against float64; a rotation may round once, to its result.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, list[torch.Tensor]] = {"rope tables": [], "wan norm input": []}
        self.errors = dict.fromkeys(("rope error", "rotation error", "sinusoid error"), 0.0)
        self.angles = exact_angles()

    @contextmanager
    def functions(self, t: torch.Tensor) -> Iterator[None]:
        """Around a forward at ``t``: everything that the blocks call by name is watched."""
        def sinusoid(given, dim):
            features, half = timestep_sinusoid(given, dim), dim // 2
            angles = 1000 * t.double()[:, None] * 10000.0 ** (
                -torch.arange(half, dtype=torch.float64) / half)
            self.error("sinusoid error", features - torch.cat((angles.cos(), angles.sin()), 1))
            return features

        def norm(x, eps):
            self.tensors["wan norm input"].append(x)
            return layer_norm(x, eps)

        with ExitStack() as stack:
            for module in (video_dit, audio_blocks):
                stack.enter_context(patch.object(module, "rotate", self.rotate))
            for module in (video_dit, audio_dit):
                stack.enter_context(patch.object(module, "timestep_sinusoid", sinusoid))
            stack.enter_context(patch.object(video_dit, "layer_norm", norm))
            yield

    def rotate(self, x, rope):
        self.tensors["rope tables"] += rope
        angles = self.angles[x.shape[1]]
        self.error("rope error", torch.cat((rope.cos - angles.cos(), rope.sin - angles.sin())))
        rotated = rotate(x, rope)
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (L, 1, D/2)
        exact = torch.view_as_real(pairs * turn).flatten(-2)
        rounding = exact.abs() * torch.finfo(x.dtype).eps / 2
        self.error("rotation error", ((rotated - exact).abs() - rounding).clamp(min=0))
        return rotated

    def error(self, name: str, difference: torch.Tensor) -> None:
        self.errors[name] = max(self.errors[name], difference.abs().max().item())


def exact_angles() -> dict[int, torch.Tensor]:
    """Number of tokens -> angles (L, D/2) of `towers.joint_inputs`, in float64."""
    def of(positions, dim):
        return torch.outer(positions, 10000.0 ** (-torch.arange(0, dim, 2).double() / dim))

    grid = torch.cartesian_prod(*(torch.arange(size).double() for size in (3, 2, 3)))
    stream = torch.cat((torch.arange(10).double(), torch.zeros(6).double()))  # tau is 1
    return {18: torch.cat([of(grid[:, axis], dim) for axis, dim in enumerate((8, 4, 4))], dim=1),
            16: torch.cat([of(stream, dim) for dim in (4, 4, 8)], dim=1)}


def rope_error() -> float:
    """Largest error of the tables of a 5 s clip against float64, here and now."""
    place = torch.device("cpu")
    rope = audio_rope(645, 65, (16, 56, 56), 3.588867, place)
    frequencies = torch.cat([
        10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in (16, 56, 56)])
    exact = torch.arange(645, dtype=torch.float64)[:, None] / 3.588867 * frequencies
    video = video_rope(31, 1, 1, 128, place)
    time = torch.arange(31, dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(0, 44, 2, dtype=torch.float64) / 44)
    errors = [rope.cos[:645] - exact.cos(), rope.sin[:645] - exact.sin(),
              video.cos[:, :22] - time.cos(), video.sin[:, :22] - time.sin()]
    assert rope.cos.dtype == video.cos.dtype == torch.float32
    return max(error.abs().max().item() for error in errors)


def dtype_table() -> dict[str, dict[str, str | float]]:
    plain = build()
    engine_model = build()
    table = {"plain": dtypes(plain, plain)}
    engine = deepspeed.initialize(
        model=engine_model, config=BF16 | {"zero_optimization": {"stage": 0}})[0]
    table["bf16 engine"] = dtypes(engine, engine_model)
    with deepspeed.zero.Init(config_dict_or_path=BF16):
        sharded = build()
    engine = deepspeed.initialize(model=sharded, config=BF16)[0]
    table["zero.Init"] = dtypes(engine, sharded)
    return table


def anonymous_mib() -> float:
    """Memory of this process that is no file's: mapped checkpoint pages are the kernel's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def loading(folder: Path, num_layers: int) -> dict[str, float]:
    """Stream a synthetic Wan of 17 MiB a layer into a model built under zero.Init."""
    video = replace(
        towers.VIDEO, num_attention_heads=32, ffn_dim=2048, num_layers=num_layers
    )
    config = replace(towers.T2V, video=video)
    export_wan(build(config).state_dict(), config, folder)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = build(config)
    sizes = [torch.Size(p.ds_shape).numel() * 4 / MIB for p in model.parameters()]
    before, peak = anonymous_mib(), 0.0
    earlier: list[weakref.ref] = []
    held = 0  # earlier tensors still there: mapped from their file, they grow no memory of ours

    def write(parameter, tensor):
        nonlocal peak, held
        held = max(held, sum(one() is not None for one in earlier))
        earlier.append(weakref.ref(tensor))
        write_parameter(parameter, tensor)
        peak = max(peak, anonymous_mib())

    load_pretrained(model, folder, None, write=write)
    return {"model_mib": sum(sizes), "largest_mib": max(sizes), "growth_mib": peak - before,
            "held": held}


def main() -> None:
    deepspeed.init_distributed("gloo")
    result = compare(towers.EARLY_SINGLE)
    variants = ({"num_joint_blocks": 3, "init": "normal"}, {"fusion": "cross"})
    result["variants"] = [compare(replace(towers.CONFIG, **change)) for change in variants]
    with tempfile.TemporaryDirectory() as folder:
        loading(Path(folder), 2)  # the allocator's own start is not the checkpoint's
        result["loading"] = loading(Path(folder), 12)
    result["dtypes"] = dtype_table()
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    main()
