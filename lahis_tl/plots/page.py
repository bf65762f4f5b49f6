"""Figures on disk: pages, images for papers, the numbers behind them."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lahis_tl.artifacts import write_atomically

_IMAGE_FORMATS = {".png", ".svg", ".pdf"}
# Inches, as in most two-column styles; plotly counts 96 pixels an inch, images of 4 times as many dots.
_PAPER_WIDTHS = {"column": 3.3, "page": 6.9}
_POINT = 96 / 72


def write(
    figure: go.Figure, path: str | Path, *, paper: str | None = None, data: bool = True
) -> Path:
    """Write a figure as HTML (with plotly inside, opens without a network), PNG, SVG or PDF.

    >>> write(heatmap(scores), "map.pdf", paper="column")              # doctest: +SKIP

    Args:
        paper: ``"column"`` or ``"page"``: drawn anew at that width, with letters of 7 points.
        data: beside an image, its numbers as CSV of the same name.

    Raises:
        ValueError: another suffix or width.
        RuntimeError: an image was asked for and kaleido or its browser is not there.
    """
    if paper is not None:
        figure = for_paper(figure, paper)
    path = Path(path)
    if path.suffix == ".html":
        write_atomically(path, figure.to_html(include_plotlyjs=True, full_html=True).encode())
        return path
    if path.suffix not in _IMAGE_FORMATS:
        raise ValueError(f"cannot write {path.name}: the formats are html, png, svg, pdf")
    try:
        dots = (4 if paper else 2) if path.suffix == ".png" else 1
        content = figure.to_image(format=path.suffix[1:], scale=dots)
    except Exception as error:  # kaleido raises its own and its browser's
        raise RuntimeError(
            f"{path.suffix[1:].upper()} needs kaleido and a Chrome or Chromium: pip install "
            f"'lahis-tl[png]' and install the browser, or write .html instead ({error})"
        ) from error
    write_atomically(path, content)
    if data:
        numbers = figure_data(figure).to_csv(index=False)
        write_atomically(path.with_suffix(".csv"), numbers.encode())
    return path


def for_paper(figure: go.Figure, width: str = "column") -> go.Figure:
    """A copy at the width of a column or a page of a paper, letters of 7 points, no title (the caption's place).

    >>> for_paper(go.Figure(go.Bar(y=[1, 2])), "column").layout.width
    317

    Raises:
        ValueError: another width.
    """
    if width not in _PAPER_WIDTHS:
        raise ValueError(f"paper={width!r} is neither {' nor '.join(_PAPER_WIDTHS)}")
    found = go.Figure(figure)
    layout: Any = found.layout
    wide = round(_PAPER_WIDTHS[width] * 96)
    shape = (layout.height or 450) / (layout.width or 700)
    letters = {"size": 7 * _POINT}
    found.update_layout(
        width=wide,
        height=max(150, round(wide * shape)),
        font=letters,
        title=None,
        showlegend=layout.showlegend,
    )
    found.update_layout(margin={"t": 16, "l": 38, "r": 8, "b": 32}, legend={"font": letters})
    found.update_annotations(font=letters)
    found.for_each_xaxis(
        lambda axis: axis.update(tickfont=letters, title={"font": letters, "standoff": 4})
    )
    found.for_each_yaxis(
        lambda axis: axis.update(tickfont=letters, title={"font": letters, "standoff": 4})
    )
    for name in (key for key in layout.to_plotly_json() if key.startswith("coloraxis")):
        bar = {"thickness": 7, "tickfont": letters, "title": {"font": letters}, "xpad": 2}
        found.update_layout({name: {"colorbar": bar}})
    found.update_traces(marker={"size": 4}, selector={"type": "scatter"})
    return found


def figure_data(figure: go.Figure) -> pd.DataFrame:
    """The numbers that a figure shows, one row a point or cell.

    >>> figure_data(go.Figure(go.Bar(x=["fr"], y=[2.0], name="score"))).to_dict("records")
    [{'trace': 'score', 'x': 'fr', 'y': 2.0}]

    Returns:
        trace (name, or number from 0); x and y; z of maps; lower and upper where there are error bars.
    """
    tables = [_trace_data(trace, str(i)) for i, trace in enumerate(figure.data)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _trace_data(trace: Any, number: str) -> pd.DataFrame:
    name = trace.name or number
    if trace.type == "heatmap":
        z = np.array([list(row) for row in trace.z], dtype=float)
        x = list(range(z.shape[1])) if trace.x is None else list(trace.x)
        y = list(range(z.shape[0])) if trace.y is None else list(trace.y)
        cells = {"x": np.tile(x, len(y)), "y": np.repeat(y, len(x)), "z": z.flatten()}
        return pd.DataFrame({"trace": name, **cells})
    y = [] if trace.y is None else list(trace.y)
    x = [None] * len(y) if trace.x is None else list(trace.x)
    found = pd.DataFrame({"trace": name, "x": x, "y": y})
    for axis, values in (("y", y), ("x", x)):
        bars = getattr(trace, f"error_{axis}", None)
        if bars is not None and bars.array is not None:
            below = bars.array if bars.arrayminus is None else bars.arrayminus
            found["lower"] = np.asarray(values, dtype=float) - np.asarray(below, dtype=float)
            found["upper"] = np.asarray(values, dtype=float) + np.asarray(bars.array, dtype=float)
    return found


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
