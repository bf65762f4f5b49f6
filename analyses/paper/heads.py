"""The paper's first step under both protocols: importance maps, where the heads are, head sets, overlap."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import lahis_tl as lt
from analyses.result import Result, shared_gradients
from lahis_tl.access import LensModel
from lahis_tl.scores import method_for, reduce_rows
from lahis_tl.selection import authors_rule
from lahis_tl.statistics import empirical_p, percentile_interval


def run(
    model: LensModel,
    languages: Sequence[str],
    n: int = 48,
    max_tokens: int = 96,
    method: str = "lahis",
    top_k: int = 20,
    quantile: float = 0.96,
    draws: int = 500,
    permutations: int = 20_000,
    seed: int = 0,
    gradients: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Float32 scores at a fixed mask, with intervals: general heads beside chance, specific heads by a permutation
    test, overlap of the languages' best heads beside chance."""
    corpus, _ = lt.load_corpus("bundled", languages).split(n, seed=seed)
    grads = shared_gradients(model, corpus, gradients, max_tokens=max_tokens, progress=progress)
    scores = lt.score(grads, method)
    heads = lt.language_heads(scores, quantile=quantile)
    tested = lt.language_heads(grads, "tested", method=method, permutations=permutations, seed=seed)
    overlap = lt.head_overlap(grads, method, top_k=top_k, draws=draws, seed=seed)
    general = pd.DataFrame([general_beside_chance(grads, method, heads, draws, seed)])
    specific = pd.DataFrame(
        [{"language": c, "heads": len(s), "fdr": 0.05} for c, s in tested.specific.items()]
    )
    tables = {
        "general": general,
        "specific": specific,
        "overlap": overlap.to_dataframe(),
        "layers": layer_shares(heads),
        "sets": heads.to_dataframe(),
    }
    figures = {"heatmap": lt.plots.heatmap(scores), "layers": lt.plots.heads_per_layer(heads)}
    row = general.iloc[0]
    counts = ", ".join(f"{r['language']} {r['heads']}" for r in specific.to_dict("records"))
    pairs = tables["overlap"]
    verdict = (
        f"{row['share']:.2%} of {heads.grid.size} heads are kept by {row['min_languages']} languages or more; chance "
        f"gives {row['chance']:.2%} (p {row['p']:.2g}). Heads specific to a language at a false discovery rate of 5%: "
        f"{counts}. The top {top_k} of two languages overlap by {pairs['jaccard'].min():.2f} to "
        f"{pairs['jaccard'].max():.2f} (Jaccard; chance within layers {pairs['chance'].mean():.2f})."
    )
    return Result("heads", tables, figures, verdict, dict(scores.card))


def general_beside_chance(
    grads: lt.HeadGradients, method: str, heads: lt.LanguageHeads, draws: int, seed: int
) -> dict[str, Any]:
    """The share of general heads: its bootstrap interval over texts, and what shuffled heads give.

    Chance leaves every language as many heads in every layer and exchanges them within the layer.
    """
    needed = int(heads.options["min_languages"])
    quantile, size = float(heads.options["quantile"]), heads.grid.size
    share = len(heads.general) / size
    chosen = method_for(grads, method)
    samples = []
    for draw in range(draws):
        maps = []
        for code, n in grads.n_texts.items():
            # The same texts in all languages: the corpus is parallel.
            generator = torch.Generator().manual_seed(1_000_003 * seed + draw)
            maps.append(
                reduce_rows(grads, code, torch.randint(n, (n,), generator=generator), chosen)
            )
        again = lt.HeadScores(torch.stack(maps), tuple(grads.languages), method, chosen.unit)
        samples.append(len(authors_rule(again, quantile, needed).general) / size)
    chance = torch.tensor([_shuffled_general(heads, needed, seed + i) / size for i in range(draws)])
    mean = float(chance.mean())
    spread = percentile_interval(share, torch.tensor(samples), 0.95)
    return {
        "what": "all languages",
        "min_languages": needed,
        "share": share,
        "share_lower": spread.lower,
        "share_upper": spread.upper,
        "chance": mean,
        "above_chance": share - mean,
        "lower": spread.lower - mean,
        "upper": spread.upper - mean,
        "p": empirical_p(share, chance),
    }


def _shuffled_general(heads: lt.LanguageHeads, needed: int, seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    votes: Counter[tuple[int, int]] = Counter()
    for kept in heads.kept.values():
        for layer, count in Counter(head.layer for head in kept).items():
            places = torch.randperm(heads.grid.n_heads, generator=generator)[:count]
            votes.update((layer, place) for place in places.tolist())
    return sum(count >= needed for count in votes.values())


def layer_shares(heads: lt.LanguageHeads) -> pd.DataFrame:
    """Where each language's specific heads are: shares in the first, middle and last third of the layers."""
    thirds = ("first third", "middle third", "last third")
    rows = []
    for name, members in [*heads.specific.items(), ("general", heads.general)]:
        places = Counter(min(2, 3 * head.layer // heads.grid.n_layers) for head in members)
        shares = {
            third: places[i] / len(members) if len(members) else float("nan")
            for i, third in enumerate(thirds)
        }
        rows.append({"heads of": name, "heads": len(members), **shares})
    return pd.DataFrame(rows)
