"""Prompts that ask for text in a language: to go on, to sum up, to follow an instruction."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lahis_tl.access import LensModel, tokenizer_of
from lahis_tl.corpora import Corpus, load_corpus
from lahis_tl.errors import CorpusError

TASKS = ("continuation", "summary", "instruction")
# Where a sentence ends: a mark and a space, or a mark of a script without spaces.
_SENTENCE_END = re.compile(r"(?<=[.!?।])\s+|(?<=[。！？])")
XLSUM = "csebuetnlp/xlsum"
# Of the languages that requests are bundled in; the data set has no German and no Italian.
_XLSUM_NAMES = {
    "en": "english",
    "fr": "french",
    "es": "spanish",
    "pt": "portuguese",
    "ru": "russian",
    "zh": "chinese_simplified",
    "hi": "hindi",
    "vi": "vietnamese",
}


@dataclass(frozen=True)
class Task:
    """A prompt, the language that the answer should be in, and an answer to compare with if there is one.

    Attributes:
        task: ``continuation``, ``summary`` or ``instruction``.
        id: the same for translations of one prompt.
    """

    task: str
    language: str
    id: str
    prompt: str
    reference: str | None = None


@cache
def _data(name: str) -> dict[str, Any]:
    path = files("lahis_tl") / "data" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def continuation_tasks(corpus: Corpus) -> list[Task]:
    """The first half of each text, to the nearest end of a sentence; the rest is the reference.

    >>> from lahis_tl.corpora import load_corpus
    >>> task = continuation_tasks(load_corpus("bundled", ["fr"]))[0]
    >>> task.prompt.endswith("."), task.reference is not None
    (True, True)
    """
    tasks = []
    for language, texts in corpus.texts.items():
        for i, text in enumerate(texts):
            first, rest = _halves(text)
            name = str(i) if corpus.ids is None else corpus.ids[i]
            tasks.append(Task("continuation", language, name, first, rest or None))
    return tasks


def _halves(text: str) -> tuple[str, str]:
    ends = [
        match.start() for match in _SENTENCE_END.finditer(text) if 0 < match.start() < len(text)
    ]
    middle = len(text) // 2
    cut = min(ends, key=lambda end: abs(end - middle), default=middle)
    return text[:cut].rstrip(), text[cut:].strip()


def summary_tasks(
    languages: Sequence[str],
    n: int | None = None,
    source: str = "bundled",
    seed: int = 0,
    words: int = 300,
    without: Collection[str] = (),
) -> list[Task]:
    """A text and the request to sum it up in one sentence, both in the language; a summary to compare with.

    Args:
        n: texts a language; all if None (24 are bundled).
        source: ``"bundled"``, or ``"csebuetnlp/xlsum"`` from the hub (Hasan et al. 2021, arXiv 2106.13822).
        words: longer texts of XL-Sum are cut there (four times as many characters where words have no spaces).
        without: ids of bundled texts to leave out, as those that were scored.

    Raises:
        ValueError: a language without a request or summaries, or fewer than ``n`` texts.
        CorpusError: the hub cannot be reached.
    """
    requests = _data("prompts")["summary"]
    _require(languages, requests, "a request for a summary")
    if source == XLSUM:
        pairs = {code: _xlsum(code, n or 100, seed, words) for code in languages}
    elif source == "bundled":
        pairs = {
            code: [row for row in _bundled_summaries(code) if row[0] not in without]
            for code in languages
        }
    else:
        raise ValueError(f"summaries are 'bundled' or from {XLSUM!r}, not {source!r}")
    tasks = []
    for code, rows in pairs.items():
        if n is not None and not 0 < n <= len(rows):
            raise ValueError(f"n={n}: there are {len(rows)} texts with summaries in {code!r}")
        tasks += [
            Task("summary", code, name, requests[code].format(text=text), summary)
            for name, text, summary in rows[:n]
        ]
    return tasks


def summary_languages(source: str = "bundled") -> list[str]:
    """Languages that there are both requests for a summary and summaries in.

    >>> summary_languages("csebuetnlp/xlsum")
    ['en', 'fr', 'es', 'pt', 'ru', 'zh', 'hi', 'vi']
    """
    return list(_XLSUM_NAMES if source == XLSUM else _data("prompts")["summary"])


def _bundled_summaries(language: str) -> list[tuple[str, str, str]]:
    corpus = load_corpus("bundled", [language])
    texts = dict(zip(corpus.ids or (), corpus[language], strict=True))
    return [
        (name, texts[name], summaries[language]) for name, summaries in _data("summaries").items()
    ]


def _xlsum(language: str, n: int, seed: int, words: int) -> list[tuple[str, str, str]]:
    from datasets import load_dataset

    if language not in _XLSUM_NAMES:
        raise ValueError(f"{XLSUM} has no {language!r}; there are {', '.join(_XLSUM_NAMES)}")
    name = _XLSUM_NAMES[language]
    try:
        # The hub's own conversion: the data set itself is a script, which datasets no longer runs.
        table: Any = load_dataset(XLSUM, name, split="test", revision="refs/convert/parquet")
    except Exception as error:  # the hub, its cache and the data set's own script fail in many ways
        raise CorpusError(
            f"{XLSUM} ({name}) cannot be had: {error}. Load it once where the hub can be reached, or take "
            'source="bundled"'
        ) from error
    rows = table.shuffle(seed=seed).select(range(min(n, len(table))))
    return [(row["id"], _cut(row["text"], words), row["summary"]) for row in rows]


def _cut(text: str, words: int) -> str:
    """The first words; where there are hardly any spaces, four characters for each."""
    return " ".join(text.split()[:words])[: 8 * words if " " in text[:200] else 4 * words]


def instruction_tasks(
    model: LensModel, languages: Sequence[str], n: int | None = None, chat: bool | None = None
) -> list[Task]:
    """Everyday requests for a short text, in the language that they are put in.

    Args:
        n: requests a language; all if None (20 are bundled).
        chat: put them into the tokenizer's chat template; if it has one, by default. Many templates add a
            system prompt in English.

    Raises:
        ValueError: a language without requests, or ``chat=True`` where there is no template.
    """
    requests, leads = _data("prompts")["instruction"], _data("prompts")["answer"]
    _require(languages, next(iter(requests.values())), "a set of instructions")
    if n is not None and not 0 < n <= len(requests):
        raise ValueError(f"n={n}: there are {len(requests)} instructions")
    tokenizer = tokenizer_of(model)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError("the tokenizer has no chat template; leave chat out")
    in_chat = has_template if chat is None else chat
    return [
        Task(
            "instruction",
            code,
            name,
            _chat_prompt(tokenizer, wording[code])
            if in_chat
            else f"{wording[code]}\n{leads[code]}",
        )
        for code in languages
        for name, wording in list(requests.items())[:n]
    ]


def _chat_prompt(tokenizer: Any, request: str) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
    )
    # The tokenizer puts its own BOS in front of every prompt.
    return text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _require(languages: Sequence[str], known: Mapping[str, Any], what: str) -> None:
    absent = [code for code in languages if code not in known]
    if absent:
        raise ValueError(
            f"{what} is not bundled in {', '.join(absent)}; there are {', '.join(known)}"
        )
