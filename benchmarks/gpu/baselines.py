"""Plain training loops to compare the engine's steps with, at the same batch.

    python -m benchmarks.gpu.baselines RESULT.json LOOP [--rehearse]

bf16 weights, fp32 master weights and moments, torch's fused AdamW, clipping by the global norm;
no engine, no guards, the same batch, noise and clip. `bare_*` is this project's model;
`diffusers_*` is diffusers' WanTransformer3DModel with its own gradient checkpointing and the
caption padded to 512 rows, t2v.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.common import (
    CLIPS,
    PEAK_TFLOPS,
    SMALL,
    Clip,
    Record,
    build,
    random_batch,
    randomise,
    set_compiled,
    spread,
    synchronize,
    without_audio,
)
from model import AVFullDiTConfig
from model.flops import training_work
from model.flow import FlowConfig
from model.objective import Objective


@dataclass(frozen=True)
class Loop:
    task: str
    recompute: bool
    compiled: bool = False
    diffusers: bool = False
    batch: int = 8


LOOPS = {
    "bare_t2av_compiled": Loop("t2av", False, compiled=True),
    "bare_t2v_eager": Loop("t2v", False),
    "bare_t2v_compiled": Loop("t2v", False, compiled=True),
    "diffusers_t2v_recompute": Loop("t2v", True, diffusers=True),
    "diffusers_t2v_recompute_batch1": Loop("t2v", True, diffusers=True, batch=1),
}


class Wan(torch.nn.Module):
    """diffusers' Wan under the arguments of AVFullDiT.forward."""

    def __init__(self, config: AVFullDiTConfig, recompute: bool) -> None:
        from diffusers import WanTransformer3DModel

        super().__init__()
        video = config.video
        self.inner = WanTransformer3DModel(
            patch_size=video.patch_size, num_attention_heads=video.num_attention_heads,
            attention_head_dim=video.attention_head_dim, in_channels=video.in_channels,
            out_channels=video.out_channels, text_dim=video.text_dim, freq_dim=video.freq_dim,
            ffn_dim=video.ffn_dim, num_layers=video.num_layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", eps=video.eps, rope_max_seq_len=1024)
        if recompute:
            self.inner.enable_gradient_checkpointing()

    def forward(self, noisy_video: torch.Tensor, t: torch.Tensor, video_text: torch.Tensor,
                video_text_length: int, cross_modal_bias: float) -> tuple[torch.Tensor, None]:
        dtype = next(self.parameters()).dtype
        missing = video_text_length - video_text.shape[1]
        text = torch.nn.functional.pad(video_text.to(dtype), (0, 0, 0, missing))
        return self.inner(noisy_video.to(dtype), 1000 * t, text, return_dict=False)[0], None


class Trainer:
    """The loop's model, masters and AdamW."""

    def __init__(self, loop: Loop, device: torch.device, small: bool) -> None:
        self.loop, self.device = loop, device
        size = min(loop.batch, 2) if small else loop.batch
        self.config = SMALL if small else AVFullDiTConfig()
        if loop.task == "t2v":
            self.config = without_audio(self.config)
        self.model: Any
        if loop.diffusers:
            torch.set_default_dtype(torch.bfloat16)
            with device:
                self.model = Wan(self.config, loop.recompute)
            torch.set_default_dtype(torch.float32)
            self.model.to(device=device, dtype=torch.bfloat16).train()
            randomise(self.model)
        else:
            self.model = build(self.config, device, torch.bfloat16)
            self.model.recompute = "full" if loop.recompute else "none"
            self.model.attend.resolve(device, torch.bfloat16)
            set_compiled(self.model, loop.compiled, "aot_eager" if small else "inductor")
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=1e-4, fused=device.type == "cuda")
        clip = Clip(2.0, 3, 12) if small else CLIPS["2s"]
        self.batch = random_batch(self.config, clip, size, 2 if small else 1)
        self.objective = Objective(loop.task, 0, FlowConfig(caption_dropout=0.0))

    def step(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        synchronize(self.device)
        began = time.perf_counter()
        t = self.objective.draw_t(self.batch.sample_ids, 0)
        noised = self.objective.noise(self.batch, t, 0, self.device)
        video, audio = self.objective.losses(self.model, noised)
        loss = self.objective.total(video.mean(), audio.mean())
        loss.backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        value = float(loss.detach())
        synchronize(self.device)
        return time.perf_counter() - began, value

    def flops(self) -> int:
        t = self.objective.draw_t(self.batch.sample_ids, 0)
        inputs = self.objective.noise(self.batch, t, 0, torch.device("cpu")).inputs
        return training_work(self.config, inputs).flops


def run(loop: Loop, device: torch.device, small: bool) -> dict[str, Any]:
    """Time one loop; its MFU counts what this project's model would compute (caption rows once)."""
    trainer = Trainer(loop, device, small)
    first = [trainer.step() for _ in range(3)]
    steps = [trainer.step() for _ in range(2 if small else 10)]
    seconds = spread(second for second, _ in steps)
    rate = trainer.flops() / seconds["median"] / 1e12
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"seconds": seconds, "first_step_seconds": first[0][0], "tflops": rate,
            "mfu": rate / PEAK_TFLOPS, "samples_per_second": loop.batch / seconds["median"],
            "losses": [loss for _, loss in (*first, *steps)], "memory_gib": {"allocated": peak}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    if LOOPS[arguments.loop].diffusers:
        import diffusers  # noqa: F401  # slow: while another process may have the device
    input()  # the driver says when the device is free
    record = Record(arguments.result)
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    record.attempt("loop", lambda: run(LOOPS[arguments.loop], device, arguments.rehearse))


if __name__ == "__main__":
    main()
