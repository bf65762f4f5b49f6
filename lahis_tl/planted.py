"""A testbed with a known answer: five made-up languages and a small model trained to a plan of heads.

A text is a row of words of five types, A B C D E A B C D E ..., each with nine indices:
``qaa.A3 qaa.B1 ...``. Most words follow from one earlier word of the same text:

* A, B and D by rules that all languages share: the word 2, 7 or 9 places back gives the index;
* C by a rule of the language's own: the word 3, 4, 5, 6 or 7 places back.

E is always drawn at random, and so are 15 % of the others, so that the loss never vanishes. The model
``"planted"`` (``analyses/train_planted.py``) follows each rule with one head of its own and keeps all
other heads silent: one specific head a language, three general ones, sixteen that do nothing.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lahis_tl.corpora import Corpus
from lahis_tl.errors import CorpusError
from lahis_tl.heads import HeadGrid, HeadSet
from lahis_tl.languages import check_language

LANGUAGES = ("qaa", "qab", "qac", "qad", "qae")  # codes that ISO 639 leaves to private use
TYPES = "ABCDE"
OWN_TYPE, FREE_TYPE = "C", "E"  # ruled by each language in its own way; by nothing
N_INDICES = 9
NOISE = 0.15
MAX_LENGTH = 63  # words; with the first token the model's whole context

# How many places back the word stands that gives the index. Neighbours never go back to the same word,
# or the one would tell the next without any head. Sources of A, B and D are never of type C, so these
# words have the same indices in all languages; and each language's own rule begins to hold with the
# second C of a text, so that no language is easier than another.
SHARED_OFFSETS = {"A": 2, "B": 7, "D": 9}
OWN_OFFSETS = {"qaa": 3, "qab": 4, "qac": 5, "qad": 6, "qae": 7}
# The index that follows from each index of the source.
_FOLLOWS = {
    "A": (4, 7, 1, 8, 0, 3, 5, 2, 6),
    "B": (2, 6, 8, 0, 5, 1, 7, 4, 3),
    "C": (6, 3, 0, 7, 2, 8, 4, 1, 5),
    "D": (8, 0, 4, 5, 7, 6, 2, 3, 1),
}


def word_type(place: int) -> str:
    """
    >>> "".join(word_type(place) for place in range(6))
    'ABCDEA'
    """
    return TYPES[place % len(TYPES)]


def offset_of(language: str, kind: str) -> int:
    """How many places back the word stands that decides a word of this type.

    >>> offset_of("qaa", "A"), offset_of("qae", "A"), offset_of("qaa", "C"), offset_of("qae", "C")
    (2, 2, 3, 7)
    """
    return OWN_OFFSETS[language] if kind == OWN_TYPE else SHARED_OFFSETS[kind]


def expected_index(language: str, indices: Sequence[int]) -> int | None:
    """The index that the rule gives to the next word; None where none does, or it reaches too far back.

    >>> expected_index("qab", [5, 0, 1, 2, 3])      # an A, by the D two places back
    1
    >>> expected_index("qab", [5, 0, 1, 2]) is None      # an E
    True
    """
    kind = word_type(len(indices))
    if kind == FREE_TYPE:
        return None
    source = len(indices) - offset_of(language, kind)
    return None if source < 0 else _FOLLOWS[kind][indices[source]]


def vocabulary() -> list[str]:
    """All words, by language, type and index.

    >>> len(vocabulary()), vocabulary()[:2]
    (225, ['qaa.A0', 'qaa.A1'])
    """
    return [f"{code}.{kind}{i}" for code in LANGUAGES for kind in TYPES for i in range(N_INDICES)]


def draw_indices(language: str, row: str, length: int) -> list[int]:
    """The indices of one text; ``row`` seeds the draws, which are the same for all languages.

    >>> draw_indices("qaa", "0/0", 10)      # the second C is the eighth word
    [6, 3, 7, 4, 1, 0, 0, 3, 5, 2]
    >>> draw_indices("qab", "0/0", 10)
    [6, 3, 7, 4, 1, 0, 0, 2, 5, 2]
    """
    chance = random.Random(row)
    indices: list[int] = []
    for _ in range(length):
        # Of all of random's methods only random() is promised to be the same on every Python.
        roll, drawn = chance.random(), int(chance.random() * N_INDICES)
        ruled = expected_index(language, indices)
        indices.append(drawn if ruled is None or roll < NOISE else ruled)
    return indices


def planted_corpus(
    n: int = 64,
    seed: int = 0,
    languages: Sequence[str] | None = None,
    length: int = 48,
) -> Corpus:
    """Texts in the made-up languages, parallel: row i has the same draws in all of them.

    >>> corpus = planted_corpus(2, languages=["qaa", "qab"], length=6)
    >>> corpus
    Corpus(qaa: 2, qab: 2, parallel)
    >>> corpus["qaa"][0]
    'qaa.A6 qaa.B3 qaa.C7 qaa.D4 qaa.E1 qaa.A0'

    Args:
        n: texts a language; those of a smaller n come first in a larger one.
        seed: of the draws.
        languages: of the five; all if None.
        length: words a text, at most 63, the model's context without its first token.

    Raises:
        CorpusError: another language, or ``n`` or ``length`` out of range.
    """
    wanted = LANGUAGES if languages is None else tuple(check_language(code) for code in languages)
    unknown = [code for code in wanted if code not in LANGUAGES]
    if unknown:
        raise CorpusError(
            f"the planted corpus has no texts in {', '.join(unknown)}; it has {', '.join(LANGUAGES)}"
        )
    if n < 1 or not 2 <= length <= MAX_LENGTH:
        raise CorpusError(
            f"the planted corpus has texts of 2 to {MAX_LENGTH} words and at least one of them, "
            f"but n={n} of length={length} were asked for"
        )
    rows = [f"{seed}/{i}" for i in range(n)]
    return Corpus(
        texts={code: tuple(_text(code, row, length) for row in rows) for code in wanted},
        ids=tuple(rows),
        source="planted",
        history=(f"planted(n={n}, seed={seed}, length={length})",),
    )


def _text(language: str, row: str, length: int) -> str:
    indices = draw_indices(language, row, length)
    return " ".join(f"{language}.{word_type(place)}{i}" for place, i in enumerate(indices))


def planted_folder() -> Path:
    """The folder of the bundled model, with ``truth.json``."""
    return Path(str(files("lahis_tl") / "data" / "planted"))


@torch.no_grad()
def planted_random(hf: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Give a model of the planted architecture random weights, in place; the caller's RNG stays as it is.

    A word has the same random vectors, read and predicted, in all languages. With vectors of its own each
    language would differ from the others by chance, in every head, and the heads' effects truly with it;
    so there is nothing in this model that could be specific. ``std`` is larger than at the beginning of a
    training, so that removing a head changes the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    n_words = len(vocabulary())
    for name, parameter in hf.named_parameters():
        if parameter.ndim < 2:  # norms stay at one
            continue
        parameter.normal_(0, std, generator=generator)
        if name.startswith(("model.embed_tokens", "lm_head")):
            words = parameter[-n_words:].unflatten(0, (len(LANGUAGES), -1))  # a view
            words[1:] = words[0].clone()


@dataclass(frozen=True, eq=False)
class PlantedTruth:
    """What the heads of the model ``"planted"`` are for, by plan and by measurement.

    Attributes:
        grid: the model's layers × heads.
        languages: of ``effects``, in its order.
        specific: language → the heads that only its rule needs.
        general: the heads that all languages need.
        silent: the heads that none needs.
        effects: rise of the mean next-token loss when the head alone is zeroed, nats a token, over
            texts that were not trained on.

    Raises:
        ValueError: ``effects`` has another shape, or the heads are not all there once.
    """

    grid: HeadGrid
    languages: tuple[str, ...]
    specific: dict[str, HeadSet]
    general: HeadSet
    silent: HeadSet
    effects: Float[Tensor, "language layer head"]

    def __post_init__(self) -> None:
        expected = (len(self.languages), *self.grid.shape)
        if tuple(self.effects.shape) != expected:
            raise ValueError(f"effects has shape {tuple(self.effects.shape)}, not {expected}")
        parts = [*self.specific.values(), self.general, self.silent]
        placed = sorted(index for part in parts for index in part.flat_indices())
        if placed != list(range(self.grid.size)):
            raise ValueError(f"specific, general and silent do not make up the {self.grid}")

    def needed(self) -> Bool[Tensor, "language layer head"]:
        """Which language needs which head, by plan."""
        needed = torch.zeros(self.effects.shape, dtype=torch.bool)
        for row, language in enumerate(self.languages):
            for layer, head in (*self.specific[language], *self.general):
                needed[row, layer, head] = True
        return needed


def planted_truth() -> PlantedTruth:
    """The plan of the model ``"planted"`` and the effect of each head, as measured after training.

    >>> truth = planted_truth()
    >>> truth.specific["qaa"].labels, truth.general.labels, len(truth.silent)
    (['L0H6'], ['L0H2', 'L1H5', 'L2H1'], 16)
    >>> round(float(truth.effects[0, 0, 6]), 2)      # nats a token that L0H6 is worth in qaa
    0.29
    """
    stored = json.loads((planted_folder() / "truth.json").read_text())
    grid = HeadGrid(stored["n_layers"], stored["n_heads"])
    return PlantedTruth(
        grid=grid,
        languages=tuple(stored["languages"]),
        specific={code: HeadSet(grid, heads) for code, heads in stored["specific"].items()},
        general=HeadSet(grid, stored["general"]),
        silent=HeadSet(grid, stored["silent"]),
        effects=torch.tensor(stored["effects"]),
    )
