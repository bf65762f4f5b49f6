"""Is generated text in the language that it should be in, and is it text at all?

Line- and word-level pass rates follow the Language Confusion Benchmark (Marchisio et al. 2024, arXiv 2406.20052),
with two differences that make them stricter: texts too short to identify fail in place of being left out,
and any longer lower-case Latin word counts in a language of another script, without a dictionary.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import langcodes
import pandas as pd

from lahis_tl.identify import UNKNOWN, LanguageIdentifier, macrolanguage
from lahis_tl.quality import chrf
from lahis_tl.statistics import Interval, wilson_interval

# A line with fewer words (characters, where words have no spaces) is no evidence for or against a language.
_LEAST_WORDS, _LEAST_CHARACTERS = 5, 10
_LEAST_CONFIDENCE = 0.3
_UNSPACED = frozenset({"Hans", "Hant", "Jpan", "Thai", "Khmr", "Laoo", "Mymr", "Tibt"})
_UNSPACED_BLOCKS = (
    ("\u0e00", "\u0fff"),  # Thai, Lao, Tibetan
    ("\u1000", "\u109f"),  # Burmese
    ("\u1780", "\u17ff"),  # Khmer
    ("\u3040", "\u30ff"),  # kana
    ("\u3400", "\u9fff"),  # Chinese characters
    ("\uf900", "\ufaff"),
)
_LATIN_WORD = re.compile(r"(?<![A-Za-z])[a-z]{4,}(?![A-Za-z])")


@cache
def script_of(language: str) -> str:
    """
    >>> script_of("fr"), script_of("hi"), script_of("zh")
    ('Latn', 'Deva', 'Hans')
    """
    return langcodes.Language.get(language).maximize().script or "Latn"


def judge_text(
    text: str,
    language: str,
    identify: LanguageIdentifier,
    prompt: str = "",
    reference: str | None = None,
    second: LanguageIdentifier | None = None,
) -> dict[str, Any]:
    """Measures of one generated text.

    >>> from lahis_tl.identify import language_identifier
    >>> found = judge_text("Le chat dort. The weather is nice today.", "fr", language_identifier())
    >>> found["identified"], found["line_pass"]
    ('en', False)

    Args:
        language: the one that it should be in.
        identify, second: identifiers; the second only tells how far the two agree.
        prompt: what it answers to, for the copy rate.
        reference: a text to compare with.

    Returns:
        ``identified`` the language of the whole text, ``und`` if none is clear; ``short``: neither five words nor
        ten letters of a script without spaces, so that nothing can be identified; ``empty``: no letter;
        ``line_pass``: not short, and every line long enough to tell is in the language;
        ``word_pass``: no lower-case Latin word of four letters or more (None in languages of Latin script);
        ``passes``: both, and not repetitive; ``distinct_3``: share of different ones among the text's 3-grams of
        words (characters), 0 without any; ``repetitive``: below one half; ``copy_rate``: share of the text's
        3-grams that the prompt has; ``chrf``: against the reference, 0 to 100 (Popović 2015), None without one;
        ``agree``: both identifiers name one language for the whole text, None without a second or where neither knows.
    """
    expected, script = macrolanguage(language), script_of(language)
    units = _units(text, script)
    short = not _long_enough(text)
    whole, _ = _identified(identify, text)
    lines = [line for line in text.splitlines() if _long_enough(line)]
    line_pass = not short and all(
        _identified(identify, line)[0] == expected for line in lines or [text]
    )
    word_pass = None if script == "Latn" else not short and not _LATIN_WORD.search(text)
    grams = _trigrams(units)
    distinct = len(set(grams)) / len(grams) if grams else 0.0
    repetitive = bool(grams) and distinct < 0.5
    given = set(_trigrams(_units(prompt, script)))
    return {
        "identified": whole,
        "short": short,
        "empty": not any(map(str.isalpha, text)),
        "line_pass": line_pass,
        "word_pass": word_pass,
        "passes": line_pass and word_pass is not False and not repetitive,
        "distinct_3": distinct,
        "repetitive": repetitive,
        "copy_rate": sum(gram in given for gram in grams) / len(grams) if grams else 0.0,
        "chrf": None if reference is None else chrf(text, reference),
        "agree": _agree(whole, second, text),
    }


def judge_texts(
    rows: Sequence[Mapping[str, Any]],
    identify: LanguageIdentifier,
    second: LanguageIdentifier | None = None,
) -> pd.DataFrame:
    """The rows (with ``text`` and ``language``, and ``prompt`` and ``reference`` where known) and their measures."""
    return pd.DataFrame(
        [
            {
                **row,
                **judge_text(
                    row["text"],
                    row["language"],
                    identify,
                    row.get("prompt", ""),
                    row.get("reference"),
                    second,
                ),
            }
            for row in rows
        ]
    )


def pass_rates(judged: pd.DataFrame, by: Sequence[str] = ("language",)) -> pd.DataFrame:
    """Shares of judged texts, one row a group: line-level and word-level pass rates, with Wilson intervals.

    ``word_rate`` is over texts that pass line by line, as in the benchmark; ``confusion_rate`` is the harmonic mean of
    both (LCPR), of the first alone in Latin script. Beside them the share of texts that ``passes``, are unknown,
    short, empty or repetitive, means of distinct 3-grams, copy rate and chrF, and the identifiers' agreement.
    """
    rows = []
    for key, group in judged.groupby(list(by), sort=False, dropna=False):
        passed = group.query("line_pass")
        words = passed["word_pass"].dropna()
        line = wilson_interval(int(group["line_pass"].sum()), len(group))
        word = None if words.empty else wilson_interval(int(words.sum()), len(words))
        rows.append(
            dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
            | _interval("line_rate", line)
            | _interval("word_rate", word)
            | {
                "confusion_rate": line.value if word is None else _harmonic(line.value, word.value),
                "passes": float(group["passes"].mean()),
                "unknown": float((group["identified"] == UNKNOWN).mean()),
                "short": float(group["short"].mean()),
                "empty": float(group["empty"].mean()),
                "repetitive": float(group["repetitive"].mean()),
                "distinct_3": float(group["distinct_3"].mean()),
                "copy_rate": float(group["copy_rate"].mean()),
                "chrf": _mean(group["chrf"]),
                "agreement": _mean(group["agree"]),
                "texts": len(group),
            }
        )
    return pd.DataFrame(rows)


def _mean(column: pd.Series) -> float:
    return float(column.dropna().astype(float).mean())


def _interval(name: str, interval: Interval | None) -> dict[str, float]:
    if interval is None:
        return dict.fromkeys((name, f"{name}_lower", f"{name}_upper"), float("nan"))
    return {name: interval.value, f"{name}_lower": interval.lower, f"{name}_upper": interval.upper}


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def _long_enough(line: str) -> bool:
    """Whether its language can be told, whatever it is: words, or letters of a script without spaces."""
    unspaced = sum(character.isalpha() and _is_unspaced(character) for character in line)
    return unspaced >= _LEAST_CHARACTERS or len(_units(line, "Latn")) >= _LEAST_WORDS


def _is_unspaced(character: str) -> bool:
    """Chinese, Japanese, Thai, Lao, Burmese, Khmer, Tibetan."""
    return any(first <= character <= last for first, last in _UNSPACED_BLOCKS)


def _agree(whole: str, second: LanguageIdentifier | None, text: str) -> bool | None:
    if second is None:
        return None
    other = _identified(second, text)[0]
    return None if whole == other == UNKNOWN else whole == other


def _units(text: str, script: str) -> list[str]:
    """Words that have a letter; letters one by one where words have no spaces."""
    if script in _UNSPACED:
        return [character for character in text if character.isalpha()]
    return [word for word in text.casefold().split() if any(map(str.isalpha, word))]


def _trigrams(units: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(units[i : i + 3]) for i in range(len(units) - 2)]


def _identified(identify: LanguageIdentifier, text: str) -> tuple[str, float]:
    code, confidence = identify(text)
    if confidence < _LEAST_CONFIDENCE:
        return UNKNOWN, confidence
    return macrolanguage(code), confidence
