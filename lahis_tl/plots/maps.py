"""Scores and sets of heads over the grid of layers and heads."""

import numpy as np
import plotly.express as px
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from lahis_tl.heads import HeadGrid
from lahis_tl.plots.style import (
    CATEGORICAL,
    DIVERGING,
    SEQUENTIAL,
    about_heads,
    about_scores,
    bar_title,
    dress,
    panels,
)
from lahis_tl.scores import HeadScores
from lahis_tl.selection import LanguageHeads, chance_jaccard, jaccard


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
    figure = panels(scores.grid, names if language is None else None, columns)
    for i, name in enumerate(names):
        trace = _map(scores[name].numpy(), scores.unit)
        figure.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    title = f"Importance of attention heads for {language or f'{len(names)} languages'}"
    dress(figure, title, about_scores(scores))
    return figure.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL,
            "colorbar": {"title": bar_title(scores.method, scores.unit)},
        }
        | ({} if (scores.values < 0).any() else {"cmin": 0})
    )


def selectable_map(values: Float[Tensor, "layer head"], unit: str) -> go.Figure:
    """One map with two rows of marks, empty yet: the chosen head, the selected heads."""
    figure = panels(HeadGrid(*values.shape), None)
    figure.add_trace(_map(values.numpy(), unit))
    for name, symbol, color in (("chosen", "square-open", "#ff3b30"), ("selected", "x", "#00b3a4")):
        marker = {"symbol": symbol, "size": 11, "color": color, "line": {"width": 2}}
        figure.add_scatter(
            x=[], y=[], mode="markers", marker=marker, name=name, hoverinfo="skip", showlegend=False
        )
    signed = bool((values < 0).any())
    axis = {"colorscale": DIVERGING, "cmid": 0} if signed else {"colorscale": SEQUENTIAL, "cmin": 0}
    return figure.update_layout(
        template="plotly_white",
        margin={"t": 30, "b": 50, "l": 60, "r": 20},
        coloraxis={**axis, "colorbar": {"title": unit.replace(" ", "<br>", 1)}},
    )


def difference(scores: HeadScores, language: str, minus: str) -> go.Figure:
    """Score in one language minus that in another, on a diverging scale centred on 0."""
    values = (scores[language] - scores[minus]).numpy()
    figure = panels(scores.grid, None)
    figure.add_trace(_map(values, scores.unit))
    title = f"Attention heads: importance for {language} minus {minus}"
    dress(figure, title, about_scores(scores))
    bar = {"title": bar_title(f"{scores.method}, {language} − {minus}", scores.unit)}
    return figure.update_layout(coloraxis={"colorscale": DIVERGING, "cmid": 0, "colorbar": bar})


def language_counts(heads: LanguageHeads) -> go.Figure:
    """How many languages keep each head."""
    counts, most = heads.counts.numpy(), len(heads.languages)
    figure = panels(heads.grid, None)
    figure.add_trace(
        go.Heatmap(
            z=counts,
            coloraxis="coloraxis",
            hovertemplate="L%{y}H%{x}: %{z} languages<extra></extra>",
        )
    )
    title = f"Number of languages (of {most}) that keep each head"
    dress(figure, title, about_heads(heads))
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
    dress(figure, "Language heads by layer", about_heads(heads))
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
    dress(
        figure,
        "Overlap of the heads that two languages keep",
        f"{about_heads(heads)}; {level}",
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
