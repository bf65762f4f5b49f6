"""Texts coloured by what a head does at each token."""

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from lahis_tl.heads import HeadLike
from lahis_tl.per_token import TokenEffects

_HELPS, _HURTS = "94,60,153", "230,97,1"  # ends of the diverging scale


@dataclass(frozen=True)
class ColoredText:
    """Texts as HTML that a notebook shows; ``html`` to put elsewhere."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def token_text(effects: TokenEffects, head: HeadLike, language: str | None = None) -> ColoredText:
    """Each text with its tokens coloured by the head's effect: violet helps, orange hurts.

    >>> import torch
    >>> effects = TokenEffects({"fr": [["Le", " chat"]]}, {"fr": [torch.tensor([[[0.2, -0.1]]])]})
    >>> "Le" in token_text(effects, "L0H0").html
    True

    Args:
        language: only its texts.

    Raises:
        IndexError: the head is outside the grid.
        KeyError: no texts in ``language``.
    """
    layer, number = effects.grid.check(head)
    codes = list(effects.effects) if language is None else [language]
    values = {code: [row[layer, number].tolist() for row in effects[code]] for code in codes}
    most = (
        max((abs(v) for rows in values.values() for row in rows for v in row), default=0.0) or 1.0
    )
    label = effects.grid.check(head).label
    parts = [
        f"<p><b>{label}</b>: effect at each token, violet helps, orange hurts; darkest {most:.2g} nats</p>"
    ]
    for code in codes:
        for tokens, row in zip(effects.tokens[code], values[code], strict=True):
            spans = "".join(_span(token, v, most) for token, v in zip(tokens, row, strict=True))
            parts.append(
                f'<p dir="{_direction(tokens)}" style="line-height:1.9">'
                f'<b dir="ltr">{html.escape(code)}</b> {spans}</p>'
            )
    return ColoredText("".join(parts))


def _direction(tokens: Sequence[str]) -> str:
    """By most letters, not by the first: a text may begin with a special token in Latin letters."""
    kinds = [unicodedata.bidirectional(letter) for letter in "".join(tokens) if letter.isalpha()]
    return "rtl" if 2 * sum(kind in ("R", "AL") for kind in kinds) > len(kinds) else "ltr"


def _span(token: str, value: float, most: float) -> str:
    ground = f"rgba({_HELPS if value > 0 else _HURTS},{0.75 * abs(value) / most:.2f})"
    shown = html.escape(token.replace("\n", "⏎"))
    return (
        f'<span title="{value:.3g}" style="background:{ground};white-space:pre-wrap">{shown}</span>'
    )
