"""The paper's first test: perplexity of each language with its heads, other heads or random heads off.

The authors give the mean of exp(loss) with one unmatched random set; here are nats per token and bits per
byte too, with intervals, paired differences, and a distribution of matched random sets.

    python -m analyses.perplexity
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.result import Result, choose_and_set_aside, model_of, part_of
from lahis_tl.access import LensModel
from lahis_tl.statistics import mean_interval


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "de", "zh"),
    n: int = 48,
    test_texts: int = 16,
    max_tokens: int = 64,
    test_tokens: int | None = None,
    method: str = "lahis",
    rule: str = "authors",
    draws: int = 50,
    seed: int = 0,
    dtype: str = "float32",
    checkpoint: str | Path | None = None,
    gradients: str | Path | None = None,
    progress: bool = True,
    **rule_options: Any,
) -> Result:
    """Perplexity under no mask, the language's own heads off, the general heads off, random heads off.

    Args:
        dtype: to load the model in; bfloat16 is faster where the processor has arithmetic for it.
        n, max_tokens: scoring texts a language, and where they are cut.
        test_texts, test_tokens: others, for testing, and where they are cut; as the former if None.
        checkpoint: a folder for finished sets of heads, from which an interrupted run with these settings goes on.
        gradients: a folder of gradients that experiments share; nothing is kept if None.
        method, rule, rule_options: how heads are scored and chosen.
        draws: random sets, matched in layers to each language's heads; general heads are never among them.
    """
    model = model_of(model, dtype=dtype)
    options: dict[str, Any] = {"max_tokens": max_tokens, "progress": progress}
    grads, heads, testing = choose_and_set_aside(
        model, languages, n, test_texts, method, rule, seed, rule_options, gradients, **options
    )
    options["max_tokens"] = max_tokens if test_tokens is None else test_tokens
    plain = lt.perplexity(model, testing, **options)
    sets = {
        f"{code} heads": heads.specific[code] for code in languages if len(heads.specific[code])
    }
    if len(heads.general):
        sets["general heads"] = heads.general
    rows = _rows("none", plain, plain, None)
    effects = {}
    for name, members in sets.items():
        off = lt.perplexity(model, testing, lt.HeadMask.scaling(members, 0.0), **options)
        columns = list(languages) if name == "general heads" else [name.split()[0]]
        effects[name] = lt.ablation_effect(
            model,
            testing.select(columns),
            members,
            draws=draws,
            exclude=list(heads.general),
            scored=grads.card,
            seed=seed,
            checkpoint=part_of(checkpoint, name.replace(" ", "_")),
            **options,
        )
        rows += _rows(f"{name} off", off, plain, effects[name])
    table = pd.DataFrame(rows)
    return Result(
        "perplexity",
        {"perplexity": table, "heads": heads.to_dataframe()},
        {
            "bits": _figure(table, plain),
            **{k.replace(" ", "_"): lt.plots.set_effect(e) for k, e in effects.items()},
        },
        _verdict(table, draws),
        {**plain.card, "heads": heads.card, "rule": heads.rule},
    )


def _rows(
    condition: str, losses: lt.TextLosses, plain: lt.TextLosses, effect: lt.AblationEffect | None
) -> list[dict[str, Any]]:
    table = losses.to_dataframe().to_dict("records")
    p = {} if effect is None else effect.to_dataframe().set_index("language")["p"].to_dict()
    draws = {} if effect is None else {"draws": len(effect.control_sets)}
    for row in table:
        code = row["language"]
        change = mean_interval(losses.nll[code] - plain.nll[code])
        row |= {"change": change.value, "change_lower": change.lower, "change_upper": change.upper}
        row |= {"p": p.get(code, float("nan")), **draws}
    return [{"condition": condition, **row} for row in table]


def _figure(table: pd.DataFrame, plain: lt.TextLosses) -> go.Figure:
    figure = go.Figure()
    for i, (condition, rows) in enumerate(table.groupby("condition", sort=False)):
        figure.add_bar(
            x=rows["language"],
            y=rows["bits_per_byte"],
            name=str(condition),
            marker_color=lt.plots.CATEGORICAL[i % len(lt.plots.CATEGORICAL)],
            error_y={
                "array": rows["bits_upper"] - rows["bits_per_byte"],
                "arrayminus": rows["bits_per_byte"] - rows["bits_lower"],
                "thickness": 1,
            },
        )
    lt.plots.dress(
        figure,
        "Bits per byte with heads taken away",
        lt.plots.about_card(plain.card, "95% intervals over texts"),
    )
    figure.update_layout(width=820, height=440, barmode="group", legend_title="taken away")
    return figure.update_yaxes(title_text="bits per byte").update_xaxes(title_text="language")


def _verdict(table: pd.DataFrame, draws: int) -> str:
    own = table[
        [
            c == f"{code} heads off"
            for c, code in zip(table["condition"], table["language"], strict=True)
        ]
    ]
    parts = [
        f"{row.language} {row.change:+.2f} [{row.change_lower:.2f}, {row.change_upper:.2f}], p {row.p:.2g}"
        for row in own.itertuples()
    ]
    general = table[table["condition"] == "general heads off"]
    text = (
        f"Own heads off, change in nats per token on texts not used for scoring, p against {draws} matched random "
        f"sets: {'; '.join(parts)}."
    )
    if len(general):
        low, high = general["change"].min(), general["change"].max()
        text += f" General heads off: {low:+.2f} to {high:+.2f} over languages."
    return text


if __name__ == "__main__":
    run_from_command_line(
        run,
        __doc__,
        {"languages": ("en", "fr"), "n": 16, "test_texts": 6, "max_tokens": 32, "draws": 10},
    )
