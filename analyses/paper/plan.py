"""What a run of ``analyses.paper`` is to do: sizes, languages, sources of texts; and that a folder holds one run."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lahis_tl as lt
from analyses.paper.authors import WIKIPEDIA
from lahis_tl.artifacts import write_atomically
from lahis_tl.errors import ArtifactError, CorpusError
from lahis_tl.models import has_bfloat16_arithmetic
from lahis_tl.presets import PRESETS, ModelPreset, preset_of
from lahis_tl.processes import local_device
from lahis_tl.questions import XQUAD, load_questions
from lahis_tl.tasks import XLSUM, summary_languages, summary_tasks
from lahis_tl.transfer import transfer_languages

EXPERIMENTS = ("heads", "perplexity", "summaries", "transfer", "off_target", "xquad")
AUTHORS, SOUND = "authors", "sound"
_XQUAD_LANGUAGES = ("en", "es", "de", "zh", "hi", "vi", "th", "tr", "el", "ar", "ru", "ro")
_THEIR_SETTINGS = {
    "quantile": 0.96,
    "perplexity_fraction": 0.02,
    "summary_fraction": 0.01,
    "transfer_fraction": 0.01,
    "tuned_fraction": 0.02,
}
# ``scoring``: how many texts the sound protocol scores heads on, the same ones in all experiments but the last, whose
# questions are about some of them. ``languages``: only the first so many.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        AUTHORS: _THEIR_SETTINGS
        | {"texts": 16, "test_texts": 6, "max_tokens": 48, "summaries": 3, "summary_tokens": 20}
        | {"jobs": 2, "tuning": 4, "questions": 6},
        "scoring": {"n": 24, "max_tokens": 48},
        "heads": {"draws": 200, "permutations": 4000},
        "perplexity": {"test_texts": 4, "test_tokens": 32, "draws": 19, "languages": 3},
        "selectivity": {"test_texts": 4, "test_tokens": 32, "draws": 19},
        "summaries": {"prompts": 4, "draws": 2, "max_new_tokens": 20, "languages": 3},
        "transfer": {"prompts": 1, "draws": 19, "factors": (0.0, 2.0), "relations": ("job",)}
        | {"languages": 3},
        "off_target": {"prompts": 1, "draws": 2, "max_new_tokens": 20, "languages": 3},
        "xquad": {"epochs": 1, "training_seeds": 1, "random_sets": 1, "top_k": 20}
        | {"shares": (0.083, 0.083, 0.125), "max_new_tokens": 12, "languages": 2},
    },
    "full": {
        AUTHORS: _THEIR_SETTINGS
        | {"texts": 48, "test_texts": 16, "max_tokens": 64, "summaries": 6, "summary_tokens": 60}
        | {"jobs": 5, "tuning": 16, "questions": 36},
        "scoring": {"n": 48, "max_tokens": 64},
        "heads": {},
        "perplexity": {"test_texts": 12, "test_tokens": 48, "draws": 19},
        "selectivity": {"test_texts": 8, "test_tokens": 32, "draws": 19},
        "summaries": {"prompts": 6, "draws": 19, "max_new_tokens": 20},
        "transfer": {"prompts": 1, "draws": 19},
        "off_target": {"prompts": 2, "draws": 19, "max_new_tokens": 20},
        "xquad": {"epochs": 2, "training_seeds": 1, "random_sets": 4, "top_k": 20}
        | {"shares": (0.3, 0.1, 0.3), "max_new_tokens": 12, "languages": 2},
    },
}
# Where Wikipedia can be had, and so a machine for the paper's models is likely: as many texts as the authors take.
SIZES["paper"] = {
    AUTHORS: _THEIR_SETTINGS
    | {"texts": 1000, "test_texts": 1000, "max_tokens": 2048, "summaries": 500}
    | {"summary_tokens": 80, "jobs": 10, "tuning": 200, "questions": 800},
    "scoring": {"n": 48, "max_tokens": 96},
    "heads": {},
    "perplexity": {"test_texts": 24, "test_tokens": 96, "draws": 39},
    "selectivity": {"test_texts": 24, "test_tokens": 96, "draws": 39},
    "summaries": {"prompts": 8, "draws": 19, "max_new_tokens": 80},
    "transfer": {"prompts": 3, "draws": 39},
    "off_target": {"prompts": 4, "draws": 19, "max_new_tokens": 40},
    "xquad": {"epochs": 4, "training_seeds": 3, "random_sets": 5, "top_k": 20}
    | {"shares": (0.4, 0.1, 0.5)},
}


@cache
def _bundled_languages() -> frozenset[str]:
    return frozenset(lt.load_corpus("bundled").languages)


@cache
def _asked_languages() -> frozenset[str]:
    return frozenset(load_questions("bundled"))


@dataclass(frozen=True)
class Plan:
    """What is asked for; kept in the folder, and nothing else may be done there.

    Attributes:
        model: preset, hub name or path; ``known``: its preset, if it has one.
        sources: where ``texts``, ``summaries`` and ``questions`` come from.
        wanted: what could not be reached, and how to fetch it.
    """

    model: str
    known: ModelPreset | None
    languages: tuple[str, ...]
    dtype: str
    size: str
    sizes: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, str]
    wanted: tuple[str, ...]
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        found = {"model": self.model, "languages": self.languages, "dtype": self.dtype}
        found |= {"size": self.size, "sizes": self.sizes, "sources": self.sources}
        found |= {"seed": self.seed, "version": lt.__version__}
        return json.loads(json.dumps(found))

    def own_sizes(self, experiment: str) -> dict[str, Any]:
        """What its ``run`` takes."""
        return {k: v for k, v in self.sizes[experiment].items() if k != "languages"}

    def languages_of(self, protocol: str, experiment: str) -> list[str]:
        """Those of the languages that there are texts for, as many as the run's size takes."""
        bundled = _bundled_languages()
        texts = bundled if self.sources["texts"] == "bundled" else frozenset(self.languages)
        asked = frozenset(_XQUAD_LANGUAGES)
        if self.sources["questions"] == "bundled":
            asked = _asked_languages()
        summed = frozenset(summary_languages(self.sources["summaries"]))
        # The sound protocol scores heads on the bundled texts alone, or on the questions' paragraphs.
        known = texts if protocol == AUTHORS else bundled
        able = {
            "summaries": known & summed,
            "transfer": known & set(transfer_languages()),
            "off_target": known & (summed if protocol == AUTHORS else bundled),
            "xquad": asked & texts if protocol == AUTHORS else asked,
        }.get(experiment, known)
        found = [code for code in self.languages if code in able]
        most = self.sizes[experiment].get("languages", len(found))
        # English heads are suppressed in one of them, so English is never cut off.
        first = sorted(found, key=lambda code: code != "en")[:most]
        return [code for code in found if code in first]


def make_plan(
    model: str,
    languages: Sequence[str] | None,
    dtype: str | None,
    quick: bool,
    data: str,
    preset: str | None,
    sizes: Mapping[str, Mapping[str, Any]] | None,
    seed: int,
    folder: Path | None = None,
) -> Plan:
    """Settle what is left open: by the folder's own settings, else the preset's languages and dtype, and the data
    sets that can be had."""
    if data not in ("auto", "bundled", "hub"):
        raise ValueError(f"data={data!r} is neither 'auto' nor 'bundled' nor 'hub'")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    known = PRESETS[preset] if preset else preset_of(model)
    begun = {} if folder is None else _settings_in(folder)
    of_hub = data == "hub" or (data == "auto" and known is not None and known.hub is not None)
    sources = dict(_BUNDLED)
    if data == "auto" and begun:
        sources = begun["sources"]
    elif of_hub:
        sources = reachable(strict=data == "hub")
    size = "quick" if quick else "paper" if sources["texts"] == WIKIPEDIA else "full"
    chosen = tuple(languages or (known.languages if known else ("en", "fr", "es", "de", "it")))
    if quick and languages is None:
        readable = _bundled_languages()
        chosen = tuple(code for code in chosen if code in readable)[:4]
    return Plan(
        model=model,
        known=known,
        languages=chosen,
        dtype=dtype or begun.get("dtype") or _fast_dtype(known),
        size=size,
        sizes=_sizes(size, sources, sizes or {}),
        sources=sources,
        wanted=tuple(
            f"{_FETCH[kind]} Bundled {kind} stand in for it."
            for kind, source in sources.items()
            if of_hub and source == "bundled"
        ),
        seed=seed,
    )


def _settings_in(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _sizes(
    size: str, sources: Mapping[str, str], changed: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    found = {name: dict(own) for name, own in SIZES[size].items()}
    if sources["summaries"] == "bundled":  # there are fewer than in XL-Sum
        most = SIZES["full"][AUTHORS]["summaries"]
        found[AUTHORS]["summaries"] = min(found[AUTHORS]["summaries"], most)
    for name, own in found.items():
        own.update(changed.get(name, {}))
    return found


def _fast_dtype(known: ModelPreset | None) -> str:
    """The preset's; float32 for a small model on a processor that has no arithmetic for bfloat16."""
    if known is None:
        return "bfloat16"
    emulated = local_device() == "cpu" and not has_bfloat16_arithmetic()
    return "float32" if emulated and known.small else known.dtype


_BUNDLED = {"texts": "bundled", "summaries": "bundled", "questions": "bundled"}


# What is wanted where a data set cannot be had.
_FETCH = {
    kind: f"{kind}: the data set {name} from the hub, for every language. {how}"
    for kind, name, how in (
        (
            "texts",
            WIKIPEDIA,
            "It is read piece by piece and not kept, so that the hub must be reachable during the run (and "
            "HF_HUB_OFFLINE not be set).",
        ),
        (
            "summaries",
            XLSUM,
            "Once, where the hub can be reached: `python -c 'import datasets; "
            f'datasets.load_dataset("{XLSUM}", "english", split="test", revision="refs/convert/parquet")\'`.',
        ),
        (
            "questions",
            "google/xquad",
            "Once, where the hub can be reached: `python -c 'import datasets; "
            'datasets.load_dataset("google/xquad", "xquad.en", split="validation")\'`.',
        ),
    )
}


def reachable(strict: bool = False) -> dict[str, str]:
    """Which of the paper's data sets can be had; the bundled texts for the rest.

    Raises:
        CorpusError: ``strict``, and one cannot be had.
    """

    def wikipedia() -> None:
        import datasets

        datasets.load_dataset(WIKIPEDIA, "20231101.en", split="train", streaming=True)

    trials: dict[str, tuple[str, Callable[[], Any]]] = {
        "texts": (WIKIPEDIA, wikipedia),
        "summaries": (XLSUM, lambda: summary_tasks(["en"], 1, XLSUM)),
        "questions": (XQUAD, lambda: load_questions(XQUAD, ["en"])),
    }
    sources = dict(_BUNDLED)
    for kind, (name, trial) in trials.items():
        try:
            trial()
            sources[kind] = name
        except Exception as error:  # datasets raises many kinds for a wrong name and for no network
            if strict:
                raise CorpusError(
                    f"cannot be had, which data='hub' asks for: {_FETCH[kind]} Or take data='auto'"
                ) from error
    return sources


def refuse_other(path: Path, about: Mapping[str, Any]) -> None:
    """
    Raises:
        ArtifactError: the file is there and says otherwise; each difference is named.
    """
    if path.is_file():
        found = differences(json.loads(path.read_text(encoding="utf-8")), about)
        if found:
            raise ArtifactError(
                f"{path.parent} holds a run with other settings: {'; '.join(found)}. "
                "Give another --out, or the same settings"
            )


def keep(path: Path, about: Mapping[str, Any]) -> None:
    """Write what a folder is about; as ``refuse_other`` if it is about something else already."""
    refuse_other(path, about)
    write_atomically(path, json.dumps(about, indent=2).encode())


def differences(there: Any, asked: Any, name: str = "") -> list[str]:
    """
    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a.b is 1 there, 3 asked']
    """
    if isinstance(there, Mapping) and isinstance(asked, Mapping):
        found = []
        for key in dict.fromkeys([*there, *asked]):
            inside = f"{name}.{key}" if name else key
            found += differences(there.get(key), asked.get(key), inside)
        return found
    return [] if there == asked else [f"{name} is {there} there, {asked} asked"]
