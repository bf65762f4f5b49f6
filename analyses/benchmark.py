"""Time and memory of gradient scoring, against the authors' procedure and against the floor.

Ways to score the same texts, timed in turn within one process so that a drifting machine hits all alike:

a. ours: texts batched, mask expanded per text, chunked loss.
b. the authors' procedure in our own writing: Hugging Face with eager attention, one text at a time,
   a bfloat16 mask that AdamW moves after every text.
c. the floor: the bare Hugging Face model with its fastest attention (SDPA) on the batches of (a),
   one forward pass and a backward pass to the activations, no mask at all.
d. TransformerLens itself: its model with no hook and no mask, the same loss and backward pass. What (a) takes
   beyond (d) is ours; what (d) takes beyond (c) no hook point can save.

    python -m analyses.benchmark                     # all lengths, float32 and bfloat16
    python -m analyses.benchmark --quick             # one short length
    python -m analyses.benchmark --profile 128       # operations of (d) and (c) side by side
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lahis_tl as lt
import lahis_tl.access
from analyses.benchmark_common import cut_texts, in_turn, needs_grad, peak_mb
from lahis_tl.batches import Batch, make_batches
from lahis_tl.gradients import batch_gradients
from lahis_tl.models import has_bfloat16_arithmetic
from lahis_tl.models.sources import smollm2_folder

LENGTHS = {32: 32, 64: 16, 128: 8, 512: 4}  # tokens a text → texts


@dataclass(frozen=True)
class Result:
    """``table`` has a row for each length and dtype; times are seconds a text, memory MB over the weights."""

    table: pd.DataFrame
    agreement: pd.DataFrame
    verdict: str

    def __str__(self) -> str:
        return "\n\n".join(
            [self.table.to_string(index=False), self.agreement.to_string(index=False), self.verdict]
        )


def floor_pass(hf: Any, batches: list[Batch]) -> None:
    """(c) One forward and one activation-only backward pass a batch, no mask."""
    with needs_grad(hf.get_input_embeddings()):
        for batch in batches:
            logits = hf(
                input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            rows = logits[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(rows, batch.ids[:, 1:].flatten(), reduction="sum")
            (loss / (batch.ids.shape[1] - 1)).backward()


def bare_pass(model: lt.access.LensModel, batches: list[Batch]) -> None:
    """(d) The same through TransformerLens's model, without a hook."""
    hf = getattr(model, "original_model", None)
    with needs_grad(model.embed if hf is None else hf.get_input_embeddings()):
        for batch in batches:
            lt.text_nll(model, batch.ids, batch.attention_mask).sum().backward()


def authors_pass(hf: Any, texts: list[list[int]]) -> Tensor:
    """(b) The authors' importance matrix: bfloat16 mask, moved by AdamW after each text."""
    config = hf.config
    shape = (config.num_hidden_layers, config.num_attention_heads)
    mask = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([mask], lr=1e-2, weight_decay=0.01)
    total = torch.zeros(shape, dtype=torch.bfloat16)
    negative = torch.zeros(shape)
    handles = []
    for layer, block in enumerate(hf.model.layers):

        def scale(module: nn.Module, inputs: tuple[Tensor], layer: int = layer) -> tuple[Tensor]:
            z = inputs[0].unflatten(-1, (shape[1], -1))
            return ((z * mask[layer].to(z.dtype)[:, None]).flatten(-2),)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(scale))
    try:
        for ids in texts:
            batch = torch.tensor([ids])
            optimizer.zero_grad()
            hf(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            assert mask.grad is not None
            total += mask.grad.abs() * mask.detach() * 1000
            negative += (mask.grad * mask.detach() < 0).float()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    return total.float() / len(texts) * negative / len(texts)


def ours_pass(model: nn.Module, batches: list[Batch]) -> Tensor:
    """(a) Per-text gradients of every head."""
    return torch.cat([batch_gradients(model, batch)[0] for batch in batches])


def run(
    lengths: dict[int, int] | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    backends: tuple[str, ...] = ("auto", "bridge"),
    repeats: int = 3,
    batch_tokens: int = 1024,
    progress: bool = False,
) -> Result:
    """Time all three ways and compare the scores of the dtypes.

    On a processor without bfloat16 arithmetic, where it is tens of times slower than float32, bfloat16
    is measured once on two short texts.

    Args:
        lengths: tokens a text → number of texts.
        backends: classes for (a), as in ``load_model``; duplicates by class are left out.
        repeats: rounds; every ratio is the median over rounds.
    """
    rows: list[dict[str, Any]] = []
    gradients: dict[tuple[str, str, int], Tensor] = {}
    for dtype in dtypes:
        models = _load_all(dtype, backends)
        sizes, rounds = lengths or LENGTHS, repeats
        if dtype == "bfloat16" and not has_bfloat16_arithmetic():
            sizes, rounds = {min(sizes): 2}, 1
        for length, count in sizes.items():
            texts = cut_texts(lt.tokenizer_of(next(iter(models.ours.values()))), length, count)
            batches = make_batches({"all": texts}, batch_tokens)
            for name, model in models.ours.items():
                gradients[dtype, name, length] = ours_pass(model, batches)  # also warms up
            floor_pass(models.sdpa, batches)
            found = _measure(models, texts, batches, rounds)
            rows += [{"dtype": dtype, "tokens": length, "texts": count, **row} for row in found]
            if progress:
                print(pd.DataFrame(rows[-len(found) :]).to_string(index=False), flush=True)
    table, agreement = pd.DataFrame(rows), _agreement(gradients)
    return Result(table, agreement, _verdict(table, agreement))


@dataclass(frozen=True)
class _Models:
    ours: dict[str, lt.access.LensModel]
    eager: Any
    sdpa: Any


def _load_all(dtype: str, backends: tuple[str, ...]) -> _Models:
    folder = smollm2_folder()
    bare = {}
    for attention in ("eager", "sdpa"):
        hf: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        bare[attention] = hf.requires_grad_(False)
    ours: dict[str, Any] = {}
    for backend in backends:
        model = lt.load_model("smollm2", dtype=dtype, backend=backend)
        ours.setdefault(type(model).__name__, model)
    return _Models(ours, **bare)


def _measure(
    models: _Models, texts: list[list[int]], batches: list[Batch], repeats: int
) -> list[dict[str, Any]]:
    """Times in turn, then memory; one row a way."""
    runs = {name: partial(ours_pass, model, batches) for name, model in models.ours.items()}
    runs |= {f"{name}, bare": partial(bare_pass, m, batches) for name, m in models.ours.items()}
    runs |= {"authors": partial(authors_pass, models.eager, texts)}
    runs |= {"floor": partial(floor_pass, models.sdpa, batches)}
    seconds = in_turn(runs, repeats, warm=False)
    rows = []
    for name, each in runs.items():
        peak = peak_mb(each)
        together = 1 if name == "authors" else max(len(batch.keys) for batch in batches)
        over_floor = [a / c for a, c in zip(seconds[name], seconds["floor"], strict=True)]
        speedup = [b / a for a, b in zip(seconds[name], seconds["authors"], strict=True)]
        rows.append(
            {
                "way": name,
                "ms_per_text": round(1000 * statistics.median(seconds[name]) / len(texts), 1),
                "over_floor": round(statistics.median(over_floor), 2),
                "spread": f"{min(over_floor):.2f}-{max(over_floor):.2f}",
                "authors_over_this": round(statistics.median(speedup), 2),
                "peak_mb": round(peak),
                "peak_mb_per_text": round(peak / together),
            }
        )
    return rows


def _agreement(gradients: dict[tuple[str, str, int], Tensor]) -> pd.DataFrame:
    """Rank correlation of bfloat16's scores with float32's, all texts of a length together."""
    rows = []
    for (dtype, name, length), low in gradients.items():
        high = gradients.get(("float32", name, length))
        if dtype == "float32" or high is None:
            continue
        for method in ("lahis", "taylor"):
            reduce = lt.scores.score_method(method).reduce
            result: Any = spearmanr(reduce(low).flatten(), reduce(high[: len(low)]).flatten())
            rho = float(result.statistic)
            rows.append(
                {
                    "way": name,
                    "tokens": length,
                    "score": method,
                    f"rank_correlation_{dtype}": round(rho, 4),
                }
            )
    return pd.DataFrame(rows)


def _verdict(table: pd.DataFrame, agreement: pd.DataFrame) -> str:
    lines = []
    for way in dict.fromkeys(table["way"]):
        if way in ("authors", "floor") or way.endswith("bare"):
            continue
        rows = [row for row in table.to_dict("records") if row["way"] == way]
        worst = max(rows, key=lambda row: row["over_floor"])
        best = min(row["over_floor"] for row in rows)
        speedups = [row["authors_over_this"] for row in rows]
        lines.append(
            f"{way}: {best:.2f} to {worst['over_floor']:.2f} times the floor (most at "
            f"{worst['tokens']} tokens, {worst['dtype']}); the authors' procedure takes "
            f"{min(speedups):.2f} to {max(speedups):.2f} times as long."
        )
    if len(agreement):
        lowest = min(agreement.iloc[:, -1])
        lines.append(f"Rank correlation of the low-precision scores: at least {lowest:.3f}.")
    return " ".join(lines)


def profile(length: int, count: int, top: int = 14) -> pd.DataFrame:
    """Time of each operation in one pass of (d) and of (c), ms a text; where (d) takes longest beyond (c)."""
    models = _load_all("float32", ("auto",))
    ((name, model),) = models.ours.items()
    batches = make_batches({"all": cut_texts(lt.tokenizer_of(model), length, count)}, 1024)
    columns = {}
    for way, run_once in (
        (name, partial(bare_pass, model)),
        ("floor", partial(floor_pass, models.sdpa)),
    ):
        run_once(batches)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            run_once(batches)
        events = recorded.key_averages()
        columns[f"{way}_ms"] = {e.key: e.self_cpu_time_total / 1000 / count for e in events}
        columns[f"{way}_calls"] = {e.key: e.count for e in events}
    table = pd.DataFrame(columns).fillna(0).rename_axis("operation").reset_index()
    beyond = table[f"{name}_ms"] - table["floor_ms"]
    return table.assign(beyond_ms=beyond).nlargest(top, "beyond_ms").round(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="32 tokens only, one round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="write the table there")
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="operations at this length")
    options = parser.parse_args()
    if options.profile:
        print(profile(options.profile, max(2, 1024 // options.profile)).to_string(index=False))
        return
    result = run(
        lengths={32: 16} if options.quick else None,
        repeats=1 if options.quick else options.repeats,
        progress=True,
    )
    if options.csv:
        result.table.to_csv(options.csv, index=False)
    print(f"\n{result}")


if __name__ == "__main__":
    main()
