"""Experiments on transfer and generated text: they run end to end on a tiny model, and their reports, made from saved
records alone, say what made-up records hold."""

import json
from pathlib import Path

import pandas as pd
import pytest
from torch import nn

import lahis_tl as lt
from analyses import attention_transfer, general_heads, generating, off_target, transfer_inside
from analyses.generating import NONE, against_random
from analyses.result import Parts, Result, scored_ids
from lahis_tl.identify import language_identifier
from lahis_tl.records import load_records
from lahis_tl.tasks import Task, summary_tasks
from lahis_tl.transfer import conflicts

LANGUAGES = ("en", "fr", "de")
SMALL = {
    "n": 6,
    "draws": 3,
    "max_tokens": 24,
    "fraction": 0.25,
    "checkpoint": None,
    "progress": False,
}


def check(result: Result, tmp_path: Path, records: str, report) -> dict:
    """What was saved makes the same tables and verdict again, without the model."""
    page = result.save(tmp_path / result.name)
    assert "<script" in page.read_text()
    rows, _ = load_records(page.parent / records)
    card = json.loads((page.parent / "card.json").read_text())
    tables, figures, verdict = report(rows, card)
    assert verdict == result.verdict
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, result.tables[name])
    assert set(figures) <= set(result.figures)
    return tables


def test_attention_transfer_runs(speaker: nn.Module, tmp_path: Path) -> None:
    result = attention_transfer.run(speaker, LANGUAGES, prompts=1, factors=(0.0, 2.0), **SMALL)
    tables = check(result, tmp_path, "answers", attention_transfer.report)
    assert len(tables["pairs"]) == 6 * 4
    assert tables["conditions"]["prompts"].tolist() == [18] * 4
    assert tables["conditions"]["draws"].tolist()[1:] == [3] * 3
    assert tables["conditions"]["change"][0] == 0.0
    sweep = tables["sweep"].set_index("factor")
    assert sweep.loc[1.0, "change"] == 0.0
    assert sweep.loc[2.0, "change"] != 0.0
    lens = result.tables["lens"].query("condition == 'no mask' and layer == 2")
    plain = tables["conditions"]["logit_difference"][0]
    assert float(lens["difference"].iloc[0]) == pytest.approx(plain, abs=1e-3), (
        "the last layer is the output"
    )
    assert {"attention_first", "attention_second", "pattern", "lens"} <= set(result.figures)


def test_what_happened_inside_is_drawn_again_from_what_was_saved(
    speaker: nn.Module, tmp_path: Path
) -> None:
    result = attention_transfer.run(speaker, LANGUAGES, prompts=1, factors=(), **SMALL)
    result.save(tmp_path)
    (pattern,), card = load_records(tmp_path / "pattern")
    before, after = (lt.load(tmp_path / f"attention_{when}") for when in ("before", "after"))
    table, figures = transfer_inside.draw_attention(before, after, pattern, "masked", card)
    pd.testing.assert_frame_equal(table, result.tables["attention"])
    shown = figures["pattern"].data[0].z
    assert (shown == result.figures["pattern"].data[0].z).all()
    rows, card = load_records(tmp_path / "lens_prompts")
    table, figure = transfer_inside.draw_lens(rows, NONE, card)
    pd.testing.assert_frame_equal(table, result.tables["lens"])
    assert [t.name for t in figure.data] == [t.name for t in result.figures["lens"].data]


def test_masks_scale_each_prompts_own_languages() -> None:
    grid = lt.HeadGrid(2, 2)
    sets = {"fr": lt.HeadSet(grid, ["L0H0", "L1H1"]), "de": lt.HeadSet(grid, ["L1H1"])}
    items = [*conflicts("fr", "de", ["job"], 1), *conflicts("de", "fr", ["job"], 1)]
    first, second = attention_transfer.masks_of(items, sets, 3.0, 0.5)
    assert first.factors.tolist() == [[3.0, 1.0], [1.0, 1.5]]
    assert second.factors.tolist() == [[0.5, 1.0], [1.0, 1.5]]


def test_a_made_up_transfer_is_reported_as_it_is() -> None:
    def row(prompt: int, condition: str, difference: float, says: str, draw: int = -1) -> dict:
        return {
            "condition": condition,
            "draw": draw,
            "factor": 1.0,
            "prompt": prompt,
            "first": "fr",
        } | {
            "second": "de",
            "relation": "job",
            "logit_difference": difference,
            "rank_first": 1,
            "rank_second": 2,
            "says": says,
            "text": "",
        }

    rows = [row(i, NONE, -1.0, "second") for i in range(4)]
    for condition, gain in (("first enhanced", 2.0), ("second weakened", 0.0), ("both", 3.0)):
        rows += [row(i, condition, gain - 1.0, "first" if gain else "second") for i in range(4)]
        rows += [row(i, condition, -0.5, "neither", d) for d in range(9) for i in range(4)]
    tables, _, verdict = attention_transfer.report(rows, {"model": {"name": "made up"}})
    found = tables["conditions"].set_index("condition")
    assert found["change"].to_dict() == {
        NONE: 0.0,
        "first enhanced": 2.0,
        "second weakened": 0.0,
        "both": 3.0,
    }
    assert found.loc["both", "random_change"] == 0.5
    assert found.loc["both", "p_change"] == pytest.approx(0.1)
    assert found.loc["second weakened", "p_change"] == 1.0
    assert found.loc["both", "says_first"] == 1.0
    assert "1 of 1 ordered pairs move towards the first language" in verdict


def test_off_target_runs(
    speaker: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generating.competence

    def french_alone(*arguments, **options):
        found = real(*arguments, **options)
        found.table["writes"] = found.table["language"] == "fr"
        return found

    class French:
        name = "french"

        def __call__(self, text: str) -> tuple[str, float]:
            return ("fr", 1.0) if text.strip() else ("und", 0.0)

    monkeypatch.setattr(off_target, "language_identifier", lambda name: French())
    monkeypatch.setattr(generating, "competence", french_alone)
    result = off_target.run(speaker, LANGUAGES, prompts=2, max_new_tokens=30, **SMALL)
    own = pd.DataFrame(result.records["generations"])
    assert len(own) == (3 * 3 * 2) * (1 + 3 + 3 * 3), (
        "prompts × (no mask, conditions, draws of each)"
    )
    assert set(own["task"]) == {"continuation", "summary", "instruction"}
    assert own.query("task == 'continuation'")["reference"].notna().all()
    assert (own.query("language == 'de'")["line_pass"] == False).all()  # noqa: E712
    assert result.card["writes"] == ["fr"]
    check(result, tmp_path, "generations", off_target.report)
    with pytest.raises(ValueError, match="'en' must be among the languages"):
        off_target.run(speaker, ("fr", "de"))


def generation(i: int, condition: str, good: bool, draw: int = -1, language: str = "fr") -> dict:
    return {
        "condition": condition, "draw": draw, "number": i, "task": "summary", "id": str(i),
        "language": language, "text": "",
        "identified": language if good else "en", "short": False, "empty": False, "line_pass": good, "word_pass": None,
        "passes": good, "distinct_3": 1.0, "repetitive": False, "copy_rate": 0.0, "agree": True,
        "chrf": 50.0 if good else 20.0,
    }  # fmt: skip


def test_made_up_generations_are_reported_as_they_are() -> None:
    rows = [generation(i, NONE, i < 5) for i in range(10)]
    for condition, right in (("English heads", 10), ("own heads", 0), ("general heads", 5)):
        rows += [generation(i, condition, i < right) for i in range(10)]
        rows += [generation(i, condition, i < 5, d) for d in range(9) for i in range(10)]
    # A language that the model cannot write must not count.
    rows += [
        generation(10 + i, c, False, language="zh")
        for c in (NONE, "English heads", "own heads", "general heads")
        for i in range(10)
    ]
    card = {"model": {"name": "made up"}, "writes": ["en", "fr"]}
    tables, _, verdict = off_target.report(rows, card)
    found = tables["effects"].set_index("condition")
    assert found["value"].to_dict() == {
        NONE: 0.5,
        "English heads": 1.0,
        "own heads": 0.0,
        "general heads": 0.5,
    }
    assert found["change"].fillna(0).tolist() == [0.0, 0.5, -0.5, 0.0]
    assert found.loc["English heads", "p"] == pytest.approx(0.1)
    assert found.loc["own heads", "p"] == pytest.approx(0.1)
    assert found.loc["general heads", "p"] == 1.0
    assert verdict.startswith("Without a mask 50% of 10 texts in fr are in the right language")
    rates = tables["rates"].set_index(["condition", "language"])
    assert not rates.loc[(NONE, "zh"), "writes"]
    nothing = off_target.report(rows, {**card, "writes": ["en"]})
    assert nothing[2] == "The model writes en: there is none but English to be on target in."


def test_the_interval_is_paired_over_prompts() -> None:
    rows = [generation(i, NONE, i % 2 == 0) for i in range(20)]
    rows += [generation(i, "off", i % 2 == 0) for i in range(20)]
    rows += [generation(i, "off", True, 0) for i in range(20)]
    found = against_random(pd.DataFrame(rows), "line_pass", {"off": -1}).iloc[1]
    assert (found["change"], found["lower"], found["upper"]) == (0.0, 0.0, 0.0)
    assert found["random_change"] == 0.5


def test_a_condition_is_asked_where_it_has_heads(speaker: nn.Module) -> None:
    heads = lt.HeadSet(lt.grid_of(speaker), ["L0H1", "L1H2"])
    other = lt.HeadSet(lt.grid_of(speaker), ["L2H0", "L2H5"])
    tasks = [
        Task("summary", code, str(i), "Le chat", "a cat") for i, code in enumerate(["en", "fr"])
    ]
    records = generating.generate_under(
        speaker,
        tasks,
        {"all": {"en": heads, "fr": heads}, "own": {"fr": heads}},
        {"all": {"en": [other], "fr": [other]}, "own": {"fr": [other]}},
        factor=0.0,
        identify=language_identifier(),
        second=None,
        seed=0,
        parts=Parts(None, {}),
        max_new_tokens=3,
        progress=False,
    )
    asked = {(row["condition"], row["draw"], row["number"], row["language"]) for row in records}
    everywhere = {(NONE, -1), ("all", -1), ("all", 0)}
    assert asked == {
        *((c, draw, i, code) for c, draw in everywhere for i, code in enumerate(["en", "fr"])),
        ("own", -1, 1, "fr"),
        ("own", 0, 1, "fr"),
    }
    rows = pd.DataFrame(records).assign(chrf=1.0)
    found = against_random(rows, "chrf", {"all": -1, "own": -1, "never asked": -1}, "language")
    assert found[["language", "condition"]].to_numpy().tolist() == [
        ["en", NONE],
        ["en", "all"],
        ["fr", NONE],
        ["fr", "all"],
        ["fr", "own"],
    ]
    assert found["texts"].tolist() == [1] * 5


def test_summaries_in_languages_that_the_model_cannot_write_do_not_count() -> None:
    rows = [generation(i, NONE, True) for i in range(6)]
    for condition in ("general heads", "own specific heads"):
        rows += [generation(i, condition, i < 3) for i in range(6)]
        rows += [generation(i, condition, True, d) for d in range(4) for i in range(6)]
    foreign = [{**row, "language": "zh", "number": row["number"] + 6, "chrf": 0.0} for row in rows]
    card = {"model": {"name": "made up"}, "writes": ["fr"], "measure": "chrf"}
    tables, _, verdict = general_heads.report([*rows, *foreign], card)
    found = tables["effects"].set_index("condition")
    assert found.loc[NONE, "value"] == 50.0
    assert found.loc["general heads", "change"] == -15.0
    assert found.loc["general heads", "p"] == pytest.approx(1 / 5)
    assert "chrF of 6 summaries in fr without a mask: 50.0" in verdict
    assert set(tables["languages"]["language"]) == {"fr", "zh"}
    assert general_heads.report(foreign, card)[2].startswith("The model writes none")


def gate_would_see_a_summary(seed: int) -> bool:
    """Whether the gate's texts, drawn from all that are not scored, hold one of two that are to be summed up."""
    _, rest = lt.load_corpus("bundled", LANGUAGES).split(SMALL["n"], seed=seed)
    scored = scored_ids(LANGUAGES, SMALL["n"], seed)
    tasks = summary_tasks(LANGUAGES, 2, seed=seed, without=scored)
    return bool({task.id for task in tasks} & set(rest.sample(8, seed=seed).ids or ()))


def test_general_heads_run(
    speaker: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generating.competence

    seen_by_the_gate: set[str] = set()

    def all_written(model, corpus, **options):
        seen_by_the_gate.update(corpus.ids)
        found = real(model, corpus, **options)
        found.table["writes"] = True
        return found

    monkeypatch.setattr(generating, "competence", all_written)
    small = {name: value for name, value in SMALL.items() if name != "fraction"}
    small |= {"quantile": 0.7, "min_languages": 2}
    seed = next(filter(gate_would_see_a_summary, range(50)))
    result = general_heads.run(speaker, LANGUAGES, prompts=2, max_new_tokens=12, seed=seed, **small)
    scored = scored_ids(LANGUAGES, SMALL["n"], seed)
    asked = {row["id"] for row in result.records["generations"]}
    assert not asked & scored
    assert not asked & seen_by_the_gate, "a language may not come in by its lucky draws"
    assert len(seen_by_the_gate) == 8
    tables = check(result, tmp_path, "generations", general_heads.report)
    rows = pd.DataFrame(result.records["generations"])
    assert rows["chrf"].between(0, 100).all()
    plain = rows[rows["condition"] == NONE]["chrf"].mean()
    assert tables["effects"]["value"].iloc[0] == pytest.approx(plain)
    assert set(tables["languages"]["language"]) == set(LANGUAGES)
    with pytest.raises(ValueError, match="measure 'rouge' is not one of chrf, bertscore"):
        general_heads.run(speaker, LANGUAGES, measure="rouge")
