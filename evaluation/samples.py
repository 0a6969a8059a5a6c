"""Samples of a training that runs: fixed prompts and seeds, drawn by all ranks together.

The prompts are validation samples, whose caption states are stored with them, so that no text
encoder is loaded next to the model; the noise is that of `tools.sample` with the same captions.
Every rank draws its share with the same calls in the same order, as ZeRO-3 needs, then decodes it;
the decoders are on the device only for that. The first prompt is drawn twice more: at guidance 1,
and with the audio stream cut off, which shows whether sound changes the picture. Called by
train.py.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.files import write_json
from common.ranks import World
from data.loading.loader import ValidationSet
from evaluation.gallery import CAPTIONS, write_gallery
from evaluation.render import Decoders, write_files, write_gif, write_wav
from model.flow import FlowConfig, keyed_normal, shifted_audio_t
from model.objective import Batch
from model.sampling import Prompts, sample
from training.guards.optional import Attempt
from training.metrics.tensorboard import Events


@dataclass(frozen=True)
class Preview:
    """How samples are drawn, and from what.

    Args:
        wan, tangoflux: folders with the decoders; tangoflux None in t2v.
        text_states: the data set's empty and negative prompts (`data.schema.load_text_states`).
    """

    run_dir: Path
    validation_set: ValidationSet
    wan: str
    tangoflux: str | None
    text_states: dict[str, torch.Tensor]
    flow: FlowConfig
    seed: int
    count: int
    num_steps: int
    guidance_video: float
    guidance_audio: float
    negative_prompts: bool


class DrawnClip(NamedTuple):
    """One clip as latents on the host."""

    name: str
    title: str
    seconds: float
    video: torch.Tensor
    audio: torch.Tensor | None


def draw_previews(
    preview: Preview, engine: Any, step: int, world: World,
    on_clip: Callable[[], None],
) -> Path | None:
    """Draw, decode and write RUN/samples/stepXXXXXXXX; a collective.

    Returns: the folder, or None on ranks that do not write the index.

    Raises:
        AttemptError: on every rank, when any rank could not draw, decode or write.
    """
    prompts = _read_prompts(preview, step)
    drawing = Attempt(world, engine.zero_optimization_stage() == 3)
    engine.eval()
    try:
        drawn = _draw(preview, engine, prompts, world, on_clip, drawing)
    finally:
        engine.train()
    drawing.settle()
    samples = preview.run_dir / "samples"
    real = [] if (samples / "validation" / CAPTIONS).is_file() else _stored(prompts, world)
    on_clip()
    clips = {f"step{step:08d}": drawn, "validation": real}
    captions = {_name(place, batch): _title(record)
                for place, (batch, record) in enumerate(prompts)}
    writing = Attempt(world, gathers=False)
    with writing.part():
        _decode(preview, engine.device, clips)
    writing.settle()
    with writing.part():
        if world.is_main:
            for folder in clips:
                write_json(samples / folder / CAPTIONS, captions)
            write_gallery(samples, preview.run_dir.name)
    writing.settle()
    return samples / f"step{step:08d}" if world.is_main else None


def _read_prompts(preview: Preview, step: int) -> list[tuple[Batch, dict[str, Any]]]:
    """The first validation samples, each a batch of its own; every rank reads all."""
    samples = preview.validation_set
    return [(samples.batch([place], step), samples.records([place])[0])
            for place in range(min(preview.count, len(samples)))]


def _name(place: int, batch: Batch) -> str:
    return f"{place:02d}_{batch.sample_ids[0].replace('/', '_')}"


def _title(record: dict[str, Any]) -> str:
    said = [str(record[key]) for key in ("video_caption", "audio_caption") if key in record]
    return "  |  ".join(said) or str(record.get("id", ""))


def _draw(
    preview: Preview, engine: Any, prompts: list[tuple[Batch, dict[str, Any]]], world: World,
    on_clip: Callable[[], None], drawing: Attempt,
) -> list[DrawnClip]:
    """This rank's clips. All ranks go through the same rounds: some draw a clip they drop."""
    rounds: list[tuple[str, int, dict[str, Any]]] = [("", len(prompts), {}), ("_guidance1", 1, {})]
    if preview.tangoflux:
        rounds.append(("_no_sound", 1, {"cross_modal": False}))
    kept = []
    for suffix, count, more in rounds:
        scales = (1.0, 1.0) if suffix == "_guidance1" else (
            preview.guidance_video, preview.guidance_audio)
        for turn in range(-(-count // world.world_size)):
            place = world.rank + turn * world.world_size
            batch, record = prompts[place % count]
            on_clip()
            with drawing.part():
                video, audio = _sample(preview, partial(engine, **more), engine.device,
                                       batch, place % count, scales)
                if place < count:
                    kept.append(DrawnClip(_name(place, batch) + suffix, _title(record),
                                      float(batch.duration[0]), video, audio))
    return kept


def _sample(
    preview: Preview, model: Callable[..., Any], device: torch.device, batch: Batch, place: int,
    scales: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    key, sound = (preview.seed, 0, [f"sample {place}"]), preview.tangoflux is not None
    audio_noise = keyed_normal(
        "audio_noise", *key, batch.audio_mean.shape[1:], device) if sound else None
    kind = "negative" if preview.negative_prompts else "empty"
    rows, audio_text, audio_mask = (
        preview.text_states[name] for name in
        (f"video_{kind}", f"audio_{kind}", f"audio_{kind}_mask"))
    text = batch.padded_video_text
    other = torch.zeros_like(text)
    other[0, : len(rows)] = rows
    shifted = preview.flow.audio_t == "shifted"
    video, audio = sample(
        model,
        Prompts(text.to(device), batch.audio_text.to(device),
                batch.audio_text_mask.to(device)),
        Prompts(other.to(device), audio_text[None].to(device), audio_mask[None].to(device)),
        keyed_normal("video_noise", *key, batch.video_latents.shape[1:], device),
        audio_noise,
        batch.duration.to(device) if sound else None,
        num_steps=preview.num_steps,
        shift=preview.flow.shift,
        guidance_video=scales[0],
        guidance_audio=scales[1],
        audio_t=partial(shifted_audio_t, preview.flow) if shifted else None,
    )
    return video.cpu(), None if audio is None else audio.cpu()


def _stored(prompts: list[tuple[Batch, dict[str, Any]]], world: World) -> list[DrawnClip]:
    """The validation clips themselves, as the frozen autoencoders give them back; in turn."""
    return [
        DrawnClip(_name(place, batch), f"validation clip: {_title(record)}",
                  float(batch.duration[0]), batch.video_latents,
                  batch.audio_mean if batch.has_audio[0] else None)
        for place, (batch, record) in enumerate(prompts)
        if place % world.world_size == world.rank
    ]


def _decode(preview: Preview, device: torch.device, clips: dict[str, list[DrawnClip]]) -> None:
    """Write this rank's clips."""
    data = preview.validation_set.opened[0].metadata
    decoders: Decoders | None = None
    try:
        decoders = Decoders(preview.wan, preview.tangoflux, device)
        for folder, drawn in clips.items():
            place = preview.run_dir / "samples" / folder
            place.mkdir(parents=True, exist_ok=True)
            for clip in drawn:
                path = place / f"{clip.name}.mp4"
                frames, sound = decoders.clip(
                    clip.video, clip.audio, clip.seconds, data.sample_rate)
                write_files(path, frames, data.fps, sound, data.sample_rate, clip.title)
                write_gif(path.with_suffix(".gif"), frames, data.fps)
                if sound is not None:
                    write_wav(path.with_suffix(".wav"), sound, data.sample_rate)
    finally:
        decoders = None  # the device is training's again
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def log_previews(folder: Path, step: int, events: Events, sample_rate: int) -> None:
    """A step's finished files into TensorBoard: sheet and moving picture, and the sound."""
    for clip in sorted(folder.glob("*.mp4")):
        tag = f"samples/{clip.stem}"
        events.picture(step, f"{tag}/sheet", clip.with_suffix(".png").read_bytes())
        events.picture(step, f"{tag}/clip", clip.with_suffix(".gif").read_bytes())
        sound = clip.with_suffix(".wav")
        if sound.is_file():
            data = sound.read_bytes()
            events.sound(step, f"{tag}/sound", data, sample_rate, (len(data) - 44) // 4)
