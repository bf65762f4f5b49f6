"""The explorer: results as one self-contained page whose panels answer each other."""

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs, get_plotlyjs_version

from lahis_tl.access import LensModel
from lahis_tl.artifacts import Artifact, load, write_atomically
from lahis_tl.batches import TokenIds
from lahis_tl.corpora import Corpus
from lahis_tl.explorer.payload import Payload
from lahis_tl.patterns import attention_patterns
from lahis_tl.per_token import token_effects

_SCRIPTS = ("data.js", "figures.js", "map.js", "head.js", "text.js", "page.js")
_CDN = "https://cdn.plot.ly"


def explore(
    results: Artifact | str | Path | Sequence[Artifact | str | Path],
    path: str | Path = "heads.html",
    *,
    model: LensModel | None = None,
    samples: Corpus | TokenIds | None = None,
    max_tokens: int | None = 20,
    plotlyjs: str = "inline",
    title: str | None = None,
) -> Path:
    """Write results as one interactive page that opens from disk, without a network or a kernel.

    A layer × head map by language, score and rule; for each head its scores with intervals, ranks, selection
    probability and exact effect; what it attends to on sample texts and which tokens it works on; sets of heads to
    copy as Python. All texts are shown as text, whatever they hold.

    >>> explore([grads, heads], "heads.html", model=model, samples=corpus.sample(1))    # doctest: +SKIP

    Args:
        results: scores, their certainty, gradients (shown with intervals and selection probability), exact effects,
            language heads, attention patterns, token effects, or files of them; about one model. Scores and their
            certainty of one name are shown together.
        model: for the samples' attention patterns and token effects, if these are not among the results.
        samples: a few texts to look at heads on.
        max_tokens: samples are cut there; the page grows with its square.
        plotlyjs: ``"inline"``, some 5 MB in the page; or ``"cdn"``, fetched when the page is opened.
        title: of the page.

    Returns:
        the page.

    Raises:
        ValueError: results of different models, two different scores of one name, none that can be mapped,
            samples without a model, or another ``plotlyjs``.
        ArtifactError: a file is damaged or no result; FileNotFoundError: there is none.
        CorpusError: a sample of fewer than two tokens.
        ModelError: the model gives no attention pattern.
    """
    if plotlyjs not in ("inline", "cdn"):
        raise ValueError(f"plotlyjs={plotlyjs!r} is neither 'inline' nor 'cdn'")
    if (model is None) != (samples is None):
        raise ValueError(
            "samples are looked at with a model: give both, model= and samples=, or none"
        )
    found = loaded(results)
    if model is not None and samples is not None:
        found.append(attention_patterns(model, samples, max_tokens=max_tokens))
        found.append(token_effects(model, samples, max_tokens=max_tokens))
    page = Path(path)
    write_atomically(page, page_of(Payload(found, title), plotlyjs).encode("utf-8"))
    return page


def loaded(results: Artifact | str | Path | Sequence[Artifact | str | Path]) -> list[Any]:
    """One result or many, those named by files read."""
    listed = [results] if isinstance(results, (Artifact, str, Path)) else list(results)
    return [load(result) if isinstance(result, (str, Path)) else result for result in listed]


def page_of(payload: Payload, plotlyjs: str = "inline") -> str:
    """The page's HTML."""
    about, block = payload.encode()
    sources = files(__name__)
    scripts = "\n".join(sources.joinpath(name).read_text("utf-8") for name in _SCRIPTS)
    address = f"{_CDN}/plotly-{get_plotlyjs_version()}.min.js"
    plotly = (
        f"<script>{get_plotlyjs()}</script>"
        if plotlyjs == "inline"
        else f'<script src="{address}" charset="utf-8"></script>'
    )
    parts = {
        "TITLE": html.escape(payload.title),
        "STYLE": sources.joinpath("page.css").read_text("utf-8"),
        "ORIGIN": "" if plotlyjs == "inline" else _CDN,
        "PLOTLY": plotly,
        "ABOUT": about,
        "BLOCK": block,
        "SCRIPT": f"(async () => {{\n'use strict';\n{scripts}\n}})();",
    }
    # One pass over the template's own places, so that nothing put in is read as a place.
    pieces = sources.joinpath("page.html").read_text("utf-8").split("%%")
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))
