"""RUN/samples/index.html: every prompt's clips side by side over the steps, to be opened offline.

Plain HTML that links to the files next to it; written again after each round of samples. Called by
evaluation.samples.
"""

import html
import json
import re
from pathlib import Path
from urllib.parse import quote

CAPTIONS = "prompts.json"  # written after a folder's clips: a folder that has it is whole
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em; color: #222 }
h1 { font-size: 1.3em } p { max-width: 60em } button { font: inherit; padding: .3em 1em }
table { border-collapse: collapse } td, th { padding: .3em .5em; vertical-align: top }
th { position: sticky; top: 0; background: white; text-align: left; font-weight: 600 }
td.name { width: 14em; color: #444 } video { width: 260px; background: #eee; display: block }
img { width: 260px; display: block } small { color: #777 }
tr { border-top: 1px solid #ddd }
"""
SCRIPT = """
const clips = [...document.querySelectorAll('video')];
const play = (chosen) => { for (const c of clips) c.pause();
  for (const c of chosen) { c.currentTime = 0; c.muted = chosen.length > 1; c.play(); } };
for (const c of clips) {
  c.onclick = () => { c.muted = false; };
  c.controls = false;  // on a clip this small they lie over half of the picture
  c.onmouseenter = () => { c.controls = true; };
  c.onmouseleave = () => { c.controls = false; };
}
document.getElementById('all').onclick = () => play(clips);
for (const row of document.querySelectorAll('tr')) {
  const button = row.querySelector('button');
  if (button) button.onclick = () => play([...row.querySelectorAll('video')]);
}
"""


def write_gallery(samples: Path, title: str) -> Path:
    """Write `samples`/index.html from the step folders next to it; returns its path.

    A clip's caption is what its prompts.json says. The column "validation" holds the real clips.
    """
    # tools.sample leaves folders of its own here (step00000600_ema).
    steps = [folder for folder in sorted(samples.glob("step*"))
             if re.fullmatch(r"step\d+", folder.name)]
    columns = [folder for folder in (samples / "validation", *steps)
               if folder.is_dir() and any(folder.glob("*.mp4"))]
    captions: dict[str, str] = {}
    for folder in columns:
        path = folder / CAPTIONS
        if path.is_file():
            captions |= json.loads(path.read_text(encoding="utf-8"))
    names = sorted({clip.stem for folder in columns for clip in folder.glob("*.mp4")})
    head = "".join(f"<th>{_column(folder.name)}</th>" for folder in columns)
    rows = "".join(_row(name, _caption(name, captions), columns, samples) for name in names)
    title = html.escape(title)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>{STYLE}</style><h1>Samples of {title}</h1>
<p>Fixed prompts and seeds. <b>guidance1</b> is drawn without guidance, <b>no_sound</b> with the
audio stream cut off from the picture: where it differs from the row above, sound changes the
picture. One clip plays with its sound; several play muted, and a click on one unmutes it. A
clip's controls show under the pointer.</p>
<p><button id="all">play all</button></p>
<table><tr><th></th>{head}</tr>{rows}</table><script>{SCRIPT}</script></html>
"""
    index = samples / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def _caption(name: str, captions: dict[str, str]) -> str:
    """A variant is named after its prompt."""
    return next((said for prompt, said in captions.items() if name.startswith(prompt)), "")


def _column(folder: str) -> str:
    if folder == "validation":
        return "validation clip"
    return f"step {int(folder.removeprefix('step'))}"


def _row(name: str, caption: str, columns: list[Path], samples: Path) -> str:
    cells = []
    for folder in columns:
        clip = folder / f"{name}.mp4"
        if not clip.is_file():
            cells.append("<td></td>")
            continue
        place = quote(clip.relative_to(samples).as_posix())
        sheet = quote(clip.with_suffix(".png").relative_to(samples).as_posix())
        cells.append(f'<td><video src="{place}" controls loop preload="metadata"></video>'
                     f'<a href="{sheet}"><img src="{sheet}" loading="lazy"></a></td>')
    return (f'<tr><td class="name"><b>{html.escape(name)}</b><br><small>{html.escape(caption)}'
            f'</small><br><button>play row</button></td>{"".join(cells)}</tr>')
