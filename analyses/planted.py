"""How often are scores and rules right where the truth is known?

The bundled model ``"planted"`` was trained so that, of its 24 heads, each of five made-up languages needs
one that no other language needs, three are needed by all, and the rest do nothing. Every score is judged by
how well it ranks the planted heads first (area under the ROC curve), every rule by what it finds. With the
languages of each text shuffled, and on a model of random weights, nothing is specific: what is found there
is false.

    python -m analyses.planted
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest, mannwhitneyu
from torch import Tensor

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.result import Result
from lahis_tl.per_text import PerTextHeads
from lahis_tl.planted import PlantedTruth, planted_truth

METHODS = ("lahis", "lahis_code", "sensitivity", "taylor", "second_order", "exact")


def run(
    n: int = 48,
    shuffles: int = 50,
    fdr: float = 0.05,
    methods: Sequence[str] = METHODS,
    permutations: int = 20_000,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Area under the ROC curve of every score, what every rule finds, false discoveries without any truth.

    Args:
        n: texts a language.
        shuffles: how often the languages of every text are shuffled.
        fdr: the tested rule's false discovery rate.
        permutations: of each test.
    """
    truth = planted_truth()
    sources = _sources("planted", n, seed, progress)
    scores = pd.DataFrame([_judge_score(sources, method, truth) for method in methods])
    rules = pd.DataFrame(
        [
            row
            for method in methods
            for row in _judge_rules(sources, method, truth, fdr, permutations)
        ]
    )
    null = pd.DataFrame(
        [
            _judge_null(_source_for(sources, method), method, shuffles, fdr, permutations, seed)
            for method in methods
        ]
    )
    random_model = pd.DataFrame(_random_model(n, methods, fdr, permutations, seed, progress))
    return Result(
        "planted",
        {"scores": scores, "rules": rules, "shuffled": null, "random_model": random_model},
        {
            "auc": _auc_figure(scores, n),
            "exact": lt.plots.heatmap(lt.score(sources["effects"])),
            "lahis": lt.plots.heatmap(lt.score(sources["gradients"], "lahis")),
        },
        _verdict(scores, rules, null, random_model, truth, fdr),
        sources["gradients"].card,
    )


def _sources(name: str, n: int, seed: int, progress: bool) -> dict[str, PerTextHeads]:
    model = lt.load_model(name)
    corpus = lt.load_corpus(
        "planted", n=n, seed=seed + 10
    )  # not the texts that the truth was measured on
    grads = lt.head_gradients(model, corpus, curvature_draws=8, seed=seed, progress=progress)
    return {"gradients": grads, "effects": lt.exact_effects(model, corpus, progress=progress)}


def _source_for(sources: dict[str, PerTextHeads], method: str) -> PerTextHeads:
    return sources["effects" if method == "exact" else "gradients"]


def _judge_score(
    sources: dict[str, PerTextHeads], method: str, truth: PlantedTruth
) -> dict[str, Any]:
    """Areas under the ROC curve: of a language's own head among the others, and of the general heads."""
    scores = lt.score(_source_for(sources, method), method)
    values = scores.values.clamp_min(0)  # a share of a negative score has no meaning
    shares = values / values.sum((1, 2), keepdim=True)
    own, needed = [], []
    for i, code in enumerate(scores.languages):
        contrast = shares[i] - (shares.sum(0) - shares[i]) / (len(shares) - 1)
        own.append(_auc(contrast, _mask(truth, truth.specific[code])))
        needed.append(_auc(values[i], truth.needed()[truth.languages.index(code)]))
    return {
        "score": method,
        "auc_specific": sum(own) / len(own),
        "auc_specific_worst": min(own),
        "auc_general": _auc(shares.amin(0), _mask(truth, truth.general)),
        "auc_needed": sum(needed) / len(needed),
        "auc_needed_worst": min(needed),
    }


def _mask(truth: PlantedTruth, heads: lt.HeadSet) -> Bool[Tensor, "layer head"]:
    mask = torch.zeros(truth.grid.shape, dtype=torch.bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask


def _auc(values: Float[Tensor, "layer head"], positive: Bool[Tensor, "layer head"]) -> float:
    """The chance that a planted head outranks another; ½ by luck."""
    yes, no = values[positive].numpy(), values[~positive].numpy()
    return float(mannwhitneyu(yes, no).statistic / (len(yes) * len(no)))


def _judge_rules(
    sources: dict[str, PerTextHeads],
    method: str,
    truth: PlantedTruth,
    fdr: float,
    permutations: int,
) -> list[dict[str, Any]]:
    """Found and falsely found heads of each rule; rules of a fixed size are given the right one."""
    source = _source_for(sources, method)
    scores = lt.score(source, method)
    n_planted = len(truth.general) + 1  # of each language
    rules: dict[str, dict[str, Any]] = {
        "authors": {"quantile": 1 - (n_planted - 0.5) / (truth.grid.size - 1)},
        "contrastive": {"fraction": 1 / truth.grid.size},
        "tested": {"fdr": fdr, "method": method, "permutations": permutations},
    }
    rows = []
    for rule, options in rules.items():
        if rule == "contrastive" and (scores.values < 0).any():
            continue
        heads = lt.language_heads(source if rule == "tested" else scores, rule, **options)
        planted = {(code, head) for code, members in truth.specific.items() for head in members}
        found = {(code, head) for code, members in heads.specific.items() for head in members}
        general = set(heads.general)
        rows.append(
            {
                "score": method,
                "rule": rule,
                "specific_found": len(found & planted),
                "of": len(planted),
                "specific_false": len(found - planted),
                "general_found": len(general & set(truth.general)),
                "of_general": len(truth.general),
                "general_false": len(general - set(truth.general)),
            }
        )
    return rows


def _judge_null(
    source: PerTextHeads, method: str, shuffles: int, fdr: float, permutations: int, seed: int
) -> dict[str, Any]:
    """Discoveries where there is nothing to discover: every one is false."""
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for number in range(shuffles):
        heads = lt.language_heads(
            shuffled(source, generator),
            "tested",
            method=method,
            fdr=fdr,
            permutations=permutations,
            seed=number,
        )
        counts.append(sum(map(len, heads.specific.values())))
    runs = sum(count > 0 for count in counts)
    upper = float(binomtest(runs, shuffles).proportion_ci(method="exact").high)
    return {
        "score": method,
        "shuffles": shuffles,
        "shuffles_with_discoveries": runs,
        "false_discovery_rate": runs / shuffles,
        "upper": upper,
        "heads_found_in_all": sum(counts),
    }


def shuffled(source: PerTextHeads, generator: torch.Generator) -> PerTextHeads:
    """The languages of every parallel text in random order."""
    n_texts, codes = source.n_texts[source.languages[0]], source.languages
    order = torch.stack(
        [torch.randperm(len(codes), generator=generator) for _ in range(n_texts)], 1
    )

    def mixed(mapping: Any) -> dict[str, Tensor]:
        stacked = torch.stack([mapping[code] for code in codes])
        rows = torch.arange(n_texts)
        return {code: stacked[order[i], rows] for i, code in enumerate(codes)}

    return source.with_parts({name: mixed(mapping) for name, mapping in source.parts.items()})


def _random_model(
    n: int, methods: Sequence[str], fdr: float, permutations: int, seed: int, progress: bool
) -> list[dict[str, Any]]:
    sources = _sources("planted-random", n, seed, progress)
    rows = []
    for method in methods:
        source = _source_for(sources, method)
        heads = lt.language_heads(
            source, "tested", method=method, fdr=fdr, permutations=permutations, seed=seed
        )
        rows.append({"score": method, "specific_found": sum(map(len, heads.specific.values()))})
    return rows


def _auc_figure(scores: pd.DataFrame, n: int) -> go.Figure:
    figure = go.Figure()
    names = {
        "auc_specific": "specific heads",
        "auc_general": "general heads",
        "auc_needed": "needed heads",
    }
    for i, (column, name) in enumerate(names.items()):
        figure.add_bar(
            x=scores["score"],
            y=scores[column],
            name=name,
            marker_color=lt.plots.CATEGORICAL[i],
            texttemplate="%{y:.2f}",
            textposition="outside",
            textangle=0,
            hovertemplate="%{x}, " + name + ": %{y:.3f}<extra></extra>",
        )
    lt.plots.dress(
        figure,
        "How well scores rank the planted heads first",
        f"planted model, {n} texts a language; ½ by luck, 1 if all planted heads come first",
    )
    figure.add_hline(y=0.5, line={"color": "#444", "dash": "dot"})
    figure.update_layout(width=980, height=440, barmode="group", legend_title="ranked first")
    return figure.update_yaxes(title_text="area under the ROC curve", range=[0, 1.1]).update_xaxes(
        title_text="score"
    )


def _verdict(
    scores: pd.DataFrame,
    rules: pd.DataFrame,
    null: pd.DataFrame,
    random_model: pd.DataFrame,
    truth: PlantedTruth,
    fdr: float,
) -> str:
    tested = rules[rules["rule"] == "tested"]
    n_planted = sum(map(len, truth.specific.values()))
    whole = tested[
        (tested["specific_found"] == n_planted) & (tested["general_found"] == len(truth.general))
    ]
    clean = whole[(whole["specific_false"] == 0) & (whole["general_false"] == 0)]
    worst = null.loc[null["false_discovery_rate"].idxmax()]
    by_auc = scores.sort_values("auc_needed", ascending=False).set_index("score")["auc_needed"]
    listed = ", ".join(f"{name} {value:.2f}" for name, value in by_auc.items())
    any_score = ", ".join(whole["score"]) or "no score"
    clean_score = ", ".join(clean["score"]) or "no score"
    return (
        f"Area under the ROC curve for the heads that a language needs: {listed}. The tested rule (false "
        f"discovery rate {fdr:g}) finds all {n_planted} specific and {len(truth.general)} general heads with "
        f"{any_score}; without a false one with {clean_score}. With shuffled languages it finds something in at "
        f"most {worst['shuffles_with_discoveries']} of {worst['shuffles']} shuffles ({worst['score']}; 95% interval "
        f"of the rate up to {worst['upper']:.2f}). On the model of random weights it finds "
        f"{int(random_model['specific_found'].sum())} specific heads over all scores."
    )


if __name__ == "__main__":
    run_from_command_line(run, __doc__, {"n": 24, "shuffles": 10, "permutations": 4000})
