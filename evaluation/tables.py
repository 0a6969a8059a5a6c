"""The tables of a run report: what one asks first, and what made the weights.

Called by tools.report.
"""

import html
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from common.durations import as_clock
from common.settings import ConfigError, parse_config
from data.loading.sources import DataConfig
from evaluation.plots import Curves
from evaluation.trained_run import RESTORE, read_run_file, read_setting
from model import AVFullDiT, AVFullDiTConfig
from model.variants import CHOICES
from model.weights.hub import one_line_errors
from model.weights.names import part_of
from training.engine import count_by
from training.guards.run_state import read_state


def table(header: list[str], rows: list[list[str]]) -> str:
    """Text as an HTML table, whose rows begin with their names."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def summary_table(runs: list[tuple[Path, Curves]]) -> str:
    """What one asks first, a column per run."""
    rows: dict[str, list[str]] = {}
    for run_dir, curves in runs:
        steps, _ = curves.points("train/loss")
        _, seconds = curves.points("time/step_seconds")
        rows.setdefault("run directory", []).append(str(run_dir))
        task = read_run_file(run_dir / "config" / "run.json")["task"]
        rows.setdefault("task", []).append(task)
        rows.setdefault("steps", []).append(str(steps[-1]) if len(steps) else "none")
        for modality in ("video", "audio"):  # their sum does not compare with the twin's video
            _, loss = curves.points(f"train/loss_{modality}")
            rows.setdefault(f"last training {modality} loss", []).append(
                f"{loss[-1]:.4f}" if len(loss) else "")
        for modality in ("video", "audio"):
            at, values = curves.points(f"validation/loss_{modality}")
            said = ""
            if len(values):
                best = int(values.argmin())
                said = (f"{values[0]:.4f} at step {at[0]}; {values[-1]:.4f} at step {at[-1]}; "
                        f"best {values[best]:.4f} at step {at[best]}")
            rows.setdefault(f"validation {modality} loss", []).append(said)
        rate = curves.points("throughput/samples_per_second")[1]
        rows.setdefault("samples/s, median", []).append(
            f"{statistics.median(rate):.3g}" if len(rate) else "")
        rows.setdefault("time in steps", []).append(
            as_clock(float(statistics.median(seconds) * steps[-1])) if len(steps) else "")
        rows.setdefault("starts", []).append(str(len(read_state(run_dir).cards)))
    return table([], [[name, *values] for name, values in rows.items()])


def model_table(run_dir: Path) -> str:
    """The parts that gradients are reported by, their parameters and structure.

    Raises:
        ConfigError: RUN/config/model.json is missing or does not describe a model.
    """
    path = run_dir / "config" / "model.json"
    with one_line_errors(ConfigError, str(path), RESTORE), torch.device("meta"):
        config = AVFullDiTConfig.from_dict(read_run_file(path))
        counts = count_by(AVFullDiT(config, attention="sdpa"), part_of)
    video, audio, joint = config.video, config.audio, config.num_joint_blocks
    about = {"video tower": f"{video.num_layers} blocks, width {_width(video)}"}
    if config.task == "t2av" and audio is not None:
        about |= {
            "audio tower": f"{audio.num_layers} double and {audio.num_single_layers} single "
                           f"blocks, width {_width(audio)}",
            "joint blocks, new weights": f"{joint} of the blocks of each; " + ", ".join(
                f"{key} {getattr(config, key)}" for key in CHOICES),
        }
    names = ("video_tower", "audio_tower", "joint_new")
    rows = [[name, f"{counts[part]:,}", said]
            for (name, said), part in zip(about.items(), names, strict=False)]
    return table(["part", "parameters", "structure"],
                 [*rows, ["all", f"{sum(counts.values()):,}", ""]])


def _width(tower: Any) -> str:
    heads, size = tower.num_attention_heads, tower.attention_head_dim
    return f"{heads * size} = {heads} heads x {size}"


def data_table(run_dir: Path) -> str:
    """A row per stream: what its samples are, and the version that the last start read.

    Raises:
        ConfigError: a file of RUN/config is missing or damaged.
    """
    folder = run_dir / "config"
    path = folder / "run.json"
    config = parse_config(DataConfig, read_setting(read_run_file(path), path, "data"), str(path))
    streams, starts = config.all_streams, read_state(run_dir).cards
    # data.json is the first stream's, by which sampling goes; streams.json has all by their names.
    known = (read_run_file(folder / "streams.json") if (folder / "streams.json").is_file()
             else {streams[0].label: read_run_file(folder / "data.json")})
    proportions = sum(stream.proportion or 0 for stream in streams)
    rows = []
    for stream in streams:
        share = f"{stream.proportion / proportions:.0%}" if stream.proportion else "every sample"
        held = _describe(known[stream.label]) if stream.label in known else ["not recorded"] * 4
        version = starts[-1].get("data", {}).get(stream.label, "") if starts else ""
        rows.append([stream.label, stream.place, share.replace("%", " %"), *held, version])
    return table(["stream", "place", "share of an epoch", "sample", "samples", "hours",
                  "left out when prepared", "version"], rows)


def _describe(metadata: dict[str, Any]) -> list[str]:
    """What a stream's dataset.json says: its sample, their counts and hours, and the rejects."""
    counts, rejected = metadata["counts"], metadata["rejected"]
    hours = sum(counts.values()) * metadata["frames"] / metadata["fps"] / 3600
    why = ", ".join(f"{reason} {clips:,}" for reason, clips in rejected.items())
    return [
        f"{metadata['frames']} frames at {metadata['fps']:g} fps, "
        f"{metadata['height']} x {metadata['width']}",
        ", ".join(f"{split} {samples:,}" for split, samples in counts.items()),
        f"{hours:.2f}",
        f"{sum(rejected.values()):,}" + (f": {why}" if why else ""),
    ]


def card_section(run_dir: Path, label: str) -> str:
    """What made the weights: the model, the data, every start and setting."""
    parts = [f"<h2>How {html.escape(label)} was made</h2>",
             f"<h3>Model</h3>{model_table(run_dir)}<h3>Data</h3>{data_table(run_dir)}"]
    for start in read_state(run_dir).cards:
        title = f"start of {start['time']} at step {start['first_step']}"
        parts.append(_folded(title, start))
    for path in sorted((run_dir / "config").glob("*.json")):
        parts.append(_folded(path.name, json.loads(path.read_text(encoding="utf-8"))))
    return "".join(parts)


def _folded(title: str, values: Any) -> str:
    text = html.escape(json.dumps(values, indent=1, ensure_ascii=False))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"
