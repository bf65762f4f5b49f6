"""Do scores say what removing a head does? Every score against exact ablation, on the same texts.

python -m analyses.faithfulness             # four languages, 48 texts each: half an hour on two cores
python -m analyses.faithfulness --quick
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.result import Result, model_of
from lahis_tl.access import LensModel
from lahis_tl.batches import tokenize
from lahis_tl.scores import method_for, reduce_rows
from lahis_tl.statistics import percentile_interval, rank_correlation

METHODS = ("lahis", "lahis_code", "sensitivity", "taylor", "second_order")


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "de", "zh"),
    n: int = 48,
    max_tokens: int = 32,
    methods: Sequence[str] = METHODS,
    top_k: int = 20,
    budget: float = 0.15,
    draws: int = 200,
    seed: int = 0,
    checkpoint: str | Path | None = "out/faithfulness/parts",
    progress: bool = True,
) -> Result:
    """Rank correlation with the exact effect, and how deep a ranking must be read to hold the true top k.

    Args:
        n, max_tokens: texts a language, and where they are cut.
        top_k: heads of largest exact effect, and of a score, that are compared.
        budget: of ``verified_scores``.
        draws: bootstrap samples of texts; score and exact effect are resampled together.
        checkpoint: a folder from which an interrupted run goes on.
    """
    model = model_of(model)
    corpus = lt.load_corpus("bundled", languages, n=n, seed=seed)
    folder = None if checkpoint is None else Path(checkpoint)
    computed_anew = folder is None or not folder.exists()
    options: dict[str, Any] = {"max_tokens": max_tokens, "progress": progress}

    effects, exact_s = _timed(lambda: _exact(model, corpus, max_tokens, folder, progress))
    grads, screen_s = _timed(
        lambda: lt.head_gradients(model, corpus, curvature_draws=2, seed=seed, **options)
    )
    verified, verified_s = _timed(
        lambda: lt.verified_scores(model, corpus, budget=budget, seed=seed, **options)
    )
    truth = lt.score(effects)
    rows = []
    for code in languages:
        for method in methods:
            value = lt.score(grads, method)[code]
            interval = _bootstrap(grads, effects, code, method, draws, seed)
            rows.append(
                {"score": method, "language": code, **_compare(value, truth[code], top_k)}
                | {"lower": interval.lower, "upper": interval.upper}
            )
        rows.append(
            {"score": "verified", "language": code, **_compare(verified[code], truth[code], top_k)}
        )
    table = pd.DataFrame(rows)
    if not computed_anew:
        exact_s = float("nan")  # a part of it was read, so that times cannot be compared
    times = pd.DataFrame(
        [
            {"what": "exact effects of all heads", "seconds": exact_s, "share": 1.0},
            {"what": "gradients and curvature", "seconds": screen_s, "share": screen_s / exact_s},
            {"what": "verified scores", "seconds": verified_s, "share": verified_s / exact_s},
        ]
    )
    figures = {"correlation": _figure(table, truth)}
    for method in ("lahis", "second_order"):
        figures[f"agreement_{method}"] = lt.plots.agreement(
            lt.score(grads, method), truth, languages[0]
        )
    figures["agreement_verified"] = lt.plots.agreement(verified, truth, languages[0])
    return Result(
        "faithfulness",
        {"faithfulness": table, "cost": times},
        figures,
        _verdict(table, verified, times, top_k),
        grads.card,
    )


def _exact(
    model: LensModel, corpus: lt.Corpus, max_tokens: int, folder: Path | None, progress: bool
) -> lt.HeadEffects:
    """Language by language, so that what is finished of an interrupted run is whole languages."""
    found = [
        lt.exact_effects(
            model, {code: ids}, checkpoint=folder and folder / f"exact-{code}", progress=progress
        )
        for code, ids in tokenize(model, corpus, max_tokens).items()
    ]
    return lt.HeadEffects.side_by_side(found)


def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return make(), time.perf_counter() - start


def _compare(value: Tensor, truth: Tensor, k: int) -> dict[str, float]:
    """Rank correlation; common heads of the two top k; how many heads down all true top k are seen."""
    best = truth.flatten().topk(k).indices
    order = value.flatten().argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    depths = place[best].sort().values + 1
    return {
        "rank_correlation": rank_correlation(value, truth),
        f"common_of_top_{k}": int((depths <= k).sum()),
        "depth_for_all": int(depths[-1]),
        "depth_for_90%": int(depths[round(0.9 * k) - 1]),
    }


def _bootstrap(
    grads: lt.HeadGradients,
    effects: lt.HeadEffects,
    language: str,
    method: str,
    draws: int,
    seed: int,
) -> lt.Interval:
    """The correlation over samples of texts, the same for score and exact effect."""
    chosen, n = method_for(grads, method), grads.n_texts[language]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        rows = torch.randint(n, (n,), generator=generator)
        value = reduce_rows(grads, language, rows, chosen)
        found.append(rank_correlation(value, effects[language][rows].mean(0)))
    return percentile_interval(float("nan"), torch.tensor(found), 0.95)


def _figure(table: pd.DataFrame, truth: lt.HeadScores) -> go.Figure:
    figure = go.Figure()
    for i, (code, rows) in enumerate(table.groupby("language", sort=False)):
        figure.add_trace(
            go.Scatter(
                x=rows["score"],
                y=rows["rank_correlation"],
                name=str(code),
                mode="markers",
                marker={"color": lt.plots.CATEGORICAL[i], "symbol": i, "size": 10},
                error_y={
                    "array": rows["upper"] - rows["rank_correlation"],
                    "arrayminus": rows["rank_correlation"] - rows["lower"],
                    "thickness": 1,
                },
                hovertemplate=f"%{{x}}, {code}: %{{y:.3f}}<extra></extra>",
            )
        )
    lt.plots.dress(
        figure,
        "How scores agree with exact ablation",
        lt.plots.about_card(
            truth.card, f"{truth.n_texts[0]} texts a language, 95% intervals over texts"
        ),
    )
    figure.update_layout(width=820, height=440, legend_title="language", scattermode="group")
    figure.update_xaxes(title_text="score", type="category")
    return figure.update_yaxes(
        title_text="rank correlation with the exact effect", range=[-0.1, 1.02]
    )


def _verdict(table: pd.DataFrame, verified: lt.VerifiedScores, times: pd.DataFrame, k: int) -> str:
    parts = []
    for name, rows in table.groupby("score", sort=False):
        rho, common = rows["rank_correlation"].tolist(), rows[f"common_of_top_{k}"].tolist()
        parts.append(
            f"{name} {min(rho):.2f} to {max(rho):.2f} ({min(common)} of the true top {k} at least)"
        )
    listed = "; ".join(parts)
    share = float(times["share"].iloc[-1])
    took = "" if math.isnan(share) else f", and took {share:.0%} of its time here"
    return (
        f"Rank correlation with the exact effect of zero ablation, over languages: {listed}. Verified scores take "
        f"{verified.cost:.1%} of the arithmetic of ablating every head{took}."
    )


if __name__ == "__main__":
    run_from_command_line(
        run,
        __doc__,
        {"languages": ("en", "fr"), "n": 8, "max_tokens": 24, "draws": 20, "checkpoint": None},
    )
