"""Commands that put results to the test: ``ablate``, ``rerun``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lahis_tl.cli.common import (
    Command,
    Device,
    Dtype,
    Fresh,
    Languages,
    Out,
    Quiet,
    app,
    drop_parts,
    heads_file,
    heads_of,
    match_names,
    one_of,
    parts_folder,
    print_effects,
    split_codes,
)


@app.command(cls=Command)
def ablate(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, .gguf file, or smollm2.")],
    heads: Annotated[
        str,
        typer.Argument(help="A heads.safetensors, or labels such as L12H3,L7H0."),
    ],
    of: Annotated[
        str,
        typer.Option(
            "--of",
            help="Which heads of the file: a language, general, or all (each language's, with the matrix).",
        ),
    ] = "all",
    factor: Annotated[
        float, typer.Option(help="What the heads are multiplied by: 0 takes them away.")
    ] = 0.0,
    draws: Annotated[int, typer.Option(help="Random sets of heads to hold it against.")] = 100,
    match: Annotated[
        str,
        typer.Option(callback=one_of(match_names), help="How they match: MATCHES."),
    ] = "nearest",
    corpus: Annotated[
        str,
        typer.Option(help="Texts that were not scored: bundled, a file, folder or hub data set."),
    ] = "bundled",
    languages: Languages = None,
    n: Annotated[
        int | None, typer.Option("-n", help="Texts a language, drawn by the seed.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Hub configuration, with {language} for the code.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing of texts and of random sets.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut there.")] = 512,
    dtype: Dtype = "float32",
    device: Device = None,
    out: Out = Path("out/ablate"),
    fresh: Fresh = False,
    quiet: Quiet = False,
) -> None:
    """Take heads away and measure the loss in every language, beside matched random heads.

    Prints the change in nats per token with its interval, what random sets do, and a p-value; writes the
    table and a figure to the folder. Texts that the heads were chosen on are left out of the bundled corpus,
    and refused of any other.

    Example: `lahis-tl ablate smollm2 out/run/heads.safetensors --of fr -n 12 --max-tokens 64 --draws 20`
    """
    from lahis_tl import plots
    from lahis_tl.ablation import ablation_effect, selectivity
    from lahis_tl.access import grid_of
    from lahis_tl.artifacts import check_model, write_atomically
    from lahis_tl.corpora import load_corpus, without_scored
    from lahis_tl.models import load_model

    file = heads_file(heads)
    loaded = load_model(model, dtype=dtype, device=device)
    if file is not None:
        check_model(heads, file.card, loaded)
    if corpus == "bundled" and file is not None:
        texts = without_scored(load_corpus(corpus, split_codes(languages)), file.card)
        texts = texts if n is None else texts.sample(n, seed)
    else:
        texts = load_corpus(corpus, split_codes(languages), n, seed=seed, config=config)
    typer.echo(f"{texts!r}")
    options: dict[str, Any] = {
        "factor": factor,
        "draws": draws,
        "match": match,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    running: dict[str, Any] = {
        "checkpoint": parts_folder(out / "parts", fresh),
        "progress": not quiet,
    }
    if file is not None and of == "all":
        result = selectivity(loaded, file, texts, **options, **running)
        table, figure, card = result.to_dataframe(), plots.selectivity_matrix(result), result.card
        typer.echo(f"Own language minus the others: {result.contrast()}, p {result.p_value():.3g}")
    else:
        members = heads_of(file, heads, of, grid_of(loaded))
        scored = None if file is None else file.card
        effect = ablation_effect(loaded, texts, members, scored=scored, **options, **running)
        table, figure, card = effect.to_dataframe(), plots.set_effect(effect), effect.card
    print_effects(table)
    write_atomically(out / "ablation.csv", table.to_csv(index=False).encode())
    about = json.dumps({**card, "heads": heads, "of": of, "options": options}, indent=2)
    write_atomically(out / "ablation.json", about.encode())
    typer.echo(f"\nTable:  {(out / 'ablation.csv').resolve()}")
    typer.echo(f"Figure: {plots.write(figure, out / 'ablation.html').resolve()}")
    drop_parts(out / "parts")


@app.command(cls=Command)
def rerun(
    card: Annotated[
        Path,
        typer.Argument(help="Saved gradients, scores or exact effects, or their card (.json)."),
    ],
    corpus: Annotated[
        str | None,
        typer.Option(help="Where the texts are now, if they came from a file or folder."),
    ] = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the new result in this file.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compute a saved result again from its card, and say whether the numbers are the same.

    Example: `lahis-tl rerun out/demo/gradients.json`
    """
    from lahis_tl.reruns import rerun as run_again

    found = run_again(card, corpus=corpus, device=device, progress=not quiet)
    typer.echo(str(found))
    if out is not None:
        typer.echo(f"Result: {found.result.save(out).resolve()}")
