"""Results as interactive plotly figures. Each function takes a result, returns a figure, shows nothing."""

import html
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lahis_tl.artifacts import write_atomically
from lahis_tl.heads import HeadGrid
from lahis_tl.scores import HeadScores
from lahis_tl.selection import LanguageHeads, chance_jaccard, jaccard

# Both scales read the same with the common kinds of colour blindness.
SEQUENTIAL = "Cividis"
DIVERGING = "PuOr"
# For up to 11 languages; chosen to be told apart in the same way.
CATEGORICAL = px.colors.qualitative.Safe
_IMAGE_FORMATS = {".png", ".svg", ".pdf"}


def heatmap(scores: HeadScores, language: str | None = None) -> go.Figure:
    """Layer × head map of one language, or of all as small multiples on one scale.

    >>> import torch
    >>> scores = HeadScores(torch.rand(2, 3, 4), ("en", "fr"), "lahis", "nats per token")
    >>> heatmap(scores, "fr").layout.title.text.split("<br>")[0]
    'Importance of attention heads for fr'

    Raises:
        KeyError: no scores for ``language``.
    """
    if language is not None:
        scores = scores.select([language])
    names = list(scores.languages)
    columns = min(5, len(names))
    figure = _panels(scores.grid, names if language is None else None, columns)
    for i, name in enumerate(names):
        trace = _map(scores[name].numpy(), scores.unit)
        figure.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    title = f"Importance of attention heads for {language or f'{len(names)} languages'}"
    _style(figure, title, _about(scores))
    return figure.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL,
            "colorbar": {"title": _bar(scores.method, scores.unit)},
        }
        | ({} if (scores.values < 0).any() else {"cmin": 0})
    )


def difference(scores: HeadScores, language: str, minus: str) -> go.Figure:
    """Score in one language minus that in another, on a diverging scale centred on 0."""
    values = (scores[language] - scores[minus]).numpy()
    figure = _panels(scores.grid, None)
    figure.add_trace(_map(values, scores.unit))
    title = f"Attention heads: importance for {language} minus {minus}"
    _style(figure, title, _about(scores))
    bar = {"title": _bar(f"{scores.method}, {language} − {minus}", scores.unit)}
    return figure.update_layout(coloraxis={"colorscale": DIVERGING, "cmid": 0, "colorbar": bar})


def language_counts(heads: LanguageHeads) -> go.Figure:
    """How many languages keep each head."""
    counts, most = heads.counts.numpy(), len(heads.languages)
    figure = _panels(heads.grid, None)
    figure.add_trace(
        go.Heatmap(
            z=counts,
            coloraxis="coloraxis",
            hovertemplate="L%{y}H%{x}: %{z} languages<extra></extra>",
        )
    )
    title = f"Number of languages (of {most}) that keep each head"
    _style(figure, title, _about_heads(heads))
    bands = px.colors.sample_colorscale(SEQUENTIAL, np.linspace(0, 1, most + 1))
    steps = [
        (edge, color)
        for i, color in enumerate(bands)
        for edge in (i / (most + 1), (i + 1) / (most + 1))
    ]
    bar = {"title": "languages", "tickvals": list(range(most + 1))}
    return figure.update_layout(
        coloraxis={"colorscale": steps, "cmin": -0.5, "cmax": most + 0.5, "colorbar": bar}
    )


def heads_per_layer(heads: LanguageHeads) -> go.Figure:
    """How many specific heads each language has in each layer, and how many are general."""
    figure = go.Figure()
    sets = [*heads.specific.items(), ("general", heads.general)]
    for i, (name, members) in enumerate(sets):
        counts = np.bincount([head.layer for head in members], minlength=heads.grid.n_layers)
        color = "#222222" if name == "general" else CATEGORICAL[i % len(CATEGORICAL)]
        figure.add_bar(
            x=list(range(heads.grid.n_layers)),
            y=counts,
            name=name,
            marker_color=color,
            hovertemplate=f"{name}, layer %{{x}}: %{{y}} heads<extra></extra>",
        )
    _style(figure, "Language heads by layer", _about_heads(heads))
    return figure.update_layout(
        width=760,
        height=420,
        barmode="stack",
        xaxis_title="layer",
        yaxis_title="heads",
        legend_title="specific to",
    )


def overlap(heads: LanguageHeads) -> go.Figure:
    """Jaccard overlap of the heads that any two languages keep, with its level by chance."""
    names, size = heads.languages, heads.grid.size
    values = np.array([[jaccard(heads.kept[a], heads.kept[b]) for b in names] for a in names])
    chance = np.array(
        [
            [chance_jaccard(len(heads.kept[a]), len(heads.kept[b]), size) for b in names]
            for a in names
        ]
    )
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            y=names,
            customdata=chance,
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            texttemplate="%{z:.2f}",
            colorbar={"title": "Jaccard"},
            hovertemplate="%{y} and %{x}: %{z:.2f}, by chance %{customdata:.3f}<extra></extra>",
        )
    )
    pairs = chance[~np.eye(len(names), dtype=bool)]
    level = f"by chance {pairs.mean():.3f}" if len(pairs) else "one language"
    side = 240 + 44 * len(names)
    _style(
        figure,
        "Overlap of the heads that two languages keep",
        f"{_about_heads(heads)}; {level}",
    )
    figure.update_layout(width=max(480, side), height=max(400, side))
    return figure.update_layout(
        yaxis={"autorange": "reversed", "scaleanchor": "x", "constrain": "domain"}
    )


def _map(values: np.ndarray, unit: str) -> go.Heatmap:
    ranks = (-values.flatten()).argsort(kind="stable").argsort(kind="stable").reshape(
        values.shape
    ) + 1
    return go.Heatmap(
        z=values.astype(np.float32),
        customdata=ranks,
        coloraxis="coloraxis",
        hovertemplate=f"L%{{y}}H%{{x}}: %{{z:.3g}} {unit}, rank %{{customdata}} of {values.size}<extra></extra>",
    )


_TOP, _BOTTOM, _LEFT, _RIGHT = 90, 55, 60, 130  # pixels around the panels
_GAP_X, _GAP_Y = 24, 40  # pixels between them


def _panels(grid: HeadGrid, titles: list[str] | None, columns: int = 1) -> go.Figure:
    """Empty layer × head panels of a size at which a cell can be pointed at."""
    rows = math.ceil(len(titles or [""]) / columns)
    cell = min(16, max(6, 560 // grid.n_layers))
    inner_width = max(260, columns * (max(130, cell * grid.n_heads) + _GAP_X))
    inner_height = max(180, rows * (cell * grid.n_layers + _GAP_Y))
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=titles,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=_GAP_X / inner_width if columns > 1 else 0,
        vertical_spacing=_GAP_Y / inner_height if rows > 1 else 0,
    )
    figure.update_layout(width=inner_width + _LEFT + _RIGHT, height=inner_height + _TOP + _BOTTOM)
    figure.update_yaxes(autorange="reversed", ticks="")
    figure.update_xaxes(ticks="")
    for column in range(1, columns + 1):
        figure.update_xaxes(title_text="head", row=rows, col=column)
    for row in range(1, rows + 1):
        figure.update_yaxes(title_text="layer", row=row, col=1)
    return figure


def _style(figure: go.Figure, title: str, about: str) -> None:
    figure.update_layout(
        template="plotly_white",
        title={
            "text": f"{html.escape(title)}<br><span style='font-size:12px;color:#555'>{html.escape(about)}</span>",
            "x": 0.02,
            "font": {"size": 17},
        },
        margin={"t": _TOP, "l": _LEFT, "r": 30, "b": _BOTTOM},
        font={"color": "#222"},
        # An opaque ground keeps the figure readable on a dark page.
        paper_bgcolor="white",
        plot_bgcolor="white",
    )


def _bar(name: str, unit: str) -> str:
    return f"{name}<br>({unit})" if unit else name


def _about(scores: HeadScores) -> str:
    model = scores.card.get("model", {}).get("name", "")
    counts = sorted(set(scores.n_texts))
    texts = f"{'–'.join(map(str, (counts[0], counts[-1])))} texts" if len(counts) > 1 else ""
    texts = f"{counts[0]} texts a language" if len(counts) == 1 else texts
    return ", ".join(part for part in (Path(model).name, scores.method, texts) if part)


def _about_heads(heads: LanguageHeads) -> str:
    model = heads.card.get("model", {}).get("name", "")
    options = ", ".join(f"{name} {value}" for name, value in heads.options.items())
    parts = (Path(model).name, heads.method, f"rule {heads.rule} ({options})")
    return ", ".join(part for part in parts if part)


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
