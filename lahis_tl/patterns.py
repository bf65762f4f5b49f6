"""Attention patterns: of one head on one text, of all heads on sample texts, with tokens that can be read."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lahis_tl.access import (
    LensModel,
    device_of,
    grid_of,
    layer_points,
    model_name,
    run_layers,
    tokenizer_of,
    unembedding_of,
)
from lahis_tl.artifacts import Artifact, Card, keyed
from lahis_tl.batches import TokenIds, tokenize
from lahis_tl.cards import card_of
from lahis_tl.corpora import Corpus
from lahis_tl.errors import ModelError
from lahis_tl.heads import Head, HeadGrid, HeadLike
from lahis_tl.masks import HeadMask, hooked_points, masked
from lahis_tl.prompts import prompt_ids

SampleTokens = Mapping[str, Sequence[Sequence[str]]]  # language → texts → tokens


@torch.no_grad()
def patterns_of(
    model: LensModel,
    ids: Int[Tensor, "batch pos"],
    keep: Callable[[Float[Tensor, "batch head query key"]], Tensor],
    mask: HeadMask | None = None,
    layers: Sequence[int] | None = None,
) -> list[Tensor]:
    """What ``keep`` takes of each layer's attention pattern, float32 on the CPU.

    Args:
        layers: only these; all if None.

    Raises:
        ModelError: the model gives no attention pattern.
    """
    points = layer_points(model, "attn.hook_pattern")
    wanted = list(range(len(points)) if layers is None else layers)
    found: dict[int, Tensor] = {}

    def note(layer: int) -> Callable[[Tensor], None]:
        def take(pattern: Tensor) -> None:
            found[layer] = keep(pattern).float().cpu()

        return take

    unembedding_of(model)  # probes the model once, which the hooks are not to see
    with (
        nullcontext() if mask is None else masked(model, mask),
        hooked_points(points, {layer: note(layer) for layer in wanted}),
    ):
        run_layers(model, ids.to(device_of(model)))
    for layer in wanted:
        if layer not in found:
            raise ModelError(
                f"{model_name(model)} gives no attention pattern in layer {layer}: its attention runs fused. "
                'Load the Hugging Face model with attn_implementation="eager"'
            )
    return [found[layer] for layer in wanted]


def head_pattern(
    model: LensModel, text: str, head: HeadLike, mask: HeadMask | None = None
) -> tuple[list[str], Float[Tensor, "query key"]]:
    """One head's whole attention pattern on one text, and the text's tokens to read.

    >>> tokens, pattern = head_pattern(model, "Le chat dort.", "L12H3")     # doctest: +SKIP

    Raises:
        IndexError: the head is outside the model.
        ModelError: the model gives no attention pattern.
        ValueError: the text is empty or longer than the context.
    """
    parsed: Head = grid_of(model).check(head)
    (ids,) = prompt_ids(model, [text], 0)
    (pattern,) = patterns_of(
        model, torch.tensor([ids]), lambda p: p[0, parsed.head], mask, [parsed.layer]
    )
    return readable_tokens(tokenizer_of(model), ids), pattern


class OnSamples(Artifact):
    """A result with values [layer, head, ...] of each of a few texts; subclasses are dataclasses."""

    kind: ClassVar[str] = "on_samples"
    main: ClassVar[str]
    tokens: SampleTokens

    @property
    @abstractmethod
    def _values(self) -> Mapping[str, Sequence[Tensor]]: ...

    def __repr__(self) -> str:
        sizes = ", ".join(f"{code}: {len(texts)}" for code, texts in self.tokens.items())
        return f"{type(self).__name__}({sizes} texts; {self.grid})"

    def __getitem__(self, language: str) -> Sequence[Tensor]:
        if language not in self._values:
            raise KeyError(f"no {self.main} for {language!r}; there are {', '.join(self._values)}")
        return self._values[language]

    @property
    def grid(self) -> HeadGrid:
        return HeadGrid(*next(iter(self._values.values()))[0].shape[:2])

    def _summary(self) -> pd.DataFrame:
        """Each language's first text."""
        firsts = {code: "".join(texts[0]) for code, texts in self.tokens.items() if texts}
        return pd.DataFrame({"language": list(firsts), "first text": list(firsts.values())})

    def _content(self) -> Card:
        return {"tokens": {code: [list(t) for t in texts] for code, texts in self.tokens.items()}}


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(OnSamples):
    """Every head's attention pattern on a few texts.

    Attributes:
        tokens: language → texts → tokens to read.
        patterns: language → texts, float16 [layer, head, query, key]; each row sums to 1.
    """

    kind: ClassVar[str] = "attention_patterns"
    main: ClassVar[str] = "patterns"
    tokens: SampleTokens
    patterns: Mapping[str, Sequence[Float[Tensor, "layer head _query _key"]]]
    card: Card = field(default_factory=dict, repr=False)

    @property
    def _values(self) -> Mapping[str, Sequence[Tensor]]:
        return self.patterns

    def _tensors(self) -> dict[str, Tensor]:
        return keyed(
            "patterns",
            {
                code: torch.cat([p.flatten(2) for p in each], 2)
                for code, each in self.patterns.items()
            },
        )

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "AttentionPatterns":
        tokens = card["content"]["tokens"]
        patterns = {}
        for code, texts in tokens.items():
            parts = tensors[f"patterns/{code}"].split([len(t) ** 2 for t in texts], 2)
            patterns[code] = [
                p.unflatten(2, (len(t),) * 2) for p, t in zip(parts, texts, strict=True)
            ]
        return cls(tokens, patterns, card)


def attention_patterns(
    model: LensModel, corpus: Corpus | TokenIds, *, max_tokens: int | None = 32
) -> AttentionPatterns:
    """Every head's attention pattern on each text; meant for a few short ones.

    >>> samples = load_corpus("bundled", ["fr", "hi"], n=1)                  # doctest: +SKIP
    >>> attention_patterns(model, samples)["fr"][0][12, 3]                   # doctest: +SKIP

    Args:
        max_tokens: longer texts are cut there; a pattern grows with its square.

    Raises:
        CorpusError: a text with fewer than two tokens.
        ModelError: the model gives no attention pattern.
    """
    token_ids = tokenize(model, corpus, max_tokens)
    patterns = {
        code: [
            torch.stack(patterns_of(model, torch.tensor([ids]), lambda p: p[0])).half()
            for ids in texts
        ]
        for code, texts in token_ids.items()
    }
    return AttentionPatterns(
        readable_samples(model, token_ids),
        patterns,
        {
            "model": card_of(model),
            "corpus": corpus.card if isinstance(corpus, Corpus) else {"source": "token ids"},
            "settings": {"max_tokens": max_tokens},
        },
    )


def readable_samples(model: LensModel, token_ids: TokenIds) -> dict[str, list[list[str]]]:
    """Tokens of every text to read."""
    tokenizer = tokenizer_of(model)
    return {
        code: [readable_tokens(tokenizer, ids) for ids in texts]
        for code, texts in token_ids.items()
    }


def readable_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text; of a character that is split over tokens, the first shows it and the others ``·``.

    >>> readable_tokens(tokenizer, [5, 6])          # doctest: +SKIP
    ['Le', ' chat']
    """

    def text(first: int, end: int) -> str:
        return tokenizer.decode(list(ids[first:end]), clean_up_tokenization_spaces=False)

    shown: list[str] = []
    before = start = 0
    for i in range(len(ids)):
        # After the piece before it: alone, tokens of some tokenizers lose the space that they begin with.
        whole, known = text(before, i + 1), text(before, start)
        piece = whole[len(known) :] if whole.startswith(known) else text(start, i + 1)
        if piece.endswith("\ufffd") and i + 1 < len(ids) and i - start < 4:
            continue  # not yet whole
        shown += [piece, *["·"] * (i - start)]
        before, start = start, i + 1
    return shown
