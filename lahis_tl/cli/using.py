"""Commands that use heads: ``steer``, ``tune``, ``export``."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from lahis_tl.cli.common import (
    Command,
    Device,
    Dtype,
    Fresh,
    HeadsArgument,
    Quiet,
    Recompute,
    app,
    drop_parts,
    heads_file,
    heads_of,
    parts_folder,
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
    fresh: Fresh = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for both texts as JSON lines; made if missing."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Generate text with heads suppressed or enhanced, beside the text without.

    One prompt is written out as it comes; several are shown when all are done. With --out, an interrupted run goes on
    where it stopped when the same command is given again.

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
    parts = None if out is None else parts_folder(out / "parts", fresh)
    scaled = f"{', '.join(members.labels)} × {factor:g}"
    for name, title, mask in (
        ("plain", "no mask", None),
        ("steered", scaled, HeadMask.scaling(members, factor)),
    ):
        stream = None
        if live:
            typer.secho(f"\n{title}", bold=True)
            typer.echo(texts[0], nl=False)
            stream = _write_piece
        folder = parts and parts / name
        both.append(generate(loaded, texts, mask, stream=stream, checkpoint=folder, **options))
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
        drop_parts(out / "parts")
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


@app.command(cls=Command)
def tune(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, .gguf file, or smollm2.")],
    pairs: Annotated[
        Path,
        typer.Argument(help='JSON lines with "prompt" and "target", or a SQuAD-format file.'),
    ],
    heads: Annotated[
        str | None,
        typer.Option(
            help="A heads.safetensors (with --of), labels such as L12H3,L7H0, or all.",
            show_default="all",
        ),
    ] = None,
    of: Annotated[
        str | None, typer.Option("--of", help="Which heads of the file: a language or general.")
    ] = None,
    language: Annotated[
        str, typer.Option("--language", "-l", help="Of the questions of a SQuAD-format file.")
    ] = "en",
    validation: Annotated[
        float,
        typer.Option(
            help="Share of the pairs (of a SQuAD file: paragraphs) to keep the best epoch by."
        ),
    ] = 0.1,
    epochs: Annotated[int, typer.Option(help="Times through the pairs.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-2,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 4,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better validation loss.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of pairs and the split.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    recompute: Recompute = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of the mask.")] = Path(
        "out/mask.safetensors"
    ),
    quiet: Quiet = False,
) -> None:
    """Train one factor for each chosen head so that targets become more probable; write the mask.

    Interrupted, it goes on after the last finished epoch when the same command is given again.

    Example: `lahis-tl tune smollm2 questions.json --heads out/demo/heads.safetensors --of fr -l fr -o out/fr-mask`
    """
    if pairs.suffix not in (".json", ".jsonl"):
        raise typer.BadParameter(
            f"{pairs} is neither JSON lines (.jsonl) nor a SQuAD-format file (.json)"
        )
    if not pairs.is_file():
        raise typer.BadParameter(f"there is no file {pairs}")
    from lahis_tl.access import grid_of
    from lahis_tl.artifacts import check_model
    from lahis_tl.heads import HeadSet
    from lahis_tl.memory import recomputed
    from lahis_tl.models import load_model
    from lahis_tl.tuning import tune_mask

    train, held_out = _read_pairs(pairs, language, validation, seed)
    chosen = None if heads in (None, "all") else heads_file(str(heads))
    if (chosen is None) != (of is None):
        raise typer.BadParameter(
            "--of names a set of a heads.safetensors, which --heads must give; and of such a file one must be named"
        )
    loaded = load_model(model, dtype=dtype, device=device)
    grid = grid_of(loaded)
    if chosen is not None:
        check_model(str(heads), chosen.card, loaded)
    members = (
        HeadSet.from_flat(grid, range(grid.size))
        if heads in (None, "all")
        else heads_of(chosen, str(heads), of or "", grid)
    )
    typer.echo(f"{len(members)} heads, {len(train)} pairs, {len(held_out)} for validation")
    parts = parts_folder(out.with_name(f"{out.name}-parts"), fresh)
    with recomputed(loaded) if recompute else nullcontext():
        tuned = tune_mask(
            loaded,
            train,
            members,
            validation=held_out,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            patience=patience,
            seed=seed,
            checkpoint=parts,
            progress=not quiet,
        )
    typer.echo(tuned.history.round(4).to_string(index=False))
    typer.echo(f"\nkept epoch {tuned.card['settings']['kept_epoch']}, stopped by {tuned.stopped}")
    typer.echo(f"Mask: {tuned.save(out).resolve()}")
    drop_parts(parts)


def _read_pairs(
    path: Path, language: str, validation: float, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs for training and for validation; questions are split by paragraph."""
    import json
    import random

    from lahis_tl.questions import load_questions, question_pair, split_by_paragraph

    if not 0 <= validation < 1:
        raise typer.BadParameter(f"--validation {validation} must be at least 0 and below 1")
    if path.suffix == ".json":
        questions = load_questions({language: path})
        if validation == 0:
            return [question_pair(q) for q in questions[language]], []
        held_out, train = split_by_paragraph(questions, [validation, 1 - validation], seed)
        return [question_pair(q) for q in train[language]], [
            question_pair(q) for q in held_out[language]
        ]
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((str(row["prompt"]), str(row["target"])))
        except (ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(
                f'{path}, line {number}: not an object with "prompt" and "target" ({error})'
            ) from error
    random.Random(seed).shuffle(pairs)
    count = round(validation * len(pairs))
    return pairs[count:], pairs[:count]


@app.command(cls=Command)
def export(
    mask: Annotated[Path, typer.Argument(help="A mask that `lahis-tl tune` wrote.")],
    model: Annotated[
        str, typer.Argument(help="The model that it is for, by the name it was loaded by.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    kind: Annotated[
        str,
        typer.Option(
            help="folded (an ordinary checkpoint with the factors in its weights) or ia3 (a PEFT adapter)."
        ),
    ] = "folded",
    dtype: Dtype = "float32",
    push: Annotated[
        str | None, typer.Option(help="Upload the folder to this hub repository, private.")
    ] = None,
) -> None:
    """Write a tuned mask as a checkpoint for transformers alone, or as an adapter for peft alone.

    Example: `lahis-tl export out/mask.safetensors smollm2 --kind ia3 -o out/adapter`
    """
    if kind not in ("folded", "ia3"):
        raise typer.BadParameter(f"--kind {kind!r} is not one of folded, ia3")
    from lahis_tl import export as exporting
    from lahis_tl.tuning import TunedMask

    exporting.refuse_folder(out)
    tuned = TunedMask.load(mask)
    folder = (
        exporting.export_folded(tuned, model, out, dtype=dtype)
        if kind == "folded"
        else exporting.export_ia3(tuned, model, out)
    )
    typer.echo(f"Written to {folder.resolve()}")
    if push is not None:
        typer.echo(f"Uploaded to {exporting.push(folder, push)}")
