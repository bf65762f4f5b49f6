"""Do a language's heads matter to that language more than to others, and more than random heads do?

Heads are chosen on one part of a parallel corpus and taken away on the other. Every set stands beside as many
matched random sets: as many heads in the same layers, none of the set. Then the dose and its response: more
and more heads, and factors from 0 to 3.

    python -m analyses.selectivity
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.result import Result, choose_and_set_aside, model_of, part_of
from lahis_tl.access import LensModel


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "de", "zh"),
    n: int = 48,
    test_texts: int = 12,
    max_tokens: int = 64,
    test_tokens: int | None = None,
    method: str = "lahis",
    rule: str = "contrastive",
    draws: int = 50,
    match: str = "nearest",
    seed: int = 0,
    sweeps: bool = True,
    dtype: str = "float32",
    checkpoint: str | Path | None = None,
    gradients: str | Path | None = None,
    progress: bool = True,
    **rule_options: Any,
) -> Result:
    """The languages × languages matrix with its controls, and sweeps for each language's heads.

    Args:
        dtype: to load the model in; bfloat16 is faster where the processor has arithmetic for it.
        n, max_tokens: scoring texts a language, and where they are cut.
        test_texts, test_tokens: others of the bundled 80, for testing, and where they are cut; as the former if None.
        checkpoint: a folder for finished sets of heads, from which an interrupted run with these settings goes on.
        gradients: a folder of gradients that experiments share; nothing is kept if None.
        method, rule, rule_options: how heads are scored and chosen; for the tested rule ``method`` is what
            it tests.
        draws, match: random sets for each language, see ``matched_random_heads``; where a set is of one or two
            heads, layers allow few, and only ``"network"`` allows small p-values.
        sweeps: also k and factor sweeps, with fewer random sets.
    """
    model = model_of(model, dtype=dtype)
    options: dict[str, Any] = {"max_tokens": max_tokens, "progress": progress}
    grads, heads, testing = choose_and_set_aside(
        model, languages, n, test_texts, method, rule, seed, rule_options, gradients, **options
    )
    options["max_tokens"] = max_tokens if test_tokens is None else test_tokens
    options |= {"seed": seed, "match": match}
    parts = partial(part_of, checkpoint)
    result = lt.selectivity(model, heads, testing, draws=draws, checkpoint=parts("all"), **options)
    tables = {
        "matrix": result.to_dataframe(),
        "contrasts": _contrasts(result),
        "heads": heads.to_dataframe(),
    }
    figures = {"matrix": lt.plots.selectivity_matrix(result)}
    if sweeps:
        ranking = lt.score(grads, method)
        few = min(draws, 5)
        for code in result.rows[:2]:
            members = heads.specific[code]
            swept = options | {"draws": few, "scored": grads.card}
            by_factor = lt.sweep_factors(
                model, testing, members, checkpoint=parts(f"factors_{code}"), **swept
            )
            counts = [k for k in (1, 2, 5, 10, 20, 40) if k <= ranking.grid.size // 4]
            best = ranking.top(counts[-1], code)
            by_count = lt.sweep_heads(
                model, testing, best, counts, checkpoint=parts(f"counts_{code}"), **swept
            )
            for kind, sweep in (("factors", by_factor), ("counts", by_count)):
                tables[f"{kind}_{code}"] = sweep.to_dataframe()
                figures[f"{kind}_{code}"] = lt.plots.sweep(sweep, f"heads of {code}")
    card = {**result.card, "heads": heads.card, "rule": heads.rule, "options": dict(heads.options)}
    return Result("selectivity", tables, figures, _verdict(result, heads), card)


def _contrasts(result: lt.Selectivity) -> pd.DataFrame:
    """Own language minus the others, row by row and over all rows."""
    rows = []
    for row in (*result.rows, None):
        interval = result.contrast(row)
        rows.append(
            {
                "heads_of": row or "all",
                "own_minus_others": interval.value,
                "lower": interval.lower,
                "upper": interval.upper,
                "p": result.p_value(row),
            }
        )
    return pd.DataFrame(rows)


def _verdict(result: lt.Selectivity, heads: lt.LanguageHeads) -> str:
    table = _contrasts(result)
    rows = table[table["heads_of"] != "all"]
    good = rows[(rows["lower"] > 0) & (rows["p"] <= 0.05)]["heads_of"].tolist()
    sizes = sorted({len(heads.specific[code]) for code in result.rows})
    own = [result.change[code, code].mean().item() for code in result.rows]
    return (
        f"Taking a language's {'-'.join(map(str, sizes))} heads away (score {heads.method}, rule "
        f"{heads.rule}) raises the loss in its own language by {min(own):.2f} to {max(own):.2f} nats per "
        f"token, and by {result.contrast()} more than in the others, mean over {len(result.rows)} languages "
        f"(p {result.p_value():.2g} against {result.controls.shape[1]} matched random sets a language). Selective "
        "language by language, with an interval above 0 and p ≤ 0.05: "
        f"{', '.join(good) or 'none'}."
    )


if __name__ == "__main__":
    run_from_command_line(
        run,
        __doc__,
        {"languages": ("en", "fr"), "n": 16, "test_texts": 6, "max_tokens": 32, "draws": 10},
    )
