"""Scoring and exact effects against other tools that compute the same numbers, and how far the numbers agree.

The ways are those of ``analyses.benchmark_ways``, on the same texts in the same dtype, timed in turn. captum is
optional (``pip install captum``): without it its rows are left out, and the verdict says so.

    python -m analyses.benchmark_others
    python -m analyses.benchmark_others --backend bridge
    python -m analyses.benchmark_others --quick
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lahis_tl as lt
from analyses import benchmark_ways as ways
from analyses.benchmark import authors_pass
from analyses.benchmark_common import compared, cut_texts, in_turn, machine, peak_mb
from analyses.result import Result
from lahis_tl.access import LensModel
from lahis_tl.models.sources import smollm2_folder

Way = Callable[[], Tensor]
AUTHORS = "the authors' procedure"


def scoring_ways(model: LensModel, hf: Any, texts: list[list[int]], batch: int) -> dict[str, Way]:
    """Every way to the ``taylor`` effect of every head, ours first.

    Args:
        batch: texts in one pass of the ways that can.
    """
    ids = torch.tensor(texts)
    found: dict[str, Way] = {
        "ours": lambda: (
            -lt.head_gradients(
                model, {"all": texts}, batch_tokens=batch * ids.shape[1], progress=False
            )["all"]
        ),
        "TransformerLens script, text by text": partial(ways.taylor_plain, model, ids),
        "TransformerLens script, our batches": partial(ways.taylor_plain, model, ids, batch),
    }
    if not lt.access.is_bridge(model):
        found["TransformerLens script, retain_grad"] = partial(ways.taylor_retained, model, ids)
    found["TransformerLens cache_activation_and_gradient"] = partial(ways.taylor_cached, model, ids)
    if ways.HAS_CAPTUM:
        found["captum LayerGradientXActivation, text by text"] = partial(
            ways.taylor_captum, hf, ids
        )
        found["captum LayerGradientXActivation, our batches"] = partial(
            ways.taylor_captum, hf, ids, batch
        )
    return found


def effect_ways(
    model: LensModel, hf: Any, texts: list[list[int]], heads: lt.HeadSet, batch: int
) -> dict[str, Way]:
    """Every way to the exact effect of zeroing each of the heads, which are all of some layers; ours first."""
    ids = torch.tensor(texts)
    found: dict[str, Way] = {
        "ours": lambda: lt.exact_effects(
            model, {"all": texts}, heads, batch_tokens=batch * ids.shape[1], progress=False
        )["all"],
        "run_with_hooks, text by text": partial(ways.effects_plain, model, ids, heads),
        "run_with_hooks, our batches": partial(ways.effects_plain, model, ids, heads, batch),
        "TransformerLens patching": partial(ways.effects_patching, model, ids, heads),
    }
    if ways.HAS_CAPTUM:
        found["captum LayerFeatureAblation, text by text"] = partial(
            ways.effects_captum, hf, ids, heads
        )
        found["captum LayerFeatureAblation, our batches"] = partial(
            ways.effects_captum, hf, ids, heads, batch
        )
    return found


def measure(
    numbers: Mapping[str, Way], rounds: int, per: int, others: Mapping[str, Way] | None = None
) -> list[dict[str, Any]]:
    """Times in turn, peak memory, and the largest difference from ours as a share of our largest value.

    Args:
        numbers: ways that compute what ours does.
        per: times are divided by it.
        others: ways to compare in time and memory alone.
    """
    values = {name: way() for name, way in numbers.items()}  # warms up too
    every: dict[str, Way] = {**numbers, **(others or {})}
    rows = compared(in_turn(every, rounds, warm=False), "ours", per)
    ours = values["ours"].nan_to_num()
    for row in rows:
        value = values.get(row["way"])
        apart = (
            None if value is None else (value.nan_to_num() - ours).abs().max() / ours.abs().max()
        )
        row |= {"peak_mb": peak_mb(every[row["way"]])}
        row |= {"difference": float("nan") if apart is None else float(apart)}
    return rows


def run(
    lengths: Mapping[int, int] | None = None,
    batch_tokens: int = 1024,
    every: int = 6,
    rounds: int = 3,
    backend: str = "auto",
    dtype: str = "float32",
    progress: bool = True,
) -> Result:
    """Both comparisons on SmolLM2.

    Args:
        lengths: tokens a text → number of texts; exact effects take as many as one batch of ours, at most eight.
        every: exact effects of all heads of every ``every``-th layer.
    """
    model = lt.load_model("smollm2", dtype=dtype, backend=backend)
    kinds = {
        kind: AutoModelForCausalLM.from_pretrained(
            smollm2_folder(), dtype=getattr(torch, dtype), attn_implementation=kind
        ).requires_grad_(False)
        for kind in ("eager", "sdpa")
    }
    grid = lt.grid_of(model)
    layers = range(every // 2, grid.n_layers, every)
    heads = lt.HeadSet(grid, [(layer, head) for layer in layers for head in range(grid.n_heads)])
    rows: dict[str, list[dict[str, Any]]] = {"scoring": [], "exact": []}
    for length, count in (lengths or {32: 32, 128: 16}).items():
        texts = cut_texts(lt.tokenizer_of(model), length, count)
        batch = max(1, batch_tokens // length)
        few, ids, clean = texts[:8], torch.tensor(texts), torch.tensor(texts[1:] + texts[:1])
        others: dict[str, Way] = {
            "TransformerLens attribution_patch": partial(
                ways.attribution_patching_scores, model, clean, ids
            ),
            AUTHORS: partial(authors_pass, kinds["eager"], texts),
        }
        scoring = scoring_ways(model, kinds["sdpa"], texts, batch)
        effects = effect_ways(model, kinds["sdpa"], few, heads, min(batch, len(few)))
        found = {
            "scoring": measure(scoring, rounds, len(texts), others),
            "exact": measure(effects, rounds, len(few) * len(heads)),
        }
        for name, each in found.items():
            n = len(texts if name == "scoring" else few)
            rows[name] += [{"tokens": length, "texts": n, **row} for row in each]
            if progress:
                print(pd.DataFrame(each).round(3).to_string(index=False), flush=True)
    tables = {name: pd.DataFrame(each) for name, each in rows.items()}
    card = {**machine(), "dtype": dtype, "class": type(model).__name__, "heads": len(heads)}
    return Result("benchmark_others", tables, {}, _verdict(tables), card)


def _verdict(tables: Mapping[str, pd.DataFrame]) -> str:
    parts = []
    for name, table in tables.items():
        other = table[table["way"] != "ours"]
        slower = list(dict.fromkeys(other["way"][other["over_ours"] < 1]))
        parts.append(
            f"{name}: the other ways take {other['over_ours'].min():.2f} to {other['over_ours'].max():.2f} times as "
            f"long as ours, and the numbers differ by at most {table['difference'].max():.1e} of the largest"
            + (f"; ours is the slower beside {', '.join(slower)}" if len(slower) else "")
        )
    return ". ".join([*parts, "" if ways.HAS_CAPTUM else "captum is not installed"]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="32 tokens, 4 texts, one round")
    parser.add_argument("--backend", default="auto", help="hooked or bridge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = vars(parser.parse_args())
    out, quick = given.pop("out"), given.pop("quick")
    small: dict[str, Any] = {"lengths": {32: 4}, "every": 15, "rounds": 1}
    result = run(**{**given, **(small if quick else {})})
    print(f"\n{result}")
    if out:
        print(f"\nWritten to {result.save(out)}")


if __name__ == "__main__":
    main()
