"""The plots of a run report, as inline SVG. Called by tools.report."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from evaluation.paired import Difference, steps_of
from evaluation.validation import spread_by_t
from training.metrics.writer import read_records

COLOURS = ("#1b6ca8", "#d1495b", "#7a7a7a", "#b08900", "#3c8d5a", "#7b5ea7")  # runs A and B first
REFERENCE = "--"  # the style of a reference
SIZE = (5.6, 3.2)  # inches


class Curves(NamedTuple):
    """One run's numbers, and how it is drawn."""

    label: str
    colour: str
    style: str  # "-", or REFERENCE
    records: list[dict[str, Any]]
    run_dir: Path | None = None  # None: metrics.jsonl is all there is

    def points(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        found = [(record["step"], record[tag]) for record in self.records if tag in record]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps), np.array(values, dtype=float)


def load_curves(run_dir: Path, place: int, label: str) -> Curves:
    colour = COLOURS[place % len(COLOURS)]
    return Curves(label, colour, "-", read_records(run_dir), run_dir)


def svg(figure: Figure) -> str:
    """A figure as an <svg> element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg"):]


def plot_validation(runs: Sequence[Curves], modality: str) -> str:
    """Validation loss over steps, with the band of its standard error; "" where no run has one."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for run in runs:
        for suffix, style in (("", "-"), ("_ema", "--")):
            steps, values = run.points(f"validation/loss_{modality}{suffix}")
            _, errors = run.points(f"validation/stderr_{modality}{suffix}")
            if not len(steps):
                continue
            label = f"{run.label} {suffix[1:]}".strip()
            axes.plot(steps, values, style, marker="o", markersize=3, color=run.colour,
                      label=label)
            if len(errors) == len(values):
                axes.fill_between(steps, values - errors, values + errors, color=run.colour,
                                  alpha=0.15, linewidth=0)
    return _finish(figure, axes, f"validation {modality} loss, +- standard error", "step", False)


def plot_by_t(runs: Sequence[Curves], modality: str) -> str:
    """The first and the last validation loss at each t, with its standard error."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for run in runs:
        prefix = f"validation_t/{modality}/"
        found = [record for record in run.records if any(tag.startswith(prefix) for tag in record)]
        for record, style in zip(found[:1] + found[-1:], (":", "-"), strict=False):
            points = {tag.removeprefix(prefix): value for tag, value in record.items()
                      if tag.startswith(prefix)}
            errors = spread_by_t(run.run_dir, record["step"], modality) if run.run_dir else {}
            axes.errorbar([float(t) for t in points], list(points.values()),
                          yerr=[errors.get(t, 0.0) for t in points] if errors else None,
                          linestyle=style, marker="o", markersize=3, capsize=2, color=run.colour,
                          label=f"{run.label} step {record['step']}")
    return _finish(figure, axes, f"validation {modality} loss by t, +- standard error",
                   "t (1 is noise)", True)


def plot_difference(found: Mapping[str, Mapping[int, Difference]]) -> str:
    """Paired difference of the video's validation loss: kind of weights -> step -> mean over t."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    for (weights, by_step), style in zip(found.items(), ("o-", "o--"), strict=False):
        means = [difference.mean for difference in by_step.values()]
        reach = [[d.mean - d.low for d in by_step.values()],
                 [d.high - d.mean for d in by_step.values()]]
        axes.errorbar(list(by_step), means, yerr=reach, fmt=style, color=COLOURS[0], capsize=3,
                      markersize=3, label=weights)
    axes.axhline(0, color="#999", linewidth=0.8)
    title = "validation video loss, B minus A, per sample (95 %)"
    return _finish(figure, axes, title, "step", False)


def shared_steps(run_a: Path, run_b: Path) -> list[int]:
    return sorted(set(steps_of(run_a)) & set(steps_of(run_b)))


def _finish(figure: Figure, axes: Any, title: str, x_label: str, log: bool) -> str:
    if not axes.lines:
        return ""
    if log and any(line.get_ydata().size and np.min(line.get_ydata()) > 0 for line in axes.lines):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
    return svg(figure)
