"""Memory: the loss of a model with a vocabulary of 256 000, and a long run's level from first to last.

*Loss*: forward and backward of the next-token loss of 1024 positions from hidden states, the unembedding frozen, in
blocks beside the plain way (all logits, float32 cross entropy). *Soak*: the resident memory of ``head_gradients`` over
2000 texts, mean of the last quarter over the first.

python -m analyses.benchmark_memory
python -m analyses.benchmark_memory --texts 400
"""

import argparse
import gc
import itertools
import statistics
from typing import Any

import pandas as pd
import torch

import lahis_tl as lt
from analyses.benchmark_common import peak_mb, status
from analyses.result import Result
from lahis_tl import gradients
from lahis_tl.access import LensModel, Unembedding
from lahis_tl.losses import chunked_nll


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
    loss = pd.DataFrame(loss_rows())
    levels, ratio = soak(texts=texts)
    shares = ", ".join(
        f"{row['plain/ours']:.1f} in {row['dtype']}" for row in loss.to_dict("records")
    )
    verdict = (
        f"The loss part takes so many times less memory than all logits at once: {shares}. Over {texts} texts the "
        f"resident memory of the last quarter is {ratio:.3f} of the first's."
    )
    return Result("benchmark_memory", {"loss": loss, "soak": levels}, {}, verdict)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=2000)
    result = run(**vars(parser.parse_args()))
    print(
        f"{result.tables['loss'].to_string(index=False, float_format='{:.3g}'.format)}\n\n{result.verdict}"
    )
