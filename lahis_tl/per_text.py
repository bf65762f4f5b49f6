"""What gradients, curvatures and exact effects have in common: one number a text, layer and head."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import ClassVar, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lahis_tl.artifacts import Artifact, Card
from lahis_tl.heads import HeadGrid

P = TypeVar("P", bound="PerTextHeads")


class PerTextHeads(Artifact):
    """A result with values [text, layer, head] for each language; subclasses are dataclasses.

    Every field that maps languages to tensors is checked, cut and saved alike; ``main`` names the one
    that the result is about.
    """

    kind: ClassVar[str] = "per_text_heads"
    main: ClassVar[str]

    @property
    @abstractmethod
    def _values(self) -> Mapping[str, Float[Tensor, "_text layer head"]]: ...

    def __post_init__(self) -> None:
        grids = {language: tuple(v.shape[1:]) for language, v in self._values.items()}
        if len(set(grids.values())) != 1:
            raise ValueError(f"all languages need one grid of heads, but have {grids}")
        for part, mapping in self.parts.items():
            for language, values in self._values.items():
                if language not in mapping or len(mapping[language]) != len(values):
                    found = len(mapping[language]) if language in mapping else "no"
                    raise ValueError(
                        f"{language!r}: {len(values)} {self.main} and {found} {part} do not match"
                    )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{code}: {len(v)}" for code, v in self._values.items())
        return f"{type(self).__name__}({sizes} texts; {self.grid})"

    def __getitem__(self, language: str) -> Float[Tensor, "text layer head"]:
        if language not in self._values:
            raise KeyError(
                f"no {self.main} for {language!r}; there are {', '.join(self.languages)}"
            )
        return self._values[language]

    @property
    def languages(self) -> list[str]:
        return list(self._values)

    @property
    def grid(self) -> HeadGrid:
        return HeadGrid(*next(iter(self._values.values())).shape[1:])

    @property
    def n_texts(self) -> dict[str, int]:
        return {language: len(values) for language, values in self._values.items()}

    @property
    def origin(self) -> Card:
        """What a result made of this one says of where it came from."""
        return {k: self.card[k] for k in ("model", "corpus", "settings") if k in self.card}

    def take(self: P, rows: Sequence[int] | Mapping[str, Sequence[int]]) -> P:
        """Only these texts, by row: the same rows of every language, or rows by language.

        Raises:
            IndexError: there is no such row.
        """
        chosen = rows if isinstance(rows, Mapping) else dict.fromkeys(self.languages, rows)
        taken = self.with_parts(
            {
                part: {code: values[list(chosen[code])] for code, values in mapping.items()}
                for part, mapping in self.parts.items()
            }
        )
        if len({tuple(chosen[code]) for code in self.languages}) == 1:
            return taken
        corpus = {**self.card.get("corpus", {}), "parallel": False}  # rows no longer match
        return replace(taken, card={**self.card, "corpus": corpus})  # type: ignore[type-var]

    def select(self: P, languages: Sequence[str]) -> P:
        """Only these languages, in this order."""
        missing = [code for code in languages if code not in self._values]
        if missing:
            raise KeyError(
                f"no {self.main} for {', '.join(missing)}; there are {', '.join(self.languages)}"
            )
        return self.with_parts(
            {
                part: {code: mapping[code] for code in languages}
                for part, mapping in self.parts.items()
            }
        )

    def with_parts(self: P, parts: Mapping[str, Mapping[str, Tensor]]) -> P:
        """The same result with other values, see ``parts``."""
        return replace(self, **parts)  # type: ignore[type-var]

    @classmethod
    def concatenate(cls: type[P], parts: Sequence[P]) -> P:
        """The texts of several results one after another; the card is the first one's."""
        first = parts[0]
        joined = {
            name: {code: torch.cat([part.parts[name][code] for part in parts]) for code in mapping}
            for name, mapping in first.parts.items()
        }
        return first.with_parts(joined)

    @classmethod
    def side_by_side(cls: type[P], results: Sequence[P]) -> P:
        """Results of different languages as one; the card is the first one's."""
        joined: dict[str, dict[str, Tensor]] = {name: {} for name in results[0].parts}
        for result in results:
            for name, mapping in result.parts.items():
                joined[name] |= mapping
        return results[0].with_parts(joined)

    def _summary(self) -> pd.DataFrame:
        """How many texts there are of each language, and their mean loss."""
        losses = self.parts.get("losses", {})
        means = {code: float(losses[code].mean()) for code in self.languages if code in losses}
        rows = {"language": self.languages, "texts": list(self.n_texts.values())}
        known = {"mean loss (nats per token)": list(means.values())} if means else {}
        return pd.DataFrame({**rows, **known})

    def to_dataframe(self) -> pd.DataFrame:
        """One row a text and head: language, text, layer, head, value."""
        frames = []
        for language, values in self._values.items():
            index = pd.MultiIndex.from_product(
                [range(size) for size in values.shape], names=["text", "layer", "head"]
            )
            name = self.main.removesuffix("s")
            frame = pd.DataFrame({name: values.flatten().numpy()}, index).reset_index()
            frame.insert(0, "language", language)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    @property
    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The fields that map languages to tensors, by name; those that were not computed are left out."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {
            name: value
            for name, value in found.items()
            if isinstance(value, Mapping)
            and value
            and all(isinstance(v, Tensor) for v in value.values())
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}/{language}": tensor
            for part, mapping in self.parts.items()
            for language, tensor in mapping.items()
        }

    def _content(self) -> Card:
        plain = {
            f.name: getattr(self, f.name)
            for f in fields(self)  # type: ignore[arg-type]
            if f.name != "card" and f.name not in self.parts and getattr(self, f.name)
        }
        return {"languages": self.languages, "parts": list(self.parts), **plain}

    @classmethod
    def _from_tensors(cls: type[P], tensors: dict[str, Tensor], card: Card) -> P:
        content = dict(card["content"])
        languages = content.pop("languages")
        names = content.pop("parts", ["gradients", "losses", "n_tokens"])
        parts = {name: {code: tensors[f"{name}/{code}"] for code in languages} for name in names}
        return cls(**parts, **content, card=card)  # type: ignore[call-arg]
