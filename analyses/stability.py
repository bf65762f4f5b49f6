"""How many texts are enough: reliability of scores and of the top heads, by number of texts.

For each number of texts, random halves of so many texts each are scored apart: their rank correlation and
the overlap of their top heads say how far one sample's answer is the next one's. Then ``score_until`` says
after how many texts it would have stopped.

    python -m analyses.stability
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.result import Result, model_of, shared_gradients
from lahis_tl.access import LensModel
from lahis_tl.per_text import PerTextHeads
from lahis_tl.scores import method_for, reduce_rows
from lahis_tl.selection import chance_jaccard
from lahis_tl.sequential import StoppingRule, default_looks
from lahis_tl.statistics import in_top, rank_correlation


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "de", "zh"),
    n: int = 80,
    max_tokens: int = 96,
    methods: Sequence[str] = ("lahis", "lahis_code", "sensitivity", "taylor"),
    top_k: int = 20,
    draws: int = 200,
    seed: int = 0,
    gradients: str | Path | None = None,
    computed: lt.HeadGradients | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> Result:
    """Reliability by number of texts, and where the stopping rule would stop.

    Args:
        dtype: to load the model in; bfloat16 is faster where the processor has arithmetic for it.
        n: texts a language; samples of up to half of them are compared.
        top_k: size of the set of best heads.
        draws: random pairs of samples for each number of texts.
        gradients: a folder of gradients that experiments share; nothing is kept if None.
        computed: gradients that there are already, instead of model and texts.
    """
    if computed is None:
        corpus = lt.load_corpus("bundled", languages, n=n, seed=seed)
        loaded = model_of(model, dtype=dtype)
        computed = shared_gradients(
            loaded, corpus, gradients, max_tokens=max_tokens, progress=progress
        )
    table = _reliability(computed, methods, top_k, draws, seed)
    stops = _stops(computed, methods, top_k, seed)
    return Result(
        "stability",
        {"reliability": table, "stopping": stops},
        {
            method: _figure(table.query("method == @method"), method, computed, top_k)
            for method in methods
        },
        _verdict(table, stops, computed, top_k),
        computed.card,
    )


def _reliability(
    source: PerTextHeads, methods: Sequence[str], top_k: int, draws: int, seed: int
) -> pd.DataFrame:
    rows = []
    for method in methods:
        chosen = method_for(source, method)
        for code, available in source.n_texts.items():
            generator = torch.Generator().manual_seed(seed)
            for size in _sizes(available // 2):
                found = []
                for _ in range(draws):
                    order = torch.randperm(available, generator=generator)
                    parts = (order[:size], order[size : 2 * size])
                    a, b = (reduce_rows(source, code, part, chosen) for part in parts)
                    first, second = in_top(torch.stack([a, b]), top_k)
                    common = int((first & second).sum()) / top_k
                    found.append((rank_correlation(a, b), common))
                rho, common = torch.tensor(found).T
                rows.append(
                    {
                        "method": method,
                        "language": code,
                        "texts": size,
                        **_summary("rank_correlation", rho),
                        **_summary(f"common_of_top_{top_k}", common),
                    }
                )
    return pd.DataFrame(rows)


def _summary(name: str, values: Tensor) -> dict[str, float]:
    lower, upper = (
        values.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    return {name: float(values.mean()), f"{name}_lower": lower, f"{name}_upper": upper}


def _sizes(most: int) -> list[int]:
    return [size for size in (2, 5, 10, 20, 30, 40, 60, 100, 200, 500) if size < most] + [most]


def _stops(source: lt.HeadGradients, methods: Sequence[str], top_k: int, seed: int) -> pd.DataFrame:
    """Where ``score_until`` would stop, for several shares of the top heads that are to stay."""
    rows = []
    for method in methods:
        for code, available in source.n_texts.items():
            looks = default_looks(available)
            bounds = []
            for size in looks:
                rule = StoppingRule(top_k, 0.8, {}, 0.95, len(looks), draws=2000, seed=seed)
                part = source.select([code]).take(range(size))
                bounds.append(rule.look(part, code, method_for(part, method))[0])
            row: dict[str, object] = {"method": method, "language": code}
            for share in (0.5, 0.6, 0.7, 0.8):
                enough = [n for n, bound in zip(looks, bounds, strict=True) if bound >= share]
                row[f"sure of {share:.0%}"] = enough[0] if enough else f"> {available}"
            rows.append({**row, f"bound at {available}": bounds[-1]})
    return pd.DataFrame(rows)


def _figure(table: pd.DataFrame, method: str, source: PerTextHeads, top_k: int):
    name = f"common_of_top_{top_k}"
    sizes = sorted(table["texts"].unique())
    values = {
        str(code): tuple(
            rows[column].tolist() for column in (name, f"{name}_lower", f"{name}_upper")
        )
        for code, rows in table.groupby("language", sort=False)
    }
    chance = chance_jaccard(top_k, top_k, source.grid.size)
    expected = top_k / source.grid.size
    figure = lt.plots.curves(
        [float(s) for s in sizes],
        values,  # type: ignore[arg-type]
        title=f"Top {top_k} heads of two samples of texts: {method}",
        about=f"share in common, 95% of random pairs of samples; by chance {expected:.2f} (Jaccard {chance:.2f})",
        x_title="texts in each sample",
        y_title=f"share of the top {top_k} in common",
        legend="language",
    )
    return figure.update_yaxes(range=[0, 1])


def _verdict(table: pd.DataFrame, stops: pd.DataFrame, source: PerTextHeads, top_k: int) -> str:
    name = f"common_of_top_{top_k}"
    most = table["texts"].max()
    last = table[table["texts"] == most].groupby("method", sort=False)[name]
    parts = [
        f"{method} {low:.0%} to {high:.0%}"
        for method, low, high in zip(last.min().index, last.min(), last.max(), strict=True)
    ]
    sure = {
        share: int(stops[f"sure of {share}"].map(lambda v: not isinstance(v, str)).sum())
        for share in ("50%", "70%", "80%")
    }
    return (
        f"Two samples of {most} texts share so much of their top {top_k} of {source.grid.size} heads, "
        f"over languages: {'; '.join(parts)}. The stopping rule (certainty 95 %, looks paid for) is sure "
        f"of half of the set in {sure['50%']} of {len(stops)} cases within the texts there are, of 70 % in "
        f"{sure['70%']}, of 80 % in {sure['80%']}."
    )


if __name__ == "__main__":
    run_from_command_line(
        run, __doc__, {"languages": ("en", "fr"), "n": 16, "max_tokens": 32, "draws": 20}
    )
