"""Where heads look, and how a mask changes it."""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from lahis_tl.attention import AttentionMass
from lahis_tl.plots.style import DIVERGING, SEQUENTIAL, about_card, dress, panels

_LONGEST_TOKEN = 14


def attention_change(
    before: AttentionMass, after: AttentionMass, part: str, masked_by: str
) -> go.Figure:
    """Share of the last position's attention on a part of the text: without and with a mask, and the difference.

    Heads that rest on the first position in both (sinks) are crossed out.

    Args:
        masked_by: what the mask does, for the titles.
    """
    titles = ["no mask", masked_by, "difference"]
    figure = panels(before.grid, titles, 3)
    plain, changed = before[part].mean(0), after[part].mean(0)
    for column, values in enumerate((plain, changed, changed - plain), start=1):
        figure.add_trace(
            go.Heatmap(
                z=values.numpy(),
                coloraxis="coloraxis2" if column == 3 else "coloraxis",
                hovertemplate="L%{y}H%{x}: %{z:.3f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    resting = sorted(set(before.sinks()) & set(after.sinks()))
    for column in (1, 2, 3):
        figure.add_trace(
            go.Scatter(
                x=[head.head for head in resting],
                y=[head.layer for head in resting],
                mode="markers",
                marker={"symbol": "x-thin", "size": 6, "line": {"width": 1, "color": "#888"}},
                name="rests on the first position",
                hovertemplate="L%{y}H%{x} rests on the first position<extra></extra>",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
    dress(
        figure,
        f"Attention of the last position on: {part}",
        about_card(
            before.card,
            f"mean of {len(before.mass)} prompts; × heads with 90 % or more on the first position",
        ),
    )
    layout: Any = figure.layout
    return figure.update_layout(
        width=layout.width + 130,
        margin={"r": 190},
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "colorbar": {"title": "share", "x": 1.02}},
        coloraxis2={
            "colorscale": DIVERGING,
            "cmid": 0,
            "colorbar": {"title": "change", "x": 1.16},
        },
    )


def attention_pattern(
    tokens: Sequence[str], pattern: Float[Tensor, "query key"], title: str, about: str = ""
) -> go.Figure:
    """One head's attention on one text, with its tokens.

    >>> import torch
    >>> figure = attention_pattern(["Le", " chat"], torch.eye(2), "L0H0")
    >>> list(figure.layout.xaxis.ticktext)
    ['Le', ' chat']
    """
    places = list(range(len(tokens)))
    shown = [_short(token) for token in tokens]
    figure = go.Figure(
        go.Heatmap(
            z=pattern.numpy(),
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            colorbar={"title": "attention"},
            customdata=[[html.escape(f"{q!r} on {k!r}") for k in tokens] for q in tokens],
            hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        )
    )
    dress(figure, title, about)
    side = 14 * len(tokens)
    figure.update_layout(width=max(420, side + 260), height=max(380, side + 220))
    figure.update_xaxes(tickvals=places, ticktext=shown, tickangle=-90, title_text="attended token")
    return figure.update_yaxes(
        tickvals=places, ticktext=shown, autorange="reversed", title_text="attending token"
    )


def _short(token: str) -> str:
    token = token.replace("\n", "⏎")
    short = token if len(token) <= _LONGEST_TOKEN else token[: _LONGEST_TOKEN - 1] + "…"
    return html.escape(short, quote=False)  # plotly reads tags in labels
