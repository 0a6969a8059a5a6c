"""Draws docs/joint_block_light.svg and docs/joint_block_dark.svg: `python docs/joint_block.py`."""

from pathlib import Path

THEMES = {  # text, quiet text, lines, boxes, video, audio, new
    "light": ("#1f2328", "#59636e", "#59636e", "#f6f8fa", "#1b6ca8", "#8a6d00", "#b3382c"),
    "dark": ("#e6edf3", "#9198a1", "#9198a1", "#161b22", "#6cb6ff", "#d9b44a", "#ff8b80"),
}
WIDTH, HEIGHT = 760, 470
LEFT, RIGHT, COLUMN = 30, 400, 330  # of the columns
# (y, height, video's lines, audio's lines); None: the box that both share.
ROWS = (
    (44, 34, ["video tokens  (B, Nv, 3072)"], ["audio | text tokens  (B, La + Lt, 1024)"]),
    (96, 34, ["norm, scale and shift by t"], ["norm, scale and shift by t"]),
    (148, 50, ["q, k, v: 24 heads of 128", "RoPE over time, height, width"],
     ["q, k, v: 8 heads of 128", "RoPE over time, index / tau (Eq. 12)"]),
    (222, 62, None, None),
    (308, 50, ["output projection", "+ residual"],
     ["output projection", "its new columns start at zero, + residual"]),
    (376, 50, ["cross-attention to the video caption", "feed-forward, + residual"],
     ["MLP, + residual", "(in a single block parallel to attention)"]),
)
SHARED = ("one attention over [video | audio | text]  (Eq. 7)",
          "video sees V, A;  audio sees V, A, T;  text sees A, T")


def draw(theme: str) -> str:
    ink, quiet, line, fill, video, audio, new = THEMES[theme]
    parts = []

    def box(x: int, y: int, width: int, height: int, colour: str, lines: list[str]) -> None:
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
                     f'fill="{fill}" stroke="{colour}" stroke-width="1.5"/>')
        for place, text in enumerate(lines):
            below = y + height / 2 + 5 + 17 * (place - (len(lines) - 1) / 2)
            tone = ink if place == 0 else quiet
            parts.append(f'<text x="{x + width / 2}" y="{below:g}" text-anchor="middle" '
                         f'fill="{tone}">{text}</text>')

    def arrow(x: float, top: int, bottom: int) -> None:
        parts.append(f'<path d="M{x} {top}V{bottom - 6}" stroke="{line}" stroke-width="1.5"/>'
                     f'<path d="M{x - 4} {bottom - 8}L{x} {bottom}L{x + 4} {bottom - 8}Z" '
                     f'fill="{line}"/>')

    for x, title, colour in ((LEFT, "Wan2.2-TI2V-5B block", video),
                             (RIGHT, "TangoFlux block", audio)):
        parts.append(f'<text x="{x + COLUMN / 2}" y="28" text-anchor="middle" font-weight="600" '
                     f'fill="{colour}">{title}</text>')
    ends = [y + height for y, height, *_ in ROWS]
    for (y, height, left, right), before in zip(ROWS, [None, *ends], strict=False):
        if before is not None:
            for x in (LEFT, RIGHT):
                arrow(x + COLUMN / 2, before, y)
        if left is None:
            box(LEFT, y, RIGHT + COLUMN - LEFT, height, ink, list(SHARED))
        else:
            box(LEFT, y, COLUMN, height, video, left)
            box(RIGHT, y, COLUMN, height, audio, right)
    parts.append(f'<text x="{RIGHT + COLUMN - 10}" y="{ROWS[2][0] + 64}" text-anchor="end" '
                 f'font-size="12" fill="{new}">+ 16 new heads (Eq. 6)</text>')
    for x in (LEFT, RIGHT):
        arrow(x + COLUMN / 2, ends[-1], HEIGHT - 14)
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="system-ui, sans-serif" font-size="14">\n{body}\n</svg>\n')


if __name__ == "__main__":
    for name in THEMES:
        path = Path(__file__).parent / f"joint_block_{name}.svg"
        path.write_text(draw(name), encoding="utf-8")
