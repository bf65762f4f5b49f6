"""What general heads are for: the quality of summaries with general, specific or random heads off.

The authors give BERTScore by an English encoder and one unmatched random set; here are chrF (or BERTScore by a
multilingual encoder), paired changes with intervals, and matched random sets.

python -m analyses.general_heads
python -m analyses.general_heads --quick
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.generating import (
    NONE,
    Conditions,
    against_random,
    drawn_sets,
    generate_under,
    labels_of,
    random_changes,
    set_up,
)
from analyses.result import (
    Parts,
    Result,
    model_of,
    scored_ids,
    under,
)
from lahis_tl.access import LensModel
from lahis_tl.identify import language_identifier
from lahis_tl.quality import bert_scores
from lahis_tl.tasks import summary_tasks

GENERAL, SPECIFIC = "general heads", "own specific heads"
EXPECTED = {GENERAL: -1, SPECIFIC: -1}
MEASURES = {"chrf": "chrF", "bertscore": "BERTScore F1"}


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "es", "de", "it", "pt"),
    n: int = 40,
    prompts: int = 10,
    source: str = "bundled",
    measure: str = "chrf",
    factor: float = 0.0,
    method: str = "lahis",
    rule: str = "authors",
    draws: int = 19,
    max_tokens: int = 64,
    max_new_tokens: int = 40,
    seed: int = 0,
    dtype: str = "float32",
    checkpoint: str | Path | None = "out/general_heads/parts",
    gradients: str | Path | None = None,
    progress: bool = True,
    **rule_options: Any,
) -> Result:
    """Summaries under no mask, general heads off, the language's own heads off, matched random heads off.

    In a language without specific heads only general and random heads are taken away.

    Args:
        n, max_tokens: texts a language that heads are scored on, and where they are cut.
        gradients: a folder of gradients that experiments share; nothing is kept if None.
        prompts: texts to sum up, a language; none that was scored.
        source: ``bundled``, or ``csebuetnlp/xlsum`` from the hub.
        measure: ``chrf``, or ``bertscore`` (needs bert-score and an encoder from the hub).
        rule: the general heads of ``authors`` are those that many languages keep; those of ``contrastive`` must be
            among no language's specific ones, which leaves out many that all languages need.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r} is not one of {', '.join(MEASURES)}")
    if measure == "bertscore":
        bert_scores([], [])  # not installed? Better now than after all is written
    model = model_of(model, dtype=dtype)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    identify = language_identifier()
    scored = scored_ids(languages, n, seed)
    tasks = summary_tasks(languages, prompts, source, seed, without=scored)
    ready = set_up(
        model,
        languages,
        n=n,
        continuations=0,
        gated=8,
        method=method,
        rule=rule,
        rule_options=rule_options,
        gradients=gradients,
        seed=seed,
        max_tokens=max_tokens,
        identify=identify,
        reserved=tasks,
        **options,
    )
    heads = ready.heads
    own = {code: heads.specific[code] for code in languages if len(heads.specific[code])}
    conditions: Conditions = {GENERAL: dict.fromkeys(languages, heads.general)}
    if own:
        conditions |= {SPECIFIC: own}
    card = ready.card | {"factor": factor, "sets": labels_of(conditions)}
    card |= {"measure": measure, "source": source}
    drawn = drawn_sets(conditions, heads.general, draws, seed)
    records = generate_under(
        model,
        tasks,
        conditions,
        drawn,
        factor=factor,
        identify=identify,
        second=None,
        seed=seed,
        parts=Parts(checkpoint, card | {"tasks": [task.prompt for task in tasks]}),
        **options,
    )
    if measure == "bertscore":
        found = bert_scores([r["text"] for r in records], [r["reference"] for r in records])
        records = [{**r, "bertscore": value} for r, value in zip(records, found, strict=True)]
    tables, figures, verdict = report(records, card)
    return Result(
        "general_heads",
        {**tables, "competence": ready.gate.to_dataframe(), "heads": heads.to_dataframe()},
        figures,
        verdict,
        card,
        {"generations": records},
    )


def report(
    records: Sequence[Mapping[str, Any]], card: Mapping[str, Any]
) -> tuple[dict[str, pd.DataFrame], dict[str, go.Figure], str]:
    """Tables, figure and verdict from the saved generations alone.

    Languages that the model cannot write are in the table by language alone.
    """
    rows, measure = pd.DataFrame(records), card["measure"]
    languages = against_random(rows, measure, EXPECTED, "language")
    languages["writes"] = languages["language"].isin(card["writes"])
    rows = pd.DataFrame(rows[rows["language"].isin(card["writes"])])
    if rows.empty:
        return (
            {"languages": languages},
            {},
            "The model writes none of the languages, so nothing can be said.",
        )
    effects = against_random(rows, measure, EXPECTED)
    n = len(under(rows, NONE))
    figure = lt.plots.beside_draws(
        effects.iloc[1:].rename(columns={"condition": "name"}),
        random_changes(rows, measure),
        "Quality of summaries with heads off",
        lt.plots.about_card(card, f"{n} texts; 95% intervals over texts"),
        f"change of {MEASURES[measure]} (points of 100)",
    )
    figure.update_layout(width=680).update_xaxes(title_text="off")
    plain, *off = effects.to_dict("records")
    parts = [
        f"{row['condition']} off {row['change']:+.1f} [{row['lower']:.1f}, {row['upper']:.1f}] ({row['texts']} texts; "
        f"random sets {row['random_change']:+.1f}, p {row['p']:.2g})"
        for row in off
    ]
    verdict = (
        f"{MEASURES[measure]} of {n} summaries in {', '.join(card['writes'])} without a mask: {plain['value']:.1f}. "
        f"Change: {'; '.join(parts)}. The least p that {off[0]['draws']:.0f} random sets allow is "
        f"{1 / (off[0]['draws'] + 1):.2g}."
    )
    return {"effects": effects, "languages": languages}, {"effect": figure}, verdict


if __name__ == "__main__":
    run_from_command_line(
        run,
        __doc__,
        {
            "languages": ("en", "fr", "es"),
            "n": 16,
            "prompts": 4,
            "draws": 3,
            "max_new_tokens": 24,
            "checkpoint": None,
        },
    )
