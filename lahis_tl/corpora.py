"""Texts by language: from the hub, local files, or the bundled parallel corpus."""

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from lahis_tl.errors import CorpusError
from lahis_tl.hub import from_hub
from lahis_tl.languages import check_language
from lahis_tl.tables import (
    READERS,
    from_file,
    from_folder,
    from_mapping,
    normalise,
    of_one_language,
)

BUNDLED = "bundled"
PLANTED = "planted"


@dataclass(frozen=True)
class Corpus:
    """Texts of several languages.

    >>> corpus = load_corpus({"en": ["One plain sentence, long enough."], "fr": ["Une phrase simple, assez longue."]})
    >>> corpus
    Corpus(en: 1, fr: 1)
    >>> corpus.parallel
    False

    Attributes:
        texts: language → texts.
        ids: what the texts are about, one id a row, if the corpus is parallel: the i-th texts of all
            languages then say the same. None if not.
        source: where it came from.
        history: what was done since: bounds, samples and splits with their seeds.
        dropped: language → number of near-empty or repeated texts left out.
        origin: the options with which ``load_corpus`` read the source, so that it can be read again.
    """

    texts: Mapping[str, tuple[str, ...]]
    ids: tuple[str, ...] | None = None
    source: str = "memory"
    dropped: Mapping[str, int] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.texts:
            raise CorpusError(f"the corpus {self.source} has no language")
        for language, texts in self.texts.items():
            if not texts:
                left_out = self.dropped.get(language, 0)
                raise CorpusError(
                    f"the corpus {self.source} has no usable text for {language!r} "
                    f"({left_out} near-empty or repeated ones were left out)"
                )
            if self.ids is not None and len(texts) != len(self.ids):
                raise CorpusError(
                    f"a parallel corpus needs one text an id, but {language!r} has {len(texts)} for {len(self.ids)}"
                )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{language}: {len(texts)}" for language, texts in self.texts.items())
        return f"Corpus({sizes}{', parallel' if self.parallel else ''})"

    def __getitem__(self, language: str) -> tuple[str, ...]:
        if language not in self.texts:
            raise CorpusError(f"the corpus has no {language!r}; it has {', '.join(self.languages)}")
        return self.texts[language]

    @property
    def languages(self) -> list[str]:
        return list(self.texts)

    @property
    def parallel(self) -> bool:
        """Whether the i-th texts of all languages are translations of one another."""
        return self.ids is not None

    @property
    def sha256(self) -> str:
        """A hash of languages, ids and texts, in their order."""
        content = json.dumps([list(self.texts.items()), self.ids], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def card(self) -> dict[str, Any]:
        """What a result says of the texts that it came from."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "texts": {language: len(texts) for language, texts in self.texts.items()},
            "parallel": self.parallel,
            "dropped": dict(self.dropped),
            "history": list(self.history),
            "origin": dict(self.origin),
            "fingerprints": {code: fingerprints(texts) for code, texts in self.texts.items()},
        }

    def select(self, languages: Iterable[str]) -> "Corpus":
        """Only these languages, in this order."""
        texts = {language: self[language] for language in languages}
        dropped = {
            language: self.dropped[language] for language in texts if language in self.dropped
        }
        return replace(self, texts=texts, dropped=dropped)

    def sample(self, n: int, seed: int = 0) -> "Corpus":
        """``n`` texts a language; of a parallel corpus the same rows for all.

        Raises:
            CorpusError: some language has fewer.
        """
        if not 0 < n <= self._smallest():
            raise CorpusError(f"{n} texts a language were asked for, but there are {self!r}")
        return self._take(self._orders(seed), slice(n), f"sample(n={n}, seed={seed})")

    def split(self, n: int | float, seed: int = 0) -> tuple["Corpus", "Corpus"]:
        """Two corpora without a common text: ``n`` texts a language (or that share), and the rest.

        Rows of a parallel corpus stay together, so that no paragraph of the first corpus is in the
        second in another language either.

        Raises:
            CorpusError: a side would be empty.
        """
        count = round(n * self._smallest()) if isinstance(n, float) else n
        if not 0 < count < self._smallest():
            raise CorpusError(
                f"cannot split off {count} texts a language and leave some: there are {self!r}"
            )
        orders = self._orders(seed)
        done = f"split(n={count}, seed={seed})"
        first = self._take(orders, slice(count), f"{done}[0]")
        return first, self._take(orders, slice(count, None), f"{done}[1]")

    def without(self, ids: Collection[str]) -> "Corpus":
        """A parallel corpus less the rows of these ids.

        Raises:
            CorpusError: the corpus is not parallel, or no row is left.
        """
        rows = [i for i, name in enumerate(self.ids or ()) if name not in ids]
        if not rows:
            raise CorpusError(f"{self!r} has no rows but those of the ids {sorted(ids)}")
        return self._take(dict.fromkeys(self.texts, rows), slice(None), f"without {sorted(ids)}")

    def _orders(self, seed: int) -> dict[str, list[int]]:
        """A shuffled order of rows: one for a parallel corpus; else one a language, whatever the others."""
        orders = {}
        for language, texts in self.texts.items():
            key = f"{seed}" if self.parallel else f"{seed}/{language}"
            orders[language] = random.Random(key).sample(range(len(texts)), len(texts))
        return orders

    def _take(self, orders: Mapping[str, list[int]], part: slice, done: str) -> "Corpus":
        rows = {language: sorted(order[part]) for language, order in orders.items()}
        shared = next(iter(rows.values()))
        texts = {
            language: tuple(self.texts[language][i] for i in rows[language]) for language in rows
        }
        ids = None if self.ids is None else tuple(self.ids[i] for i in shared)
        return replace(self, texts=texts, ids=ids, history=(*self.history, done))

    def _smallest(self) -> int:
        return min(len(texts) for texts in self.texts.values())

    def to_dataframe(self) -> pd.DataFrame:
        """Columns language, id (row number where the corpus is not parallel), text."""
        return pd.DataFrame(
            [
                {"language": language, "id": self.ids[i] if self.ids else i, "text": text}
                for language, texts in self.texts.items()
                for i, text in enumerate(texts)
            ]
        )


_FINGERPRINT = (
    8  # characters of a text's hash on a card: enough to know texts of one data set apart
)


def fingerprints(texts: Iterable[str]) -> str:
    """Short hashes of texts, run together."""
    digests = (hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() for text in texts)
    return "".join(digest[:_FINGERPRINT] for digest in digests)


def _known(card: Mapping[str, Any], language: str) -> set[str]:
    run = card.get("corpus", {}).get("fingerprints", {}).get(language, "")
    return {run[i : i + _FINGERPRINT] for i in range(0, len(run), _FINGERPRINT)}


def shared_texts(card: Mapping[str, Any], corpus: Corpus) -> dict[str, int]:
    """How many texts a corpus has in common with the one that a result's card tells of, by language."""
    common = {
        code: sum(fingerprints([text]) in _known(card, code) for text in texts)
        for code, texts in corpus.texts.items()
    }
    return {code: n for code, n in common.items() if n}


def without_scored(corpus: Corpus, card: Mapping[str, Any]) -> Corpus:
    """The texts that the result of this card did not see; of a parallel corpus, not in any language.

    Raises:
        CorpusError: none is left.
    """
    unseen = {
        code: {i for i, text in enumerate(texts) if fingerprints([text]) not in _known(card, code)}
        for code, texts in corpus.texts.items()
    }
    if corpus.ids is not None:
        unseen = dict.fromkeys(corpus.languages, set.intersection(*unseen.values()))
    rows = {code: sorted(kept) for code, kept in unseen.items()}
    if not all(rows.values()):
        raise CorpusError(f"all texts of {corpus!r} were scored already; test on others")
    return corpus._take(rows, slice(None), "without scored texts")


def restored(corpus: Corpus, card: Mapping[str, Any]) -> Corpus:
    """The texts that a corpus's card tells of, taken out of a corpus that holds them.

    Raises:
        CorpusError: some are not there.
    """
    if corpus.sha256 == card["sha256"]:
        return corpus
    rows: dict[str, list[int]] = {}
    for code, run in card["fingerprints"].items():
        places = {fingerprints([text]): i for i, text in enumerate(corpus[code])}
        wanted = [run[i : i + _FINGERPRINT] for i in range(0, len(run), _FINGERPRINT)]
        missing = sum(each not in places for each in wanted)
        if missing:
            raise CorpusError(
                f"{missing} of the {len(wanted)} texts in {code!r} are not in {corpus.source}: give the corpus that "
                f"the result was made on ({card['source']})"
            )
        rows[code] = [places[each] for each in wanted]
    parallel = card["parallel"] and corpus.ids is not None
    found = replace(
        corpus,
        texts={code: tuple(corpus.texts[code][i] for i in kept) for code, kept in rows.items()},
        ids=tuple(corpus.ids[i] for i in next(iter(rows.values()))) if parallel else None,  # type: ignore[index]
        source=card["source"],
        dropped=card["dropped"],
        history=tuple(card["history"]),
        origin=card.get("origin", {}),
    )
    if found.sha256 != card["sha256"]:
        raise CorpusError(
            f"the texts of {corpus.source} are not those of the result ({card['source']}): another order or other ids"
        )
    return found


def load_corpus(
    source: str | Path | Mapping[str, Sequence[str]] = BUNDLED,
    languages: Sequence[str] | None = None,
    n: int | None = None,
    *,
    seed: int = 0,
    split: str | None = None,
    text_column: str = "text",
    language_column: str | None = None,
    id_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    min_chars: int = 20,
) -> Corpus:
    """Texts by language.

    >>> load_corpus("bundled", ["en", "fr"], n=48)
    Corpus(en: 48, fr: 48, parallel)

    Args:
        source: ``"bundled"`` (80 parallel paragraphs of ours in 10 languages); ``"planted"`` (texts in
            the made-up languages of ``lahis_tl.planted``, for the model of that name); a mapping
            language → texts; a folder with one file a language (``fr.txt``, ``fr.jsonl``, ...); one
            table (json, jsonl, csv, parquet) with a language and a text column, or with one column a
            language (of those named in ``languages``, else all with a two-letter code); or
            a hub data set. ``wikimedia/wikipedia`` and ``openlanguagedata/flores_plus`` are known;
            for others name the configuration by ``config="{language}"`` or a ``language_column``.
        languages: BCP 47 codes; all there are if None (needed for the hub).
        n: texts a language, drawn by ``seed``; all if None (needed for Wikipedia; 64 of ``"planted"``).
        split: of a hub data set; ``train``, or what the known ones are made for.
        id_column: where rows of one id are translations of one another; makes the corpus parallel.
        min_chars: texts shorter than this, white space stripped, are left out and counted, as are
            repeated ones; a parallel corpus loses the row in all languages.

    A ``.txt`` file holds one text a line.

    Raises:
        CorpusError: an unknown or absent language, no such file, no such column, or no text left.
    """
    given = {
        "languages": None if languages is None else list(languages),
        "n": n,
        "seed": seed,
        "split": split,
        "text_column": text_column,
        "language_column": language_column,
        "id_column": id_column,
        "config": config,
        "revision": revision,
        "min_chars": min_chars,
    }
    origin = {name: value for name, value in given.items() if value is not None}
    wanted = None if languages is None else [check_language(code) for code in languages]
    if wanted == []:
        raise CorpusError("languages=[] names none; None takes all there are")
    if wanted is not None and len(set(wanted)) < len(wanted):
        raise CorpusError(f"a language is named twice: {', '.join(wanted)}")
    if source == PLANTED:
        from lahis_tl import planted  # it makes a Corpus itself

        made = planted.planted_corpus(64 if n is None else n, seed, wanted)
        return replace(made, origin=origin)
    if isinstance(source, Mapping):
        table = from_mapping(source)
        name = "memory"
    elif source == BUNDLED:
        table, name = from_folder(Path(str(files("lahis_tl") / "data" / "parallel"))), BUNDLED
        id_column = "id"
    elif Path(source).exists():
        path = Path(source)
        table, name = from_folder(path) if path.is_dir() else from_file(path), path.name
        if path.is_file() and "language" not in table and not language_column:
            table = of_one_language(table, path, wanted, text_column)
    else:
        if Path(source).suffix in {".txt", *READERS}:
            raise CorpusError(f"there is no file {source}")
        table, id_column = from_hub(
            str(source),
            wanted,
            n,
            seed,
            split,
            text_column,
            language_column,
            id_column,
            config,
            revision,
        )
        name, language_column = str(source) + (f"@{revision}" if revision else ""), None
    table = normalise(table, name, wanted, text_column, language_column, id_column)
    wanted = wanted or list(dict.fromkeys(table["language"]))
    corpus = _clean(table, wanted, name, min_chars, parallel="id" in table)
    corpus = replace(corpus, history=(f"min_chars={min_chars}",), origin=origin)
    return corpus if n is None else corpus.sample(n, seed)


def _clean(
    table: pd.DataFrame, languages: list[str], name: str, min_chars: int, parallel: bool
) -> Corpus:
    absent = [code for code in languages if code not in set(table["language"])]
    if absent:
        there = ", ".join(dict.fromkeys(table["language"]))
        raise CorpusError(f"{name} has no texts in {', '.join(absent)}; it has {there}")
    by_language: dict[str, dict[Any, str]] = {}
    dropped: dict[str, int] = {}
    for language in languages:
        rows = table[table["language"] == language]
        keys = list(rows["id"]) if parallel else list(range(len(rows)))
        if len(set(keys)) < len(keys):
            raise CorpusError(f"{name}: ids repeat within {language!r}, so rows cannot be matched")
        seen: set[str] = set()
        kept = {}
        for key, text in zip(keys, rows["text"], strict=True):
            text = text.strip() if isinstance(text, str) else ""
            if len(text) >= min_chars and text not in seen:
                seen.add(text)
                kept[key] = text
        by_language[language] = kept
        dropped[language] = len(keys) - len(kept)
    ids = None
    if parallel:
        common = set.intersection(*(set(kept) for kept in by_language.values()))
        ids = tuple(key for key in by_language[languages[0]] if key in common)
        by_language = {code: {key: kept[key] for key in ids} for code, kept in by_language.items()}
    return Corpus(
        texts={code: tuple(kept.values()) for code, kept in by_language.items()},
        ids=ids,
        source=name,
        dropped=dropped,
    )
