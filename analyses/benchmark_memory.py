"""Memory: the loss of a model with a vocabulary of 256 000, the estimate before a run, and a long run's level.

*Loss*: forward and backward of the next-token loss of 1024 positions from hidden states, the unembedding frozen, in
blocks beside the plain way (all logits, float32 cross entropy). *Estimate*: what ``memory_estimate`` says of a batch of
SmolLM2 beside the growth of the process while the batch is scored, whole and recomputed, with glibc's own way of
keeping freed pieces and with MALLOC_MMAP_THRESHOLD_=1048576. *Soak*: the resident memory of ``head_gradients`` over
2000 texts, mean of the last quarter over the first.

python -m analyses.benchmark_memory
python -m analyses.benchmark_memory --texts 400
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch

import lahis_tl as lt
from analyses.benchmark_common import cut_texts, peak_mb, status
from analyses.result import Result
from lahis_tl import gradients
from lahis_tl.access import LensModel, Unembedding
from lahis_tl.losses import chunked_nll
from lahis_tl.models import transformer_lens_version


def loss_rows(
    vocabulary: int = 256_000, d_model: int = 512, positions: int = 1024
) -> list[dict[str, Any]]:
    """Peak memory of the loss part over the weights and hidden states, MB, ours and plain, by dtype."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(vocabulary, d_model, generator=generator).mul_(0.02).to(dtype)
        hidden = torch.randn(positions, d_model, generator=generator).to(dtype)
        targets = torch.randint(vocabulary, (positions,), generator=generator)
        found = {}

        def ours(h: torch.Tensor, w: torch.Tensor = weight, t: torch.Tensor = targets) -> None:
            chunked_nll(h, t, Unembedding(w)).sum().backward()

        def plain(h: torch.Tensor, w: torch.Tensor = weight, t: torch.Tensor = targets) -> None:
            logits = torch.nn.functional.linear(h, w).float()
            torch.nn.functional.cross_entropy(logits, t, reduction="sum").backward()

        gradients_of = {}
        for name, way in {"ours": ours, "plain": plain}.items():
            leaf = hidden.clone().requires_grad_()
            found[name] = peak_mb(lambda way=way, leaf=leaf: way(leaf))
            gradients_of[name] = leaf.grad
        far = (gradients_of["ours"] - gradients_of["plain"]).abs().max()
        rows.append(
            {"dtype": str(dtype).removeprefix("torch."), "vocabulary": vocabulary}
            | {"positions": positions, "plain_mb": found["plain"], "ours_mb": found["ours"]}
            | {"plain/ours": found["plain"] / found["ours"]}
            | {"gradient_difference": float(far / gradients_of["plain"].abs().max())}
        )
    return rows


MMAP = "MALLOC_MMAP_THRESHOLD_"


def estimate_rows(
    model: str = "smollm2",
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    shapes: tuple[tuple[int, int], ...] = ((8, 128), (2, 512)),
) -> list[dict[str, Any]]:
    """Bytes estimated and measured of one batch, each in a process of its own, weights left out, MB."""
    backends = ("bridge",) if transformer_lens_version().major >= 4 else ("hooked", "bridge")
    rows = []
    for backend, dtype, shape, recompute in itertools.product(
        backends, dtypes, shapes, (False, True)
    ):
        asked = json.dumps([model, backend, dtype, *shape, recompute])
        row: dict[str, Any] = {"class": backend, "dtype": dtype, "texts": shape[0]}
        row |= {"tokens": shape[1], "recomputed": recompute}
        for name, setting in (("measured_mb", {MMAP: "1048576"}), ("glibc_mb", {})):
            done = subprocess.run(
                [sys.executable, "-m", "analyses.benchmark_memory", "--measure", asked],
                env={k: v for k, v in os.environ.items() if k != MMAP} | setting,
                capture_output=True,
                text=True,
                check=True,
            )
            estimated, measured = json.loads(done.stdout.splitlines()[-1])
            row |= {"estimated_mb": estimated, name: measured}
        rows.append(row | {"measured/estimated": row["measured_mb"] / row["estimated_mb"]})
    return rows


def measure(
    name: str, backend: str, dtype: str, texts: int, tokens: int, recompute: bool
) -> tuple[float, float]:
    """The estimate for one batch, and by how much this process grows at its peak; MB."""
    model = lt.load_model(name, backend=backend, dtype=dtype)
    ids = {"en": cut_texts(lt.tokenizer_of(model), tokens, texts)}
    bounds: dict[str, Any] = {"max_tokens": tokens, "batch_tokens": texts * tokens}
    with lt.recomputed(model) if recompute else nullcontext():
        estimate = lt.memory_estimate(model, ids, **bounds)

        def score() -> None:
            lt.head_gradients(model, ids, **bounds, progress=False)

        score()  # what a first run leaves behind is no part of a batch
        return estimate.needed / 2**20, peak_mb(score)


def soak(
    model: LensModel | str = "smollm2", texts: int = 2000, max_tokens: int = 32
) -> tuple[pd.DataFrame, float]:
    """Resident memory after every batch of one run, and the last quarter's mean over the first's.

    The run's own results, which grow in no part of it, are allocated before the first batch.
    """
    model = lt.load_model(model, dtype="bfloat16") if isinstance(model, str) else model
    bundled = lt.load_corpus("bundled")
    pieces = [
        text[start:]
        for start in range(0, 200, 25)
        for row in zip(*bundled.texts.values(), strict=True)
        for text in row
    ]
    chosen = list(itertools.islice(itertools.cycle(pieces), texts))
    levels: list[dict[str, float]] = []
    real = gradients.batch_gradients

    def watched(model: LensModel, batch: Any) -> Any:
        found = real(model, batch)
        gc.collect()
        done = levels[-1]["texts"] if levels else 0
        levels.append({"texts": done + len(batch.keys), "mb": status("VmRSS") / 1024})
        return found

    gradients.batch_gradients = watched
    try:
        lt.head_gradients(model, lt.load_corpus({"en": chosen}, min_chars=1), max_tokens=max_tokens)
    finally:
        gradients.batch_gradients = real
    table = pd.DataFrame(levels)
    quarter = len(table) // 4
    first, last = (statistics.mean(part["mb"]) for part in (table[:quarter], table[-quarter:]))
    return table, last / first


def run(texts: int = 2000) -> Result:
    """Both tables and a sentence."""
    loss, estimates = pd.DataFrame(loss_rows()), pd.DataFrame(estimate_rows())
    off = estimates["measured/estimated"]
    levels, ratio = soak(texts=texts)
    shares = ", ".join(
        f"{row['plain/ours']:.1f} in {row['dtype']}" for row in loss.to_dict("records")
    )
    verdict = (
        f"The loss part takes so many times less memory than all logits at once: {shares}. Batches take "
        f"{off.min():.2f} to {off.max():.2f} of what was estimated. Over {texts} texts the "
        f"resident memory of the last quarter is {ratio:.3f} of the first's."
    )
    return Result(
        "benchmark_memory", {"loss": loss, "estimate": estimates, "soak": levels}, {}, verdict
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if one := given.pop("measure"):
        print(json.dumps(measure(*one)))
    else:
        result = run(**given)
        for table in ("loss", "estimate"):
            print(result.tables[table].to_string(index=False, float_format="{:.3g}".format))
        print(f"\n{result.verdict}")
