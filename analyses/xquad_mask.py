"""Tune some 20 numbers for question answering: the best heads beside random heads, all heads, other languages' masks.

The paper's last experiment, judged honestly: split by paragraph (the same ones in all languages), several training
seeds, random heads at equal data, exact match and F1 beside the paper's substring measure, the answer's NLL.

python -m analyses.xquad_mask                     # the bundled questions, three languages
python -m analyses.xquad_mask --quick
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from scipy.stats import binomtest

import lahis_tl as lt
from analyses.command_line import run_from_command_line
from analyses.result import Parts, Result, model_of, shared_gradients, under
from lahis_tl.access import LensModel
from lahis_tl.heads import top_heads
from lahis_tl.pairs import encode_pairs, target_losses
from lahis_tl.questions import (
    Question,
    answer_scores,
    load_questions,
    question_pair,
    question_prompt,
    split_by_paragraph,
)
from lahis_tl.statistics import Interval, bootstrap_means, percentile_interval, resample_counts

NONE, BEST, RANDOM = "no mask", "best heads", "random heads"
ALL, OTHER = "all heads", "other language"
MEASURES = ("nll", "exact", "f1", "contains")


def run(
    model: LensModel | str = "smollm2",
    languages: Sequence[str] = ("en", "fr", "es"),
    n: int = 40,
    source: str = "bundled",
    top_k: int = 20,
    method: str = "lahis",
    shares: tuple[float, float, float] = (0.4, 0.1, 0.5),
    epochs: int = 4,
    learning_rate: float = 1e-2,
    training_seeds: int = 3,
    random_sets: int = 5,
    adapters: Sequence[str] = (),
    max_tokens: int = 64,
    max_new_tokens: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    checkpoint: str | Path | None = "out/xquad_mask/parts",
    gradients: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Answers to unseen paragraphs' questions, under masks that were tuned on others.

    Args:
        n, max_tokens: texts a language of the bundled corpus that heads are scored on, and where they are cut;
            paragraphs that are asked about are not among them. If the corpus lacks one of the languages, all are
            scored on the training paragraphs.
        gradients: a folder of gradients that experiments share; nothing is kept if None.
        source: of ``load_questions``.
        shares: of the paragraphs for training, validation (which keeps the best epoch) and testing.
        training_seeds: orders of the training pairs, for the best heads and for all heads; random sets have one each.
        max_new_tokens: of an answer; room for the longest right one if None.
        adapters: ``"ia3"``, ``"lora"``: trained by ``peft`` on the same pairs, if it is installed.
    """
    model = model_of(model, dtype=dtype)
    questions = load_questions(source, languages)
    train, valid, test = split_by_paragraph(questions, shares, seed)
    scoring = _scoring_texts(languages, questions, train, n, seed)
    bounds: dict[str, Any] = {"max_tokens": max_tokens, "progress": progress}
    scores = lt.score(shared_gradients(model, scoring, gradients, **bounds), method)
    best = {code: top_heads(scores[code], top_k) for code in languages}
    options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate}
    card: dict[str, Any] = {"model": scores.card["model"]}
    card["settings"] = {**options, "source": source, "seed": seed}
    card["settings"] |= {"top_k": top_k, "method": method, "shares": list(shares), "n": n}
    card["sets"] = {code: heads.labels for code, heads in best.items()}
    longest = max(
        len(pair.ids) - pair.n_prompt
        for part in questions.values()
        for pair in encode_pairs(model, [question_pair(q) for q in part])
    )
    room = longest + 2 if max_new_tokens is None else max_new_tokens
    card["settings"]["max_new_tokens"] = room
    asked = [(question_pair(q), q.answers) for part in questions.values() for q in part]
    parts = Parts(checkpoint, card | {"questions": asked})
    grid = best[languages[0]].grid
    everything = lt.HeadSet.from_flat(grid, range(grid.size))

    masks: dict[tuple[str, str, int], lt.HeadMask] = {}
    costs = []

    def tuned(code: str, heads: lt.HeadSet, condition: str, number: int) -> None:
        def make() -> list[dict[str, Any]]:
            start = time.perf_counter()
            found = lt.tune_mask(
                model,
                [question_pair(q) for q in train[code]],
                heads,
                validation=[question_pair(q) for q in valid[code]],
                seed=seed + number,
                progress=progress,
                **options,
            )
            seconds = time.perf_counter() - start
            kept = found.card["settings"]["kept_epoch"]
            return [{"factors": found.factors.tolist(), "seconds": seconds, "kept_epoch": kept}]

        (row,) = parts.rows(f"mask {code} {condition} {number}", make)
        masks[code, condition, number] = lt.HeadMask(torch.tensor(row["factors"]))
        costs.append(
            {"language": code, "condition": condition, "number": number, "parameters": len(heads)}
            | {"kept_epoch": row["kept_epoch"], "seconds": row["seconds"]}
        )

    for code in languages:
        for number in range(training_seeds):
            tuned(code, best[code], BEST, number)
        drawn = lt.matched_random_heads(best[code], random_sets, match="nearest", seed=seed)
        for number, heads in enumerate(drawn):
            tuned(code, heads, RANDOM, number)
        for number in range(training_seeds):
            tuned(code, everything, ALL, number)

    records: list[dict[str, Any]] = []
    for code in languages:
        wanted: list[tuple[str, int, str, lt.HeadMask | None]] = [(NONE, 0, code, None)]
        wanted += [(c, i, code, mask) for (own, c, i), mask in masks.items() if own == code]
        wanted += [(OTHER, 0, o, masks[o, BEST, 0]) for o in languages if o != code]
        for condition, number, mask_of, mask in wanted:
            records += parts.rows(
                f"answers {code} {condition} {number} {mask_of}",
                lambda c=code, n=condition, i=number, o=mask_of, m=mask: [
                    {"condition": n, "number": i, "language": c, "mask_of": o, **row}
                    for row in answers(model, test[c], m, room, progress)
                ],
            )
    for name in adapters:
        from analyses.adapters import adapter_answers

        for code in languages:

            def adapted(name: str = name, code: str = code) -> list[dict[str, Any]]:
                found, cost = adapter_answers(
                    model, name, train[code], valid[code], test[code], epochs, room, seed
                )
                about = {"condition": name, "number": 0, "language": code, "mask_of": code}
                return [{**about, "cost": cost, **row} for row in found]

            rows = parts.rows(f"answers {code} {name}", adapted)
            costs.append({"language": code, "condition": name, "number": 0, **rows[0]["cost"]})
            records += [{k: v for k, v in row.items() if k != "cost"} for row in rows]
    card["costs"] = costs
    tables, figures, verdict = report(records, card)
    return Result("xquad_mask", tables, figures, verdict, card, {"answers": records})


def _scoring_texts(
    languages: Sequence[str],
    questions: Mapping[str, Sequence[Question]],
    train: Mapping[str, Sequence[Question]],
    n: int,
    seed: int,
) -> lt.Corpus:
    """Bundled texts that no question is about; the training paragraphs in languages that are not bundled."""
    bundled = lt.load_corpus("bundled")
    if set(languages) <= set(bundled.languages):
        corpus = bundled.select(languages)
        asked = {q.context for part in questions.values() for q in part}
        rows = [
            i
            for i in range(len(corpus.ids or ()))
            if not any(corpus[code][i] in asked for code in languages)
        ]
        texts = {code: [corpus[code][i] for i in rows] for code in languages}
    else:
        texts = {c: list(dict.fromkeys(q.context for q in train[c])) for c in languages}
    fewest = min(map(len, texts.values()))
    return lt.load_corpus(texts).sample(min(n, fewest), seed)


def answers(
    model: LensModel,
    questions: Sequence[Question],
    mask: lt.HeadMask | None,
    max_new_tokens: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Each question's generated answer, how right it is, and the NLL of the right one."""
    # Without the end of the line, which any training teaches first.
    pairs = [(prompt, target.rstrip("\n")) for prompt, target in map(question_pair, questions)]
    nll = target_losses(model, pairs, mask, progress=progress)
    texts = lt.generate(
        model,
        [question_prompt(q) for q in questions],
        mask,
        max_new_tokens=max_new_tokens,
        stop="\n",
        progress=progress,
    ).texts
    return [
        {
            "id": q.id,
            "paragraph": q.paragraph,
            "text": text,
            "nll": float(loss),
            **answer_scores(text, q),
        }
        for q, text, loss in zip(questions, texts, nll, strict=True)
    ]


def report(
    records: Sequence[Mapping[str, Any]], card: Mapping[str, Any]
) -> tuple[dict[str, pd.DataFrame], dict[str, go.Figure], str]:
    """Tables, figures and verdict from the saved answers alone."""
    rows = pd.DataFrame(records)
    conditions = pd.DataFrame(
        [
            _condition(rows, code, condition)
            for code in dict.fromkeys(rows["language"])
            for condition in dict.fromkeys(rows["condition"])
        ]
    )
    costs = pd.DataFrame(card["costs"])
    parameters = dict(zip(costs["condition"], costs["parameters"], strict=True))
    parameters[OTHER] = parameters[BEST]
    conditions.insert(
        2, "parameters", conditions["condition"].map(parameters).fillna(0).astype(int)
    )
    transfer = pd.DataFrame(_transfer(rows))
    tables = {"conditions": conditions, "transfer": transfer, "costs": costs}
    return tables, _figures(conditions, transfer, card), _verdict(conditions, costs)


def _condition(rows: pd.DataFrame, language: str, condition: str) -> dict[str, Any]:
    """Means over questions (and seeds or sets), paired changes against no mask, McNemar's test of exact match."""
    here = pd.DataFrame(rows[rows["language"] == language])
    plain, own = under(here, NONE).set_index("id"), under(here, condition)
    found: dict[str, Any] = {"language": language, "condition": condition}
    found |= {"questions": own["id"].nunique(), "paragraphs": own["paragraph"].nunique()}
    found["runs"] = len(own.groupby(["number", "mask_of"]))
    for measure in MEASURES:
        found[measure] = float(own[measure].mean())
        change = _paired(own, plain, measure)
        found |= {
            f"{measure}_change": change.value,
            f"{measure}_lower": change.lower,
            f"{measure}_upper": change.upper,
        }
    runs = [run for _, run in own.groupby(["number", "mask_of"], sort=False)]
    ps = [_mcnemar(run, plain) for run in runs]
    losses = [float(run["nll"].mean()) for run in runs]
    found |= {"mcnemar_p_least": min(ps), "mcnemar_p_greatest": max(ps)}
    found |= {"nll_lowest_run": min(losses), "nll_highest_run": max(losses)}
    for other in (RANDOM, ALL) if condition == BEST else ():
        base, stem = under(here, other), other.split()[0]
        for measure in ("nll", "f1", "exact"):
            against, name = _against(own, base, measure), f"{measure}_against_{stem}"
            found |= {name: against.value, f"{name}_lower": against.lower}
            found |= {f"{name}_upper": against.upper}
        found[f"{stem}_runs"] = base["number"].nunique()
    return found


def _each(rows: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """The mean over runs of every question."""
    return pd.DataFrame(rows.groupby("id", sort=False)[list(measures)].mean())


def _mcnemar(run: pd.DataFrame, plain: pd.DataFrame) -> float:
    """Exact McNemar test of exact match, two-sided; questions of one paragraph are taken as independent."""
    now = run.set_index("id")["exact"]
    before = plain["exact"].reindex(now.index)
    gained, lost = int((now > before).sum()), int((now < before).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _paired(own: pd.DataFrame, plain: pd.DataFrame, measure: str) -> Interval:
    """The mean change of each question over runs, with its bootstrap interval over paragraphs."""
    each = _each(own, [measure])[measure] - plain[measure]
    by_paragraph = each.groupby(plain["paragraph"]).agg(["sum", "count"])
    pair = torch.tensor(by_paragraph.to_numpy(), dtype=torch.float64)
    draws = bootstrap_means(pair)
    return percentile_interval(float(each.mean()), draws[:, 0] / draws[:, 1], 0.95)


def _against(own: pd.DataFrame, other: pd.DataFrame, measure: str) -> Interval:
    """The mean difference from another condition, with an interval over paragraphs and over the other's runs."""
    mine = _each(own, [measure])[measure]
    gain = other["id"].map(mine) - other[measure]
    # paragraph × run, the number of a paragraph's questions being the same in every run
    cells = other.assign(gain=gain).pivot_table("gain", "paragraph", "number", ["sum", "count"])
    sums, counts = (torch.tensor(cells[kind].to_numpy()).float() for kind in ("sum", "count"))
    paragraphs = resample_counts(len(sums), 2000, 0)
    runs = resample_counts(sums.shape[1], 2000, 1)
    draws = (paragraphs @ sums * runs).sum(1) / (paragraphs @ counts * runs).sum(1)
    return percentile_interval(float(gain.mean()), draws, 0.95)


def _transfer(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The first mask of each language's best heads on each language's questions: change of the answer's NLL."""
    found = []
    for language in dict.fromkeys(rows["language"]):
        here = pd.DataFrame(rows[rows["language"] == language])
        plain = under(here, NONE).set_index("id")
        own = under(here, BEST)
        tested = pd.concat([own[own["number"] == 0], under(here, OTHER)])
        for mask_of, group in tested.groupby("mask_of", sort=False):
            change = _paired(pd.DataFrame(group), plain, "nll")
            found.append(
                {"mask_of": mask_of, "questions_in": language, "change": change.value}
                | {"lower": change.lower, "upper": change.upper}
            )
    return sorted(found, key=lambda row: str(row["mask_of"]))


def _figures(
    conditions: pd.DataFrame, transfer: pd.DataFrame, card: Mapping[str, Any]
) -> dict[str, go.Figure]:
    n = int(conditions["questions"].max())
    about = lt.plots.about_card(card, f"{n} questions a language, 95% intervals over paragraphs")
    figures = {}
    for measure, title in (
        ("nll", "NLL of the right answer (nats per token)"),
        ("f1", "F1 of the generated answer"),
    ):
        figure = go.Figure()
        shown = conditions[conditions["condition"] != NONE]
        for i, (condition, rows) in enumerate(shown.groupby("condition", sort=False)):
            figure.add_bar(
                x=rows["language"],
                y=rows[f"{measure}_change"],
                name=str(condition),
                marker_color=lt.plots.CATEGORICAL[i],
                error_y={
                    "array": rows[f"{measure}_upper"] - rows[f"{measure}_change"],
                    "arrayminus": rows[f"{measure}_change"] - rows[f"{measure}_lower"],
                    "thickness": 1,
                },
            )
        lt.plots.dress(figure, f"Tuned masks: change of the {title}", about)
        figure.update_layout(width=820, height=440, barmode="group", legend_title="tuned")
        figure.update_xaxes(title_text="language")
        figures[measure] = figure.update_yaxes(title_text="change against no mask")
    figures["transfer"] = lt.plots.square(
        transfer,
        ("mask_of", "questions_in", "change"),
        "One language's mask on another's questions",
        about,
        "change of the<br>answer's NLL",
        ("mask tuned on", "questions in"),
    )
    return figures


def _verdict(conditions: pd.DataFrame, costs: pd.DataFrame) -> str:
    parts = []
    for language, rows in conditions.groupby("language", sort=False):
        by = {row["condition"]: row for row in rows.to_dict("records")}
        best, random = by[BEST], by[RANDOM]
        parts.append(
            f"{language}: NLL {by[NONE]['nll']:.2f}, best heads {best['nll_change']:+.2f} [{best['nll_lower']:.2f}, "
            f"{best['nll_upper']:.2f}], random {random['nll_change']:+.2f} (best minus random "
            f"{best['nll_against_random']:+.2f} [{best['nll_against_random_lower']:.2f}, "
            f"{best['nll_against_random_upper']:.2f}]), all {by[ALL]['nll_change']:+.2f}; F1 {by[NONE]['f1']:.2f} "
            f"{best['f1_change']:+.2f} [{best['f1_lower']:.2f}, {best['f1_upper']:.2f}], random "
            f"{random['f1_change']:+.2f}; exact {by[NONE]['exact']:.2f} {best['exact_change']:+.2f}"
        )
    seconds = costs[costs["condition"] == BEST]["seconds"].max()
    return f"Answers on unseen paragraphs. {'. '.join(parts)}. Tuning took {seconds:.0f} s at most for the best heads."


if __name__ == "__main__":
    run_from_command_line(
        run,
        __doc__,
        {
            "languages": ("en", "fr"),
            "n": 16,
            "epochs": 2,
            "training_seeds": 1,
            "random_sets": 2,
            "shares": (0.25, 0.125, 0.25),
            "checkpoint": None,
        },
    )
