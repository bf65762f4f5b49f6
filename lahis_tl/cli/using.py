"""Commands that use heads: ``steer``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lahis_tl.cli.common import (
    Command,
    Device,
    Dtype,
    HeadsArgument,
    Quiet,
    app,
    heads_file,
    heads_of,
)


@app.command(cls=Command)
def steer(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, .gguf file, or smollm2.")],
    heads: HeadsArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to go on from; or --file.", show_default=False)
    ] = None,
    of: Annotated[
        str | None,
        typer.Option("--of", help="Which heads of the file: a language or general."),
    ] = None,
    factor: Annotated[
        float,
        typer.Option(help="What the heads are multiplied by: 0 suppresses, above 1 enhances."),
    ] = 0.0,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among this much of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for both texts as JSON lines; made if missing."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Generate text with heads suppressed or enhanced, beside the text without.

    One prompt is written out as it comes; several are shown when all are done.

    Example: `lahis-tl steer smollm2 out/demo/heads.safetensors "La ville de Paris est" --of fr --factor 0`
    """
    texts = _prompts(prompts, file)
    found_file = heads_file(heads)
    if found_file is not None and of is None:
        raise typer.BadParameter(
            f"{heads} holds several sets; name one by --of: {', '.join([*found_file.specific, 'general'])}"
        )
    from lahis_tl.access import grid_of
    from lahis_tl.artifacts import check_model
    from lahis_tl.generation import Steered, generate
    from lahis_tl.masks import HeadMask
    from lahis_tl.models import load_model

    loaded = load_model(model, dtype=dtype, device=device)
    if found_file is not None:
        check_model(heads, found_file.card, loaded)
    members = heads_of(found_file, heads, of or "", grid_of(loaded))
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "progress": not quiet and len(texts) > 1,
    }
    live = len(texts) == 1 and not quiet
    both = []
    for title, mask in (
        ("no mask", None),
        (f"{', '.join(members.labels)} × {factor:g}", HeadMask.scaling(members, factor)),
    ):
        stream = None
        if live:
            typer.secho(f"\n{title}", bold=True)
            typer.echo(texts[0], nl=False)
            stream = _write_piece
        both.append(generate(loaded, texts, mask, stream=stream, **options))
    result = Steered(*both)
    if live:
        typer.echo("")
    else:
        for row in result.to_dataframe().to_dict("records"):
            typer.secho(f"\n{row['prompt']}", bold=True)
            typer.echo(f"  no mask: {row['plain']!r}\n  × {factor:g}:    {row['steered']!r}")
    if out is not None:
        for name, generations in (("plain", result.plain), ("steered", result.steered)):
            generations.save(out / name)
        typer.echo(f"\nTexts: {out.resolve()}")


def _write_piece(index: int, piece: str) -> None:
    typer.echo(piece, nl=False)


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if bool(prompts) == (file is not None):
        raise typer.BadParameter("give prompts, or a file of them by --file")
    if file is None:
        return list(prompts or [])
    if not file.is_file():
        raise typer.BadParameter(f"there is no file {file}")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise typer.BadParameter(f"{file} has no prompt")
    return lines
