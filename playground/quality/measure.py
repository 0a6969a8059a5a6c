"""Measure the shipped backbones on held-out clips; write quality.json and QUALITY.md next to them.

Every number is taken through `model.encoders`, the wrappers that prepare and sample use, on clips
of HELD_OUT_SEED, which no training command reads.
"""

import time
from pathlib import Path

import numpy as np
import torch

from model.encoders import AudioTextEncoder, AudioVAE, VideoTextEncoder, VideoVAE
from model.sampling import Prompts, sample
from playground.backbones import recipe, text
from playground.backbones.audio_vae import window_of
from playground.backbones.clips import (
    FIRST_FRAME,
    HELD_OUT_SEED,
    SAMPLE_RATE,
    WINDOW_FRAMES,
    small_clip,
)
from playground.backbones.latents import Latents, encode_captions, encode_clip
from playground.backbones.towers import VIDEO_FLOW, AudioTower, VideoTower
from playground.quality import scores
from playground.quality.recognise import judge
from playground.world.clip import ClipFacts, describe, make_clip

CLIPS = 48
PROBE_TRAIN, PROBE_TEST = 1200, 400
SAMPLED, GUIDANCE = 50, 2.0  # clips drawn by the video tower, their guidance
NOISE_LEVELS = tuple((index + 0.5) / 8 for index in range(8))  # uniform u, before the shift


class Reconstruction:
    """One held-out clip with what the VAEs make of it."""

    def __init__(self, index: int, video_vae: VideoVAE, audio_vae: AudioVAE):
        clip = make_clip(HELD_OUT_SEED, index)
        frames, audio = small_clip(clip)
        self.facts: ClipFacts = clip.facts
        self.source = frames[FIRST_FRAME:FIRST_FRAME + WINDOW_FRAMES]  # (49,64,96,3)
        start = time.perf_counter()
        self.video, self.mean, self.std = encode_clip(video_vae, audio_vae, frames, audio)
        self.encode_seconds = time.perf_counter() - start
        decoded = video_vae.decode(self.video)[0].permute(1, 2, 3, 0).numpy()
        self.decoded = np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8)
        self.wave = window_of(audio)[0].numpy()  # (2,32768)
        self.decoded_wave = audio_vae.decode(self.mean)[0].numpy()


def reconstruct(indices: range) -> list[Reconstruction]:
    video_vae = VideoVAE.from_folder(recipe.WAN, "cpu")
    audio_vae = AudioVAE.from_folder(recipe.TANGOFLUX, "cpu")
    return [Reconstruction(index, video_vae, audio_vae) for index in indices]


def vae_quality(clips: list[Reconstruction]) -> dict:
    """PSNR, centre errors (pixels at 96x64), onset errors (ms), latent scale, encode time."""
    by_class: dict[str, list[float]] = {"tight": [], "loose": []}
    for clip in clips:
        by_class[clip.facts.clip_class].append(scores.psnr(clip.decoded, clip.source))
    every = by_class["tight"] + by_class["loose"]
    centre = np.concatenate([scores.centre_errors(c.decoded, c.source, c.facts) for c in clips])
    onset = np.concatenate(
        [scores.onset_errors(c.decoded_wave, c.wave, c.facts) for c in clips]
    )
    means = torch.cat([c.mean for c in clips])
    return {
        "clips": len(clips),
        "psnr_db": {"mean": float(np.mean(every)), "worst": min(every)}
        | {name: float(np.mean(values)) for name, values in by_class.items() if values},
        "ball_centre_error_px": _spread(centre)
        | {"missed_share": float((centre == scores.MISSED_PIXELS).mean())},
        "onset_error_ms": _spread(onset) | {"within_20_ms": float((onset <= 20).mean())},
        "audio_latent_std": float(means.std()),
        "encode_seconds_per_clip": float(np.median([c.encode_seconds for c in clips])),
    }


def _spread(values: np.ndarray) -> dict:
    return {
        "count": len(values), "mean": float(values.mean()), "median": float(np.median(values)),
        "p90": float(np.percentile(values, 90)),
    }


@torch.no_grad()
def _pooled(encoder: VideoTextEncoder | AudioTextEncoder, captions: list[str]) -> torch.Tensor:
    """Mean of the true tokens' states (N,D)."""
    if isinstance(encoder, VideoTextEncoder):
        return torch.stack([rows.mean(0) for rows in encoder.encode(captions)])
    states, mask = encoder.encode(captions)
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1)


def text_quality(train: int = PROBE_TRAIN, test: int = PROBE_TEST) -> dict:
    """Accuracy of linear probes fitted on training-seed captions, tested on held-out ones."""
    fit = [describe(1, 200_000 + index) for index in range(train)]
    held = [describe(HELD_OUT_SEED, 1000 + index) for index in range(test)]
    video = VideoTextEncoder.from_folder(recipe.WAN, "cpu", max_length=64)
    audio = AudioTextEncoder.from_folder(recipe.TANGOFLUX, "cpu")
    x = [_pooled(video, [f.video_caption for f in facts]) for facts in (fit, held)]
    y = [torch.tensor([text.video_labels(f) for f in facts]) for facts in (fit, held)]
    right = [scores.probe(x[0], y[0][:, i], x[1], y[1][:, i]) for i in range(y[0].shape[1])]
    x = [_pooled(audio, [f.audio_caption for f in facts]) for facts in (fit, held)]
    y = [torch.tensor([text.audio_labels(f) for f in facts]) for facts in (fit, held)]
    heard = [scores.probe(x[0], y[0][:, i], x[1], y[1][:, i]) for i in range(y[0].shape[1])]
    names = ("count", "material", "motion", "ambience")
    return {
        "captions": test,
        "video": {"colours": scores.colour_set_right(right)}
        | {name: float(r.float().mean()) for name, r in zip(names, right[6:], strict=True)},
        "audio": {
            name: float(r.float().mean())
            for name, r in zip(("material", "number", "ambience"), heard, strict=True)
        },
    }


def load_towers() -> tuple[VideoTower, AudioTower]:
    """Both towers from the shipped files."""
    video, audio = VideoTower().eval(), AudioTower().eval()
    video.load()
    audio.load()
    return video, audio


def held_out_latents(clips: list[Reconstruction]) -> Latents:
    facts = [clip.facts for clip in clips]
    texts = encode_captions([f.video_caption for f in facts], [f.audio_caption for f in facts])
    return Latents(
        torch.cat([c.video for c in clips]), torch.cat([c.mean for c in clips]),
        torch.cat([c.std for c in clips]), *texts,
    )


@torch.no_grad()
def caption_gain(tower: VideoTower | AudioTower, latents: Latents) -> scores.CaptionGain:
    """Loss with right and with shuffled captions, same t and noise for both."""
    count = len(latents.video)
    other = torch.arange(count).roll(count // 2 + 1)
    shuffled = latents._replace(
        video_text=latents.video_text[other], audio_text=latents.audio_text[other],
        audio_text_mask=latents.audio_text_mask[other],
    )
    torch.manual_seed(0)
    right, wrong = torch.zeros(count), torch.zeros(count)
    for level in NOISE_LEVELS:
        u, noise = torch.full((count,), level), tower.draw_noise(latents)
        right += tower.loss(latents, u, noise) / len(NOISE_LEVELS)
        wrong += tower.loss(shuffled, u, noise) / len(NOISE_LEVELS)
    wins = float((right < wrong).float().mean())
    return scores.CaptionGain(float(right.mean()), float(wrong.mean()), wins)


@torch.no_grad()
def sampled_quality(tower: VideoTower, shape: torch.Size, count: int = SAMPLED) -> dict:
    """What the tracker makes of clips that the tower alone draws from held-out tight captions.

    shape: (C,F,h,w) of one clip's latents.
    """
    facts = [describe(HELD_OUT_SEED, 2000 + index) for index in range(2 * count)]
    facts = [f for f in facts if f.clip_class == "tight"][:count]
    texts = encode_captions([f.video_caption for f in facts] + [""], [""] * (count + 1)).video
    vae = VideoVAE.from_folder(recipe.WAN, "cpu")
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))

    def velocity(
        video: torch.Tensor, t: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        with torch.autocast("cpu", torch.bfloat16):
            return tower.model(video, t, text)[0].float(), None

    latents, _ = sample(
        velocity, Prompts(texts[:count]), Prompts(texts[count:].expand(count, -1, -1)), noise,
        shift=VIDEO_FLOW.shift, guidance_video=GUIDANCE,
    )
    decoded = (vae.decode(one[None])[0].permute(1, 2, 3, 0).numpy() for one in latents)
    silence = np.zeros((2, SAMPLE_RATE), np.float32)
    found = judge([
        (f, np.clip(np.round((frames + 1) * 127.5), 0, 255).astype(np.uint8), silence)
        for f, frames in zip(facts, decoded, strict=True)
    ])
    keys = ("clips", "colours_right", "count_right", "both_right", "gravity")
    return {"guidance": GUIDANCE} | {key: found[key] for key in keys}


def _sizes() -> dict:
    files = sorted(recipe.WEIGHTS.rglob("*.safetensors"))
    sizes = {str(path.relative_to(recipe.WEIGHTS)): path.stat().st_size for path in files}
    return {"files": sizes, "total_mb": round(sum(sizes.values()) / 1e6, 2)}


def write_report(quality: dict, path: Path) -> None:
    """QUALITY.md: the numbers of quality.json against what is asked of them."""
    vae, words, towers = quality["vae"], quality["text"], quality["towers"]
    fold = quality["video_fold"]
    centre, onset = vae["ball_centre_error_px"], vae["onset_error_ms"]
    rows = [
        ("video PSNR, mean (dB)", f"{vae['psnr_db']['mean']:.2f}", ">= 24"),
        ("video PSNR, tight / loose (dB)",
         f"{vae['psnr_db']['tight']:.2f} / {vae['psnr_db']['loose']:.2f}", ""),
        ("ball centre error, mean / p90 (px at 96x64)",
         f"{centre['mean']:.2f} / {centre['p90']:.2f}", "<= 2"),
        ("balls lost in decoding (share of frames)", f"{centre['missed_share']:.4f}", ""),
        ("impact onset error, median / p90 (ms)",
         f"{onset['median']:.1f} / {onset['p90']:.1f}", "<= 20"),
        ("impacts within 20 ms", f"{onset['within_20_ms']:.3f}", ""),
        ("audio latent std", f"{vae['audio_latent_std']:.2f}", "about 1"),
    ]
    rows += [(f"probe, video caption: {k}", f"{v:.3f}", ">= 0.95" if k != "motion" else "")
             for k, v in words["video"].items()]
    rows += [(f"probe, audio caption: {k}", f"{v:.3f}", ">= 0.95" if k == "material" else "")
             for k, v in words["audio"].items()]
    for name, gain in towers.items():
        rows.append((f"{name} tower: loss, right / shuffled captions",
                     f"{gain['right']:.4f} / {gain['shuffled']:.4f}", "right < shuffled"))
        rows.append((f"{name} tower: clips where right wins", f"{gain['wins']:.2f}", ""))
    drawn = quality["sampled"]
    rows += [
        (f"video tower: {drawn['clips']} clips at guidance {drawn['guidance']:g}, right "
         "colours / count / both", f"{drawn['colours_right']:.2f} / {drawn['count_right']:.2f} / "
         f"{drawn['both_right']:.2f}", ">= 0.80"),
        ("video tower: fall in free flight (px / frame^2)",
         f"{drawn['gravity']['median']:.3f}", f"{drawn['gravity']['asked']:.3f}"),
    ]
    training = {k: v for k, v in quality.items() if k.endswith("_training")}
    lines = [
        "# Quality of the built-in world's backbones", "",
        f"Measured by `python -m playground.backbones measure` on {vae['clips']} held-out clips "
        f"and {words['captions']} held-out captions (seed {HELD_OUT_SEED}; training uses "
        "seed 1).", "",
        "| what | measured | asked |", "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows), "",
        "Training on CPU threads (see `python -m playground.backbones --help`):", "",
        "| command | minutes | threads | steps |", "| --- | --- | --- | --- |",
        *(f"| {k.removesuffix('_training')} | {v['minutes']:g} | {v.get('threads', 1)} "
          f"| {v['steps']} |" for k, v in training.items()), "",
        *(v["note"] + "\n" for v in training.values() if "note" in v),
        f"video_fold: to {fold['channels']} channels, which hold {fold['variance_kept']:.4f} of "
        "the variance.\n",
        f"All files together: {quality['sizes']['total_mb']} MB, fp16 safetensors.",
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    clips = reconstruct(range(CLIPS))
    recipe.note("vae", vae_quality(clips))
    recipe.note("text", text_quality())
    latents = held_out_latents(clips)
    video, audio = load_towers()
    gains = {"video": caption_gain(video, latents), "audio": caption_gain(audio, latents)}
    recipe.note("towers", {name: gain._asdict() for name, gain in gains.items()})
    recipe.note("sampled", sampled_quality(video, latents.video.shape[1:]))
    recipe.note("sizes", _sizes())
    quality = recipe.load_json(recipe.WEIGHTS / "quality.json")
    write_report(quality, recipe.WEIGHTS / "QUALITY.md")
    print((recipe.WEIGHTS / "QUALITY.md").read_text())
