"""What the paper says, and the rule by which figures of ours count for or against it.

All figures of the paper here are second-hand: read from notes about it, not from its PDF.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lahis_tl.statistics import FEWEST_TEXTS

Tables = Mapping[str, pd.DataFrame]
# Columns that count what an interval is over, the first that a table has.
_WITNESSES = ("prompts", "paragraphs", "texts")
_FEWEST_DRAWS = 19  # of which p can be 0.05
SEEN, NOT_SEEN, UNDECIDED = "seen", "not seen", "undecided at this n"
RULE = (
    "Every effect is counted so that positive supports the claim. **Seen**: its 95% interval lies above 0 and at most "
    "5% of matched random sets do as much (p ≤ 0.05; where an effect is itself a difference from random sets, the "
    "interval alone, which is then over the sets too). **Not seen**: the interval does not reach above 0, or at least "
    "half of the random sets do as much (p > 0.5). **Undecided at this n**: all else, so also where there are fewer "
    "than the 19 random sets that p ≤ 0.05 takes, or fewer than four independent texts, prompts, paragraphs asked "
    "about, or random sets that an effect is a difference from (n, the fewest of them; translations of one are one), "
    "or where nothing changed in any of them (a floor or a ceiling). "
    "A claim about every language is seen where all of its effects are seen, and not seen where one of them is not "
    "seen; any other claim is what more than half of its effects are; else it is undecided. Heads found at a false "
    "discovery rate of 5% are their own interval; where none is found, nothing bounds their number from above. No "
    "correction is made for the number of claims."
)

XQUAD = pd.DataFrame(
    [
        ("Aya-23-8B", 76.00, 55.28, 75.25, 56.15, 77.38, 61.10),
        ("Llama-3.2-3B", 56.13, 32.98, None, None, 59.25, 36.78),
        ("Mistral-7B-v0.1", 44.88, 22.53, None, None, 60.13, 29.03),
    ],
    columns=[
        "model",
        "en, no mask",
        "mean, no mask",
        "en, random mask",
        "mean, random mask",
        "en, LAHIS mask",
        "mean, LAHIS mask",
    ],
)
XLSUM = pd.DataFrame(
    [("Aya-23-8B, mean of 7 languages", 78.5, 77.7, 66.2)],
    columns=["BERTScore F1", "no mask", "random heads off", "general heads off"],
)
OFF_TARGET = pd.DataFrame(
    [("es", 0.67, 1.0), ("vi", 0.35, 1.0), ("hi", 0.74, 1.0), ("ja", 0.99, 1.0), ("th", 0.78, 1.0)],
    columns=["language", "Mistral-7B: before", "Mistral-7B: after"],
)


@dataclass(frozen=True)
class Evidence:
    """One effect, counted so that positive supports the claim.

    Attributes:
        what: the language or mask that it is of.
        p: one-sided, against matched random sets; None where the effect is a difference from them.
        n: independent texts, prompts, paragraphs or sets, where they are known; translations of one are one.
        draws: of the random sets that p is against, where they are known.
    """

    what: str
    value: float
    lower: float
    upper: float
    p: float | None = None
    n: int | None = None
    draws: int | None = None

    @property
    def verdict(self) -> str:
        """``SEEN``, ``NOT_SEEN`` or ``UNDECIDED``, by ``RULE``.

        >>> Evidence("fr", 1.0, 0.5, 1.5, 0.02).verdict
        'seen'
        """
        too_few = self.n is not None and self.n < FEWEST_TEXTS
        too_few |= self.draws is not None and self.draws < _FEWEST_DRAWS
        if too_few or self.lower == self.upper == 0:
            return UNDECIDED
        if self.lower > 0 and (self.p is None or self.p <= 0.05):
            return SEEN
        if self.upper <= 0 or (self.p is not None and self.p > 0.5):
            return NOT_SEEN
        return UNDECIDED

    def __str__(self) -> str:
        if self.upper == float("inf"):  # a count
            return f"{self.what} {self.value:.0f}"
        p = "" if self.p is None else f", p {self.p:.2g}"
        n = "" if self.n is None else f", n {self.n}"
        return f"{self.what} {self.value:+.3g} [{self.lower:.3g}, {self.upper:.3g}]{p}{n}"


def together(found: Sequence[Evidence], every: bool = False) -> str:
    """The verdict of more than half of the effects, else undecided; of a claim about every one, that of all."""
    counts = Counter(each.verdict for each in found)
    if every:
        if counts[NOT_SEEN]:
            return NOT_SEEN
        return SEEN if found and counts[SEEN] == len(found) else UNDECIDED
    most, count = counts.most_common(1)[0] if counts else (UNDECIDED, 0)
    return most if 2 * count > len(found) else UNDECIDED


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, its figures, and where ours are.

    Attributes:
        experiment: its name in ``analyses.paper``.
        unit: of the effects.
        evidence: the effects, from the tables of the sound protocol.
        authors: one figure from the tables of the authors' protocol.
        every: whether it says something of every language.
    """

    experiment: str
    text: str
    paper: str
    unit: str
    evidence: Callable[[Tables], list[Evidence]]
    authors: Callable[[Tables], str]
    every: bool = False


def _rows(
    table: pd.DataFrame,
    what: str,
    effect: str,
    p: str | None = "p",
    sign: int = 1,
    sets: str | None = None,
) -> list[Evidence]:
    """Rows of a table as evidence; ``effect`` with ``lower`` and ``upper`` beside it.

    Args:
        sets: the column that counts the random sets which the effect is a difference from.
    """
    counted = next((name for name in _WITNESSES if name in table), None)
    witnesses = [name for name in (counted, sets) if name is not None]
    lower, upper = ("lower", "upper") if sign > 0 else ("upper", "lower")
    return [
        Evidence(
            str(row[what]),
            sign * float(row[effect]),
            sign * float(row[lower]),
            sign * float(row[upper]),
            None if p is None else float(row[p]),
            min((int(row[name]) for name in witnesses if name in row), default=None),
            None if p is None or "draws" not in row else int(row["draws"]),
        )
        for row in table.to_dict("records")
    ]


def _only(table: pd.DataFrame, column: str, *values: str) -> pd.DataFrame:
    return pd.DataFrame(table[table[column].isin(values)])


def _specific(tables: Tables) -> list[Evidence]:
    return [
        Evidence(row["language"], row["heads"], row["heads"], float("inf"), row["fdr"])
        for row in tables["specific"].to_dict("records")
    ]


def _own_perplexity(tables: Tables) -> list[Evidence]:
    table = tables["perplexity"]
    own = table[table["condition"] == table["language"] + " heads off"]
    names = {"change_lower": "lower", "change_upper": "upper"}
    return _rows(pd.DataFrame(own).rename(columns=names), "language", "change")


def _crossed(tables: Tables) -> list[Evidence]:
    matrix = tables["matrix"]
    contrasts = tables["contrasts"].assign(texts=matrix["texts"].min(), draws=matrix["draws"].min())
    return _rows(_only(contrasts, "heads_of", "all"), "heads_of", "own_minus_others")


def _effects(condition: str, sign: int) -> Callable[[Tables], list[Evidence]]:
    def found(tables: Tables) -> list[Evidence]:
        if "effects" not in tables:  # the model writes none of the languages
            return []
        return _rows(
            _only(tables["effects"], "condition", condition), "condition", "change", sign=sign
        )

    return found


def _transfer(tables: Tables) -> list[Evidence]:
    masks = ("first enhanced", "second weakened")
    return _rows(
        _only(tables["conditions"], "condition", *masks), "condition", "change", "p_change"
    )


def _tuned(measure: str, sign: int) -> Callable[[Tables], list[Evidence]]:
    """Columns ``measure``, ``measure_lower``, ``measure_upper`` of the best heads, a row a language."""

    def found(tables: Tables) -> list[Evidence]:
        best = _only(tables["conditions"], "condition", "best heads")
        stem = measure.removesuffix("_change")
        names = {f"{stem}_lower": "lower", f"{stem}_upper": "upper"}
        sets = "random_runs" if "against_random" in measure else None
        return _rows(best.rename(columns=names), "language", measure, None, sign, sets)

    return found


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _authors_general(tables: Tables) -> str:
    row = tables["counts"].iloc[0]
    return f"{row['general']:.0f} of {row['heads']:.0f} heads ({_share(row['general'] / row['heads'])})"


def _authors_specific(tables: Tables) -> str:
    counts = tables["counts"].iloc[0]["specific"]
    return f"specific heads: {counts}"


def _authors_own(tables: Tables) -> str:
    table = tables["crossed"]
    own = pd.DataFrame(table[table["off"] == table["text_in"]])
    parts = [
        f"{row['text_in']} × {row['ratio']:.2f} (random × {row['random_ratio']:.2f})"
        for row in own.to_dict("records")
    ]
    return f"perplexity {', '.join(parts)}"


def _authors_crossed(tables: Tables) -> str:
    table = tables["crossed"].pivot(index="off", columns="text_in", values="ratio")
    worst = sum(table[code].idxmax() == code for code in table.columns)
    return f"own heads hurt most in {worst} of {len(table.columns)} languages"


def _authors_mean(table: str, *conditions: str) -> Callable[[Tables], str]:
    def said(tables: Tables) -> str:
        rows = tables[table].set_index("condition")["mean"]
        return ", ".join(f"{name} {rows[name]:.3g}" for name in conditions if name in rows)

    return said


def _authors_transfer(tables: Tables) -> str:
    rows = tables["answers"].to_dict("records")
    return "first answer given: " + ", ".join(
        f"{r['condition']} {_share(r['says_first'])}" for r in rows
    )


def _authors_tuned(tables: Tables) -> str:
    rows = tables["accuracy"].groupby("condition", sort=False)
    return "mean of the languages: " + ", ".join(
        f"{name} {_share(float(group['contains'].mean()))}" for name, group in rows
    )


CLAIMS = (
    Claim(
        "heads",
        "Some heads are general: kept by four languages or more.",
        "about 1% of the heads",
        "share of heads above chance",
        lambda tables: _rows(tables["general"], "what", "above_chance"),
        _authors_general,
    ),
    Claim(
        "heads",
        "Every language has heads that are specific to it.",
        "as many as are kept above the 0.96 quantile, less the general ones",
        "heads at FDR 5%",
        _specific,
        _authors_specific,
        every=True,
    ),
    Claim(
        "perplexity",
        "Without its own heads a language's perplexity rises, more than without random heads.",
        "no figure in our notes",
        "nats per token",
        _own_perplexity,
        _authors_own,
    ),
    Claim(
        "perplexity",
        "A language's own heads matter more to it than to other languages.",
        "no figure in our notes",
        "nats per token, own minus others",
        _crossed,
        _authors_crossed,
    ),
    Claim(
        "summaries",
        "Without the general heads summaries become worse, much more than without random heads.",
        "Aya-23-8B: BERTScore F1 78.5 → 66.2 (random 77.7)",
        "chrF lost, points of 100",
        _effects("general heads", -1),
        _authors_mean("chrf", "no mask", "general heads", "random heads"),
    ),
    Claim(
        "transfer",
        "Enhancing the heads of one language, or weakening those of the other, turns the answer to the first.",
        "no figure in our notes",
        "nats towards the first answer",
        _transfer,
        _authors_transfer,
    ),
    Claim(
        "off_target",
        "With English heads suppressed, text is more often in the language that it should be in.",
        "Mistral-7B: es .67→1.00, vi .35→1.00, hi .74→1.00, ja .99→1.00, th .78→1.00",
        "share of texts gained",
        _effects("English heads", 1),
        _authors_mean("on_target", "no mask", "English heads", "own heads"),
    ),
    Claim(
        "xquad",
        "A mask of some twenty trained numbers answers more questions rightly.",
        "Aya-23-8B 55.28 → 61.10, Llama-3.2-3B 32.98 → 36.78, Mistral-7B 22.53 → 29.03 (means of the languages)",
        "share of answers that hold the right one",
        _tuned("contains_change", 1),
        _authors_tuned,
    ),
    Claim(
        "xquad",
        "It does so more than a trained mask of as many random heads.",
        "Aya-23-8B: random mask 56.15, LAHIS mask 61.10",
        "nats per answer token, less than random",
        _tuned("nll_against_random", -1),
        _authors_tuned,
    ),
)
