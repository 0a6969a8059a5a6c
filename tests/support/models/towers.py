"""The two towers by their released classes, with random weights, and our model filled from them."""

from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioNumberConditioner
from torch import nn

from model import AudioDiTConfig, AVFullDiT, AVFullDiTConfig, VideoDiTConfig
from model.weights.names import released_name
from tests.support.models import tiny

VIDEO = VideoDiTConfig.from_dict({
    key: value for key, value in tiny.VIDEO_DIT.items() if key not in ("cross_attn_norm", "qk_norm")
})
AUDIO = AudioDiTConfig.from_dict({
    key: value for key, value in tiny.AUDIO_DIT.items()
    if key not in ("patch_size", "guidance_embeds")
})
# 4 frames at 24 fps last as long as 1000 samples at 6 kHz: tau is 1.
CONFIG = AVFullDiTConfig(
    video=VIDEO, audio=AUDIO, num_joint_blocks=2, sample_rate=6000, audio_hop=1000
)
T2V = replace(CONFIG, task="t2v", audio=None)
EARLY_SINGLE = replace(CONFIG, num_joint_blocks=1)  # one single block stays unimodal


class TangoFlux(nn.Module):
    """TangoFlux's own forward around diffusers' Flux class, with the names of its release."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(**tiny.AUDIO_DIT)
        self.fc = nn.Sequential(nn.Linear(tiny.WIDTH, tiny.WIDTH), nn.ReLU())
        self.duration_emebdder = StableAudioNumberConditioner(tiny.WIDTH, 0, 30)

    def forward(self, audio, t, text, mask, duration):
        pairs = zip(text, mask, strict=True)
        pooled = torch.stack([rows[keep].mean(dim=0) for rows, keep in pairs])
        states = torch.cat((text, self.duration_emebdder(duration)), dim=1)
        return self.transformer(
            hidden_states=audio, timestep=t, encoder_hidden_states=states,
            pooled_projections=self.fc(pooled), txt_ids=torch.zeros(states.shape[1], 3),
            img_ids=torch.arange(audio.shape[1])[:, None].expand(-1, 3), return_dict=False,
        )[0]


def build_released(seed: int = 0) -> tuple[WanTransformer3DModel, TangoFlux]:
    """Both towers with every weight moved off its default, norms included."""
    torch.manual_seed(seed)
    wan, tangoflux = WanTransformer3DModel(**tiny.VIDEO_DIT), TangoFlux()
    return tiny.moved(wan).eval(), tiny.moved(tangoflux).eval()


@torch.no_grad()
def fill(model: AVFullDiT, wan: nn.Module, tangoflux: nn.Module) -> AVFullDiT:
    """Copy the released weights into ours by name; new weights are left alone."""
    states = {"wan": wan.state_dict(), "tangoflux": tangoflux.state_dict()}
    for name, parameter in model.named_parameters():
        released = released_name(name, model.config)
        if released is not None:
            parameter.copy_(states[released[0]][released[1]])
    return model


@torch.no_grad()
def randomise_new(model: AVFullDiT) -> AVFullDiT:
    """New weights as after some training: none of them zero."""
    for name, parameter in model.named_parameters():
        if released_name(name, model.config) is None:
            parameter.normal_(0, 0.1)
    return model


def video_inputs(batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "noisy_video": torch.randn(batch, 48, 3, 4, 6),
        "t": torch.tensor([0.313, 0.5, 0.02])[:batch],
        "video_text": torch.randn(batch, 7, tiny.WIDTH),
    }


def audio_inputs(batch: int = 2, seed: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "noisy_audio": torch.randn(batch, 10, 6),
        "audio_text": torch.randn(batch, 5, tiny.WIDTH),
        "audio_text_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2] * 2)[:batch],
        "duration": torch.tensor([2.04, 41.0, 0.5])[:batch],  # 41 s is clamped to 30
    }


def joint_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    return video_inputs(batch) | audio_inputs(batch)
