"""Two languages disagree about a fact: whose answer does a model give, and do language heads decide it?

The probe is the paper's: a statement in a first language, a distraction, a contradicting statement in a second
language, and the question. Enhancing the first language's heads or weakening the second's should move
the answer towards the first.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, end_tokens, tokenizer_of
from lahis_tl.artifacts import Card
from lahis_tl.cards import card_of
from lahis_tl.decoding import Decoder
from lahis_tl.errors import ArtifactError
from lahis_tl.masks import masked
from lahis_tl.processes import shows
from lahis_tl.prompts import Masks, decoding_groups, mask_rows, prompt_ids
from lahis_tl.records import load_records, save_records

# Written without spaces between words, so that the next sentence or answer follows at once.
_UNSPACED = frozenset({"zh", "ja", "th"})


@dataclass(frozen=True)
class Conflict:
    """A prompt whose two statements, in two languages, contradict each other.

    >>> conflict = conflicts("fr", "de", ["job"], n=1)[0]
    >>> conflict.answers[0] != conflict.answers[1]
    True

    Attributes:
        first, second: languages of the statements.
        question: language of the question.
        relation, answers: what is asked, and the names of the two answers in the data.
        prompt: the text.
        asked: both answers in the language of the question.
        forms: strings that count as each answer: in the question's language, the statement's own, English.
        spans: [start, end) of both statements, in characters of the prompt.
    """

    first: str
    second: str
    question: str
    relation: str
    answers: tuple[str, str]
    prompt: str
    asked: tuple[str, str]
    forms: tuple[tuple[str, ...], tuple[str, ...]]
    spans: tuple[tuple[int, int], tuple[int, int]]


@cache
def _templates() -> dict[str, Any]:
    path = files("lahis_tl") / "data" / "transfer.json"
    return json.loads(path.read_text(encoding="utf-8"))


def transfer_languages() -> list[str]:
    """Languages that the bundled statements and questions are written in."""
    return list(_templates()["languages"])


def transfer_relations() -> list[str]:
    """What the bundled statements are about."""
    return list(_templates()["answers"])


def conflicts(
    first: str,
    second: str,
    relations: Sequence[str] | None = None,
    n: int = 4,
    *,
    question: str = "en",
    distraction: str = "en",
    seed: int = 0,
) -> list[Conflict]:
    """Prompts of two contradicting statements, ``n`` of each relation.

    >>> print(conflicts("fr", "de", ["job"], n=1)[0].prompt)                   # doctest: +SKIP
    Alice travaille comme médecin. ... Alice works as a

    Persons, answers and distractions are drawn by the seed, anew for every pair of languages; no two
    prompts of a pair and relation have the same two answers in the same order.

    Args:
        relations: of ``transfer_relations()``; all if None.
        question, distraction: languages of the last and the middle sentence; the paper's are English.

    Raises:
        ValueError: a language without templates, an unknown relation, the same language twice, or more
            prompts than there are pairs of answers.
    """
    data = _templates()
    chosen = list(data["answers"]) if relations is None else list(relations)
    for code in (first, second, question, distraction):
        if code not in data["languages"]:
            raise ValueError(
                f"there are no statements in {code!r}; there are {', '.join(data['languages'])}"
            )
    if first == second:
        raise ValueError(f"a conflict needs two languages, not {first!r} twice")
    unknown = [relation for relation in chosen if relation not in data["answers"]]
    if unknown:
        raise ValueError(f"no relation {unknown[0]!r}; there are {', '.join(data['answers'])}")
    found = []
    for relation in chosen:
        draw = random.Random(f"{seed}/{first}/{second}/{relation}")
        answers = data["answers"][relation]
        pairs = [(a, b) for a in answers for b in answers if a != b]
        if not 0 < n <= len(pairs):
            raise ValueError(f"n={n}: {relation} has {len(pairs)} pairs of answers")
        for pair in draw.sample(pairs, n):
            name = draw.choice(data["names"])
            between = draw.choice(data["languages"][distraction]["distraction"])
            found.append(_conflict(first, second, question, relation, pair, name, between))
    return found


def _conflict(
    first: str,
    second: str,
    question: str,
    relation: str,
    answers: tuple[str, str],
    name: str,
    between: str,
) -> Conflict:
    languages = _templates()["languages"]

    def in_language(code: str) -> dict[str, Any]:
        return languages[code]["relations"][relation]

    statements = [
        in_language(code)["statement"].format(
            name=name, answer=in_language(code)["answers"][answer]
        )
        for code, answer in zip((first, second), answers, strict=True)
    ]
    asked = in_language(question)["question"].format(name=name)
    prompt = " ".join([statements[0], between, statements[1], asked])
    starts = (0, len(statements[0]) + 1 + len(between) + 1)
    forms = tuple(
        tuple(dict.fromkeys(in_language(c)["answers"][answer] for c in (question, code, "en")))
        for code, answer in zip((first, second), answers, strict=True)
    )
    return Conflict(
        first=first,
        second=second,
        question=question,
        relation=relation,
        answers=answers,
        prompt=prompt,
        asked=tuple(in_language(question)["answers"][answer] for answer in answers),  # type: ignore[arg-type]
        forms=forms,  # type: ignore[arg-type]
        spans=tuple(  # type: ignore[arg-type]
            (start, start + len(text)) for start, text in zip(starts, statements, strict=True)
        ),
    )


def answer_tokens(model: LensModel, conflict: Conflict) -> tuple[int, int]:
    """The first token of each answer, as it follows the prompt.

    Raises:
        ValueError: both begin with the same token, so that it cannot tell them apart, or the tokenizer
            joins an answer with the prompt's end.
    """
    tokenizer = tokenizer_of(model)
    (ids,) = prompt_ids(model, [conflict.prompt], 0)
    space = "" if conflict.question in _UNSPACED else " "
    tokens = []
    for answer in conflict.asked:
        whole = tokenizer(conflict.prompt + space + answer, verbose=False)["input_ids"]
        if list(whole[: len(ids)]) != ids:
            raise ValueError(
                f"the tokenizer joins {answer!r} with the end of the prompt {conflict.prompt[-30:]!r}; "
                "ask in another language (question=...)"
            )
        tokens.append(int(whole[len(ids)]))
    if tokens[0] == tokens[1]:
        raise ValueError(
            f"{conflict.asked[0]!r} and {conflict.asked[1]!r} share their first token "
            f"({tokenizer.decode(tokens[:1])!r}), which cannot tell them apart; take other answers or "
            "ask in another language (question=...)"
        )
    return tokens[0], tokens[1]


@dataclass(frozen=True, eq=False)
class TransferAnswers:
    """What a model answered to conflicts.

    Attributes:
        conflicts: the prompts.
        logit_difference: float32 [text], logit of the first answer's first token minus the second's.
        ranks: int64 [text, 2], places of both tokens among all, 1 for the most probable.
        texts: what was generated.
    """

    conflicts: tuple[Conflict, ...]
    logit_difference: Float[Tensor, " text"]
    ranks: Int[Tensor, "text 2"]
    texts: tuple[str, ...]
    card: Card = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.conflicts)

    def __repr__(self) -> str:
        shares = self.to_dataframe()["says"].value_counts(normalize=True)
        listed = ", ".join(f"{says} {share:.0%}" for says, share in shares.items())
        return f"TransferAnswers({len(self)}; {listed})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row a prompt: first, second, relation, logit_difference, rank_first, rank_second, says, text.

        ``says`` is ``first``, ``second`` or ``neither``: the answer whose form comes first in the text.
        """
        return pd.DataFrame(
            [
                {
                    "first": c.first,
                    "second": c.second,
                    "relation": c.relation,
                    "logit_difference": float(self.logit_difference[i]),
                    "rank_first": int(self.ranks[i, 0]),
                    "rank_second": int(self.ranks[i, 1]),
                    "says": says_which(self.texts[i], c.forms),
                    "text": self.texts[i],
                }
                for i, c in enumerate(self.conflicts)
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Write JSON lines and their card; see ``lahis_tl.records``."""
        rows = [
            {
                "conflict": asdict(c),
                "logit_difference": float(self.logit_difference[i]),
                "ranks": self.ranks[i].tolist(),
                "text": self.texts[i],
            }
            for i, c in enumerate(self.conflicts)
        ]
        return save_records(path, rows, self.card)

    @classmethod
    def load(cls, path: str | Path) -> "TransferAnswers":
        """Read what ``save`` wrote.

        Raises:
            ArtifactError: damaged or foreign.
        """
        rows, card = load_records(path)
        try:
            return cls(
                conflicts=tuple(_restored(row["conflict"]) for row in rows),
                logit_difference=torch.tensor([row["logit_difference"] for row in rows]),
                ranks=torch.tensor([row["ranks"] for row in rows]),
                texts=tuple(row["text"] for row in rows),
                card=card,
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} holds no answers to conflicts: {error}") from error


def _restored(record: Mapping[str, Any]) -> Conflict:
    pairs = {name: tuple(record[name]) for name in ("answers", "asked")}
    nested = {name: tuple(map(tuple, record[name])) for name in ("forms", "spans")}
    return Conflict(**{**record, **pairs, **nested})


def says_which(text: str, forms: Sequence[Sequence[str]]) -> str:
    """Whose answer a text gives: ``first``, ``second`` or ``neither``.

    >>> says_which("a teacher, not a cook", [["teacher"], ["cook"]])
    'first'
    """
    places = [
        min((m.start() for form in each if (m := _find(form, text))), default=None)
        for each in forms
    ]
    if places[0] is None and places[1] is None:
        return "neither"
    if places[1] is None or (places[0] is not None and places[0] < places[1]):
        return "first"
    return "second"


def _find(form: str, text: str) -> re.Match[str] | None:
    """Where a form begins, not within a word (what follows it may be an ending)."""
    before = r"(?<![^\W\d_])" if form[0].isalpha() and form[0].casefold() != form[0].upper() else ""
    return re.search(before + re.escape(form.casefold()), text.casefold())


@torch.no_grad()
def transfer_answers(
    model: LensModel,
    items: Sequence[Conflict],
    mask: Masks = None,
    *,
    max_new_tokens: int = 5,
    batch_tokens: int = 4096,
    progress: bool = True,
    description: str = "",
) -> TransferAnswers:
    """Ask the model, under a head mask if one is given.

    >>> items = conflicts("fr", "de")
    >>> plain = transfer_answers(model, items)                                            # doctest: +SKIP
    >>> enhanced = HeadMask.scaling(heads.specific["fr"], 3.0)                             # doctest: +SKIP
    >>> (transfer_answers(model, items, enhanced).logit_difference - plain.logit_difference).mean()  # doctest: +SKIP

    Args:
        mask: as in ``generate``: one for all prompts or one for each.
        max_new_tokens: generated greedily, to see whose answer is given; the paper's are 5.

    Raises:
        ValueError: no conflict, answers that share their first token, or a prompt longer than the context.
    """
    if not items:
        raise ValueError("there is no conflict to ask about")
    encoded = prompt_ids(model, [item.prompt for item in items], max_new_tokens)
    wanted = torch.tensor([answer_tokens(model, item) for item in items])
    tokenizer = tokenizer_of(model)
    difference = torch.empty(len(items))
    ranks = torch.empty(len(items), 2, dtype=torch.int64)
    written: list[list[int]] = [[] for _ in items]
    ends, ended = end_tokens(model), frozenset[int]()
    with tqdm(
        total=len(items), desc=description, unit="prompt", disable=not shows(progress)
    ) as bar:
        for group in decoding_groups(encoded, max_new_tokens, batch_tokens):
            chosen = mask_rows(model, mask, len(items), group)
            with nullcontext() if chosen is None else masked(model, chosen):
                decoder = Decoder(model, [encoded[i] for i in group])
                logits = decoder.start()
                two = logits.gather(1, wanted[group].to(logits.device))
                difference[group] = (two[:, 0] - two[:, 1]).cpu()
                ranks[group] = 1 + (logits[:, :, None] > two[:, None]).sum(1).cpu()
                for step in range(max_new_tokens):
                    tokens = logits.argmax(-1)
                    for i, token in zip(group, tokens.tolist(), strict=True):
                        ended = ended | {i} if token in ends else ended
                        if i not in ended:
                            written[i].append(token)
                    if step < max_new_tokens - 1:
                        logits = decoder.step(tokens)
            bar.update(len(group))
    return TransferAnswers(
        conflicts=tuple(items),
        logit_difference=difference,
        ranks=ranks,
        texts=tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in written),
        card={"model": card_of(model), "settings": {"max_new_tokens": max_new_tokens}},
    )
