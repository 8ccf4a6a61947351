"""The parts of an HTML page: its pictures are inside, and it fetches and runs nothing."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from pyro_scenes import __version__, plots

# Nothing is fetched and no script runs, whatever a name in the page may hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --pale: #626a73; --page: #ffffff;
  --panel: #f5f6f8; --line: #d9dde2; --link: #1f5fa8; --right: 47 155 95; --wrong: 214 69 65; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --pale: #9aa3ad; --page: #15181c; --panel: #1e2228; --line: #343a42;
    --link: #7db4f0; }
  img { filter: brightness(0.9); }
}
body { margin: 0 auto; max-width: 80rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 0.75rem; font-size: 1.4rem; overflow-wrap: anywhere; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 1.05rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
a { color: var(--link); }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 1.5rem 0 0; padding: 0;
  list-style: none; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr));
  gap: 0.75rem 1.5rem; margin: 1.5rem 0; }
dt, figcaption, caption, footer { color: var(--pale); font-size: 0.875rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0.5rem 0; padding: 0.75rem 1rem; overflow-x: auto; background: var(--panel);
  border-radius: 0.5rem; font-size: 0.875rem; }
summary { cursor: pointer; color: var(--pale); }
.wide { overflow-x: auto; }
figure { margin: 0.75rem 0; }
figcaption { margin-top: 0.25rem; max-width: 46rem; }
img { display: block; box-sizing: border-box; max-width: 100%; height: auto; background: white;
  border: 1px solid var(--line); border-radius: 0.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; padding-top: 0.35rem; text-align: left; }
th, td { padding: 0.35rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; }
thead th { white-space: normal; vertical-align: bottom; }
tr > :first-child { padding-left: 0; text-align: left; }
.counts tr > * { padding: 0.35rem 0.75rem; text-align: center; }
.counts td { min-width: 3.5rem; border: 1px solid var(--line); }
.right { background: rgb(var(--right) / calc(0.6 * var(--share))); }
.wrong { background: rgb(var(--wrong) / calc(0.15 + 0.45 * var(--share))); }
footer { margin-top: 3rem; }
@media (max-width: 48rem) { .wide > img { max-width: 56rem; } }
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""


def document(title: str, about: str, parts: Mapping[str, str]) -> str:
    """A whole page.

    :param about: HTML below the title. :param parts: HTML by heading.
    """
    name = escape(title)
    links, sections = [], []
    for i, (heading, part) in enumerate(parts.items()):
        links.append(f'<li><a href="#part-{i}">{escape(heading)}</a></li>')
        sections.append(
            f'<section aria-labelledby="part-{i}">\n<h2 id="part-{i}">{escape(heading)}</h2>\n'
            f"{part}\n</section>"
        )
    return "\n".join((
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',  # or browsers ask the server for one
        f"<title>{name}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<header>\n<h1>{name}</h1>\n{about}\n</header>",
        '<nav aria-label="Parts of this page">',
        "<ul>",
        *links,
        "</ul>",
        "</nav>",
        "<main>",
        *sections,
        "</main>",
        f"<footer>Written by svi-report of pyro_scenes {__version__}.</footer>",
        "</body>",
        "</html>",
        "",
    ))


def table(columns: Mapping[str, Sequence[str]]) -> str:
    """Cells by their headings; the first column names the rows."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
        for label, *cells in zip(*columns.values())
    )
    return (f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}</tbody>\n</table></div>")


def confusion(counted: dict[str, list[Any]]) -> str:
    """A row a true count, a column an inferred one; shaded by the share of the row."""
    head = "".join(f'<th scope="col">{count}</th>' for count in counted["inferred"])
    body = ""
    for true, row in zip(counted["true"], counted["table"], strict=True):
        body += f'<tr><th scope="row">{true}</th>'
        for inferred, images in zip(counted["inferred"], row, strict=True):
            kind = "right" if inferred == true else "wrong"
            mark = f' class="{kind}" style="--share: {images / sum(row):.3f}"' if images else ""
            body += f"<td{mark}>{images:,}</td>"
        body += "</tr>\n"
    return (
        '<div class="wide"><table class="counts">\n'
        "<caption>Images by their true count, down, and the count found, across.</caption>\n"
        f'<thead><tr><th scope="col">true \\ found</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def figure(drawn: Figure, alt: str, caption: str = "") -> str:
    """A figure inside the page, with what it shows in words."""
    picture = Image.fromarray(plots.pixels(drawn))
    file = BytesIO()
    picture.save(file, "png", optimize=True)
    said = f"<figcaption>{escape(caption)}</figcaption>\n" if caption else ""
    return (
        f'<figure>\n<div class="wide"><img src="data:image/png;base64,'
        f'{b64encode(file.getvalue()).decode()}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(alt)}"></div>\n{said}</figure>'
    )
