"""Where heads look: the attention of a text's last position, by named spans of the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, grid_of, tokenizer_of
from lahis_tl.artifacts import Artifact, Card
from lahis_tl.cards import card_of
from lahis_tl.heads import HeadGrid, HeadSet
from lahis_tl.patterns import patterns_of
from lahis_tl.processes import shows
from lahis_tl.prompts import Masks, decoding_groups, mask_rows, prompt_ids

Spans = Mapping[str, tuple[int, int]]
START, REST = "start", "rest"


@dataclass(frozen=True, eq=False)
class AttentionMass(Artifact):
    """How a text's last position shares its attention out.

    Attributes:
        parts: ``"start"`` (the first position: BOS, or the first token where there is none), the named
            spans, ``"rest"``.
        mass: float32 [text, layer, head, part]; sums to 1 over the parts.
    """

    kind: ClassVar[str] = "attention_mass"
    parts: tuple[str, ...]
    mass: Float[Tensor, "text layer head part"]
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        means = ", ".join(f"{p} {float(self[p].mean()):.2f}" for p in self.parts)
        return f"AttentionMass({len(self.mass)} texts; {self.grid}; mean {means})"

    def __getitem__(self, part: str) -> Float[Tensor, "text layer head"]:
        if part not in self.parts:
            raise KeyError(f"there is no part {part!r}; there are {', '.join(self.parts)}")
        return self.mass[..., self.parts.index(part)]

    @property
    def grid(self) -> HeadGrid:
        return HeadGrid(*self.mass.shape[1:3])

    def sinks(self, least: float = 0.9) -> HeadSet:
        """Heads that leave at least this share on the first position, on average: they rest there."""
        means = self[START].mean(0)
        order = means.flatten().argsort(descending=True, stable=True).tolist()
        flat = means.flatten()
        return HeadSet(self.grid, (self.grid.head(i) for i in order if flat[i] >= least))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, head, label, and the mean mass on each part."""
        means = self.mass.mean(0).flatten(0, 1)
        heads = [self.grid.head(i) for i in range(self.grid.size)]
        return pd.DataFrame(
            [
                {"layer": h.layer, "head": h.head, "label": h.label}
                | dict(zip(self.parts, row, strict=True))
                for h, row in zip(heads, means.tolist(), strict=True)
            ]
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {"mass": self.mass}

    def _content(self) -> Card:
        return {"parts": list(self.parts)}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "AttentionMass":
        return cls(tuple(card["content"]["parts"]), tensors["mass"], card)


def token_spans(tokenizer: Any, text: str, spans: Spans) -> dict[str, tuple[int, int]]:
    """Spans of characters as spans of tokens, [start, end) in the tokenizer's ids of the text.

    A token belongs to the span that its last character lies in; so the space before a word, which many
    tokenizers count to the word, moves no border, and all tokens of a character of several bytes go together.

    Raises:
        ValueError: the tokenizer does not say where its tokens lie (a slow one), or a span is empty,
            outside the text, or holds no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where tokens lie in a text; a fast tokenizer is needed"
        )
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ends = [end if end > start else None for start, end in encoded["offset_mapping"]]
    found = {}
    for name, (start, end) in spans.items():
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"span {name!r} [{start}, {end}) is not within the text's {len(text)} characters"
            )
        inside = [i for i, last in enumerate(ends) if last is not None and start < last <= end]
        if not inside:
            raise ValueError(f"span {name!r} ({text[start:end]!r}) holds no token")
        found[name] = (inside[0], inside[-1] + 1)
    return found


@torch.no_grad()
def attention_mass(
    model: LensModel,
    texts: Sequence[str],
    spans: Sequence[Spans],
    mask: Masks = None,
    *,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> AttentionMass:
    """What share of the last position's attention goes to each span, for every head.

    >>> text = "Le chat dort. The cat sleeps."                                       # doctest: +SKIP
    >>> attention_mass(model, [text], [{"fr": (0, 13), "en": (14, 29)}])["fr"].mean(0)   # doctest: +SKIP

    Args:
        spans: for each text, name → [start, end) in characters; the same names for all.
        mask: as in ``generate``: one for all texts or one for each.

    Raises:
        ValueError: spans that differ in their names or overlap, or do not fit their text.
        ModelError: the model gives no attention pattern.
    """
    names = tuple(spans[0]) if spans else ()
    if len(spans) != len(texts) or any(set(s) != set(names) for s in spans):
        raise ValueError(f"{len(texts)} texts need as many spans, all of the same names")
    if {START, REST} & set(names):
        raise ValueError(f"{START!r} and {REST!r} are parts of every text; call a span otherwise")
    encoded = prompt_ids(model, texts, 0)
    tokenizer, grid = tokenizer_of(model), grid_of(model)
    members = [
        _membership(len(ids), names, token_spans(tokenizer, text, each))
        for ids, text, each in zip(encoded, texts, spans, strict=True)
    ]
    mass = torch.empty(len(texts), *grid.shape, len(names) + 2)
    with tqdm(total=len(texts), unit="text", disable=not shows(progress)) as bar:
        for group in decoding_groups(encoded, 0, batch_tokens):
            # The last row of each text's pattern, by part. Padding stands on the right, so it gets nothing.
            parts = pad_sequence([members[i] for i in group], batch_first=True)
            ids = pad_sequence([torch.tensor(encoded[i]) for i in group], batch_first=True)
            rows = torch.arange(len(group))
            last = torch.tensor([len(encoded[i]) - 1 for i in group])
            patterns = patterns_of(
                model,
                ids,
                lambda p, rows=rows, last=last: p[rows.to(p.device), :, last.to(p.device)],
                mask_rows(model, mask, len(texts), group),
            )
            for layer, pattern in enumerate(patterns):
                mass[group, layer] = torch.einsum("bhk,bkp->bhp", pattern, parts)
            bar.update(len(group))
    return AttentionMass((START, *names, REST), mass, {"model": card_of(model)})


def _membership(n_tokens: int, names: Sequence[str], spans: Spans) -> Float[Tensor, "pos part"]:
    """One-hot: the part of every token."""
    part = torch.full((n_tokens,), len(names) + 1)
    taken = torch.zeros(n_tokens, dtype=torch.bool)
    for i, name in enumerate(names, start=1):
        start, end = spans[name]
        if taken[start:end].any():
            raise ValueError(f"span {name!r} overlaps another one")
        taken[start:end] = True
        part[start:end] = i
    part[0] = 0
    return torch.nn.functional.one_hot(part, len(names) + 2).float()
