"""Time and memory of a tuning step against the floor: a bare forward and an activation-only backward pass.

The floor is the Hugging Face model with SDPA on the same padded batches, no mask, the loss over the targets' tokens
alone; ours trains the factors of 20 heads; the plain way is a TransformerLens script that finds the same factors. Timed
in turn within one process.

    python -m analyses.benchmark_tuning
"""

import argparse
import statistics
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import lahis_tl as lt
from analyses.benchmark_common import in_turn, needs_grad, peak_mb
from analyses.benchmark_ways import tune_plain
from analyses.result import Result
from lahis_tl.access import frozen
from lahis_tl.models import transformer_lens_version
from lahis_tl.models.sources import open_source
from lahis_tl.pairs import EncodedPair, encode_pairs, pad_pairs
from lahis_tl.questions import load_questions, question_pair
from lahis_tl.tuning import _Run


def floor_steps(hf: Any, batches: list[list[EncodedPair]]) -> None:
    """One forward and one activation-only backward pass a batch."""
    with needs_grad(hf.get_input_embeddings()):
        for batch in batches:
            ids, mask, wanted = pad_pairs(batch)
            hidden = hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1]
            logits = hf.get_output_embeddings()(hidden[wanted]).float()  # of targets alone, as ours
            nll = nn.functional.cross_entropy(logits, ids[:, 1:][wanted])
            nll.backward()


def tuning_steps(
    model: lt.access.LensModel, batches: list[list[EncodedPair]], heads: lt.HeadSet
) -> Tensor:
    """An epoch of ``tune_mask`` by its own inner step; the factors."""
    values = nn.Parameter(torch.ones(len(heads)))
    optimizer = torch.optim.AdamW([values], lr=1e-2, weight_decay=0.0)
    run = _Run(model, heads, [], learning_rate=1e-2, weight_decay=0.0)
    with frozen(model):
        for batch in batches:
            run.backward(values, batch, len(batch))
            optimizer.step()
            optimizer.zero_grad()
    return values.detach()


def run(
    languages: tuple[str, ...] = ("en", "zh"),
    backends: tuple[str, ...] = ("hooked", "bridge"),
    batch_size: int = 4,
    batches: int = 3,
    repeats: int = 3,
    dtype: str = "float32",
) -> Result:
    """Seconds a step and peak memory over the weights, and their ratios, on the bundled questions.

    Heads are spread over all layers, so that the gradient runs through the whole model: the dearest choice.
    """
    if transformer_lens_version().major >= 4:
        backends = ("bridge",)
    options: dict[str, Any] = {"revision": None, "trust_remote_code": False}
    source = open_source(
        "smollm2", dtype=getattr(torch, dtype), device=torch.device("cpu"), **options
    )
    source.hf.requires_grad_(False).set_attn_implementation("sdpa")
    rows = []
    for backend in backends:
        model = lt.load_model("smollm2", dtype=dtype, backend=backend)
        grid = lt.grid_of(model)
        heads = lt.HeadSet.from_flat(grid, range(0, grid.size, grid.size // 20))
        for code in languages:
            questions = load_questions(languages=[code])[code][: batch_size * batches]
            pairs = encode_pairs(model, [question_pair(q) for q in questions])
            split = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
            ways = {
                "floor": lambda split=split: floor_steps(source.hf, split),
                "ours": lambda split=split, m=model, h=heads: tuning_steps(m, split, h),
                "plain": lambda split=split, m=model, h=heads: tune_plain(m, split, h),
            }
            times = in_turn(ways, repeats)
            memory = {name: peak_mb(way) for name, way in ways.items()}
            median = {
                name: statistics.median(values) / len(split) for name, values in times.items()
            }
            rows.append(
                {"class": type(model).__name__, "language": code}
                | {"tokens_a_pair": sum(len(p.ids) for p in pairs) / len(pairs)}
                | {f"{name}_s": each for name, each in median.items()}
                | ratio(times, "ours", "floor")
                | ratio(times, "plain", "ours")
                | {f"{name}_mb": each for name, each in memory.items()}
            )
    table = pd.DataFrame(rows)
    worst = table["ours/floor"].max()
    verdict = (
        f"A tuning step of {batch_size} pairs takes {table['ours/floor'].min():.2f} to {worst:.2f} of a bare "
        f"forward and activation-only backward pass in {dtype}; a plain TransformerLens script takes "
        f"{table['plain/ours'].min():.2f} to {table['plain/ours'].max():.2f} times as long as ours."
    )
    return Result("benchmark_tuning", {"steps": table}, {}, verdict)


def ratio(times: dict[str, list[float]], a: str, b: str) -> dict[str, float]:
    """Median and range over rounds."""
    found = [x / y for x, y in zip(times[a], times[b], strict=True)]
    name = f"{a}/{b}"
    return {name: statistics.median(found), f"{name} low": min(found), f"{name} high": max(found)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(run(dtype=given.dtype, repeats=given.repeats))
