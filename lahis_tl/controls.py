"""Random head sets to hold a result against: like the tested set in all but what it was chosen for."""

import random
from collections import Counter
from collections.abc import Iterable

from lahis_tl.heads import Head, HeadSet
from lahis_tl.scores import HeadScores

MATCHES = ("layer", "nearest", "network")


def matched_random_heads(
    heads: HeadSet,
    draws: int = 100,
    *,
    match: str = "layer",
    exclude: Iterable[Head] = (),
    seed: int = 0,
) -> list[HeadSet]:
    """Distinct random sets of as many heads, none of them in ``heads``.

    >>> from lahis_tl.heads import HeadGrid
    >>> heads = HeadSet(HeadGrid(2, 4), ["L0H0", "L1H1", "L1H2"])
    >>> control = matched_random_heads(heads, draws=1)[0]
    >>> [sum(h.layer == layer for h in control) for layer in (0, 1)]
    [1, 2]

    Args:
        draws: how many sets; fewer come back where there are no more. The smallest p-value that n sets
            allow is 1 / (n + 1). Since none overlaps ``heads``, p-values of a set that is itself random are
            somewhat too small: for 11 of 270 heads some 8 % of them fall below 0.05.
        match: ``"layer"``, as many in every layer; ``"nearest"``, the same but that where a layer has too
            few others left, the nearest layers give theirs; ``"network"``, anywhere.
        exclude: other heads that no set may hold, as the general heads.
        seed: of the draws.

    Raises:
        ValueError: there are not enough other heads, unknown ``match``, or no draws.
    """
    if match not in MATCHES:
        raise ValueError(f"match {match!r} is not one of {', '.join(MATCHES)}")
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one random set is needed")
    if not len(heads):
        raise ValueError("there are no heads to match; the set is empty")
    grid = heads.grid
    taken = set(heads) | {grid.check(head) for head in exclude}
    free = {
        layer: [Head(layer, head) for head in range(grid.n_heads) if Head(layer, head) not in taken]
        for layer in range(grid.n_layers)
    }
    wanted = Counter(head.layer for head in heads)
    _check_enough(wanted, free, match)
    generator = random.Random(seed)
    found: dict[frozenset[Head], HeadSet] = {}
    for _ in range(50 * draws):  # enough to meet nearly all where there are few
        drawn = _draw(wanted, free, match, generator)
        found.setdefault(frozenset(drawn), HeadSet(grid, drawn))
        if len(found) == draws:
            break
    return list(found.values())


def score_matched_heads(scores: HeadScores, heads: HeadSet, language: str) -> dict[str, HeadSet]:
    """The best heads of every other language, as many as ``heads`` has and none of them.

    They matter as much, but to another language; what they do to ``language`` is what importance alone does.

    >>> controls = score_matched_heads(scores, heads.specific["fr"], "fr")     # doctest: +SKIP

    Raises:
        KeyError: no scores for ``language``.
    """
    scores[language]
    own = set(heads)
    ranked = {code: scores.top(scores.grid.size, code) for code in scores.languages}
    return {
        code: HeadSet(heads.grid, [head for head in ranking if head not in own][: len(heads)])
        for code, ranking in ranked.items()
        if code != language
    }


def _check_enough(wanted: Counter[int], free: dict[int, list[Head]], match: str) -> None:
    short = [layer for layer, n in wanted.items() if len(free[layer]) < n]
    if match == "layer" and short:
        layer = short[0]
        raise ValueError(
            f"layer {layer} has {wanted[layer]} heads of the set and only {len(free[layer])} others to draw "
            'from; use match="nearest" (nearest layers help out) or match="network"'
        )
    total = sum(map(len, free.values()))
    if total < wanted.total():
        raise ValueError(f"{wanted.total()} heads cannot be matched: only {total} others are left")


def _draw(
    wanted: Counter[int], free: dict[int, list[Head]], match: str, generator: random.Random
) -> list[Head]:
    if match == "network":
        everywhere = [head for heads in free.values() for head in heads]
        return generator.sample(everywhere, wanted.total())
    chosen: list[Head] = []
    missing: list[int] = []
    for layer, n in sorted(wanted.items()):
        here = min(n, len(free[layer]))
        chosen += generator.sample(free[layer], here)
        missing += [layer] * (n - here)
    for layer in missing:
        left = [head for heads in free.values() for head in heads if head not in chosen]
        nearest = min(abs(head.layer - layer) for head in left)
        chosen.append(generator.choice([h for h in left if abs(h.layer - layer) == nearest]))
    return chosen
