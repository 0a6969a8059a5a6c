"""Pretrain the tiny text-to-video and text-to-audio towers, each alone, as the real ones were.

Flow matching with each backbone's own t: Wan's uniform t with shift 5, TangoFlux's logit-normal t
without a shift and with its own (not AVSync) time index. The towers meet for the first time where
a real pair does: when train.py stitches them.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from model import AudioDiTConfig, AVFullDiT, AVFullDiTConfig, VideoDiTConfig
from model.flow import FlowConfig, add_noise, flow_loss, sample_t, velocity_target
from model.towers.attention import Attention
from model.towers.audio_dit import AudioDiT
from model.weights.load import load_pretrained
from model.weights.names import TANGOFLUX_NAMES, released_name
from model.weights.released import WAN_FIXED
from playground.backbones import recipe
from playground.backbones.clips import WINDOW_FRAMES
from playground.backbones.latents import Latents, build, encode_captions, open_latents
from playground.backbones.text import update_tangoflux

VIDEO = VideoDiTConfig(
    num_attention_heads=6, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=96,
    ffn_dim=512, num_layers=6,
)
AUDIO = AudioDiTConfig(
    in_channels=16, num_layers=1, num_single_layers=4, attention_head_dim=32,
    num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64,
    axes_dims_rope=(4, 14, 14), max_duration=4.0, audio_seq_len=96,
)
VIDEO_FLOW = FlowConfig("uniform", shift=5.0)
AUDIO_FLOW = FlowConfig("logit_normal", shift=1.0)
BATCH = 32
PEAK_RATE = 2e-3
AVERAGE_DECAY = 0.998
SECONDS = WINDOW_FRAMES / 24
NATIVE_TAU = 1.0  # TangoFlux's own index; AVSyncRoPE only enters with the joint model
# PyTorch's flash kernel on a CPU takes 3 to 8 times longer backwards than this one in bfloat16.
KERNEL = "sdpa_math"


def _save_pipeline_files() -> None:
    """model_index.json and the scheduler's config, as the released Wan folder has them."""
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    index = {"_class_name": "WanPipeline", "expand_timesteps": True} | parts
    recipe.save_json(index, recipe.WAN / "model_index.json")
    scheduler = {
        "_class_name": "UniPCMultistepScheduler", "flow_shift": VIDEO_FLOW.shift,
        "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    recipe.save_json(scheduler, recipe.WAN / "scheduler" / "scheduler_config.json")


class VideoTower(nn.Module):
    """Our video tower alone, with the loss it is trained by."""

    def __init__(self) -> None:
        super().__init__()
        config = AVFullDiTConfig(task="t2v", video=VIDEO, audio=None)
        self.model = AVFullDiT(config, attention=KERNEL)

    def loss(self, batch: Latents, u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Flow loss (B,) at t from uniform u (B,), noise (B,C,F,h,w)."""
        t = sample_t(VIDEO_FLOW, u)
        velocity, _ = self.model(add_noise(batch.video, noise, t), t, batch.video_text)
        return flow_loss(velocity, velocity_target(batch.video, noise))

    def draw_noise(self, batch: Latents) -> torch.Tensor:
        return torch.randn_like(batch.video)

    def load(self) -> None:
        load_pretrained(self.model, recipe.WAN, None)

    def save(self) -> None:
        state = self.model.state_dict()
        names = {name: released_name(name, self.model.config) for name in state}
        tensors = {value[1]: state[name] for name, value in names.items() if value is not None}
        folder = recipe.WAN / "transformer"
        recipe.save_tensors(tensors, folder, "diffusion_pytorch_model")
        config = {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(VIDEO)} | WAN_FIXED
        recipe.save_json(config, folder / "config.json")
        _save_pipeline_files()


class AudioTower(nn.Module):
    """Our audio tower alone: all single blocks unimodal, native positions."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AudioDiT(
            AUDIO, AUDIO.num_layers, AUDIO.num_single_layers, Attention(KERNEL)
        )

    def velocity(self, noisy: torch.Tensor, t: torch.Tensor, batch: Latents) -> torch.Tensor:
        duration = torch.full_like(t, SECONDS)
        stream, context = self.model.embed(
            noisy, t, batch.audio_text, batch.audio_text_mask, duration, NATIVE_TAU
        )
        for block in (*self.model.transformer_blocks, *self.model.single_transformer_blocks):
            stream = block(stream, context)
        return self.model.velocity(stream[:, : context.num_audio], context)

    def loss(self, batch: Latents, u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Flow loss (B,) at t from uniform u (B,); noise (2,B,L,C): of the flow, of the VAE."""
        t = sample_t(AUDIO_FLOW, u)
        latents = batch.audio_mean + batch.audio_std * noise[1]
        velocity = self.velocity(add_noise(latents, noise[0], t), t, batch)
        return flow_loss(velocity, velocity_target(latents, noise[0]))

    def draw_noise(self, batch: Latents) -> torch.Tensor:
        return torch.randn(2, *batch.audio_mean.shape)

    def load(self) -> None:
        with safe_open(recipe.TANGOFLUX / "tangoflux.safetensors", framework="pt") as file:
            names = self.model.state_dict()
            state = {name: file.get_tensor(self.released(name)).float() for name in names}
        self.model.load_state_dict(state)

    @staticmethod
    def released(name: str) -> str:
        """Our parameter name -> its name in tangoflux.safetensors."""
        for ours, theirs in TANGOFLUX_NAMES.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return "transformer." + name

    def save(self) -> None:
        state = self.model.state_dict()
        update_tangoflux({self.released(name): tensor for name, tensor in state.items()})
        path = recipe.TANGOFLUX / "config.json"
        recipe.save_json(recipe.load_json(path) | dataclasses.asdict(AUDIO), path)


def _drop_captions(batch: Latents, empty: Latents, share: float) -> Latents:
    """Replace both captions of a `share` of the clips by the encoded ""."""
    drop = torch.rand(len(batch.video)) < share
    return batch._replace(
        video_text=torch.where(drop[:, None, None], empty.video_text, batch.video_text),
        audio_text=torch.where(drop[:, None, None], empty.audio_text, batch.audio_text),
        audio_text_mask=torch.where(drop[:, None], empty.audio_text_mask, batch.audio_text_mask),
    )


def _take(latents: Latents, rows: torch.Tensor) -> Latents:
    return Latents(*(tensor[rows] for tensor in latents))


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights: what is shipped."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _optimizers(tower: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the blocks' matrices: here a third fewer steps to a loss than AdamW for all."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in tower.named_parameters():
        inside = "blocks." in name and "modulation" not in name and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    return (
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.99)),
    )


def train(
    name: str, tower: VideoTower | AudioTower, cache: Path, minutes: float, seed: int = 0
) -> None:
    """Train one tower for `minutes`, saving its weight average every few."""
    torch.manual_seed(seed)
    latents = open_latents(cache, "video" if isinstance(tower, VideoTower) else "audio")
    texts = encode_captions([""], [""])
    empty = _take(latents, torch.tensor([0]))._replace(
        video_text=texts.video, audio_text=texts.audio, audio_text_mask=texts.audio_mask
    )
    optimizers = _optimizers(tower)
    tower_loss = torch.compile(tower.loss)  # minutes once, then a step takes 0.7 of its time
    average = copy.deepcopy(tower).requires_grad_(False)
    budget, smooth = recipe.Budget(minutes), 0.0
    while budget.running():
        recipe.set_learning_rate(budget, PEAK_RATE, *optimizers)
        batch = _take(latents, torch.randint(len(latents.video), (BATCH,)))
        batch = _drop_captions(batch, empty, VIDEO_FLOW.caption_dropout)
        u = (torch.randperm(BATCH) + torch.rand(BATCH)) / BATCH  # stratified: less noise in t
        with torch.autocast("cpu", torch.bfloat16):
            loss = tower_loss(batch, u.clamp(1e-4, 1 - 1e-4), tower.draw_noise(batch)).mean()
        recipe.update(tower, loss, *optimizers)
        _follow(average, tower, min(AVERAGE_DECAY, budget.step / (budget.step + 10)))
        smooth += (loss.item() - smooth) * max(0.01, 1 / budget.step)
        if budget.step % 100 == 0:
            print(f"{name} step {budget.step} {budget.minutes_used:.1f} min loss {smooth:.4f}",
                  flush=True)
        if budget.save_due():
            average.save()
    average.save()
    facts = {"minutes": minutes, "steps": budget.step, "seed": seed}
    recipe.note(f"{name}_training", facts | {"threads": torch.get_num_threads()})


def run(
    command: str, cache: Path, count: int, minutes: float, processes: int, resume: bool
) -> None:
    """The commands video_latents, audio_latents, video_tower and audio_tower."""
    kind, verb = command.split("_")
    if verb == "latents":
        build(cache, kind, count, processes)
    else:
        torch.manual_seed(0)
        tower = VideoTower() if kind == "video" else AudioTower()
        if resume:
            tower.load()
        train(command, tower, cache, minutes, seed=int(resume))
