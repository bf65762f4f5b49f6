"""What supports a claim about heads: intervals, controls, agreement with exact effects."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch

from lahis_tl.ablation import AblationEffect, Selectivity
from lahis_tl.plots.style import CATEGORICAL, DIVERGING, SEQUENTIAL, about_card, bar_title, dress
from lahis_tl.scores import HeadScores
from lahis_tl.statistics import ScoreCertainty, rank_correlation
from lahis_tl.sweeps import Sweep
from lahis_tl.tuning import TunedMask

GREY = "#999999"
_NATS = "rise of the loss (nats per token)"


def intervals(certainty: ScoreCertainty, language: str, k: int | None = None) -> go.Figure:
    """Scores of the best heads with their bootstrap intervals, coloured by the chance to be among the top k."""
    rows = certainty.to_dataframe().query("language == @language")
    rows = rows.nlargest(k or certainty.top_k, "score")
    figure = go.Figure(
        go.Scatter(
            x=rows["score"],
            y=rows["label"],
            mode="markers",
            error_x={
                "array": rows["upper"] - rows["score"],
                "arrayminus": rows["score"] - rows["lower"],
                "color": GREY,
                "thickness": 1.5,
            },
            marker={
                "color": rows["selection"],
                "colorscale": SEQUENTIAL,
                "cmin": 0,
                "cmax": 1,
                "size": 9,
                "line": {"color": "#444", "width": 1},
                "colorbar": {"title": f"chance to be<br>in the top {certainty.top_k}"},
            },
            hovertemplate="%{y}: %{x:.3g}, chance %{marker.color:.2f}<extra></extra>",
        )
    )
    about = (
        f"{certainty.method}, {certainty.level:.0%} intervals over texts, {certainty.draws} samples"
    )
    dress(
        figure,
        f"Best heads for {language}, and how sure that is",
        about_card(certainty.card, about),
    )
    figure.update_layout(width=680, height=170 + 20 * len(rows))
    figure.update_xaxes(title_text=bar_title(certainty.method, certainty.unit), rangemode="tozero")
    return figure.update_yaxes(autorange="reversed", dtick=1)


def agreement(scores: HeadScores, exact: HeadScores, language: str) -> go.Figure:
    """A score against the exact effect of every head, coloured by layer."""
    x, y = exact[language].flatten(), scores[language].flatten()
    layers = np.repeat(np.arange(exact.grid.n_layers), exact.grid.n_heads)
    figure = go.Figure(
        go.Scatter(
            x=x.numpy(),
            y=y.numpy(),
            mode="markers",
            text=exact.labels,
            marker={
                "color": layers,
                "colorscale": SEQUENTIAL,
                "size": 7,
                "line": {"color": "white", "width": 0.5},
                "colorbar": {"title": "layer"},
            },
            hovertemplate="%{text}: exact %{x:.3g}, score %{y:.3g}<extra></extra>",
        )
    )
    about = about_card(exact.card, f"rank correlation {rank_correlation(x, y):.2f}")
    dress(figure, f"{scores.method} against exact ablation, {language}", about)
    figure.update_layout(width=620, height=480)
    figure.update_xaxes(title_text=f"exact effect: {_NATS}")
    return figure.update_yaxes(title_text=bar_title(scores.method, scores.unit))


def selectivity_matrix(result: Selectivity) -> go.Figure:
    """Heads of the row off, text of the column; a star where no more than 5 % of random sets do as much."""
    table = result.to_dataframe()
    shape = (len(result.rows), len(result.columns))
    change = table["change"].to_numpy().reshape(shape)
    text = np.array(
        [
            f"{v:.2f}{'*' if p <= 0.05 else ''}"
            for v, p in zip(table["change"], table["p"], strict=True)
        ]
    ).reshape(shape)
    hover = table[["lower", "upper", "control_mean", "p"]].to_numpy().reshape(*shape, 4)
    figure = go.Figure(
        go.Heatmap(
            z=change,
            x=list(result.columns),
            y=list(result.rows),
            text=text,
            texttemplate="%{text}",
            customdata=hover,
            colorscale=DIVERGING,
            zmid=0,
            colorbar={"title": "rise of the loss<br>(nats per token)"},
            hovertemplate=(
                "heads of %{y} off, text in %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
                "<br>random sets %{customdata[2]:.3f}, p %{customdata[3]:.3f}<extra></extra>"
            ),
        )
    )
    draws = result.controls.shape[1]
    about = f"own minus other languages {result.contrast()}, p {result.p_value():.2g}, {draws} random sets"
    dress(figure, "Heads of one language off, text of another", about_card(result.card, about))
    figure.update_layout(width=300 + 70 * shape[1], height=220 + 44 * shape[0])
    figure.update_xaxes(title_text="language of the text", type="category")
    return figure.update_yaxes(
        title_text="language of the heads", autorange="reversed", type="category"
    )


def square(
    table: pd.DataFrame,
    names: tuple[str, str, str],
    title: str,
    about: str,
    bar: str,
    axes: tuple[str, str],
) -> go.Figure:
    """A matrix of signed values, centred on 0.

    Args:
        table: one row a cell.
        names: columns of the row, the column and the value.
        axes: titles of y and x.
    """
    row, column, value = names
    rows = list(dict.fromkeys(table[row]))
    columns = sorted(
        dict.fromkeys(table[column]),
        key=lambda name: rows.index(name) if name in rows else len(rows),
    )
    matrix = table.pivot(index=row, columns=column, values=value).reindex(rows)[columns]
    figure = go.Figure(
        go.Heatmap(
            z=matrix.to_numpy(),
            x=columns,
            y=rows,
            texttemplate="%{z:.2f}",
            hoverongaps=False,
            colorscale=DIVERGING,
            zmid=0,
            colorbar={"title": bar},
            hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        )
    )
    dress(figure, title, about)
    figure.update_layout(width=max(480, 300 + 70 * len(columns)), height=220 + 44 * len(rows))
    figure.update_xaxes(title_text=axes[1], type="category")
    return figure.update_yaxes(title_text=axes[0], autorange="reversed", type="category")


def set_effect(effect: AblationEffect) -> go.Figure:
    """The change under a set of heads beside every matched random set, by language."""
    table = effect.to_dataframe()
    about = f"{len(effect.heads)} heads × {effect.factor:g}, {table['draws'].iloc[0]} random sets"
    figure = beside_draws(
        table.rename(columns={"language": "name"}),
        {code: draws.tolist() for code, draws in effect.controls.items()},
        "A set of heads beside matched random sets",
        about_card(effect.card, about),
        _NATS,
    )
    return figure.update_xaxes(title_text="language of the text")


def beside_draws(
    table: pd.DataFrame, draws: Mapping[str, Sequence[float]], title: str, about: str, unit: str
) -> go.Figure:
    """Changes with intervals, each beside what random sets of heads gave.

    Args:
        table: columns name, change, lower, upper, p.
        draws: name → change under each random set; names without any are left alone.
        unit: of the y axis.
    """
    figure = go.Figure()
    for i, (name, values) in enumerate(draws.items()):
        figure.add_trace(
            go.Box(
                x=[name] * len(values),
                y=list(values),
                name="random sets",
                legendgroup="random",
                showlegend=i == 0,
                boxpoints="all",
                pointpos=0,
                jitter=0.5,
                marker={"color": GREY, "size": 4, "opacity": 0.6},
                line={"color": GREY, "width": 1},
                fillcolor="rgba(0,0,0,0)",
                hovertemplate="random set: %{y:.3f}<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=table["name"],
            y=table["change"],
            mode="markers",
            name="these heads",
            marker={
                "color": CATEGORICAL[0],
                "size": 11,
                "symbol": "diamond",
                "line": {"color": "#222", "width": 1},
            },
            error_y={
                "array": table["upper"] - table["change"],
                "arrayminus": table["change"] - table["lower"],
            },
            customdata=table["p"],
            hovertemplate="%{x}: %{y:.3f}, p %{customdata:.3f}<extra></extra>",
        )
    )
    dress(figure, title, about)
    figure.update_layout(width=max(520, 220 + 70 * len(table)), height=440)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(table["name"]))
    return figure.update_yaxes(title_text=unit)


def sweep(result: Sweep, about: str = "") -> go.Figure:
    """The change along a sweep, one line a language, with the range of all random sets behind.

    Args:
        about: what the heads are, for the subtitle.
    """
    table = result.to_dataframe()
    figure = go.Figure()
    steps = list(result.steps)
    drawn = torch.cat(list(result.controls.values()), 1)  # [step, draws of all languages]
    low, high = drawn.amin(1).tolist(), drawn.amax(1).tolist()
    figure.add_trace(
        go.Scatter(
            x=steps + steps[::-1],
            y=low + high[::-1],
            mode="lines",
            fill="toself",
            fillcolor="rgba(120,120,120,0.2)",
            line={"width": 0},
            name="random sets",
            hoverinfo="skip",
        )
    )
    for i, (code, rows) in enumerate(table.groupby("language", sort=False)):
        figure.add_trace(
            go.Scatter(
                x=rows[result.what],
                y=rows["change"],
                name=str(code),
                mode="lines+markers",
                line={"color": CATEGORICAL[i % len(CATEGORICAL)]},
                marker={"symbol": i},
                error_y={
                    "array": rows["upper"] - rows["change"],
                    "arrayminus": rows["change"] - rows["lower"],
                    "thickness": 1,
                },
                hovertemplate=f"{code}, {result.what} %{{x:g}}: %{{y:.3f}}<extra></extra>",
            )
        )
    title = "Number of heads taken away" if result.what == "heads" else "Heads scaled by a factor"
    dress(
        figure,
        title,
        about_card(result.card, f"{about}{', ' if about else ''}95% intervals over texts"),
    )
    figure.update_layout(width=720, height=440, legend_title="text in")
    figure.update_xaxes(title_text=result.what)
    return figure.update_yaxes(title_text=_NATS)


def curves(
    x: list[float], values: dict[str, tuple[list[float], list[float], list[float]]], **names: str
) -> go.Figure:
    """Lines with bands: name → (value, lower, upper) at every x.

    Args:
        names: ``title``, ``about``, ``x_title``, ``y_title``, ``legend``.
    """
    figure = go.Figure()
    for i, (name, (value, lower, upper)) in enumerate(values.items()):
        color = CATEGORICAL[i % len(CATEGORICAL)]
        red, green, blue = px.colors.unlabel_rgb(color)
        figure.add_trace(
            go.Scatter(
                x=x + x[::-1],
                y=[*lower, *upper[::-1]],
                mode="lines",
                fill="toself",
                fillcolor=f"rgba({red:.0f},{green:.0f},{blue:.0f},0.15)",
                line={"width": 0},
                showlegend=False,
                hoverinfo="skip",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=x,
                y=value,
                name=name,
                mode="lines+markers",
                line={"color": color},
                marker={"symbol": i},
                hovertemplate=f"{name}, %{{x:g}}: %{{y:.3f}}<extra></extra>",
            )
        )
    dress(figure, names.get("title", ""), names.get("about", ""))
    figure.update_layout(width=720, height=440, legend_title=names.get("legend", ""))
    figure.update_xaxes(title_text=names.get("x_title", ""))
    return figure.update_yaxes(title_text=names.get("y_title", ""))


def tuning(tuned: TunedMask) -> go.Figure:
    """The loss of the targets over the epochs of a tuned mask; the epoch that was kept is marked."""
    history, kept = tuned.history, tuned.card.get("settings", {}).get("kept_epoch")
    figure = go.Figure()
    for i, (column, name) in enumerate((("train_nll", "training"), ("valid_nll", "validation"))):
        figure.add_trace(
            go.Scatter(
                x=history["epoch"],
                y=history[column],
                name=name,
                mode="lines+markers",
                line={"color": CATEGORICAL[i]},
                marker={"symbol": i},
                hovertemplate=f"{name}, epoch %{{x}}: %{{y:.3f}}<extra></extra>",
            )
        )
    if kept is not None:
        figure.add_vline(x=kept, line={"dash": "dot", "color": GREY}, annotation_text="kept")
    settings = tuned.card.get("settings", {})
    about = f"{len(tuned.heads)} heads, {settings.get('pairs', '?')} pairs"
    dress(figure, "Tuning a head mask", about_card(tuned.card, about))
    figure.update_layout(width=680, height=400, legend_title="pairs")
    figure.update_xaxes(title_text="epoch", dtick=1)
    return figure.update_yaxes(title_text="loss of the targets (nats per token)")
