"""Can the model write the language at all? What is measured in a language that it cannot write means little."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lahis_tl.access import LensModel
from lahis_tl.artifacts import Card
from lahis_tl.confusion import judge_texts, pass_rates
from lahis_tl.corpora import Corpus
from lahis_tl.evaluation import perplexity
from lahis_tl.generation import Generations, generate
from lahis_tl.identify import LanguageIdentifier, language_identifier
from lahis_tl.tasks import continuation_tasks


@dataclass(frozen=True, eq=False)
class Competence:
    """How a model does in each language, without any mask.

    Attributes:
        table: one row a language: ``bits_per_byte`` with interval, ``passes`` (share of continuations that are in the
            language and not repetitive) with a Wilson interval for the line rate, ``writes``.
        least: the share of passing continuations that it takes to count as writing a language.
        generations: what it wrote.
    """

    table: pd.DataFrame
    least: float
    generations: Generations = field(repr=False)
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"Competence(writes {', '.join(self.writes) or 'none'}; not {', '.join(self.fails) or 'none'})"

    @property
    def writes(self) -> list[str]:
        """Languages that it can write."""
        return list(self.table.loc[self.table["writes"], "language"])

    @property
    def fails(self) -> list[str]:
        return list(self.table.loc[~self.table["writes"], "language"])

    def to_dataframe(self) -> pd.DataFrame:
        return self.table


def competence(
    model: LensModel,
    corpus: Corpus,
    *,
    least: float = 0.5,
    max_new_tokens: int = 40,
    identify: LanguageIdentifier | None = None,
    max_tokens: int | None = 512,
    **options: Any,
) -> Competence:
    """Bits per byte of texts, and whether their continuations stay in the language.

    >>> competence(model, load_corpus("bundled", n=12)).writes           # doctest: +SKIP
    ['en', 'fr', 'de']

    Bits per byte are comparable between models, and only roughly between languages (scripts take one to three bytes a
    letter); so the gate is what the model writes: the share of texts continued in the language and without
    repeating itself must reach ``least``.

    Args:
        options: ``batch_tokens``, ``progress``.

    Raises:
        ValueError: ``least`` out of its range, or a default identifier that is not installed.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least={least} must lie above 0 and not above 1")
    tasks = continuation_tasks(corpus)
    losses = perplexity(model, corpus, max_tokens=max_tokens, **options)
    found = generate(
        model, [task.prompt for task in tasks], max_new_tokens=max_new_tokens, **options
    )
    rows = [
        {"language": task.language, "prompt": task.prompt, "text": text}
        for task, text in zip(tasks, found.texts, strict=True)
    ]
    judged = judge_texts(rows, identify or language_identifier())
    rates = pass_rates(judged).drop(columns=["chrf", "agreement"])
    bits = losses.to_dataframe()[["language", "bits_per_byte", "bits_lower", "bits_upper"]]
    table = bits.merge(rates, on="language")
    table["writes"] = table["passes"] >= least
    return Competence(table, least, found, losses.card)
