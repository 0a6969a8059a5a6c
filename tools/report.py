"""One HTML page about a run, or about two: `python -m tools.report RUN [RUN_B] [--out FILE]`.

Validation losses with their standard errors, over the steps and by t, the last samples with their
sound, what was configured and what made the weights; everything is inside the file, which opens
offline. Every other curve is TensorBoard's. With two runs each plot holds both, and the paired
difference of their validation losses comes with its interval: made for a t2av run and its t2v twin.
`--reference metrics.jsonl` draws another run's losses next to them, and `--overlay` puts all of its
curves next to RUN/tb for TensorBoard.
"""

import argparse
import base64
import html
import math
import sys
from pathlib import Path

from common.files import read_lines
from common.settings import ConfigError
from evaluation.gallery import CAPTIONS
from evaluation.paired import Difference, bootstrap, differences
from evaluation.plots import (
    COLOURS,
    REFERENCE,
    Curves,
    load_curves,
    plot_by_t,
    plot_difference,
    plot_validation,
    shared_steps,
)
from evaluation.tables import card_section, summary_table, table
from evaluation.validation import repeated_ids
from training.metrics.tensorboard import Events

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
h3 { font-size: 1em; margin: 1.2em 0 .3em }
.plots { display: flex; flex-wrap: wrap; gap: 1em } .plots svg { width: 560px; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top }
.samples { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 560px }
video { width: 270px; background: #eee } img { width: 560px } figcaption { color: #666 }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12px }
"""
FEW = 6  # samples in the page


def paired_section(run_a: Path, run_b: Path) -> str:
    """The difference of the video's validation loss, sample by sample."""
    steps = shared_steps(run_a, run_b)
    found: dict[str, dict[int, Difference]] = {}
    tables = []
    for kind, weights in (("weights", "raw"), ("averaged weights", "ema")):
        rows = []
        for step in steps:
            values = differences(run_a, run_b, step, weights=weights)
            if not len(values):
                continue
            parts = [bootstrap(part) for part in (
                values.mean(axis=1), values[:, 0], values[:, -1])]
            found.setdefault(kind, {})[step] = parts[0]
            rows.append([str(step), str(parts[0].samples), *(
                f"{d.mean:+.5f} [{d.low:+.5f}, {d.high:+.5f}]" for d in parts)])
        if rows:
            head = ["step", "samples", "mean over t", "lowest t", "highest t"]
            tables.append(f"<h3>{kind.capitalize()}</h3>{table(head, rows)}")
    if not tables:
        return ("<p>The runs share no validation sample at any step: nothing can be paired.</p>"
                + _not_paired(run_a, run_b, steps))
    return (
        "<p>Loss of B minus loss of A on the same samples, t and noise; below 0, B is better. "
        f"Brackets: 95 % bootstrap interval over samples.</p>{_not_paired(run_a, run_b, steps)}"
        f"<div class=plots>{plot_difference(found)}</div>{''.join(tables)}"
    )


def _not_paired(run_a: Path, run_b: Path, steps: list[int]) -> str:
    """Which samples `differences` left out because they share an id."""
    twice = sorted({name for run in (run_a, run_b) for step in steps
                    for name in repeated_ids(run, step)})
    if not twice:
        return ""
    shown = ", ".join(twice[:3] + ["..."] * (len(twice) > 3))
    return (f"<p>Not paired: {len(twice)} id{'s' * (len(twice) > 1)} that a run holds twice "
            f"({html.escape(shown)}). Two of data.streams have them, or a substitute stood in for "
            "a bad sample; give every stream's manifest ids of its own.</p>")


def plots_section(runs: list[Curves]) -> str:
    """Validation losses with their standard errors, which TensorBoard does not draw."""
    modalities = [m for m in ("video", "audio")
                  if any(len(run.points(f"train/loss_{m}")[0]) for run in runs)]
    drawn = [plot_validation(runs, m) for m in modalities]
    drawn += [plot_by_t(runs, m) for m in modalities]
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


def build_page(run_dirs: list[Path], references: list[Path]) -> str:
    """The whole page as text."""
    labels = [f"{letter}: {run.name}" if len(run_dirs) > 1 else run.name
              for letter, run in zip("AB", run_dirs, strict=False)]
    runs = [load_curves(run, place, label)
            for place, (run, label) in enumerate(zip(run_dirs, labels, strict=True))]
    others = [read_reference(path, 2 + place) for place, path in enumerate(references)]
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
        f"<h2>Validation</h2>{plots_section([*runs, *others])}{samples}{cards}</html>\n"
    )


def reference_name(path: Path) -> str:
    """A reference's name: the file's, or its run's where it is metrics.jsonl."""
    return path.resolve().parent.name if path.stem == "metrics" else path.stem


def check_references(references: list[Path], overlay: bool) -> None:
    """ConfigError unless each has a name of its own: its label, and its folder in TensorBoard."""
    if overlay and not references:
        raise ConfigError("--overlay: no --reference is given, and the overlay is made of them; "
                          "add --reference metrics.jsonl")
    seen: dict[str, Path] = {}
    for path in references:
        name = reference_name(path)
        if name in seen:
            raise ConfigError(f"--reference={path}: called {name}, as {seen[name]} is; give it "
                              f"by another name: ln -s {path.resolve()} other.jsonl")
        seen[name] = path


def read_reference(path: Path, place: int) -> Curves:
    """Another run's metrics.jsonl, by itself; a value that is not a number is left out."""
    rule = f"--reference={path}: {{}}; give the metrics.jsonl of a run"
    if not path.is_file():
        raise ConfigError(rule.format("no such file"))
    try:
        records = read_lines(path)
    except ValueError as error:
        raise ConfigError(rule.format(f"not JSON lines: {error}")) from error
    if not records or not all(isinstance(one.get("step"), int) for one in records):
        raise ConfigError(rule.format("lines without a step" if records else "no record in it"))
    records = [{tag: value for tag, value in record.items()
                if isinstance(value, int | float) and math.isfinite(value)} for record in records]
    colour = COLOURS[place % len(COLOURS)]
    return Curves(f"reference {reference_name(path)}", colour, REFERENCE, records)


def write_overlay(run_dir: Path, reference: Path) -> Path:
    """A reference as a TensorBoard run of its own, RUN/tb/reference_NAME; OSError if it is not."""
    folder = run_dir / "tb" / f"reference_{reference_name(reference)}"
    events = Events(folder, 0)
    for record in read_reference(reference, 0).records:
        step = record.pop("step")
        events.scalars(step, record)
    events.close()
    if events.errors:
        raise OSError(f"{folder}: not written")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one run, or two")
    parser.add_argument("--reference", type=Path, action="append", default=[],
                        help="metrics.jsonl of a run to draw next to them; may be repeated")
    parser.add_argument("--overlay", action="store_true", help="references into TensorBoard too")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    arguments = parser.parse_args()
    try:
        if len(arguments.runs) > 2:
            raise ConfigError(f"{len(arguments.runs)} runs given; the report takes one or two")
        check_references(arguments.reference, arguments.overlay)
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
