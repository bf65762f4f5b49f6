"""Runs what is not finished of a plan, experiment by experiment, each in both protocols."""

import json
import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import lahis_tl as lt
from analyses import (
    attention_transfer,
    general_heads,
    off_target,
    perplexity,
    selectivity,
    xquad_mask,
)
from analyses.paper import heads
from analyses.paper.authors import AuthorsProtocol
from analyses.paper.plan import (
    AUTHORS,
    EXPERIMENTS,
    SOUND,
    Plan,
    keep,
    make_plan,
    refuse_other,
)
from analyses.paper.report import write_report
from analyses.result import Result
from lahis_tl.access import LensModel
from lahis_tl.artifacts import write_atomically
from lahis_tl.errors import ArtifactError, LahisError, ModelError

logger = logging.getLogger(__name__)

# Figures that the report shows, by experiment.
_SHOWN = {
    "heads": ("authors_heatmap", "heatmap", "layers"),
    "perplexity": ("crossed", "matrix"),
    "summaries": ("effect",),
    "transfer": ("effect", "lens"),
    "off_target": ("effect",),
    "xquad": ("nll", "f1"),
}


def run(
    model: str = "smollm2",
    out: str | Path | None = None,
    *,
    languages: Sequence[str] | None = None,
    only: Sequence[str] = EXPERIMENTS,
    dtype: str | None = None,
    quick: bool = False,
    data: str = "auto",
    preset: str | None = None,
    sizes: Mapping[str, Mapping[str, Any]] | None = None,
    docs: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Run what is not finished yet, and write the report.

    Args:
        model: ``smollm2``, ``aya-23-8b``, ``llama-3.2-3b``, ``mistral-7b-v0.1``, or any name that ``load_model`` takes.
        out: folder of all results; ``out/paper/NAME`` if None, ``NAME-quick`` for a quick run.
        languages: the preset's if None; the first four of them with ``quick``.
        data: ``bundled``, ``hub``, or ``auto``: the hub's data sets for the paper's models where they can be had,
            or what the folder's run began with.
        preset: which of the paper's models a local folder holds.
        sizes: changes to ``SIZES``, by experiment.
        docs: also write the Markdown report and its pictures there.

    Returns:
        the report, ``report.md``; ``report.html`` lies beside it.

    Raises:
        ValueError: an unknown experiment, source of data or preset.
        CorpusError: ``data="hub"``, and a data set cannot be had.
        ArtifactError: the folder holds a run with other settings, or another run is writing to it.
    """
    strange = [name for name in only if name not in EXPERIMENTS]
    if strange:
        raise ValueError(
            f"there is no experiment {', '.join(strange)}; there are {', '.join(EXPERIMENTS)}"
        )
    name = Path(model).name + ("-quick" if quick else "")
    folder = Path(out) if out is not None else Path("out") / "paper" / name
    plan = make_plan(model, languages, dtype, quick, data, preset, sizes, seed, folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            refuse_other(folder / "settings.json", plan.settings)
            _run_steps(plan, folder, [name for name in EXPERIMENTS if name in only], progress)
            return write_report(folder, plan, docs)
    except Timeout as error:
        raise ArtifactError(f"another run is writing to {folder}; give another --out") from error


def _run_steps(plan: Plan, folder: Path, names: Sequence[str], progress: bool) -> None:
    """The unfinished steps in order; the model is loaded when the first of them needs it."""
    steps = [(name, protocol) for name in names for protocol in (AUTHORS, SOUND)]
    left = [(n, p) for n, p in steps if not (folder / n / p / "finished.json").is_file()]
    for name, protocol in steps:
        if (name, protocol) not in left:
            logger.info("%s, %s: finished before", name, protocol)
    (folder / "missing.json").unlink(missing_ok=True)
    if not left:
        return
    try:
        model: Any = lt.load_model(plan.model, dtype=plan.dtype)
        if plan.known is not None:
            plan.known.check_grid(lt.grid_of(model))
    except ModelError as error:
        logger.error("%s", error)
        about = {"model": plan.model, "error": str(error)}
        write_atomically(folder / "missing.json", json.dumps(about, indent=2).encode())
        return
    card = {"model": lt.card_of(model)}
    kept = ("name", "revision", "class", "checkpoint_sha256", "tokenizer_sha256")
    about = {key: card["model"].get(key) for key in kept} | {"grid": str(lt.grid_of(model))}
    keep(folder / "model.json", about)
    # Only now: where the model could not be had, nothing is bound to them.
    keep(folder / "settings.json", plan.settings)
    protocol_of_authors = AuthorsProtocol(
        model,
        plan.sources,
        {name: plan.languages_of(AUTHORS, name) for name in EXPERIMENTS},
        plan.sizes[AUTHORS],
        folder / "authors",
        card["model"],
        plan.seed,
        progress,
    )
    for name, protocol in left:
        logger.info("%s, %s", name, protocol)
        run_step(plan, folder, name, protocol, model, protocol_of_authors, progress)
        write_report(folder, plan)


def run_step(
    plan: Plan,
    folder: Path,
    name: str,
    protocol: str,
    model: LensModel,
    authors: AuthorsProtocol,
    progress: bool,
) -> None:
    """One experiment in one protocol: its result, what it cost, and at last the mark that it is finished.

    An experiment that these texts or heads do not allow is reported with the reason, and tried again next time.
    """
    where = folder / name / protocol
    begun = where / "begun"
    resumed = begun.is_file()
    write_atomically(begun, b"")
    codes = plan.languages_of(protocol, name)
    start, processor = time.perf_counter(), time.process_time()
    try:
        if not codes:
            raise ValueError(f"there are no texts for it in {', '.join(plan.languages)}")
        result = (
            _of_authors(authors, name)
            if protocol == AUTHORS
            else _sound(plan, name, model, codes, folder, progress)
        )
    except (LahisError, ValueError) as error:
        logger.warning("%s, %s: not run: %s", name, protocol, error)
        write_atomically(where / "refused.txt", str(error).encode())
        return
    (where / "refused.txt").unlink(missing_ok=True)
    shown = {key: figure for key, figure in result.figures.items() if key in _SHOWN[name]}
    replace(result, figures=shown).save(where)
    for key, figure in shown.items():
        write_atomically(where / f"{key}.figure.json", str(figure.to_json()).encode())
    about = {
        "languages": codes,
        "left_out": [code for code in plan.languages if code not in codes],
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "peak_mb": _peak_mb(),
        "resumed": resumed,
        "tables": list(result.tables),
        "figures": list(shown),
    }
    write_atomically(where / "finished.json", json.dumps(about, indent=2).encode())


def _peak_mb() -> float:
    """The most memory so far: of the GPU if there is one, else of the process (which Linux counts in kB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _of_authors(authors: AuthorsProtocol, name: str) -> Result:
    runs: dict[str, Callable[[], Result]] = {
        "heads": authors.importance,
        "perplexity": authors.perplexity,
        "summaries": authors.summaries,
        "transfer": authors.transfer,
        "off_target": authors.off_target,
        "xquad": authors.xquad,
    }
    return runs[name]()


def _sound(
    plan: Plan, name: str, model: LensModel, codes: Sequence[str], folder: Path, progress: bool
) -> Result:
    options: dict[str, Any] = {"seed": plan.seed, "progress": progress, **plan.sizes["scoring"]}
    options["gradients"] = folder / "gradients"
    if name == "perplexity":
        return _perplexities(plan, model, codes, options, folder / "parts")
    options |= plan.own_sizes(name)
    if name == "heads":
        return heads.run(model, codes, **options)
    options["checkpoint"] = folder / "parts" / name
    if name == "summaries":
        return general_heads.run(model, codes, source=plan.sources["summaries"], **options)
    if name == "transfer":
        return attention_transfer.run(model, codes, **options)
    if name == "off_target":
        return off_target.run(model, codes, **options)
    return xquad_mask.run(model, codes, source=plan.sources["questions"], **options)


def _perplexities(
    plan: Plan, model: LensModel, codes: Sequence[str], options: Mapping[str, Any], parts: Path
) -> Result:
    """Own heads by the authors' rule, and all languages' heads on all languages' texts by the contrastive one."""

    def given(name: str) -> dict[str, Any]:
        return {**options, **plan.own_sizes(name), "checkpoint": parts / name}

    own = perplexity.run(model, codes, **given("perplexity"))
    crossed = selectivity.run(model, codes, sweeps=False, **given("selectivity"))
    tables = {**crossed.tables, **own.tables}
    figures = {**own.figures, **crossed.figures}
    verdict = f"{own.verdict} {crossed.verdict}"
    card = {**own.card, "crossed": crossed.card}
    return Result("perplexity", tables, figures, verdict, card)
