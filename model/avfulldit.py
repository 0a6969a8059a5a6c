"""AVFullDiT: two pretrained towers whose last layers share one attention (Eq. 4-9).

Early layers are unimodal. Each joint layer is a Wan block and a TangoFlux block around one
attention over video and audio tokens (model.joint). ``task: t2v`` builds the video tower alone.
Called by train.py and sampling.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.joint import Coupling, JointBlock
from model.towers.attention import ANYWHERE, Attention
from model.towers.audio_blocks import AudioContext
from model.towers.audio_dit import AudioDiT
from model.towers.rope import fusion_ropes, joint_audio_rope
from model.towers.video_dit import VideoContext, VideoDiT
from model.variants import AVFullDiTConfig
from model.weights.saving import read_config, read_state, write_folder

RECOMPUTE = ("none", "full")


class AVFullDiT(nn.Module):
    """The whole model.

    ``recompute`` "full" recomputes each block in the backward pass (a joint block as one unit);
    ``attention`` is a name of `model.towers.attention.KERNELS`; ``attention_kernel`` names the
    choice.
    """

    def __init__(
        self, config: AVFullDiTConfig, recompute: str = "none", attention: str = "auto"
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r} is unknown; use one of {RECOMPUTE}")
        self.config = config
        self.recompute = recompute
        self.attend = Attention(attention)
        self.video = VideoDiT(config.video, config.num_video_blocks, self.attend)
        if config.task == "t2v":
            return
        assert config.audio is not None
        num_double = config.audio.num_layers - config.num_joint_double
        num_single = config.audio.num_single_layers - (
            config.num_joint_blocks - config.num_joint_double
        )
        self.audio = AudioDiT(config.audio, num_double, num_single, self.attend)
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, self.attend, double=index < config.num_joint_double)
            for index in range(config.num_joint_blocks)
        )

    @property
    def attention_kernel(self) -> str:
        """The kernel in use, in words, chosen by the weights' dtype and device if not yet run."""
        weight = self.video.proj_out.weight
        kernel = self.attend.resolve(weight.device, weight.dtype)
        if self.config.init == "bias_warmup" and kernel not in ANYWHERE:
            # Only those take a bias; silent clips leave this kernel, too.
            return f"{kernel} (sdpa in joint blocks until step {self.config.bias_steps})"
        return kernel

    def forward(
        self,
        noisy_video: torch.Tensor,
        t: torch.Tensor,
        video_text: torch.Tensor,
        noisy_audio: torch.Tensor | None = None,
        audio_text: torch.Tensor | None = None,
        audio_text_mask: torch.Tensor | None = None,
        duration: torch.Tensor | None = None,
        cross_modal: bool = True,
        cross_modal_bias: float = 0.0,
        audio_t: torch.Tensor | None = None,
        video_text_length: int | None = None,
        audio_present: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocities eps - x0 of both modalities (Eq. 2-3), in float32.

        noisy_video (B, C, T, H, W), t (B,) in [0, 1] with 1 = noise, video_text (B, rows, Dt) zero
        padded, noisy_audio (B, L, C), audio_text (B, 64, Da), audio_text_mask (B, 64) True on real
        tokens, duration (B,) seconds. Task t2v takes the first three and returns (video, None).

        ``cross_modal`` False masks V <-> A; ``cross_modal_bias`` is added to their logits
        (init=bias_warmup, from `JointConfig.cross_modal_bias`). ``audio_t`` (B,) is the audio's
        own t; None shares t.
        ``video_text_length`` is how many rows video_text stands for: those left out equal its last
        one (zero padding), whose key and value are computed once. ``audio_present`` (B,) bool
        is False for clips without sound, whose video then hears nothing; None: all have sound.
        """
        if t.shape != noisy_video.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; it must be ({noisy_video.shape[0]},)")
        video, video_context = self.video.embed(
            noisy_video, t, video_text, video_text_length, self.config.video_time_scale
        )
        for block in self.video.blocks:
            video = self._run(block, video, video_context)
        audio_inputs = (noisy_audio, audio_text, audio_text_mask, duration)
        if self.config.task == "t2v":
            if any(value is not None for value in (*audio_inputs, audio_t, audio_present)):
                raise ValueError("task=t2v takes no audio inputs; use task=t2av")
            return self.video.velocity(video, video_context), None
        stream, audio_context = self._embed_audio(t if audio_t is None else audio_t, *audio_inputs)
        joint_context, ropes = self._joint_positions(video_context, audio_context)
        coupling = Coupling(cross_modal, cross_modal_bias, ropes, audio_present)
        for block in self.joint_blocks:
            video, stream = self._run(
                block, video, stream, video_context, joint_context, coupling
            )
        audio = stream[:, : audio_context.num_audio]  # the caption's tokens are dropped here
        return (
            self.video.velocity(video, video_context),
            self.audio.velocity(audio, audio_context),
        )

    def save_pretrained(
        self,
        folder: str | Path,
        state: Mapping[str, torch.Tensor] | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """Write config.json and (sharded) safetensors, each tensor in its own dtype.

        ``state`` replaces the model's own state dict: a gathered one under ZeRO-3, or an average.
        """
        write_folder(folder, self.config, self.state_dict() if state is None else state,
                     max_shard_bytes)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        recompute: str = "none",
        attention: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "AVFullDiT":
        """The model that `save_pretrained` wrote, bit for bit; ``dtype`` None keeps what was saved.

        Never holds a second copy: the parameters become the tensors that were read. Raises
        model.weights.saving.SavedModelError unless folder, names and shapes are whole.
        """
        with torch.device("meta"):
            model = cls(read_config(folder), recompute, attention)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(read_state(folder, shapes, device), assign=True)
        return model if dtype is None else model.to(dtype)

    def _embed_audio(
        self,
        t: torch.Tensor,
        noisy_audio: torch.Tensor | None,
        audio_text: torch.Tensor | None,
        audio_text_mask: torch.Tensor | None,
        duration: torch.Tensor | None,
    ) -> tuple[torch.Tensor, AudioContext]:
        """Run the unimodal audio tower -> stream [audio | text] (B, La + Lt, Ca), context."""
        if noisy_audio is None or audio_text is None or audio_text_mask is None or duration is None:
            raise ValueError(
                "task=t2av needs noisy_audio, audio_text, audio_text_mask and duration; "
                "use task=t2v for video alone"
            )
        stream, context = self.audio.embed(
            noisy_audio, t, audio_text, audio_text_mask, duration, self.config.audio_time_divisor
        )
        for block in (*self.audio.transformer_blocks, *self.audio.single_transformer_blocks):
            stream = self._run(block, stream, context)
        return stream, context

    def _joint_positions(
        self, video: VideoContext, audio: AudioContext
    ) -> tuple[AudioContext, Any]:
        """The audio context with the joint blocks' RoPE, and the ropes of a cross fusion."""
        config = self.config
        assert config.audio is not None
        sizes = audio.num_audio, audio.num_text
        axes, divisor = config.audio.axes_dims_rope, config.audio_time_divisor
        device = audio.embedding.device
        if config.fusion == "cross":
            return audio, fusion_ropes(
                video.grid, *sizes, axes, config.video_time_scale, divisor, device,
                config.rope_layout,
            )
        heads, new_heads = config.audio.num_attention_heads, config.new_heads
        rope = joint_audio_rope(*sizes, axes, divisor, device, config.rope_layout, heads, new_heads)
        return audio._replace(rope=rope), None

    def _run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        if self.recompute == "full" and torch.is_grad_enabled():
            # There is no dropout, hence no random state to keep.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)
