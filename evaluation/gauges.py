"""What happens inside the model on a few samples: attention between the modalities, activations.

The gauges are forward hooks that are there only while `Gauges.on` is open, around a forward
without gradients: training is not affected. Attention mass is the share of a query's softmax
that lies on the other modality's keys, computed as written and not by the kernel, which does not
tell. Called by train.py every `health_every` steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.avfulldit import AVFullDiT
from model.joint import AVFullAttention
from model.towers.attention import QKV

QUERIES = 1024  # at a time: bounds the memory of the logits


class Gauges:
    """Sums over samples of every gauge of one model; the same names on every rank."""

    def __init__(self, model: AVFullDiT) -> None:
        self.model = model
        self.sums: dict[str, torch.Tensor] = {}  # name -> (2,) sum over samples, samples
        self.weight = torch.ones(0)  # (B,) of the batch in hand: 0 for padding

    @contextmanager
    def on(self, real: torch.Tensor) -> Iterator[None]:
        """Watch the forwards inside; ``real`` (B,) bool says which of their samples count."""
        self.weight = real.double()
        model = self.model
        hooks = [model.video.blocks[-1].register_forward_hook(self._activation("video_tower"))] \
            if len(model.video.blocks) else []
        if model.config.task == "t2av":
            tower = [*model.audio.transformer_blocks, *model.audio.single_transformer_blocks]
            if tower:
                hooks.append(tower[-1].register_forward_hook(self._activation("audio_tower")))
            hooks.append(model.joint_blocks[-1].register_forward_hook(self._joint_activation))
            shared = [m for m in model.joint_blocks.modules() if isinstance(m, AVFullAttention)]
            for index, attention in enumerate(shared):
                hooks.append(attention.register_forward_pre_hook(self._mass(f"layer{index:02d}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, name: str, values: torch.Tensor, weight: torch.Tensor) -> None:
        added = torch.stack([(values.double() * weight).sum(), weight.sum()])
        self.sums[name] = self.sums.get(name, torch.zeros_like(added)) + added

    def _activation(self, part: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self._add(f"health/activation_{part}", rms(output), self.weight.to(output.device))
        return hook

    def _joint_activation(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for name, tokens in zip(("joint_video", "joint_audio"), output, strict=True):
            self._add(f"health/activation_{name}", rms(tokens), self.weight.to(tokens.device))

    def _mass(self, layer: str) -> Any:
        def hook(module: AVFullAttention, inputs: tuple[Any, ...]) -> None:
            video, stream, num_audio, _, bias, present = inputs
            to_video, to_audio = attention_mass(
                video, stream, num_audio, module.audio_text == "masked", bias, present
            )
            weight = self.weight.to(to_video.device)
            if present is not None:  # a clip without sound has no mass between modalities
                weight = weight * present
            self._add(f"health/attention_audio_to_video/{layer}", to_video, weight)
            self._add(f"health/attention_video_to_audio/{layer}", to_audio, weight)
        return hook


def rms(tokens: torch.Tensor) -> torch.Tensor:
    """Root mean square per sample: (B, L, C) -> (B,) float32."""
    return tokens.float().square().flatten(1).mean(dim=1).sqrt()


def attention_mass(
    video: QKV, stream: QKV, num_audio: int, masked: bool, bias: float = 0.0,
    audio_present: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of AVFull-Attention: audio's mass on video keys and video's on audio keys, (B,) each.

    Means over queries and heads. Arguments as in AVFullAttention.forward; ``masked`` says that
    video does not see the audio caption's tokens.
    """
    num_video = video.key.shape[1]
    key = torch.cat((video.key, stream.key), dim=1).float()  # (B, Nv + La + Lt, H, D)
    of_video = torch.arange(key.shape[1], device=key.device) < num_video  # (keys)
    of_audio = ~of_video & (torch.arange(key.shape[1], device=key.device) < num_video + num_audio)
    seen_by_video = of_video | of_audio if masked else torch.ones_like(of_video)
    to_stream = torch.where(seen_by_video, bias * ~of_video, -torch.inf)  # (keys)
    audio_query = stream.query[:, :num_audio]
    return (
        _mass(audio_query, key, bias * of_video, of_video),
        _mass(video.query, key, to_stream, of_audio),
    )


def _mass(
    query: torch.Tensor, key: torch.Tensor, key_bias: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Mean softmax mass on the ``chosen`` keys: query (B, Lq, H, D), key (B, Lk, H, D) -> (B,)."""
    total = torch.zeros(query.shape[0], dtype=torch.float64, device=query.device)
    for part in query.float().split(QUERIES, dim=1):
        for head in range(query.shape[2]):
            logits = part[:, :, head] @ key[:, :, head].mT * query.shape[-1] ** -0.5 + key_bias
            total += logits.softmax(dim=-1)[..., chosen].double().sum(dim=(1, 2))  # (B, q, keys)
    return total / (query.shape[1] * query.shape[2])
