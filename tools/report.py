"""One HTML page about a run, or about two: `python -m tools.report RUN [RUN_B] [--out FILE]`.

Curves, held-out loss by t, throughput with restarts, the last samples with their sound, what was
configured and what made the weights; everything is inside the file, which opens offline. With two
runs every plot holds both, and the paired difference of their held-out losses comes with its
interval: made for a t2av run and its t2v twin. `--reference metrics.jsonl` draws another run's
curves beside them, and `--overlay` puts them beside RUN/tb for TensorBoard.
"""

import argparse
import base64
import html
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from tools.export import read_run_file
from tools.gallery import CAPTIONS
from tools.paired import bootstrap, differences
from tools.plots import (
    COLOURS,
    REFERENCE,
    Curves,
    load_curves,
    plot_attention,
    plot_by_t,
    plot_difference,
    plot_held_out,
    plot_tags,
    shared_steps,
)
from training.config import ConfigError
from training.events import Events
from training.metrics import format_seconds
from training.run_dir import read_lines

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
.plots { display: flex; flex-wrap: wrap; gap: 1em } .plots svg { width: 560px; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top }
.samples { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 560px }
video { width: 270px; background: #eee } img { width: 560px } figcaption { color: #666 }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12px }
"""
FEW = 6  # samples in the page


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The reproducibility card: one entry per start of the run."""
    return read_lines(run_dir / "config" / "starts.jsonl")


def summary_table(runs: list[tuple[Path, Curves]]) -> str:
    """What one asks first, a column per run."""
    rows: dict[str, list[str]] = {}
    for run_dir, curves in runs:
        steps, loss = curves.points("train/loss")
        _, seconds = curves.points("time/step_seconds")
        rows.setdefault("run directory", []).append(str(run_dir))
        task = read_run_file(run_dir / "config" / "run.json")["task"]
        rows.setdefault("task", []).append(task)
        rows.setdefault("steps", []).append(str(steps[-1]) if len(steps) else "none")
        rows.setdefault("last training loss", []).append(f"{loss[-1]:.4f}" if len(loss) else "")
        for modality in ("video", "audio"):
            at, values = curves.points(f"validation/loss_{modality}")
            said = ""
            if len(values):
                best = int(values.argmin())
                said = (f"{values[0]:.4f} at step {at[0]}; {values[-1]:.4f} at step {at[-1]}; "
                        f"best {values[best]:.4f} at step {at[best]}")
            rows.setdefault(f"held-out {modality} loss", []).append(said)
        rate = curves.points("throughput/samples_per_second")[1]
        rows.setdefault("samples/s, median", []).append(
            f"{statistics.median(rate):.3g}" if len(rate) else "")
        rows.setdefault("time in steps", []).append(
            format_seconds(float(statistics.median(seconds) * steps[-1])) if len(steps) else "")
        rows.setdefault("starts", []).append(str(len(read_starts(run_dir))))
    cells = ("".join(f"<td>{html.escape(value)}</td>" for value in values)
             for values in rows.values())
    return "<table>" + "".join(f"<tr><th>{name}</th>{cell}</tr>"
                               for name, cell in zip(rows, cells, strict=True)) + "</table>"


def paired_section(run_a: Path, run_b: Path) -> str:
    """The difference of the video's held-out loss, sample by sample."""
    steps = shared_steps(run_a, run_b)
    rows = []
    for step in steps:
        values = differences(run_a, run_b, step)
        if not len(values):
            continue
        mean, first, last = (bootstrap(part) for part in (
            values.mean(axis=1), values[:, 0], values[:, -1]))
        rows.append(f"<tr><td>{step}</td><td>{mean.samples}</td>" + "".join(
            f"<td>{d.mean:+.5f} [{d.low:+.5f}, {d.high:+.5f}]</td>"
            for d in (mean, first, last)) + "</tr>")
    if not rows:
        return "<p>The runs share no held-out sample at any step: nothing can be paired.</p>"
    return (
        "<p>Loss of B minus loss of A on the same samples, t and noise; below 0, B is better. "
        "Brackets: 95 % bootstrap interval over samples.</p>"
        f"<div class=plots>{plot_difference(run_a, run_b, steps)}</div>"
        "<table><tr><th>step</th><th>samples</th><th>mean over t</th><th>lowest t</th>"
        f"<th>highest t</th></tr>{''.join(rows)}</table>"
    )


def plots_section(runs: list[Curves], references: list[Curves]) -> str:
    everyone = [*runs, *references]
    modalities = [m for m in ("video", "audio")
                  if any(len(run.points(f"train/loss_{m}")[0]) for run in everyone)]
    drawn = [plot_tags(everyone, {f"train/loss_{m}": m}, f"training loss, {m}") for m in modalities]
    drawn += [plot_held_out(everyone, m) for m in modalities]
    drawn += [plot_by_t(everyone, m) for m in modalities]
    parts = ("video_tower", "audio_tower", "joint_new")
    drawn += [
        plot_tags(runs, {f"train/grad_norm_{part}": part.replace("_", " ") for part in parts},
                  "gradient norm by part", log=True),
        plot_tags(runs, {f"health/update_ratio_{part}": part.replace("_", " ") for part in parts},
                  "update / weights by part", log=True),
        plot_tags(runs, {"throughput/samples_per_second": ""},
                  "samples per second (dotted: restarts)", restarts=True),
        plot_tags(runs, {"time/step_seconds": "step", "time/data_seconds": "waiting for data"},
                  "seconds of a step", restarts=True),
        plot_tags(runs, {"train/lr": ""}, "learning rate"),
        *(plot_attention(run) for run in runs),
    ]
    return f"<div class=plots>{''.join(drawn)}</div>"


def samples_section(run_dir: Path, label: str) -> str:
    """The newest clips with their sound, inside the page."""
    folders = sorted(path.parent for path in (run_dir / "samples").glob(f"step*/{CAPTIONS}"))
    clips = sorted(folders[-1].glob("*.mp4"))[:FEW] if folders else []
    figures = []
    for clip in clips:
        sheet = _inline(clip.with_suffix(".png"), "image/png")
        figures.append(
            f'<figure><img src="{sheet}"><video src="{_inline(clip, "video/mp4")}" controls loop>'
            f"</video><figcaption>{html.escape(clip.stem)}</figcaption></figure>")
    if not figures:
        return ""
    step = int(folders[-1].name.removeprefix("step"))
    return (f"<h2>Samples of {html.escape(label)} at step {step}</h2>"
            f"<div class=samples>{''.join(figures)}</div>")


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def card_section(run_dir: Path, label: str) -> str:
    """What made the weights: every start, and every resolved setting."""
    parts = [f"<h2>How {html.escape(label)} was made</h2>"]
    for start in read_starts(run_dir):
        title = f"start of {start['time']} at step {start['first_step']}"
        parts.append(_folded(title, start))
    for path in sorted((run_dir / "config").glob("*.json")):
        parts.append(_folded(path.name, json.loads(path.read_text(encoding="utf-8"))))
    return "".join(parts)


def _folded(title: str, values: Any) -> str:
    text = html.escape(json.dumps(values, indent=1, ensure_ascii=False))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"


def build_page(run_dirs: list[Path], references: list[Path]) -> str:
    """The whole page as text."""
    labels = [f"{letter}: {run.name}" if len(run_dirs) > 1 else run.name
              for letter, run in zip("AB", run_dirs, strict=False)]
    runs = [load_curves(run, place, [start["first_step"] for start in read_starts(run)[1:]], label)
            for place, (run, label) in enumerate(zip(run_dirs, labels, strict=True))]
    beside = [read_reference(path, 2 + place) for place, path in enumerate(references)]
    title = html.escape(" and ".join(labels))
    paired = ""
    if len(run_dirs) == 2:
        paired = f"<h2>Paired difference, B minus A</h2>{paired_section(*run_dirs)}"
    samples = "".join(samples_section(run, label)
                      for run, label in zip(run_dirs, labels, strict=True))
    cards = "".join(card_section(run, label) for run, label in zip(run_dirs, labels, strict=True))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>"
        f"{summary_table(list(zip(run_dirs, runs, strict=True)))}{paired}"
        f"<h2>Curves</h2>{plots_section(runs, beside)}{samples}{cards}</html>\n"
    )


def reference_name(path: Path) -> str:
    """What tells references apart: the file's name, or its run's where it is metrics.jsonl."""
    return path.resolve().parent.name if path.stem == "metrics" else path.stem


def read_reference(path: Path, place: int) -> Curves:
    """Another run's metrics.jsonl, by itself."""
    rule = f"--reference={path}: {{}}; give the metrics.jsonl of a run"
    if not path.is_file():
        raise ConfigError(rule.format("no such file"))
    try:
        records = read_lines(path)
    except ValueError as error:
        raise ConfigError(rule.format(f"not JSON lines: {error}")) from error
    if not records or not all(isinstance(one, dict) and "step" in one for one in records):
        raise ConfigError(rule.format("lines without a step" if records else "no record in it"))
    colour = COLOURS[place % len(COLOURS)]
    return Curves(f"reference {reference_name(path)}", colour, REFERENCE, records, [])


def write_overlay(run_dir: Path, reference: Path) -> Path:
    """A reference as a TensorBoard run of its own, RUN/tb/reference_NAME."""
    folder = run_dir / "tb" / f"reference_{reference_name(reference)}"
    events = Events(folder, 0)
    for record in read_reference(reference, 0).records:
        step = record.pop("step")
        events.scalars(step, {tag: value for tag, value in record.items() if math.isfinite(value)})
    events.close()
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one run, or two")
    parser.add_argument("--reference", type=Path, action="append", default=[],
                        help="metrics.jsonl of a run to draw beside them; may be repeated")
    parser.add_argument("--overlay", action="store_true", help="references into TensorBoard too")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    arguments = parser.parse_args()
    try:
        if len(arguments.runs) > 2:
            raise ConfigError(f"{len(arguments.runs)} runs given; the report takes one or two")
        page = build_page(arguments.runs, arguments.reference)
        out = arguments.out or arguments.runs[0] / "report.html"
        out.write_text(page, encoding="utf-8")
        print(f"{out}: {len(page) / 1e6:.1f} MB")
        for reference in arguments.reference if arguments.overlay else ():
            print(write_overlay(arguments.runs[0], reference))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
