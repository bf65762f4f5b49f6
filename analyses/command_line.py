"""The command line of an experiment, read from its ``run``: every setting that can be written in one word."""

import argparse
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from analyses.result import Result
from lahis_tl.processes import is_main, join

_CALLED = {"n": "--texts"}
_HELP = {
    "model": "hub name, folder, .gguf file",
    "dtype": "float32 or bfloat16",
    "languages": "comma-separated codes, as in en,fr",
    "n": "texts a language",
    "max_tokens": "longer texts are cut there",
    "draws": "random head sets",
    "gradients": "folder of gradients that experiments share",
    "checkpoint": "folder for finished parts, from which an interrupted run goes on",
}
# Options of the rules, which experiments hand on.
_OF_RULES: dict[str, type] = {
    "quantile": float,
    "min_languages": int,
    "fraction": float,
    "rounding": str,
    "fdr": float,
}


def run_from_command_line(
    run: Callable[..., Result], description: str | None, quick: Mapping[str, Any]
) -> None:
    """``python -m analyses.NAME``: an option for each setting of ``run``, ``--out``, and ``--quick``.

    Args:
        quick: settings of a small run that shows the whole way.
    """
    name = Path(run.__code__.co_filename).stem
    given = vars(_parser(run, name, description, quick).parse_args())
    given = {setting: value for setting, value in given.items() if value is not None}
    out, small = given.pop("out"), given.pop("quick")
    join()
    checkpoint = inspect.signature(run).parameters.get("checkpoint")
    parts = {"checkpoint": out / "parts"} if checkpoint and checkpoint.default else {}
    result = run(**{**parts, **(quick if small else {}), **given})
    written = result.save(out)
    if is_main():
        print(f"{result}\n\nWritten to {written}")


def _parser(
    run: Callable[..., Result], name: str, description: str | None, quick: Mapping[str, Any]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m analyses.{name}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    for setting, parameter in inspect.signature(run).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            for option, kind in _OF_RULES.items():
                flag = f"--{option.replace('_', '-')}"
                parser.add_argument(flag, type=kind, help="of the rule that has it")
            continue
        flag = _CALLED.get(setting, f"--{setting.replace('_', '-')}")
        about = [_HELP.get(setting, "")]
        if parameter.default is not None and setting != "checkpoint":
            about.append(f"default: {_written(parameter.default)}")
        shown = "; ".join(filter(None, about))
        if parameter.annotation is bool:
            switch = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=switch, default=None, help=shown)
        elif (read := _reader(parameter.annotation)) is not None:
            parser.add_argument(flag, dest=setting, type=read, metavar="…", help=shown)
    parser.add_argument("--quick", action="store_true", help=f"a small run: {dict(quick)}")
    out = Path("out") / name
    parser.add_argument("--out", type=Path, default=out, help=f"folder for the results ({out})")
    return parser


def _written(value: Any) -> str:
    several = isinstance(value, tuple | list)
    return ",".join(map(str, value)) or "none" if several else str(value)


def _reader(annotation: Any) -> Callable[[str], Any] | None:
    """How a setting is read from one word, commas between several; None where it cannot be."""
    if annotation in (str, int, float, Path):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next(filter(None, map(_reader, get_args(annotation))), None)
    if get_origin(annotation) in (Sequence, tuple):
        kind = get_args(annotation)[0]
        return partial(_several, kind) if kind in (str, int, float) else None
    return None


def _several(kind: type, text: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(word.strip()) for word in text.split(",") if word.strip())
    except ValueError as error:
        message = f"{text!r} is not {kind.__name__} and {kind.__name__}, with commas between"
        raise argparse.ArgumentTypeError(message) from error
