"""Questions about paragraphs, with answers that stand in them: XQuAD, SQuAD-format files, and a small bundled set."""

import itertools
import json
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lahis_tl.errors import CorpusError
from lahis_tl.pairs import Pair

BUNDLED, XQUAD = "bundled", "xquad"
# Answers are compared character by character where words have no spaces (MLQA, Lewis et al. 2020, arXiv 1910.07475).
_PER_CHARACTER = frozenset({"zh", "ja", "th"})
_ARTICLES = {
    "en": "a|an|the",
    "es": "un|una|unos|unas|el|la|los|las",
    "de": "ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des",
    "fr": "un|une|des|le|la|les|l|d",
    "it": "un|uno|una|il|lo|la|i|gli|le|l",
    "pt": "um|uma|uns|umas|o|a|os|as",
    "vi": "của|là|cái|chiếc|những",
}


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        id: the same for translations of one question.
        paragraph: what the paragraph is called, or its number; the same for its translations.
        answers: each counts as right.
    """

    id: str
    paragraph: str
    language: str
    context: str
    question: str
    answers: tuple[str, ...]


def load_questions(
    source: str | Path | Mapping[str, str | Path] = BUNDLED,
    languages: Sequence[str] | None = None,
) -> dict[str, list[Question]]:
    """Questions by language.

    >>> questions = load_questions("bundled", ["en", "fr"])
    >>> len(questions["fr"]), questions["fr"][0].id == questions["en"][0].id
    (72, True)

    Args:
        source: ``"bundled"`` (24 paragraphs of ours, 3 questions each, in en, fr, de, es, it, pt, zh);
            ``"xquad"`` from the hub (Artetxe et al. 2020, arXiv 1910.11856; 240 paragraphs in 12 languages); a
            mapping language → file in SQuAD's format, or a folder with one such file a language (``fr.json``).
        languages: all there are if None; needed for ``"xquad"``.

    Raises:
        CorpusError: no such file, a file in another format, an answer that is not in its paragraph, or the hub
            cannot be reached.
    """
    if languages is not None and not languages:
        raise CorpusError("languages=[] names none; None takes all there are")
    if source == XQUAD:
        if languages is None:
            raise CorpusError("xquad: name the languages, as in ['en', 'es', 'de']")
        return {code: _xquad(code) for code in languages}
    if source == BUNDLED:
        source = Path(str(files("lahis_tl") / "data" / "squad"))
    if not isinstance(source, Mapping):
        folder = Path(source)
        if not folder.is_dir():
            raise CorpusError(
                f"there is no folder {folder} with a SQuAD-format file for each language"
            )
        source = {path.stem: path for path in sorted(folder.glob("*.json"))}
    wanted = list(source) if languages is None else languages
    absent = [code for code in wanted if code not in source]
    if absent or not source:
        raise CorpusError(f"no questions in {', '.join(absent)}; there are {', '.join(source)}")
    return {code: _read_squad(Path(source[code]), code) for code in wanted}


def _read_squad(path: Path, language: str) -> list[Question]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = [
            Question(
                id=str(entry["id"]),
                paragraph=f"{article.get('title', i)}/{j}",
                language=language,
                context=paragraph["context"],
                question=entry["question"],
                answers=tuple(dict.fromkeys(answer["text"] for answer in entry["answers"])),
            )
            for i, article in enumerate(content["data"])
            for j, paragraph in enumerate(article["paragraphs"])
            for entry in paragraph["qas"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} cannot be read as SQuAD's format: {error}") from error
    return _checked(found, str(path))


def _xquad(language: str) -> list[Question]:
    from datasets import load_dataset

    try:
        table: Any = load_dataset("google/xquad", f"xquad.{language}", split="validation")
    except Exception as error:  # the hub, its cache and the data set's own script fail in many ways
        raise CorpusError(
            f"xquad.{language} cannot be had: {error}. Load it once where the hub can be reached; afterwards its "
            "cache serves"
        ) from error
    # Rows of one paragraph stand together, in the same order in every language.
    number, last, found = -1, None, []
    for row in table:
        number += row["context"] != last
        last = row["context"]
        answers = tuple(dict.fromkeys(row["answers"]["text"]))
        found.append(
            Question(
                str(row["id"]), str(number), language, row["context"], row["question"], answers
            )
        )
    return _checked(found, f"xquad.{language}")


def _checked(questions: list[Question], name: str) -> list[Question]:
    if not questions:
        raise CorpusError(f"{name} holds no question")
    repeated = [id for id, count in Counter(q.id for q in questions).items() if count > 1]
    if repeated:
        raise CorpusError(f"{name}: the id {repeated[0]!r} stands at several questions")
    for question in questions:
        if not question.answers or not all(
            answer and answer in question.context for answer in question.answers
        ):
            raise CorpusError(
                f"{name}: an answer to question {question.id} is empty or not in its paragraph: {question.answers}"
            )
    return questions


def split_by_paragraph(
    questions: Mapping[str, Sequence[Question]], shares: Sequence[float], seed: int = 0
) -> list[dict[str, list[Question]]]:
    """Parts without a common paragraph; a paragraph is in the same part in all languages.

    >>> train, test = split_by_paragraph(load_questions("bundled", ["en", "zh"]), [0.5, 0.5])
    >>> {q.paragraph for q in train["en"]} & {q.paragraph for q in test["zh"]}
    set()

    Args:
        shares: of the paragraphs; they sum to at most 1.

    Raises:
        ValueError: shares that are not positive or sum to more than 1, or a part without a paragraph.
    """
    if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares {list(shares)} must be positive and sum to at most 1")
    places: dict[str, str] = {}
    for q in (q for part in questions.values() for q in part):
        if places.setdefault(q.id, q.paragraph) != q.paragraph:
            raise ValueError(
                f"question {q.id} stands in paragraph {places[q.id]!r} and, in another language, in {q.paragraph!r}: "
                "translations must have one name, or train and test would share them"
            )
    paragraphs = sorted(set(places.values()))
    random.Random(seed).shuffle(paragraphs)
    edges = [round(sum(shares[:i]) * len(paragraphs)) for i in range(len(shares) + 1)]
    parts = []
    for start, end in itertools.pairwise(edges):
        if start == end:
            raise ValueError(
                f"shares {list(shares)} of {len(paragraphs)} paragraphs leave a part empty"
            )
        members = set(paragraphs[start:end])
        parts.append(
            {code: [q for q in part if q.paragraph in members] for code, part in questions.items()}
        )
    return parts


@cache
def _words() -> dict[str, dict[str, str]]:
    path = files("lahis_tl") / "data" / "prompts.json"
    return json.loads(path.read_text(encoding="utf-8"))


def question_prompt(question: Question) -> str:
    """The paragraph, the question and the word for the answer, in the question's language.

    Raises:
        ValueError: there are no such words in the language.
    """
    asks, answers = _words()["question"], _words()["answer"]
    code = question.language
    if code not in asks or code not in answers:
        raise ValueError(f"there is no prompt in {code!r}; there are {', '.join(asks)}")
    return f"{question.context}\n{asks[code]} {question.question}\n{answers[code]}"


def question_pair(question: Question) -> Pair:
    """Prompt and first answer, to train on: the answer ends the line.

    A space stands before the answer where the language has any, so that the tokenizer joins it with no colon.
    """
    space = "" if question.language in ("zh", "ja") else " "
    return question_prompt(question), f"{space}{question.answers[0]}\n"


def normalised(text: str, language: str) -> list[str]:
    """Lower case, without punctuation and articles, as words; as characters where words have no spaces.

    Near SQuAD's and MLQA's, with two differences: punctuation becomes a space, so that "L'école" is two words; and in
    Chinese, Japanese and Thai Latin letters and digits are taken one by one too.

    >>> normalised("The  Quick, brown fox!", "en"), normalised("大橡树。", "zh")
    (['quick', 'brown', 'fox'], ['大', '橡', '树'])
    """
    text = "".join(
        " " if unicodedata.category(c).startswith("P") or c in string.punctuation else c
        for c in text.casefold()
    )
    if language == "ar":
        text = re.sub(r"(^|\s)ال", r"\1", text)
    if language in _ARTICLES:
        text = re.sub(rf"\b({_ARTICLES[language]})\b", " ", text)
    return [c for c in text if not c.isspace()] if language in _PER_CHARACTER else text.split()


def answer_scores(text: str, question: Question) -> dict[str, float]:
    """How right a generated answer is: best over the answers.

    Only its first line counts. ``exact`` and ``f1`` (0 or 1, and 0 to 1) as in SQuAD and MLQA, after ``normalised``;
    ``contains``: the paper's measure, an answer is a part of the text.

    >>> question = Question("1", "p", "en", "It has nine legs.", "How many?", ("nine legs",))
    >>> answer_scores(" nine legs, not eight", question)
    {'exact': 0.0, 'f1': 0.6666666666666666, 'contains': 1.0}
    """
    first = text.strip().split("\n")[0]
    said = normalised(first, question.language)
    exact, f1 = 0.0, 0.0
    for answer in question.answers:
        wanted = normalised(answer, question.language)
        exact = max(exact, float(said == wanted))
        f1 = max(f1, _f1(said, wanted))
    contains = any(answer.casefold() in first.casefold() for answer in question.answers)
    return {"exact": exact, "f1": f1, "contains": float(contains)}


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))
