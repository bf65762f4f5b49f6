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
    every: dict[str, Way] = {**numbers, **(others or {})}
    values: dict[str, Tensor] = {}
    peaks = {  # the run that warms up; the weights are in memory already
        name: peak_mb(lambda name=name, way=way: values.update({name: way()}))
        for name, way in every.items()
    }
    rows = compared(in_turn(every, rounds, warm=False), "ours", per)
    ours = values["ours"].nan_to_num()
    for row in rows:
        row["peak_mb"] = peaks[row["way"]]
        same = row["way"] in numbers
        apart = (values[row["way"]].nan_to_num() - ours).abs().max() / ours.abs().max()
        row["difference"] = float(apart) if same else float("nan")
    return rows


def run(
    lengths: Mapping[int, int] | None = None,
    batch_tokens: int = 1024,
    effect_texts: int = 4,
    parts: tuple[str, ...] = ("scoring", "exact"),
    every: int = 10,
    rounds: int = 3,
    backend: str = "auto",
    dtype: str = "float32",
    progress: bool = True,
) -> Result:
    """Both comparisons on SmolLM2.

    Args:
        lengths: tokens a text → number of texts to score.
        effect_texts: of the first length, for exact effects.
        parts: which of the two tables.
        every: those of all heads of every ``every``-th layer.
    """
    model = lt.load_model("smollm2", dtype=dtype, backend=backend)
    kinds = {
        kind: AutoModelForCausalLM.from_pretrained(
            smollm2_folder(), dtype=getattr(torch, dtype), attn_implementation=kind
        ).requires_grad_(False)
        for kind in ("eager", "sdpa")
    }
    with torch.no_grad():
        for hf in kinds.values():  # its weights are read from disk as they are needed
            hf(torch.tensor([[1, 2, 3]]))
    tables: dict[str, pd.DataFrame] = {}

    def show(name: str, rows: list[dict[str, Any]], **at: int) -> None:
        table = pd.DataFrame([{**at, **row} for row in rows])
        tables[name] = pd.concat([tables[name], table]) if name in tables else table
        if progress:
            print(table.to_string(index=False, float_format="{:.3g}".format), flush=True)

    sizes, texts = lengths or {32: 16, 128: 8}, {}
    for length, count in sizes.items() if "scoring" in parts else ():
        texts[length] = cut_texts(lt.tokenizer_of(model), length, count)
        batch = max(1, batch_tokens // length)
        ids = torch.tensor(texts[length])
        others: dict[str, Way] = {AUTHORS: partial(authors_pass, kinds["eager"], texts[length])}
        if len(texts) == 1:  # it takes seconds a text where texts are longer
            others["TransformerLens attribution_patch"] = partial(
                ways.attribution_patching_scores, model, ids.roll(1, 0), ids
            )
        numbers = scoring_ways(model, kinds["sdpa"], texts[length], batch)
        show("scoring", measure(numbers, rounds, count, others), tokens=length, texts=count)
    if "exact" in parts:
        length = next(iter(sizes))
        few = cut_texts(lt.tokenizer_of(model), length, effect_texts)
        grid = lt.grid_of(model)
        layers = range(every // 2, grid.n_layers, every)
        heads = lt.HeadSet(grid, [(layer, h) for layer in layers for h in range(grid.n_heads)])
        numbers = effect_ways(model, kinds["sdpa"], few, heads, max(1, batch_tokens // length))
        found = measure(numbers, rounds, len(few) * len(heads))
        show("exact", found, tokens=length, texts=len(few), heads=len(heads))
    card = {**machine(), "dtype": dtype, "class": type(model).__name__}
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
    parser.add_argument(
        "--quick", action="store_true", help="32 tokens, 2 texts, one layer, one round"
    )
    parser.add_argument("--backend", default="auto", help="hooked or bridge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("scoring", "exact"), help="one table alone")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = vars(parser.parse_args())
    out, quick, part = (given.pop(name) for name in ("out", "quick", "part"))
    given |= {"parts": (part,)} if part else {}
    small: dict[str, Any] = {"lengths": {32: 2}, "effect_texts": 2, "every": 30, "rounds": 1}
    result = run(**{**given, **(small if quick else {})})
    print(f"\n{result}")
    if out:
        print(f"\nWritten to {result.save(out)}")


if __name__ == "__main__":
    main()
