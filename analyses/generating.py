"""What experiments on generated text share: many masks over the same prompts, judged, beside random sets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import lahis_tl as lt
from analyses.result import Parts, choose_and_set_aside, means_by_draw, under
from lahis_tl.access import LensModel
from lahis_tl.confusion import judge_texts
from lahis_tl.gate import Competence, competence
from lahis_tl.identify import LanguageIdentifier
from lahis_tl.statistics import Interval, empirical_p, mean_interval
from lahis_tl.tasks import Task, continuation_tasks

NONE = "no mask"
# condition → language of the prompt → the heads that are scaled.
Conditions = Mapping[str, Mapping[str, lt.HeadSet]]


@dataclass(frozen=True)
class SetUp:
    """What stands before anything is generated under a mask.

    Attributes:
        heads: chosen on the scored texts.
        continuations: prompts from texts that neither the scores nor the gate have seen.
        gate: which languages the model can write.
        card: of all that.
    """

    heads: lt.LanguageHeads
    continuations: list[Task]
    gate: Competence
    card: dict[str, Any]


def set_up(
    model: LensModel,
    languages: Sequence[str],
    *,
    n: int,
    continuations: int,
    gated: int,
    method: str,
    rule: str,
    rule_options: Mapping[str, Any],
    gradients: str | Path | None,
    seed: int,
    max_tokens: int,
    max_new_tokens: int,
    identify: LanguageIdentifier,
    reserved: Sequence[Task],
    progress: bool,
) -> SetUp:
    """Choose heads on ``n`` texts a language, pass the model through the gate on ``gated`` others, and set
    ``continuations`` more aside.

    The gate looks at other texts than the test, or a language would come in by its lucky draws.

    Args:
        reserved: tasks about texts of the corpus, which are for the test alone.
    """
    grads, heads, aside = choose_and_set_aside(
        model,
        languages,
        n,
        continuations + gated,
        method,
        rule,
        seed,
        rule_options,
        gradients,
        {task.id for task in reserved},
        max_tokens=max_tokens,
        progress=progress,
    )
    tasks: list[Task] = []
    if continuations:
        tested, aside = aside.split(continuations, seed=seed)
        tasks = continuation_tasks(tested)
    gate = competence(
        model,
        aside,
        identify=identify,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    card = {"model": grads.card["model"], "heads": heads.card, "rule": heads.rule}
    card |= {"method": method, "seed": seed, "max_new_tokens": max_new_tokens}
    return SetUp(heads, tasks, gate, card | {"writes": gate.writes})


def drawn_sets(
    conditions: Conditions, general: lt.HeadSet, draws: int, seed: int
) -> dict[str, dict[str, list[lt.HeadSet]]]:
    """For each condition and language, matched random sets; never general heads, which break any text.

    Raises:
        ValueError: a condition without heads in a language, or one that cannot be matched.
    """
    found: dict[str, dict[str, list[lt.HeadSet]]] = {}
    for condition, sets in conditions.items():
        empty = [code for code, members in sets.items() if not len(members)]
        if empty:
            raise ValueError(
                f"{condition}: there are none for {', '.join(empty)}; take another rule, more heads (a larger "
                "fraction, a lower quantile) or other languages"
            )
        exclude = [head for head in general if not any(head in s for s in sets.values())]
        by_set = {
            members: lt.matched_random_heads(
                members, draws, match="nearest", exclude=exclude, seed=seed
            )
            for members in set(sets.values())
        }
        fewest = min(map(len, by_set.values()))
        found[condition] = {code: by_set[members][:fewest] for code, members in sets.items()}
    return found


def labels_of(conditions: Conditions) -> dict[str, dict[str, list[str]]]:
    """What the heads of each condition are, for cards."""
    return {name: {c: s.labels for c, s in sets.items()} for name, sets in conditions.items()}


def generate_under(
    model: LensModel,
    tasks: Sequence[Task],
    conditions: Conditions,
    drawn: Mapping[str, Mapping[str, Sequence[lt.HeadSet]]],
    *,
    factor: float,
    identify: LanguageIdentifier,
    second: LanguageIdentifier | None,
    seed: int,
    parts: Parts,
    **options: Any,
) -> list[dict[str, Any]]:
    """Every prompt without a mask, under each condition, and under each of its matched random sets.

    A condition is asked in the languages that it has heads for.

    Returns:
        one row a prompt, condition and draw (-1: no random set), with the text and its measures.
    """

    def ask(
        sets: Mapping[str, lt.HeadSet] | None, condition: str, draw: int
    ) -> list[dict[str, Any]]:
        name = f"{condition} {draw if draw >= 0 else 'own'}"
        return parts.rows(name, lambda: make(sets, condition, draw))

    def make(
        sets: Mapping[str, lt.HeadSet] | None, condition: str, draw: int
    ) -> list[dict[str, Any]]:
        asked, masks = list(enumerate(tasks)), None
        if sets is not None:
            by_language = {code: lt.HeadMask.scaling(s, factor) for code, s in sets.items()}
            asked = [(i, task) for i, task in asked if task.language in by_language]
            masks = [by_language[task.language] for _, task in asked]
        prompts = [task.prompt for _, task in asked]
        texts = lt.generate(model, prompts, masks, seed=seed, **options).texts
        rows = [
            {"condition": condition, "draw": draw, "number": i, **asdict(task), "text": text}
            for (i, task), text in zip(asked, texts, strict=True)
        ]
        return judge_texts(rows, identify, second).to_dict("records")

    found = ask(None, NONE, -1)
    for condition, sets in conditions.items():
        found += ask(sets, condition, -1)
        for draw in range(len(next(iter(drawn[condition].values())))):
            found += ask({c: each[draw] for c, each in drawn[condition].items()}, condition, draw)
    return found


def against_random(
    rows: pd.DataFrame, measure: str, expected: Mapping[str, int], by: str | None = None
) -> pd.DataFrame:
    """Each condition's mean of a measure, its change against no mask, and the same of the random sets.

    Args:
        expected: condition → the direction that is claimed, 1 or -1; p is one-sided in it. One that was not asked
            has no row.
        by: a column; one row for each of its values.

    Returns:
        condition, ``by``, value, change with its paired interval over prompts (translations of one count as one),
        random_change, p (at least 1 / (draws + 1)), texts, prompts, draws.
    """
    groups = [(None, rows)] if by is None else list(rows.groupby(by, sort=False))
    table = []
    for key, group in groups:
        plain = under(group, NONE).set_index("number")[measure].astype(float)
        moved = group.assign(change=group[measure].astype(float) - group["number"].map(plain))
        named = {} if by is None else {by: key}
        table.append(
            {"condition": NONE, **named, "value": float(plain.mean()), "texts": len(plain)}
        )
        for condition, direction in expected.items():
            of = under(moved, condition)
            own, random = of.query("draw < 0"), of.query("draw >= 0")
            if own.empty:  # no heads to take away
                continue
            # Translations of one prompt are no independent witnesses.
            each = [float(g["change"].mean()) for _, g in own.groupby(["task", "id"], sort=False)]
            spread = mean_interval(torch.tensor(each))
            change = Interval(float(own["change"].mean()), spread.lower, spread.upper)
            drawn = torch.tensor(means_by_draw(random, "change"))
            table.append(
                {"condition": condition, **named}
                | {"value": float(own[measure].astype(float).mean())}
                | {"change": change.value, "lower": change.lower, "upper": change.upper}
                | {"random_change": float(drawn.mean())}
                | {"p": empirical_p(direction * change.value, direction * drawn)}
                | {"texts": len(own), "prompts": len(each), "draws": len(drawn)}
            )
    return pd.DataFrame(table)


def random_changes(rows: pd.DataFrame, measure: str) -> dict[str, list[float]]:
    """Condition → the mean change of a measure under each of its random sets."""
    plain = under(rows, NONE).set_index("number")[measure].astype(float)
    moved = rows.assign(change=rows[measure].astype(float) - rows["number"].map(plain))
    return {
        str(condition): means_by_draw(group, "change")
        for condition, group in moved.query("draw >= 0").groupby("condition", sort=False)
    }
