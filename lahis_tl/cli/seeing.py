"""Commands that show results: ``explore``, ``plot``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lahis_tl.cli.common import (
    Command,
    Device,
    Dtype,
    Languages,
    Method,
    app,
    one_of,
    scores_of,
    split_codes,
)

# Heavy modules are imported inside the commands, so that --help and mistakes answer at once.
_PLOTS = ("heatmap", "difference", "counts", "layers", "overlap")


@app.command(cls=Command)
def explore(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Saved scores, gradients, effects, heads, patterns, token effects, or a folder of them."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="To show heads on sample texts: hub name, folder, .gguf file, smollm2."),
    ] = None,
    corpus: Annotated[str, typer.Option(help="Of the sample texts, as for score.")] = "bundled",
    languages: Languages = None,
    n: Annotated[int, typer.Option("-n", help="Sample texts a language.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Sample texts are cut there.")] = 20,
    cdn: Annotated[
        bool, typer.Option("--cdn", help="A small page that fetches plotly when it is opened.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="heads.html beside the first result.")
    ] = None,
) -> None:
    """Write results as one interactive page: maps, every head's scores, what it does on texts.

    The page opens from disk; it needs no network and no kernel.

    Example: `lahis-tl explore out/run --model smollm2 -l en,fr,zh`
    """
    from lahis_tl.corpora import load_corpus
    from lahis_tl.explorer import explore as write
    from lahis_tl.models import load_model

    if model is None and (languages is not None or corpus != "bundled"):
        raise typer.BadParameter("sample texts are looked at with a model: give --model too")
    loaded = None if model is None else load_model(model, dtype=dtype, device=device)
    found = [result for given in results for result in _results_of(given, loaded)]
    samples = None
    if model is not None:
        codes = split_codes(languages)
        if codes is None and corpus == "bundled":
            known = {code for result in found for code in getattr(result, "languages", ())}
            codes = [code for code in load_corpus("bundled").languages if code in known]
            if not codes:
                raise typer.BadParameter(
                    f"the bundled corpus has none of {', '.join(sorted(known))}; give texts by --corpus"
                )
        samples = load_corpus(corpus, codes, n)
    page = write(
        found,
        out or _beside(results[0]) / "heads.html",
        model=loaded,
        samples=samples,
        max_tokens=max_tokens,
        plotlyjs="cdn" if cdn else "inline",
        title=title,
    )
    typer.echo(page)


def _beside(result: Path) -> Path:
    return result if result.is_dir() else result.parent


def _results_of(path: Path, model: Any) -> list[Any]:
    """The result in a file, or those in a folder that the explorer shows."""
    from lahis_tl.artifacts import load
    from lahis_tl.explorer.payload import shows

    if not path.is_dir():
        return [load(path, model)]
    found = [load(file, model) for file in sorted(path.glob("*.safetensors"))]
    kept = [result for result in found if shows(result)]
    if not kept:
        raise typer.BadParameter(f"{path} holds no result that can be shown")
    return kept


@app.command(cls=Command)
def plot(
    result: Annotated[Path, typer.Argument(help="A saved gradients, scores or heads file.")],
    kind: Annotated[
        str,
        typer.Option(callback=one_of(lambda: list(_PLOTS)), help=f"One of {', '.join(_PLOTS)}."),
    ] = "heatmap",
    language: Annotated[
        str | None, typer.Option("--language", "-l", help="heatmap, difference: this one.")
    ] = None,
    minus: Annotated[str | None, typer.Option(help="difference: minus this one.")] = None,
    method: Method = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="html, png, svg or pdf; KIND.html beside the result."),
    ] = None,
    paper: Annotated[
        str | None, typer.Option(help="column or page: size and letters for a paper.")
    ] = None,
) -> None:
    """Draw a saved result: an interactive page, or an image for a paper with its numbers as CSV beside it.

    heatmap and difference take scores; counts, layers and overlap take heads, and choose them by the
    authors' rule where scores are given.
    """
    from lahis_tl import plots
    from lahis_tl.selection import LanguageHeads, language_heads

    found = scores_of(result, method, or_heads=True)
    if kind in ("counts", "layers", "overlap"):
        if language or minus:
            raise typer.BadParameter(
                f"{kind} is of all languages; leave out --language and --minus"
            )
        chosen = found if isinstance(found, LanguageHeads) else language_heads(found)
        draw = {
            "counts": plots.language_counts,
            "layers": plots.heads_per_layer,
            "overlap": plots.overlap,
        }
        figure = draw[kind](chosen)
    elif isinstance(found, LanguageHeads):
        raise typer.BadParameter(f"{kind} needs scores, but {result} holds heads")
    elif kind == "difference":
        if language is None or minus is None:
            raise typer.BadParameter("difference needs --language and --minus")
        figure = plots.difference(found, language, minus)
    else:
        figure = plots.heatmap(found, language)
    typer.echo(plots.write(figure, out or result.with_name(f"{kind}.html"), paper=paper))
