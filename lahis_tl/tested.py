"""Which heads are specific or general beyond chance: permutation tests over texts, false discovery rate."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control
from torch import Tensor

from lahis_tl.artifacts import Artifact, Card
from lahis_tl.heads import HeadGrid, head_table
from lahis_tl.per_text import PerTextHeads
from lahis_tl.scores import ScoreMethod, method_for, reduce_rows

_CHUNK = 1024  # permutations held in memory at once


@dataclass(frozen=True, eq=False)
class SpecificityTest(Artifact):
    """Tests of every head, for each language and for all together.

    A head's *share* is its part of a text's score, summed over all heads; so languages and texts with
    larger losses do not look specific altogether. But one head that rules a language makes all others' shares
    smaller there; so a specific head must pass with its score as it is, too.

    Attributes:
        share: [language, layer, head], mean share; that of an average head is 1 / number of heads.
        contrast: [language, layer, head], mean share in the language minus the mean share in the others.
        specific_p: [language, layer, head], one-sided: is the share in this language more than ``ratio``
            times that in the others, and the score itself higher? The larger of the two p-values.
        specific_q: the same, adjusted by Benjamini-Hochberg over all languages and heads.
        general_p: [layer, head], is the share above that of a head drawn at random in *every* language?
            The largest of the languages' p-values.
        general_q: the same, adjusted over heads.
        paired: whether languages were exchanged within parallel texts, or texts between languages.
    """

    kind: ClassVar[str] = "specificity_test"
    share: Float[Tensor, "language layer head"]
    contrast: Float[Tensor, "language layer head"]
    specific_p: Float[Tensor, "language layer head"]
    specific_q: Float[Tensor, "language layer head"]
    general_p: Float[Tensor, "layer head"]
    general_q: Float[Tensor, "layer head"]
    languages: tuple[str, ...]
    method: str
    ratio: float
    paired: bool
    permutations: int
    seed: int
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        found = (self.specific_q <= 0.05).flatten(1).sum(1).tolist()
        counts = ", ".join(f"{c}: {n}" for c, n in zip(self.languages, found, strict=True))
        return f"SpecificityTest({self.method}; heads with q ≤ 0.05 in {counts})"

    @property
    def grid(self) -> HeadGrid:
        return HeadGrid(*self.general_p.shape)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a language and head: layer, head, label, share, contrast, specific_p, specific_q, general_q."""
        columns = {n: getattr(self, n) for n in ("share", "contrast", "specific_p", "specific_q")}
        general = self.general_q.expand_as(self.contrast)
        return head_table(self.grid, self.languages, {**columns, "general_q": general})

    def _tensors(self) -> dict[str, Tensor]:
        names = ("share", "contrast", "specific_p", "specific_q", "general_p", "general_q")
        return {name: getattr(self, name) for name in names}

    def _content(self) -> Card:
        names = ("method", "ratio", "paired", "permutations", "seed")
        return {"languages": list(self.languages), **{name: getattr(self, name) for name in names}}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "SpecificityTest":
        content = dict(card["content"])
        return cls(**tensors, **{**content, "languages": tuple(content["languages"])}, card=card)


def specificity_test(
    source: PerTextHeads,
    method: str | None = None,
    *,
    ratio: float = 2.0,
    permutations: int = 20_000,
    seed: int = 0,
    **options: Any,
) -> SpecificityTest:
    """Test each head for specificity to each language, and for generality.

    >>> test = specificity_test(grads, "sensitivity")      # doctest: +SKIP
    >>> test.to_dataframe().query("specific_q <= 0.05")    # doctest: +SKIP

    *Specific*: if a head's share in a language is ``ratio`` times that in the others and no more, then with the
    language's shares divided by ``ratio`` the languages of a parallel text can be exchanged. They are,
    ``permutations`` times, and the contrast is held against what comes out; without parallel texts all texts
    are exchanged between the languages. *General*: if a head is as important as any other, its shares are like
    those of a head drawn anew for every text; the test asks for more in every language (an intersection-union
    test, so no further correction for the number of languages).

    Args:
        source: gradients, or exact effects of all heads.
        method: a registered score; its value of a single text is what is tested.
        ratio: 1 for any difference; 2 by default, since with enough texts some difference is always there.
        permutations: the smallest p-value is 1 / (permutations + 1).

    Raises:
        ValueError: fewer than two languages, fewer than four texts in one, or ``ratio`` below 1.

    Warns:
        UserWarning: so few permutations that no single head could pass at a false discovery rate of 5 %.
    """
    if ratio < 1:
        raise ValueError(f"ratio={ratio} must be 1 or more")
    few = [code for code, n in source.n_texts.items() if n < 4]
    if len(source.languages) < 2 or few:
        raise ValueError(
            f"the test compares languages and needs two with at least 4 texts each; there are {source!r}"
        )
    chosen = method_for(source, method)
    values = [_text_scores(source, code, chosen, options) for code in source.languages]
    shares = [_shares(v) for v in values]
    paired = bool(source.card.get("corpus", {}).get("parallel")) and len(set(map(len, shares))) == 1
    _warn_of_few_permutations(permutations, len(shares) * source.grid.size)
    generator = torch.Generator().manual_seed(seed)
    contrast, specific_p = [], []
    for place in range(len(shares)):
        scaled = [s / ratio if i == place else s for i, s in enumerate(shares)]
        state = generator.get_state()  # both tests exchange the same texts
        p_share = _exchange_p(scaled, place, paired, permutations, generator)
        generator.set_state(state)
        p_score = _exchange_p(values, place, paired, permutations, generator)
        contrast.append(_contrast(shares, place))
        specific_p.append(torch.maximum(p_share, p_score))
    general_p = torch.stack([_above_random(s, permutations, generator) for s in shares]).amax(0)
    p = torch.stack(specific_p)
    shape = source.grid.shape
    return SpecificityTest(
        share=torch.stack([s.mean(0) for s in shares]).float().reshape(-1, *shape),
        contrast=torch.stack(contrast).float().reshape(-1, *shape),
        specific_p=p.float().reshape(-1, *shape),
        specific_q=adjusted_p(p).reshape(-1, *shape),
        general_p=general_p.float().reshape(shape),
        general_q=adjusted_p(general_p).reshape(shape),
        languages=tuple(source.languages),
        method=chosen.name,
        ratio=ratio,
        paired=paired,
        permutations=permutations,
        seed=seed,
        card=source.origin,
    )


def _warn_of_few_permutations(permutations: int, n_hypotheses: int) -> None:
    if n_hypotheses / (permutations + 1) > 0.05:
        warnings.warn(
            f"{n_hypotheses} hypotheses and {permutations} permutations: fewer than "
            f"{math.ceil(n_hypotheses / (permutations + 1) / 0.05)} specific heads altogether cannot be found at "
            f"a false discovery rate of 5 %; {20 * n_hypotheses} permutations allow a single one",
            stacklevel=3,
        )


def _text_scores(
    source: PerTextHeads, language: str, method: ScoreMethod, options: dict[str, Any]
) -> Float[Tensor, "text layer_head"]:
    """Each text's own score."""
    texts = range(source.n_texts[language])
    values = torch.stack([reduce_rows(source, language, [i], method, **options) for i in texts])
    return values.flatten(1).double()


def _shares(values: Float[Tensor, "text layer_head"]) -> Float[Tensor, "text layer_head"]:
    """Scores over the sum of their absolute values over heads."""
    total = values.abs().sum(1, keepdim=True)
    return values / total.clamp_min(torch.finfo(torch.float32).tiny)


def _contrast(
    values: list[Float[Tensor, "_text layer_head"]], place: int
) -> Float[Tensor, " layer_head"]:
    """Mean in one language minus the mean of the other languages' means."""
    means = torch.stack([v.mean(0) for v in values])
    return means[place] - (means.sum(0) - means[place]) / (len(values) - 1)


def _exchange_p(
    values: list[Float[Tensor, "_text layer_head"]],
    place: int,
    paired: bool,
    permutations: int,
    generator: torch.Generator,
) -> Float[Tensor, " layer_head"]:
    """One-sided p-values of the contrast when languages are exchanged."""
    pool, observed = torch.cat(values), _contrast(values, place)
    sizes = [len(v) for v in values]
    tolerance = 1e-12 * pool.abs().amax(0)
    above = torch.zeros_like(observed)
    for start in range(0, permutations, _CHUNK):
        count = min(_CHUNK, permutations - start)
        drawn = _exchanged_weights(sizes, place, paired, count, generator) @ pool
        above += (drawn >= observed - tolerance).sum(0)
    return (1 + above) / (1 + permutations)


def _exchanged_weights(
    sizes: list[int], place: int, paired: bool, permutations: int, generator: torch.Generator
) -> Float[Tensor, "permutation text"]:
    """Rows that turn the values of all texts into a contrast, with languages exchanged.

    Within a parallel text only which language is taken for the tested one matters, since the others are
    averaged.
    """
    n_own, total = sizes[place], sum(sizes)
    if paired:
        own = torch.zeros(permutations, total, dtype=torch.float64)
        languages = torch.randint(len(sizes), (permutations, n_own), generator=generator)
        own.scatter_(1, languages * n_own + torch.arange(n_own), 1)
        return own / n_own - (1 - own) / (total - n_own)
    weights = [
        torch.full((n,), 1 / n if i == place else -1 / (n * (len(sizes) - 1)), dtype=torch.float64)
        for i, n in enumerate(sizes)
    ]
    order = torch.rand(permutations, total, generator=generator).argsort(1)
    return torch.cat(weights)[order]


def _above_random(
    shares: Float[Tensor, "text layer_head"], draws: int, generator: torch.Generator
) -> Float[Tensor, " layer_head"]:
    """One-sided p of each head's mean share against that of a head drawn anew for every text."""
    n_texts, n_heads = shares.shape
    picks = torch.randint(n_heads, (n_texts, draws), generator=generator)
    null = shares.gather(1, picks).mean(0).sort().values
    below = torch.searchsorted(null, shares.mean(0) - 1e-12)
    return (1 + draws - below) / (1 + draws)


def adjusted_p(p: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Benjamini-Hochberg: the false discovery rate at which each would be found."""
    if not p.numel():
        return p
    flat = false_discovery_control(p.flatten().double().numpy(), method="bh")
    return torch.tensor(flat).float().reshape(p.shape)
