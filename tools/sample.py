"""Draw clips from a run: `python -m tools.sample RUN --prompts prompts.jsonl`.

One H.264 + AAC mp4 and one contact sheet per prompt, under RUN/samples/stepXXXXXXXX_sampled, or
stepXXXXXXXX_ema with --ema: without an ending they are training's own. RUN is a run directory or a
folder that tools.export wrote. A prompt is an object a line with `video_caption`, `audio_caption`
and optionally `id`, so a clip manifest works as it is. Noise is keyed by (seed, prompt's place): a
t2v run draws from the video noise of its twin.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.settings import ConfigError, parse_config
from data.manifest import check_text
from data.prepare import AUDIO_NEGATIVE, VIDEO_NEGATIVE
from data.schema import DataError, Metadata
from evaluation.render import Decoders, write_files
from evaluation.trained_run import load_model, read_run_file, read_setting
from model.encoders import AudioTextEncoder, VideoTextEncoder
from model.flow import FlowConfig, keyed_normal, shifted_audio_t
from model.sampling import Prompts, sample
from model.weights.hub import one_line_errors
from training.checkpoint.retention import tag_of
from training.checkpoint.save_load import CheckpointError


class Prompt(NamedTuple):
    """A caption of the picture and one of the sound."""

    name: str
    video_caption: str
    audio_caption: str


def read_prompts(path: Path, split: str | None, count: int | None) -> list[Prompt]:
    """Prompts from JSON lines.

    Raises:
        ConfigError: naming the file, the line, and the key or id that cannot be used.
    """
    if not path.is_file():
        raise ConfigError(f"--prompts={path}: no such file; give JSON lines with video_caption "
                          "and audio_caption")
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}  # name -> line
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _parse_record(line, where)
        if split and record.get("split", "train") != split:
            continue
        for key in ("video_caption", "audio_caption"):
            if key not in record:
                raise ConfigError(f"{where}: key '{key}' is missing; add it")
            if not isinstance(record[key], str):
                raise ConfigError(f"{where}: key '{key}' is not a string; put it in quotes")
        name = str(record.get("id", f"prompt{len(prompts):03d}")).replace("/", "_")
        if lines.setdefault(name, number) != number:  # its clip would be overwritten
            raise ConfigError(f"{where}: id '{name}' is taken by line {lines[name]}; ids name the "
                              "files, '/' as '_': give another")
        prompts.append(Prompt(name, record["video_caption"], record["audio_caption"]))
    if not prompts:
        chosen = f" of split '{split}'" if split else ""
        raise ConfigError(f"--prompts={path}: no prompt{chosen}; add one line per prompt")
    return prompts[:count]


def _parse_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: a JSON {type(record).__name__}, not an object; write "
                          '{"video_caption": "...", "audio_caption": "..."}')
    try:
        check_text(record)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return record


class Sampler:
    """A trained model with the frozen encoders and decoders around it.

    Raises, each in one line: ConfigError (a file of RUN/config), CheckpointError (weights),
    DataError (the backbones that the run names).
    """

    def __init__(
        self, run_dir: Path, step: int | None, device: torch.device, ema: bool = False
    ) -> None:
        config = run_dir / "config"
        run, where = read_run_file(config / "run.json"), config / "run.json"
        data = read_run_file(config / "data.json")
        self.metadata = parse_config(Metadata, data, f"{config}/data.json")
        self.device, self.task = device, read_setting(run, where, "task")
        self.shift = read_setting(run, where, "flow", "shift")
        flow = parse_config(FlowConfig, run["flow"], f"{where}: flow")
        shifted = flow.audio_t == "shifted"  # then audio's t is a function of the video's
        self.audio_t = partial(shifted_audio_t, flow) if shifted else None
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        attention = read_setting(run, where, "attention")
        self.step, self.model = load_model(run_dir, step, attention, dtype, device, ema)
        self.model.eval()
        with one_line_errors(ConfigError, str(where)):
            self.kernel = self.model.attention_kernel  # the run's own choice, or an error
        wan, length = read_setting(run, where, "wan"), self.metadata.video_text_length
        with one_line_errors(DataError, f"wan={wan}"):
            self.video_text = VideoTextEncoder.from_folder(wan, device, max_length=length)
        tangoflux = read_setting(run, where, "tangoflux") if self.task == "t2av" else None
        if tangoflux:
            with one_line_errors(DataError, f"tangoflux={tangoflux}"):
                self.audio_text = AudioTextEncoder.from_folder(tangoflux, device)
        self.decoders = Decoders(wan, tangoflux, device)

    def encode(self, video_caption: str, audio_caption: str) -> Prompts:
        """Text states of one prompt as the model takes them, batch 1."""
        rows = self.video_text.encode([video_caption])[0]  # (n, D)
        video = rows.new_zeros(1, self.metadata.video_text_length, rows.shape[1])
        video[0, : len(rows)] = rows
        if self.task == "t2v":
            return Prompts(video)
        states, mask = self.audio_text.encode([audio_caption])
        return Prompts(video, states, mask)

    def draw(
        self, prompt: Prompt, negative: Prompts, place: int, arguments: argparse.Namespace
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Frames (T, H, W, 3) uint8 and sound (N, 2) float, or None in a t2v run."""
        data, key = self.metadata, (arguments.seed, 0, [f"sample {place}"])
        audio_noise = duration = None
        if self.task == "t2av":
            audio_noise = keyed_normal("audio_noise", *key, data.audio_latent_shape, self.device)
            duration = torch.tensor([data.duration], device=self.device)
        with tqdm(total=arguments.num_steps, desc=prompt.name, leave=False,
                  disable=not sys.stderr.isatty()) as bar:
            video, audio = sample(
                self.model,
                self.encode(prompt.video_caption, prompt.audio_caption),
                negative,
                keyed_normal("video_noise", *key, data.video_latent_shape, self.device),
                audio_noise,
                duration,
                num_steps=arguments.num_steps,
                shift=self.shift,
                guidance_video=arguments.guidance_video,
                guidance_audio=arguments.guidance_audio,
                audio_t=self.audio_t,
                on_step=lambda done, total: bar.update(),
            )
        return self.decoders.clip(video, audio, data.duration, data.sample_rate)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.sample", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory of train.py")
    parser.add_argument("--prompts", type=Path, help="JSON lines: video_caption, audio_caption")
    parser.add_argument("--split", help="only prompts of this split of a manifest")
    parser.add_argument("--count", type=int, help="only the first COUNT prompts")
    parser.add_argument("--video-prompt", help="one prompt from the command line")
    parser.add_argument("--audio-prompt", default="")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (ema_decay)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--guidance-video", type=float, default=5.0)
    parser.add_argument("--guidance-audio", type=float, default=4.5)
    parser.add_argument("--negative-video", default=VIDEO_NEGATIVE, help="default: Wan's own")
    parser.add_argument("--negative-audio", default=AUDIO_NEGATIVE)
    parser.add_argument("--out", type=Path,
                        help="default: RUN/samples/stepXXXXXXXX_sampled, with --ema ..._ema")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    for key in ("count", "num_steps"):
        value = getattr(arguments, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key.replace('_', '-')}={value}: must be at least 1")
    if (arguments.prompts is None) == (arguments.video_prompt is None):
        raise ConfigError("give either --prompts FILE or --video-prompt TEXT")
    prompts = (
        read_prompts(arguments.prompts, arguments.split, arguments.count) if arguments.prompts
        else [Prompt("prompt", arguments.video_prompt, arguments.audio_prompt)]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampler = Sampler(arguments.run, arguments.step, device, arguments.ema)
    print(f"step {sampler.step} on {sampler.device}, attention {sampler.kernel}", flush=True)
    # An ending of its own: what training drew at this step stays as it was drawn.
    name = tag_of(sampler.step) + ("_ema" if arguments.ema else "_sampled")
    out = arguments.out or arguments.run / "samples" / name
    out.mkdir(parents=True, exist_ok=True)
    negative = sampler.encode(arguments.negative_video, arguments.negative_audio)
    data = sampler.metadata
    for place, prompt in enumerate(prompts):
        frames, sound = sampler.draw(prompt, negative, place, arguments)
        path = out / f"{prompt.name}.mp4"
        title = f"{prompt.video_caption}  |  {prompt.audio_caption}"
        write_files(path, frames, data.fps, sound, data.sample_rate, title)
        print(f"{path}  (sheet {path.with_suffix('.png')})", flush=True)


def main() -> int:
    try:
        run(parse_arguments(None))
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
