"""How all figures look: colours, panels, titles."""

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lahis_tl.heads import HeadGrid
from lahis_tl.scores import HeadScores
from lahis_tl.selection import LanguageHeads

# Both scales read the same with the common kinds of colour blindness.
SEQUENTIAL = "Cividis"
DIVERGING = "PuOr"
# For up to 11 languages; chosen to be told apart in the same way.
CATEGORICAL = px.colors.qualitative.Safe
_TOP, _BOTTOM, _LEFT, _RIGHT = 90, 55, 60, 130  # pixels around the panels
_GAP_X, _GAP_Y = 24, 40  # pixels between them


def panels(grid: HeadGrid, titles: list[str] | None, columns: int = 1) -> go.Figure:
    """Empty layer × head panels of a size at which a cell can be pointed at."""
    rows = math.ceil(len(titles or [""]) / columns)
    cell = min(16, max(6, 560 // grid.n_layers))
    inner_width = max(260, columns * (max(130, cell * grid.n_heads) + _GAP_X))
    inner_height = max(180, rows * (cell * grid.n_layers + _GAP_Y))
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=None if titles is None else [html.escape(title) for title in titles],
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


def dress(figure: go.Figure, title: str, about: str) -> None:
    """Give a figure the package's title, margins and an opaque ground."""
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


def bar_title(name: str, unit: str) -> str:
    return f"{name}<br>({unit})" if unit else name


def about_scores(scores: HeadScores) -> str:
    model = scores.card.get("model", {}).get("name", "")
    counts = sorted(set(scores.n_texts))
    texts = f"{'–'.join(map(str, (counts[0], counts[-1])))} texts" if len(counts) > 1 else ""
    texts = f"{counts[0]} texts a language" if len(counts) == 1 else texts
    return ", ".join(part for part in (Path(model).name, scores.method, texts) if part)


def about_card(card: Mapping[str, Any], text: str) -> str:
    """The model's name, then what there is to say."""
    name = Path(card.get("model", {}).get("name", "")).name
    return ", ".join(part for part in (name, text) if part)


def about_heads(heads: LanguageHeads) -> str:
    model = heads.card.get("model", {}).get("name", "")
    options = ", ".join(f"{name} {value}" for name, value in heads.options.items())
    parts = (Path(model).name, heads.method, f"rule {heads.rule} ({options})")
    return ", ".join(part for part in parts if part)
