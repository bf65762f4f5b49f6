"""Time of exact effects, against the plain loop and against the floor.

Three ways to ablate the same heads on the same texts, timed in turn within one process:

a. ours: from the ablated layer on, texts batched.
b. the plain loop, batched: a whole masked forward pass for every head, on the batches of (a).
c. the plain loop as it is mostly written: every head, and every text by itself.

The floor is arithmetic: a head of layer l of L still takes the layers from l on and the unembedding.

    python -m analyses.benchmark_effects
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

import lahis_tl as lt
from analyses.benchmark_common import cut_texts, in_turn
from analyses.result import Result
from lahis_tl.access import LensModel
from lahis_tl.batches import TokenIds, make_batches
from lahis_tl.verified import Costs

BATCH_TOKENS = 1024


@torch.no_grad()
def plain_loop(model: LensModel, token_ids: TokenIds, heads: lt.HeadSet, batch_tokens: int) -> None:
    """(b), and (c) with ``batch_tokens`` so small that every text is a batch."""
    batches = make_batches(token_ids, batch_tokens)
    for batch in batches:
        lt.text_nll(model, batch.ids, batch.attention_mask)
    for head in heads:
        with lt.masked(model, lt.HeadMask.scaling([head], 0.0, heads.grid)):
            for batch in batches:
                lt.text_nll(model, batch.ids, batch.attention_mask)


def run(
    lengths: tuple[int, ...] = (32, 128),
    tokens: int = 1024,
    dtypes: tuple[str, ...] = ("float32",),
    every: int = 3,
    repeats: int = 3,
    progress: bool = True,
) -> Result:
    """Seconds for one head and text of each way, and their ratios.

    Args:
        lengths: tokens a text; as many texts as come to ``tokens``.
        every: ablate all heads of every third layer, which takes the average layer's time.
    """
    rows = []
    for dtype in dtypes:
        model = lt.load_model("smollm2", dtype=dtype)
        grid = lt.grid_of(model)
        layers = range(every // 2, grid.n_layers, every)
        heads = lt.HeadSet(grid, [(layer, h) for layer in layers for h in range(grid.n_heads)])
        for length in lengths:
            cut = cut_texts(lt.tokenizer_of(model), length, tokens // length, ("en", "fr"))
            texts = {"all": cut}
            found = _measure(model, texts, heads, repeats)
            rows += [
                {"dtype": dtype, "tokens": length, "texts": tokens // length, **r} for r in found
            ]
            if progress:
                print(pd.DataFrame(rows[-len(found) :]).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    return Result("benchmark_effects", {"times": table}, {}, _verdict(table))


def _measure(
    model: LensModel, texts: TokenIds, heads: lt.HeadSet, repeats: int
) -> list[dict[str, Any]]:
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: lt.exact_effects(
            model, texts, heads, batch_tokens=BATCH_TOKENS, progress=False
        ),
        "plain loop, batched": lambda: plain_loop(model, texts, heads, BATCH_TOKENS),
        "plain loop, text by text": lambda: plain_loop(model, texts, heads, 2),
    }
    seconds = in_turn(ways, repeats, warm=False)
    costs, n_texts = Costs.of(model), len(texts["all"])
    share = sum(float(costs.one_head[head.layer]) for head in heads) / (len(heads) * costs.forward)
    floor = statistics.median(seconds["plain loop, batched"]) * share
    return [
        {
            "way": name,
            "ms_per_head_and_text": round(1000 * statistics.median(s) / len(heads) / n_texts, 2),
            "over_ours": round(
                statistics.median(a / b for a, b in zip(s, seconds["ours"], strict=True)), 2
            ),
            "over_floor": round(statistics.median(s) / floor, 2),
            "floor_share": round(share, 3),
        }
        for name, s in seconds.items()
    ]


def _verdict(table: pd.DataFrame) -> str:
    by_way = table.groupby("way", sort=False)
    batched, single = (
        by_way["over_ours"].get_group(f"plain loop, {how}") for how in ("batched", "text by text")
    )
    ours = by_way["over_floor"].get_group("ours")
    left = table["floor_share"].iloc[0]
    return (
        f"Exact effects are {single.min():.1f} to {single.max():.1f} times as fast as the plain loop over texts, "
        f"and {batched.min():.1f} to {batched.max():.1f} times as fast as the loop on the same batches. An average "
        f"head leaves {left:.0%} of a forward pass's arithmetic, so that {1 / left:.1f} times is the most that "
        f"like batches allow; ours takes {ours.min():.2f} to {ours.max():.2f} of that floor's time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one length, few layers, one round")
    parser.add_argument("--bfloat16", action="store_true", help="in bfloat16 too")
    options = parser.parse_args()
    dtypes = ("float32", "bfloat16") if options.bfloat16 else ("float32",)
    small: dict[str, Any] = {"lengths": (32,), "tokens": 128, "every": 10, "repeats": 1}
    result = run(dtypes=dtypes, **(small if options.quick else {}))
    print(f"\n{result}")


if __name__ == "__main__":
    main()
