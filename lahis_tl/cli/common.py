"""What the commands share: the application, its options, reading and printing results."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

# Heavy modules are imported inside the commands, so that --help and mistakes answer at once.
if TYPE_CHECKING:
    import pandas as pd

    from lahis_tl.heads import HeadGrid, HeadSet
    from lahis_tl.selection import LanguageHeads

app = typer.Typer(
    name="lahis-tl",
    help="Find and see the attention heads by which a language model handles its languages.\n\n"
    "Begin with `lahis-tl demo`. For your own model: `score` texts, choose `heads`, `explore` both, and "
    "`ablate` the heads to see what they do; `steer` generates text with heads scaled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


HeadsArgument = Annotated[
    str, typer.Argument(help="A heads.safetensors, or labels such as L12H3,L7H0.")
]


class Command(TyperCommand):
    """A command whose help names what the registries of the code hold, read when help is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for option in self.params:
            text = getattr(option, "help", None) or ""
            for name, names in _REGISTRIES.items():
                if name in text:
                    option.help = text.replace(name, ", ".join(names()))  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def score_names() -> list[str]:
    from lahis_tl.scores import score_methods

    return score_methods()


def rule_names() -> list[str]:
    from lahis_tl.selection import RULES

    return list(RULES)


def match_names() -> list[str]:
    from lahis_tl.controls import MATCHES

    return list(MATCHES)


_REGISTRIES: dict[str, Callable[[], list[str]]] = {
    "SCORES": score_names,
    "RULES": rule_names,
    "MATCHES": match_names,
}


def one_of(names: Callable[[], list[str]]) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        if value is not None and value not in names():
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names())}")
        return value

    return check


Method = Annotated[
    str | None,
    typer.Option(
        callback=one_of(score_names), help="The score: SCORES. Default lahis.", show_default=False
    ),
]
Languages = Annotated[
    str | None,
    typer.Option(
        "--languages",
        "-l",
        help="Comma-separated codes, as in en,fr,zh. All there are if left out.",
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str | None, typer.Option(help="As in cuda:0; the first GPU, else the CPU.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; made if missing.")]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh/--resume",
        help="Start anew; by default a run goes on with the finished parts of the same one.",
        show_default=False,
    ),
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--recompute",
        help="Keep one block's activations at a time and compute them twice: less memory, more time.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def _version(value: bool) -> bool:
    if value:
        from lahis_tl import __version__

        typer.echo(f"lahis-tl {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def parts_folder(folder: Path, fresh: bool) -> Path:
    """The folder for finished parts, emptied where a fresh start is asked for."""
    if fresh:
        drop_parts(folder)
    return folder


def drop_parts(folder: Path) -> None:
    """The run is whole in its result now, or to be begun anew."""
    import shutil

    from lahis_tl.processes import is_main

    if is_main() and folder.exists():
        shutil.rmtree(folder)


def split_codes(languages: str | None) -> list[str] | None:
    return None if languages is None else [code.strip() for code in languages.split(",")]


def scores_of(path: Path, method: str | None, or_heads: bool = False) -> Any:
    from lahis_tl.artifacts import load
    from lahis_tl.per_text import PerTextHeads
    from lahis_tl.scores import HeadScores
    from lahis_tl.scores import score as reduce
    from lahis_tl.selection import LanguageHeads

    found = load(path)
    if isinstance(found, PerTextHeads):
        return reduce(found, method)
    if method not in (None, getattr(found, "method", None)):
        raise typer.BadParameter(
            f"{path} holds {found.method} already; --method {method} needs the gradients file"
        )
    if isinstance(found, HeadScores) or (or_heads and isinstance(found, LanguageHeads)):
        return found
    raise typer.BadParameter(f"{path} holds {found.kind}; scores, gradients or effects are needed")


def heads_file(heads: str) -> "LanguageHeads | None":
    """The saved heads, or None where labels are given."""
    from lahis_tl.artifacts import load
    from lahis_tl.selection import LanguageHeads

    if not heads.endswith(".safetensors"):
        return None
    found = load(heads)
    if not isinstance(found, LanguageHeads):
        raise typer.BadParameter(
            f"{heads} holds {found.kind}; make heads of it by `lahis-tl heads`"
        )
    return found


def heads_of(file: "LanguageHeads | None", heads: str, of: str, grid: "HeadGrid") -> "HeadSet":
    from lahis_tl.heads import HeadSet

    if file is None:
        return HeadSet(grid, [label.strip() for label in heads.split(",")])
    sets = {**file.specific, "general": file.general}
    if of not in sets:
        raise typer.BadParameter(f"--of {of}: the file has {', '.join(sets)}, or all")
    return sets[of]


def print_heads(heads: "LanguageHeads") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Heads by rule {heads.rule}, score {heads.method}", title_justify="left")
    table.add_column("language")
    table.add_column("specific heads, best first")
    for language, members in heads.specific.items():
        table.add_row(language, " ".join(members.labels) or "none")
    table.add_section()
    table.add_row("general", " ".join(heads.general.labels) or "none")
    Console().print(table)


def print_effects(table: "pd.DataFrame") -> None:
    """A table with the columns of ``beside_controls``: changes and controls with their ranges, and p."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(caption="change of the loss in nats per token, 95 % intervals and ranges")
    names = list(table.columns[: table.columns.get_loc("change")])
    for name in (*names, "change", "random sets", "p"):
        shown.add_column(name, justify="left" if name in names else "right")
    for row in table.to_dict("records"):
        cells = [f"{row['change']:.2f} [{row['lower']:.2f}, {row['upper']:.2f}]"]
        low, high = row["control_lower"], row["control_upper"]
        cells += [f"{row['control_mean']:.2f} [{low:.2f}, {high:.2f}]", f"{row['p']:.3f}"]
        shown.add_row(*(str(row[name]) for name in names), *cells)
    Console().print(shown)
