"""What happens inside while two languages contradict each other: attention on each statement, and the logit lens.

Measured once, kept, and drawn from what was kept: ``measure_attention`` and ``lens_records`` need the model,
``draw_attention`` and ``draw_lens`` do not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

import lahis_tl as lt
from analyses.result import under
from lahis_tl.access import LensModel
from lahis_tl.attention import AttentionMass, Spans, attention_mass
from lahis_tl.lens import logit_lens
from lahis_tl.patterns import head_pattern
from lahis_tl.statistics import mean_interval
from lahis_tl.transfer import Conflict, answer_tokens

# condition → a mask for each prompt, or none.
ConditionMasks = Mapping[str, Sequence[lt.HeadMask] | None]
STATEMENTS = ("first", "second")


def measure_attention(
    model: LensModel,
    items: Sequence[Conflict],
    masks: Sequence[lt.HeadMask],
    progress: bool = True,
) -> tuple[AttentionMass, AttentionMass, dict[str, Any]]:
    """Attention of the last position on the two statements without and with masks; one head's pattern to look at.

    Returns:
        mass before, mass after, and a record of the head that looks at the statements most on the first prompt.
    """
    texts = [item.prompt for item in items]
    spans: list[Spans] = [dict(zip(STATEMENTS, item.spans, strict=True)) for item in items]
    before = attention_mass(model, texts, spans, progress=progress)
    after = attention_mass(model, texts, spans, masks, progress=progress)
    looking = (before["first"] + before["second"]).mean(0)
    head = before.grid.head(int(looking.argmax()))
    tokens, pattern = head_pattern(model, texts[0], head)
    record = {"head": head.label, "first": items[0].first, "second": items[0].second}
    return before, after, {**record, "tokens": tokens, "pattern": pattern.tolist()}


def draw_attention(
    before: AttentionMass,
    after: AttentionMass,
    pattern: Mapping[str, Any],
    masked_by: str,
    card: Mapping[str, Any],
) -> tuple[pd.DataFrame, dict[str, go.Figure]]:
    """The table and the figures of what ``measure_attention`` found.

    Args:
        masked_by: what the masks do, for the titles.
    """
    table = before.to_dataframe().merge(
        after.to_dataframe(), on=["layer", "head", "label"], suffixes=("", "_after")
    )
    figures = {
        f"attention_{part}": lt.plots.attention_change(before, after, part, masked_by)
        for part in STATEMENTS
    }
    figures["pattern"] = lt.plots.attention_pattern(
        pattern["tokens"],
        torch.tensor(pattern["pattern"]),
        f"Attention pattern of {pattern['head']}, the head that looks at the statements most",
        lt.plots.about_card(card, f"{pattern['first']} against {pattern['second']}, no mask"),
    )
    return table, figures


def lens_records(
    model: LensModel, items: Sequence[Conflict], masks: ConditionMasks
) -> list[dict[str, Any]]:
    """Log-probabilities of both answers after each layer: one row a condition, prompt and layer (nats)."""
    texts, targets = [item.prompt for item in items], [answer_tokens(model, item) for item in items]
    rows = []
    for condition, each in masks.items():
        nats = logit_lens(model, texts, targets, each)
        rows += [
            {"condition": condition, "prompt": prompt, "layer": layer}
            | {"first": first, "second": second}
            for prompt, layers in enumerate(nats.tolist())
            for layer, (first, second) in enumerate(layers)
        ]
    return rows


def draw_lens(
    records: Sequence[Mapping[str, Any]], plain: str, card: Mapping[str, Any]
) -> tuple[pd.DataFrame, go.Figure]:
    """First answer minus second after each layer, and how each mask moves it.

    Args:
        plain: the condition that the others are compared with.
    """
    rows = pd.DataFrame(records)
    rows["difference"] = rows["first"] - rows["second"]
    unmasked = under(rows, plain).set_index(["prompt", "layer"])["difference"]
    keys = pd.MultiIndex.from_frame(pd.DataFrame(rows[["prompt", "layer"]]))
    rows["change"] = rows["difference"].to_numpy() - unmasked.reindex(keys).to_numpy()
    table = []
    for key, group in rows.groupby(["condition", "layer"], sort=False):
        condition, layer = key  # type: ignore[misc]
        moved = mean_interval(torch.tensor(group["change"].to_numpy()))
        means = group[["first", "second", "difference"]].mean().to_dict()
        table.append(
            {"condition": condition, "layer": layer, **means}
            | {"change": moved.value, "lower": moved.lower, "upper": moved.upper}
        )
    found = pd.DataFrame(table)
    masked = found[found["condition"] != plain]
    figure = lt.plots.curves(
        sorted(map(float, found["layer"].unique())),
        {
            str(condition): (
                group["change"].tolist(),
                group["lower"].tolist(),
                group["upper"].tolist(),
            )
            for condition, group in masked.groupby("condition", sort=False)
        },
        title="Logit lens: how each mask moves the two answers, layer by layer",
        about=lt.plots.about_card(
            card, f"{rows['prompt'].nunique()} prompts, 95% intervals over prompts"
        ),
        x_title="after layer",
        y_title="change of log-probability,<br>first minus second answer (nats)",
        legend="heads scaled",
    )
    return found, figure
