"""Figures on disk: pages, images."""

import html
from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go

from lahis_tl.artifacts import write_atomically

_IMAGE_FORMATS = {".png", ".svg", ".pdf"}


def write(figure: go.Figure, path: str | Path) -> Path:
    """Write a figure as HTML (with plotly inside, opens without a network), PNG, SVG or PDF.

    Raises:
        ValueError: another suffix.
        RuntimeError: an image was asked for and kaleido or its browser is not there.
    """
    path = Path(path)
    if path.suffix == ".html":
        write_atomically(path, figure.to_html(include_plotlyjs=True, full_html=True).encode())
        return path
    if path.suffix not in _IMAGE_FORMATS:
        raise ValueError(f"cannot write {path.name}: the formats are html, png, svg, pdf")
    try:
        content = figure.to_image(format=path.suffix[1:], scale=2)
    except Exception as error:  # kaleido raises its own and its browser's
        raise RuntimeError(
            f"{path.suffix[1:].upper()} needs kaleido and a Chrome or Chromium: pip install "
            f"'lahis-tl[png]' and install the browser, or write .html instead ({error})"
        ) from error
    write_atomically(path, content)
    return path


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ margin: 0 auto; max-width: 1240px; padding: 1rem; }}
figure {{ margin: 1rem 0; background: #fff; border-radius: 8px; overflow-x: auto; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }}
code {{ font-size: .9em; }}
</style></head><body><h1>{title}</h1>{body}</body></html>"""


def write_page(
    path: str | Path,
    title: str,
    figures: list[go.Figure],
    tables: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """One self-contained page of figures, plotly embedded once, after ``tables`` (heading → name → text)."""
    parts = []
    for heading, rows in (tables or {}).items():
        cells = "".join(
            f"<tr><th>{html.escape(name)}</th><td><code>{html.escape(text)}</code></td></tr>"
            for name, text in rows.items()
        )
        parts.append(f"<h2>{html.escape(heading)}</h2><table>{cells}</table>")
    for i, figure in enumerate(figures):
        inner = figure.to_html(full_html=False, include_plotlyjs=i == 0)
        parts.append(f"<figure>{inner}</figure>")
    path = Path(path)
    write_atomically(path, _PAGE.format(title=html.escape(title), body="".join(parts)).encode())
    return path
