"""How near a text comes to a reference."""

from collections.abc import Sequence


def chrf(text: str, reference: str) -> float:
    """Character n-gram F score, 0 to 100 (Popović 2015; sacrebleu's). For every language and script.

    >>> chrf("the same", "the same")
    100.0
    """
    from sacrebleu.metrics.chrf import CHRF

    # Rounding would leave 99.99…; the figure is used with one decimal.
    return round(CHRF().sentence_score(text, [reference]).score, 6)


def bert_scores(
    texts: Sequence[str], references: Sequence[str], encoder: str = "bert-base-multilingual-cased"
) -> list[float]:
    """BERTScore F1, 0 to 100, by a multilingual encoder from the hub (Zhang et al. 2020, arXiv 1904.09675).

    An empty text scores 0.

    Raises:
        ValueError: the package ``bert-score`` is not installed.
    """
    try:
        from bert_score import score  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            "BERTScore needs a package that is not installed: pip install bert-score"
        ) from error
    if not texts:
        return []
    f1 = score(list(texts), list(references), model_type=encoder, verbose=False)[2]
    values = [100 * float(value) for value in f1]
    return [value if text.strip() else 0.0 for text, value in zip(texts, values, strict=True)]
