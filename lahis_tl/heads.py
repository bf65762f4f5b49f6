"""The vocabulary of the package: a head, the grid of a model's heads, an ordered set of heads."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from jaxtyping import Float
from torch import Tensor

_LABEL = re.compile(r"^L(\d+)H(\d+)$")


class Head(NamedTuple):
    """One query head, by layer and index, both from 0.

    >>> Head(3, 7)
    L3H7
    >>> Head.parse("L3H7") == (3, 7)
    True
    """

    layer: int
    head: int

    @property
    def label(self) -> str:
        return f"L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        return self.label

    @classmethod
    def parse(cls, head: "HeadLike") -> "Head":
        """A head from a label (``"L3H7"``) or a (layer, head) pair.

        Raises:
            ValueError: the label has another form.
        """
        if isinstance(head, str):
            match = _LABEL.match(head)
            if match is None:
                raise ValueError(
                    f"{head!r} is not a head label; write layer and head as in 'L3H7'."
                )
            return cls(int(match[1]), int(match[2]))
        layer, index = head
        return cls(int(layer), int(index))


HeadLike = Head | str | tuple[int, int]


@dataclass(frozen=True)
class HeadGrid:
    """The layers × query heads of a model.

    >>> grid = HeadGrid(n_layers=2, n_heads=3)
    >>> grid.size, grid.shape
    (6, (2, 3))
    >>> grid.head(4)
    L1H1
    """

    n_layers: int
    n_heads: int

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.n_heads < 1:
            raise ValueError(
                f"a grid needs at least one layer and one head, not {self.n_layers} × {self.n_heads}"
            )

    def __str__(self) -> str:
        return f"{self.n_layers} layers × {self.n_heads} heads"

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_layers, self.n_heads

    @property
    def size(self) -> int:
        return self.n_layers * self.n_heads

    @property
    def labels(self) -> list[str]:
        """Labels of all heads, layer-major."""
        return [self.head(i).label for i in range(self.size)]

    def head(self, flat_index: int) -> Head:
        """The head at a layer-major flat index.

        Raises:
            IndexError: the index lies outside the grid.
        """
        if not 0 <= flat_index < self.size:
            raise IndexError(f"flat index {flat_index} is outside the model's {self}")
        return Head(*divmod(flat_index, self.n_heads))

    def flat_index(self, head: HeadLike) -> int:
        layer, index = self.check(head)
        return layer * self.n_heads + index

    def check(self, head: HeadLike) -> Head:
        """The head itself, if the model has it.

        Raises:
            IndexError: it does not.
        """
        parsed = Head.parse(head)
        if not (0 <= parsed.layer < self.n_layers and 0 <= parsed.head < self.n_heads):
            raise IndexError(
                f"head {parsed.label} is outside the model's {self} (both count from 0)"
            )
        return parsed


class HeadSet(Sequence[Head]):
    """Heads of one model in a meaningful order (best first), without repetition.

    >>> heads = HeadSet(HeadGrid(2, 3), ["L1H2", (0, 1)])
    >>> heads
    HeadSet([L1H2, L0H1], 2 layers × 3 heads)
    >>> heads[0].layer, Head(0, 1) in heads, len(heads[:1])
    (1, True, 1)

    Raises:
        IndexError: a head is outside the grid.
        ValueError: a head occurs twice, or ``heads`` is a set of another grid.
    """

    def __init__(self, grid: HeadGrid, heads: Iterable[HeadLike]):
        known = getattr(heads, "grid", grid)
        if known != grid:
            raise ValueError(f"these heads belong to a model of {known}, not of {grid}")
        self.grid = grid
        self._heads = tuple(grid.check(head) for head in heads)
        if len(set(self._heads)) < len(self._heads):
            twice = sorted({h.label for h in self._heads if self._heads.count(h) > 1})
            raise ValueError(f"heads occur more than once: {', '.join(twice)}")

    def __len__(self) -> int:
        return len(self._heads)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return HeadSet(self.grid, self._heads[index])
        return self._heads[index]

    def __iter__(self) -> Iterator[Head]:
        return iter(self._heads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadSet) and (self.grid, self._heads) == (
            other.grid,
            other._heads,
        )

    def __hash__(self) -> int:
        return hash((self.grid, self._heads))

    def __repr__(self) -> str:
        return f"HeadSet({list(self._heads)}, {self.grid})"

    @property
    def labels(self) -> list[str]:
        return [head.label for head in self._heads]

    def flat_indices(self) -> list[int]:
        return [self.grid.flat_index(head) for head in self._heads]

    @classmethod
    def from_flat(cls, grid: HeadGrid, indices: Iterable[int]) -> "HeadSet":
        """The heads of these places in the grid, layer by layer; what ``flat_indices`` gave."""
        return cls(grid, (grid.head(int(index)) for index in indices))


def head_table(
    grid: HeadGrid, languages: Sequence[str], columns: Mapping[str, Tensor]
) -> pd.DataFrame:
    """One row a language and head: language, layer, head, label, and the columns [language, layer, head]."""
    index = pd.MultiIndex.from_product(
        [list(languages), range(grid.n_layers), range(grid.n_heads)],
        names=["language", "layer", "head"],
    )
    values = {name: column.flatten().numpy() for name, column in columns.items()}
    table = pd.DataFrame(values, index).reset_index()
    table.insert(3, "label", grid.labels * len(languages))
    return table


def top_heads(values: Float[Tensor, "layer head"], k: int) -> HeadSet:
    """The ``k`` heads of largest value, best first; of equal ones the earlier in the grid.

    Raises:
        ValueError: ``k`` is negative or exceeds the number of heads.
    """
    grid = HeadGrid(*values.shape)
    if not 0 <= k <= grid.size:
        raise ValueError(f"k={k} must lie between 0 and the model's {grid.size} heads")
    order = values.flatten().argsort(descending=True, stable=True)
    return HeadSet(grid, (grid.head(i) for i in order[:k].tolist()))
