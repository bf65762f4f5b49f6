"""Time and memory of gradient scoring, against the authors' procedure and against the floor.

Three ways to score the same texts, timed in turn within one process so that a drifting machine
hits all alike:

a. ours: texts batched, mask expanded per text, chunked loss.
b. the authors' procedure in our own writing: Hugging Face with eager attention, one text at a time,
   a bfloat16 mask that AdamW moves after every text.
c. the floor: the bare Hugging Face model with its fastest attention (SDPA) on the batches of (a),
   one forward pass and a backward pass to the activations, no mask at all.

    python -m analyses.benchmark                     # all lengths, float32 and bfloat16
    python -m analyses.benchmark --quick             # one short length
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lahis_tl as lt
from lahis_tl.batches import Batch, make_batches
from lahis_tl.gradients import batch_gradients
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


def _texts(tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """``count`` texts of exactly ``length`` tokens, cut from the bundled corpus, languages in turn."""
    corpus = lt.load_corpus("bundled", ["en", "fr", "es", "de"])
    streams = {
        code: tokenizer("\n".join(corpus[code]))["input_ids"] for code in corpus.languages
    }
    found = []
    for i in range(count):
        stream = streams[corpus.languages[i % 4]]
        start = (i // 4) * length
        found.append(stream[start : start + length])
    return found


def floor_pass(hf: nn.Module, batches: list[Batch]) -> None:
    """(c) One forward and one activation-only backward pass a batch, no mask."""
    for batch in batches:
        logits = hf(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
        rows = logits[:, :-1].flatten(0, 1).float()
        loss = nn.functional.cross_entropy(rows, batch.ids[:, 1:].flatten(), reduction="sum")
        (loss / (batch.ids.shape[1] - 1)).backward()


@contextmanager
def _embeddings_need_grad(hf: nn.Module) -> Iterator[None]:
    handle = hf.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_()
    )
    try:
        yield
    finally:
        handle.remove()


def authors_pass(hf: nn.Module, texts: list[list[int]]) -> Tensor:
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


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_mb(run: Callable[[], Any]) -> float:
    """Growth of the process's resident memory at its peak during ``run`` (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand back what earlier runs freed
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def run(
    lengths: dict[int, int] | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    backends: tuple[str, ...] = ("auto", "bridge"),
    repeats: int = 3,
    batch_tokens: int = 1024,
    progress: bool = False,
) -> Result:
    """Time all three ways and compare the scores of the dtypes.

    Args:
        lengths: tokens a text → number of texts.
        backends: classes for (a), as in ``load_model``; duplicates by class are left out.
        repeats: rounds; every ratio is the median over rounds.
    """
    folder = smollm2_folder()
    rows, gradients = [], {}
    for dtype in dtypes:
        torch_dtype = getattr(torch, dtype)
        load = AutoModelForCausalLM.from_pretrained
        sdpa = load(folder, dtype=torch_dtype, attn_implementation="sdpa").requires_grad_(False)
        eager = load(folder, dtype=torch_dtype, attn_implementation="eager").requires_grad_(False)
        ours = {}
        for backend in backends:
            model = lt.load_model("smollm2", dtype=dtype, backend=backend)
            ours.setdefault(type(model).__name__, model)
        for length, count in (lengths or LENGTHS).items():
            texts = _texts(lt.tokenizer_of(next(iter(ours.values()))), length, count)
            batches = make_batches({"all": texts}, batch_tokens)
            runs: dict[str, Callable[[], Any]] = {
                name: lambda model=model: ours_pass(model, batches) for name, model in ours.items()
            }
            runs["authors"] = lambda: authors_pass(eager, texts)

            def floor() -> None:
                with _embeddings_need_grad(sdpa):
                    floor_pass(sdpa, batches)

            runs["floor"] = floor
            for name, each in ours.items():
                gradients[dtype, name, length] = ours_pass(each, batches)  # also warms up
            runs["floor"](), authors_pass(eager, texts[:1])
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repeats):
                for name, each in runs.items():
                    seconds[name].append(_seconds(each) / count)
            peaks = {name: _peak_mb(each) for name, each in runs.items()}
            rows += [
                _row(dtype, length, count, name, seconds, peaks)
                for name in runs
            ]
            if progress:
                print(pd.DataFrame(rows[-len(runs) :]).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    agreement = _agreement(gradients)
    return Result(table, agreement, _verdict(table, agreement))


def _row(
    dtype: str, length: int, count: int, name: str, seconds: dict[str, list[float]], peaks: dict[str, float]
) -> dict[str, Any]:
    over_floor = [a / c for a, c in zip(seconds[name], seconds["floor"], strict=True)]
    speedup = [b / a for a, b in zip(seconds[name], seconds["authors"], strict=True)]
    return {
        "dtype": dtype,
        "tokens": length,
        "texts": count,
        "way": name,
        "ms_per_text": round(1000 * statistics.median(seconds[name]), 1),
        "over_floor": round(statistics.median(over_floor), 2),
        "spread": f"{min(over_floor):.2f}-{max(over_floor):.2f}",
        "authors_over_this": round(statistics.median(speedup), 2),
        "peak_mb": round(peaks[name]),
    }


def _agreement(gradients: dict[tuple[str, str, int], Tensor]) -> pd.DataFrame:
    """Rank correlation of bfloat16's scores with float32's, all texts of a length together."""
    rows = []
    for (dtype, name, length), low in gradients.items():
        high = gradients.get(("float32", name, length))
        if dtype == "float32" or high is None:
            continue
        for method in ("lahis", "taylor"):
            reduce = lt.scores.score_method(method).reduce
            rho = float(spearmanr(reduce(low).flatten(), reduce(high).flatten()).statistic)
            rows.append(
                {"way": name, "tokens": length, "score": method, f"rank_correlation_{dtype}": round(rho, 4)}
            )
    return pd.DataFrame(rows)


def _verdict(table: pd.DataFrame, agreement: pd.DataFrame) -> str:
    mine = table[~table["way"].isin(["authors", "floor"])]
    lines = []
    for way, part in mine.groupby("way", sort=False):
        worst = part.loc[part["over_floor"].idxmax()]
        lines.append(
            f"{way}: {part['over_floor'].min():.2f} to {part['over_floor'].max():.2f} times the floor "
            f"(most at {worst['tokens']} tokens, {worst['dtype']}); the authors' procedure takes "
            f"{part['authors_over_this'].min():.2f} to {part['authors_over_this'].max():.2f} times as long."
        )
    if len(agreement):
        lowest = agreement.iloc[:, -1].min()
        lines.append(f"Scores in bfloat16 rank heads like float32: rank correlation at least {lowest:.3f}.")
    return " ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 tokens only, one round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="write the table there")
    options = parser.parse_args()
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
