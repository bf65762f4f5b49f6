"""An extension of griffe: what the reference makes of docstrings."""

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
_DIRECTIVE = re.compile(r"\s*# doctest: \+\w+")
_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(Extension):
    """Examples become code blocks; parameters that are explained together get a line each."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = _EXAMPLE.sub(_fenced, obj.docstring.value)
            obj.docstring.value = _TOGETHER.sub(_apart, text)


def _fenced(example: re.Match[str]) -> str:
    """Without the directives that are meant for doctest alone."""
    return f"```pycon\n{_DIRECTIVE.sub('', example[0])}\n```"


def _apart(entry: re.Match[str]) -> str:
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
