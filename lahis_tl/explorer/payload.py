"""Results as the compact data of an explorer page: JSON that names arrays in one compressed block."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lahis_tl.artifacts import Artifact
from lahis_tl.effects import HeadEffects
from lahis_tl.heads import HeadGrid
from lahis_tl.patterns import AttentionPatterns
from lahis_tl.per_text import PerTextHeads
from lahis_tl.per_token import TokenEffects
from lahis_tl.scores import HeadScores, score
from lahis_tl.selection import LanguageHeads
from lahis_tl.statistics import FEWEST_TEXTS, ScoreCertainty, bootstrap_means, score_certainty
from lahis_tl.verified import VerifiedScores

# Attention is stored as its square root in so many steps, so to within 7 points of 100 and closer for small weights;
# finer steps would make the page larger by half.
_STEPS = 15
_SHARES = ("selection", "verified")  # between 0 and 1
_EFFECT_STEPS = 31  # to each side of 0


@dataclass(frozen=True)
class ScoreMap:
    """What the page shows of one score: a number for each language and head, with what is known about it.

    Attributes:
        certain: ``"lower"``, ``"upper"``, ``"selection"`` and the like → [language, layer, head].
        exact: whether these are effects of removal, not estimates.
        top_k, level: of ``selection`` and of ``lower`` and ``upper``.
        derived: whether what is certain was computed for the page, so that what is given goes before it.
    """

    name: str
    unit: str
    sign: str
    languages: Sequence[str]
    values: Float[Tensor, "language layer head"]
    n_texts: Sequence[int] = ()
    certain: Mapping[str, Tensor] = field(default_factory=dict)
    exact: bool = False
    top_k: int | None = None
    level: float = 0.95
    derived: bool = False


@singledispatch
def maps_of(result: Any) -> list[ScoreMap]:
    """The score maps that a result holds.

    Raises:
        ValueError: the explorer does not know such a result.
    """
    kind = getattr(result, "kind", type(result).__name__)
    raise ValueError(
        f"the explorer cannot show {kind}; it shows scores, their certainty, gradients, exact effects, language "
        "heads, attention patterns and token effects"
    )


@maps_of.register
def _(result: HeadScores) -> list[ScoreMap]:
    return [
        ScoreMap(
            result.method,
            result.unit,
            result.sign,
            result.languages,
            result.values,
            result.n_texts,
        )
    ]


@maps_of.register
def _(result: VerifiedScores) -> list[ScoreMap]:
    (plain,) = maps_of.dispatch(HeadScores)(result)
    assert result.verified is not None
    return [replace(plain, certain={"verified": result.verified.float()})]


@maps_of.register
def _(result: ScoreCertainty) -> list[ScoreMap]:
    certain = {name: getattr(result, name) for name in ("lower", "upper", "selection")}
    return [
        ScoreMap(
            result.method,
            result.unit,
            "",
            result.languages,
            result.values,
            certain=certain,
            top_k=result.top_k,
            level=result.level,
        )
    ]


@maps_of.register
def _(result: PerTextHeads) -> list[ScoreMap]:
    (known,) = maps_of(score(result))
    if min(result.n_texts.values()) < FEWEST_TEXTS:
        return [known]
    (certain,) = maps_of(score_certainty(result, top_k=min(20, result.grid.size)))
    return [replace(certain, sign=known.sign, n_texts=known.n_texts, derived=True)]


@maps_of.register
def _(result: HeadEffects) -> list[ScoreMap]:
    """Also where only some heads were ablated: the others are NaN."""
    values, bounds = [], []
    for effects in result.effects.values():
        values.append(effects.mean(0))
        draws = bootstrap_means(effects.nan_to_num(), 500)
        ends = draws.quantile(torch.tensor([0.025, 0.975]), 0)
        bounds.append(torch.where(values[-1].isnan(), torch.nan, ends))
    enough = min(result.n_texts.values()) >= FEWEST_TEXTS
    ends_of: dict[str, Tensor] = dict(
        zip(("lower", "upper"), torch.stack(bounds).unbind(1), strict=True)
    )
    return [
        ScoreMap(
            f"exact effect ({result.ablation} ablation)",
            "nats per token",
            "positive: removal raises the loss",
            result.languages,
            torch.stack(values),
            list(result.n_texts.values()),
            ends_of if enough else {},
            exact=True,
        )
    ]


@maps_of.register(LanguageHeads)
@maps_of.register(AttentionPatterns)
@maps_of.register(TokenEffects)
def _(result: Artifact) -> list[ScoreMap]:
    return []


def shows(result: Any) -> bool:
    """Whether a page can hold such a result."""
    return maps_of.dispatch(type(result)) is not maps_of.dispatch(object)


class Payload:
    """The page's data: ``describe`` what is in it, ``encode`` it for a script element."""

    def __init__(self, results: Sequence[Any], title: str | None):
        self._blocks: list[bytes] = []
        self._size = 0
        self.grid = _common_grid(results)
        self.maps = _merged([found for result in results for found in maps_of(result)])
        self.rules = [r for r in results if isinstance(r, LanguageHeads)]
        if not self.maps and not self.rules:
            raise ValueError(
                "there is nothing to map: give scores, gradients, effects or language heads"
            )
        self.model = _common_model(results)
        self.title = title or f"Attention heads of {Path(self.model).name or 'a model'}"
        self.samples = _samples(results)

    def describe(self) -> dict[str, Any]:
        """All but the numbers; arrays by where they lie in the block."""
        return {
            "title": self.title,
            "model": self.model,
            "grid": list(self.grid.shape),
            "maps": [self._map(found) for found in self.maps],
            "rules": [
                self._rule(rule, name)
                for rule, name in zip(self.rules, _rule_names(self.rules), strict=True)
            ],
            "samples": [
                {
                    "language": sample["language"],
                    "tokens": sample["tokens"],
                    "pattern": self._pattern(sample.get("pattern")),
                    "effects": self._scaled_rows(sample.get("effects")),
                }
                for sample in self.samples
            ],
        }

    def encode(self) -> tuple[str, str]:
        """The description as JSON that no HTML parser takes for markup, and the block in base64."""
        about = json.dumps(
            self.describe(), ensure_ascii=True, separators=(",", ":"), allow_nan=False
        )
        for sign in "<>&":
            about = about.replace(sign, f"\\u{ord(sign):04x}")
        block = gzip.compress(b"".join(self._blocks), 9, mtime=0)
        return about, base64.b64encode(block).decode("ascii")

    def _add(self, values: np.ndarray, **more: Any) -> dict[str, Any]:
        kind = {"float32": "f32", "float16": "f16", "uint8": "u8", "int8": "i8"}[str(values.dtype)]
        padding = -self._size % 4  # numbers of four bytes lie at multiples of four
        content = b"\0" * padding + np.ascontiguousarray(values).tobytes()
        place = self._size + padding
        self._blocks.append(content)
        self._size += len(content)
        return {"at": place, "n": values.size, "as": kind, **more}

    def _numbers(self, values: Tensor) -> dict[str, Any]:
        """float16 over the greatest of them, so that small scores keep their digits."""
        known = values[values.isfinite()]
        scale = float(known.abs().max()) if len(known) else 1.0
        scale = scale or 1.0
        return self._add((values.double() / scale).numpy().astype(np.float16), scale=scale)

    def _shares(self, values: Tensor) -> dict[str, Any]:
        return self._add((values * 255).round().to(torch.uint8).numpy(), scale=1 / 255)

    def _map(self, found: ScoreMap) -> dict[str, Any]:
        return {
            "name": found.name,
            "unit": found.unit,
            "sign": found.sign,
            "languages": list(found.languages),
            "texts": list(found.n_texts),
            "exact": found.exact,
            "topK": found.top_k,
            "level": round(100 * found.level, 2),
            # Whole, so that ranks are those of the scores themselves.
            "values": self._add(found.values.float().numpy()),
            "certain": {
                name: self._shares(values) if name in _SHARES else self._numbers(values)
                for name, values in found.certain.items()
            },
        }

    def _rule(self, rule: LanguageHeads, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "specific": {code: heads.flat_indices() for code, heads in rule.specific.items()},
            "general": rule.general.flat_indices(),
            "kept": {code: heads.flat_indices() for code, heads in rule.kept.items()},
        }

    def _pattern(self, pattern: Tensor | None) -> dict[str, Any] | None:
        """The lower triangle; what a row leaves above its diagonal is 0."""
        if pattern is None:
            return None
        rows, columns = torch.tril_indices(*pattern.shape[2:])
        weights = pattern[..., rows, columns].float().clamp(0, 1).sqrt()
        steps = (weights * _STEPS).round().to(torch.uint8)
        return self._add(steps.numpy(), steps=_STEPS)

    def _scaled_rows(self, effects: Tensor | None) -> dict[str, Any] | None:
        """Steps of each head's greatest effect; the scales follow as numbers."""
        if effects is None:
            return None
        rows = effects.flatten(0, 1)
        scales = rows.abs().amax(1)
        steps = (rows / scales.clamp_min(1e-30)[:, None] * _EFFECT_STEPS).round().to(torch.int8)
        return {
            "steps": self._add(steps.numpy(), steps=_EFFECT_STEPS),
            "scales": self._numbers(scales),
        }


def _merged(maps: Sequence[ScoreMap]) -> list[ScoreMap]:
    """One map a name: scores and their certainty go together if they are the same numbers.

    Raises:
        ValueError: two different maps have one name.
    """
    found: dict[str, ScoreMap] = {}
    for new in maps:
        old = found.setdefault(new.name, new)
        if old is new:
            continue
        same = tuple(old.languages) == tuple(new.languages) and torch.allclose(
            old.values, new.values, rtol=1e-4, atol=1e-8, equal_nan=True
        )
        if not same:
            raise ValueError(
                f"two results hold different {new.name!r} scores; show them on two pages, or select one"
            )
        first, second = sorted((old, new), key=lambda m: (not m.certain, m.derived))
        found[new.name] = replace(
            first,
            sign=old.sign or new.sign,
            n_texts=old.n_texts or new.n_texts,
            certain={**second.certain, **first.certain},
            top_k=first.top_k or second.top_k,
            level=first.level if first.top_k else second.level,
        )
    return list(found.values())


def _rule_names(rules: Sequence[LanguageHeads]) -> list[str]:
    """Rule, options and score; of one name the second is numbered, so that a link finds it."""
    names: list[str] = []
    for rule in rules:
        options = " ".join(f"{key} {value}" for key, value in rule.options.items())
        name = (
            f"{rule.rule} ({options}), {rule.method}" if options else f"{rule.rule}, {rule.method}"
        )
        number = sum(known.split(" #")[0] == name for known in names)
        names.append(f"{name} #{number + 1}" if number else name)
    return names


def _common_grid(results: Sequence[Any]) -> HeadGrid:
    grids = {result.grid: result for result in results if hasattr(result, "grid")}
    if len(grids) > 1:
        found = " and ".join(f"{getattr(r, 'kind', '?')} of {grid}" for grid, r in grids.items())
        raise ValueError(f"all results on a page are about one model, but there are {found}")
    if not grids:
        raise ValueError("there is nothing to show: give at least one result")
    return next(iter(grids))


def _common_model(results: Sequence[Any]) -> str:
    """The model's name.

    Raises:
        ValueError: the results are about models of different weights.
    """
    cards = [result.card.get("model", {}) for result in results]
    for key in ("checkpoint_sha256", "weights_sha256"):
        names = {card[key]: card.get("name", "") for card in cards if card.get(key)}
        if len(names) > 1:
            raise ValueError(
                f"the results are about different models, {' and '.join(names.values())}: their {key} differ"
            )
    return next((str(card["name"]) for card in cards if card.get("name")), "")


def _samples(results: Sequence[Any]) -> list[dict[str, Any]]:
    """Texts with their patterns and token effects; those of the same tokens go together."""
    found: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for name, kind in (("pattern", AttentionPatterns), ("effects", TokenEffects)):
        for result in results:
            if not isinstance(result, kind):
                continue
            for code, texts in result.tokens.items():
                for tokens, values in zip(texts, result[code], strict=True):
                    sample = found.setdefault(
                        (code, tuple(tokens)), {"language": code, "tokens": list(tokens)}
                    )
                    sample[name] = values
    return list(found.values())
