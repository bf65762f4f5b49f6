"""Cross-lingual attention transfer: two languages contradict each other; do language heads decide whom the model
believes? The paper's probe, for three relations, every ordered pair of languages, beside matched random heads.

python -m analyses.attention_transfer             # six languages, 30 ordered pairs
python -m analyses.attention_transfer --quick
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.result import (
    Parts,
    Result,
    choose_and_set_aside,
    means_by_draw,
    model_of,
    under,
)
from analyses.transfer_inside import draw_attention, draw_lens, lens_records, measure_attention
from lahis_tl.access import LensModel
from lahis_tl.statistics import empirical_p, mean_interval
from lahis_tl.transfer import Conflict, conflicts, transfer_answers

NONE, ENHANCED, WEAKENED, BOTH = "no mask", "first enhanced", "second weakened", "both"
CONDITIONS = (ENHANCED, WEAKENED, BOTH)
_CHANGE = "change towards the first answer (nats)"


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "es", "de", "it", "pt"),
    n: int = 40,
    relations: Sequence[str] | None = None,
    prompts: int = 3,
    question: str = "en",
    enhance: float = 3.0,
    weaken: float = 0.0,
    factors: Sequence[float] = (0.0, 0.5, 1.5, 2.0, 5.0),
    method: str = "lahis",
    rule: str = "contrastive",
    draws: int = 20,
    max_tokens: int = 64,
    seed: int = 0,
    dtype: str = "float32",
    checkpoint: str | Path | None = "out/attention_transfer/parts",
    gradients: str | Path | None = None,
    progress: bool = True,
    **rule_options: Any,
) -> Result:
    """Whose answer is given, under no mask, the first language's heads enhanced, the second's weakened, both.

    Args:
        n, max_tokens: texts a language that heads are scored on, and where they are cut.
        gradients: a folder of gradients that experiments share; nothing is kept if None.
        prompts: of every relation and ordered pair of languages.
        question: language of the question; the paper's is English.
        enhance, weaken: factors of the first and the second language's heads.
        factors: of the sweep of the first language's heads.
        draws: matched random sets for every language; set i of both languages goes together.
        checkpoint: a folder from which an interrupted run goes on.
        rule_options: of ``language_heads``.
    """
    model = model_of(model, dtype=dtype)
    grads, heads, _ = choose_and_set_aside(
        model,
        languages,
        n,
        1,
        method,
        rule,
        seed,
        rule_options,
        gradients,
        max_tokens=max_tokens,
        progress=progress,
    )
    sets = {code: heads.specific[code] for code in languages}
    empty = [code for code, members in sets.items() if not len(members)]
    if empty:
        raise ValueError(
            f"rule {rule} finds no heads specific to {', '.join(empty)}; take a larger fraction, more texts or "
            "other languages"
        )
    items = [
        item
        for first in languages
        for second in languages
        if first != second
        for item in conflicts(first, second, relations, prompts, question=question, seed=seed)
    ]
    drawn = {
        c: lt.matched_random_heads(s, draws, match="nearest", exclude=heads.general, seed=seed)
        for c, s in sets.items()
    }
    n_draws = min(map(len, drawn.values()))
    doses = {ENHANCED: (enhance, 1.0), WEAKENED: (1.0, weaken), BOTH: (enhance, weaken)}

    about = {"model": grads.card["model"], "heads": heads.card, "rule": heads.rule}
    about |= {"options": dict(heads.options), "sets": {c: s.labels for c, s in sets.items()}}
    about |= {"enhance": enhance, "weaken": weaken, "question": question, "seed": seed}
    parts = Parts(checkpoint, about | {"items": [item.prompt for item in items]})

    def ask(
        members: Mapping[str, lt.HeadSet] | None,
        dose: tuple[float, float],
        condition: str,
        draw: int = -1,
    ) -> list[dict[str, Any]]:
        def make() -> list[dict[str, Any]]:
            masks = None if members is None else masks_of(items, members, *dose)
            found = transfer_answers(model, items, masks, progress=progress, description=name)
            return [
                {"condition": condition, "draw": draw, "factor": dose[0], "prompt": i, **row}
                for i, row in enumerate(found.to_dataframe().to_dict("records"))
            ]

        name = f"{condition} {dose[0]:g} {dose[1]:g} {draw if draw >= 0 else 'own'}"
        return parts.rows(name, make)

    records = ask(None, (1.0, 1.0), NONE)
    for condition, dose in doses.items():
        records += ask(sets, dose, condition)
        for draw in range(n_draws):
            records += ask({c: each[draw] for c, each in drawn.items()}, dose, condition, draw)
    for factor in factors:
        records += ask(sets, (factor, 1.0), "sweep")
    tables, figures, verdict = report(records, about)
    masked = {
        name: None if dose is None else masks_of(items, sets, *dose)
        for name, dose in {NONE: None, **doses}.items()
    }
    before, after, pattern = measure_attention(model, items, masked[BOTH] or [], progress)
    lens = lens_records(model, items, masked)
    attention_table, pictures = draw_attention(
        before, after, pattern, f"first × {enhance:g}, second × {weaken:g}", about
    )
    lens_table, figures["lens"] = draw_lens(lens, NONE, about)
    return Result(
        "attention_transfer",
        {
            **tables,
            "attention": attention_table,
            "lens": lens_table,
            "heads": heads.to_dataframe(),
        },
        {**figures, **pictures},
        verdict,
        about,
        {
            "answers": records,
            "conflicts": [vars(item) for item in items],
            "lens_prompts": lens,
            "pattern": [pattern],
        },
        {"attention_before": before, "attention_after": after},
    )


def masks_of(
    items: Sequence[Conflict], sets: Mapping[str, lt.HeadSet], first: float, second: float
) -> list[lt.HeadMask]:
    """A mask for each prompt: heads of its first language × ``first``, of its second × ``second``."""
    return [
        lt.HeadMask(
            lt.HeadMask.scaling(sets[item.first], first).factors
            * lt.HeadMask.scaling(sets[item.second], second).factors
        )
        for item in items
    ]


def report(
    records: Sequence[Mapping[str, Any]], card: Mapping[str, Any]
) -> tuple[dict[str, pd.DataFrame], dict[str, go.Figure], str]:
    """Tables, figures and verdict from the saved answers alone.

    Args:
        records: of ``lahis_tl.records.load_records("out/attention_transfer/answers")``.
    """
    rows = pd.DataFrame(records)
    plain = under(rows, NONE).set_index("prompt")
    rows["change"] = rows["logit_difference"] - rows["prompt"].map(plain["logit_difference"])
    overall = pd.DataFrame([_condition(rows, name) for name in (NONE, *CONDITIONS)])
    pairs = pd.DataFrame(
        [
            {"first": key[0], "second": key[1], **_condition(group, name)}  # type: ignore[index]
            for key, group in rows.groupby(["first", "second"], sort=False)
            for name in (NONE, *CONDITIONS)
        ]
    )
    relations = pd.DataFrame(
        [
            {"relation": relation, **_condition(group, name)}
            for relation, group in rows.groupby("relation", sort=False)
            for name in (NONE, *CONDITIONS)
        ]
    )
    sweep = pd.DataFrame(_sweep_rows(rows))
    both = under(pairs, BOTH)
    tables = {"conditions": overall, "pairs": pairs, "relations": relations, "sweep": sweep}
    return tables, _figures(rows, tables, card), _verdict(overall, both, len(plain))


def _condition(rows: pd.DataFrame, condition: str) -> dict[str, Any]:
    """One condition: shares of answers, ranks, the change with its interval over prompts, p against random sets."""
    of = under(rows, condition)
    own, random = of.query("draw < 0"), of.query("draw >= 0")
    change = mean_interval(torch.tensor(own["change"].to_numpy()))
    found = {
        "condition": condition,
        "says_first": float((own["says"] == "first").mean()),
        "says_second": float((own["says"] == "second").mean()),
        "says_neither": float((own["says"] == "neither").mean()),
        "logit_difference": float(own["logit_difference"].mean()),
        "median_rank_first": float(own["rank_first"].median()),
        "median_rank_second": float(own["rank_second"].median()),
        "change": change.value,
        "lower": change.lower,
        "upper": change.upper,
        "prompts": len(own),
    }
    if random.empty:
        return found
    changes = torch.tensor(means_by_draw(random, "change"))
    firsts = torch.tensor(means_by_draw(random.assign(first=random["says"] == "first"), "first"))
    return found | {
        "random_change": float(changes.mean()),
        "p_change": empirical_p(change.value, changes),
        "random_says_first": float(firsts.mean()),
        "p_says_first": empirical_p(found["says_first"], firsts),
        "draws": len(changes),
    }


def _sweep_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for factor, group in pd.concat([under(rows, NONE), under(rows, "sweep")]).groupby("factor"):
        change = mean_interval(torch.tensor(group["change"].to_numpy()))
        found.append(
            {"factor": factor, "change": change.value, "lower": change.lower, "upper": change.upper}
            | {"says_first": float((group["says"] == "first").mean())}
            | {"says_neither": float((group["says"] == "neither").mean())}
        )
    return found


def _figures(
    rows: pd.DataFrame, tables: Mapping[str, pd.DataFrame], card: Mapping[str, Any]
) -> dict[str, go.Figure]:
    overall, sweep = tables["conditions"], tables["sweep"]
    pairs = under(tables["pairs"], BOTH)
    n = int(overall["prompts"].iloc[0])
    about = lt.plots.about_card(card, f"{n} prompts, {len(pairs)} ordered pairs of languages")
    random = rows.query("draw >= 0")
    draws = {
        str(name): means_by_draw(group, "change")
        for name, group in random.groupby("condition", sort=False)
    }
    shown = overall.iloc[1:].rename(columns={"condition": "name", "p_change": "p"})
    effect = lt.plots.beside_draws(
        shown, draws, "Whom the model believes, with language heads scaled", about, _CHANGE
    )
    effect.update_layout(width=760).update_xaxes(title_text="heads scaled")
    shares = go.Figure()
    for i, answer in enumerate(("first", "second", "neither")):
        shares.add_bar(
            x=overall["condition"],
            y=overall[f"says_{answer}"],
            name=answer,
            marker_color=[*lt.plots.CATEGORICAL[:2], "#cccccc"][i],
            hovertemplate=f"%{{x}}: {answer} %{{y:.0%}}<extra></extra>",
        )
    lt.plots.dress(shares, "Whose answer is given", about)
    shares.update_layout(width=720, height=420, barmode="stack", legend_title="answer of language")
    shares.update_yaxes(title_text="share of prompts", tickformat=".0%")
    matrix = lt.plots.square(
        pairs,
        ("first", "second", "change"),
        "Change towards the first answer, by languages",
        f"{about}, both scaled",
        "change<br>(nats)",
        ("first language", "second language"),
    )
    dose = lt.plots.curves(
        sweep["factor"].tolist(),
        {"change": (sweep["change"].tolist(), sweep["lower"].tolist(), sweep["upper"].tolist())},
        title="Heads of the first language scaled by a factor",
        about=f"{about}, 95% intervals over prompts",
        x_title="factor",
        y_title=_CHANGE,
    )
    return {
        "effect": effect,
        "shares": shares,
        "pairs": matrix,
        "sweep": dose.update_layout(showlegend=False),
    }


def _verdict(overall: pd.DataFrame, pairs: pd.DataFrame, prompts: int) -> str:
    plain, *masked = overall.to_dict("records")
    parts = [
        f"{row['condition']} {row['change']:+.2f} [{row['lower']:.2f}, {row['upper']:.2f}] (random sets "
        f"{row['random_change']:+.2f}, p {row['p_change']:.2g}), first answer given in {row['says_first']:.0%} "
        f"(random {row['random_says_first']:.0%}, p {row['p_says_first']:.2g})"
        for row in masked
    ]
    return (
        f"Without a mask the first language's answer is given in {plain['says_first']:.0%} of {prompts} prompts, "
        f"the second's in {plain['says_second']:.0%}, neither in {plain['says_neither']:.0%}. Change of the logit "
        f"difference towards the first answer, in nats: {'; '.join(parts)}. With both, "
        f"{int((pairs['change'] > 0).sum())} of {len(pairs)} ordered pairs move towards the first language."
    )


if __name__ == "__main__":
    run_from_command_line(
        run,
        __doc__,
        {
            "languages": ("en", "fr", "es"),
            "n": 16,
            "prompts": 2,
            "draws": 8,
            "checkpoint": None,
            "factors": (0.0, 2.0, 5.0),
        },
    )
