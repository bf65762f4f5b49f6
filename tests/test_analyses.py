"""Every experiment runs end to end, small, on the planted model, and its verdict follows its table."""

import re
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_statistics import gradients_of, noise

import lahis_tl as lt
from analyses import faithfulness, perplexity, planted, selectivity, stability
from analyses.result import Parts, Result, shared_gradients
from lahis_tl.planted import planted_truth


@pytest.fixture(scope="module")
def model():
    return lt.load_model("planted")


@pytest.fixture(autouse=True)
def planted_texts(monkeypatch):
    """The experiments ask for the bundled corpus; here they get the planted languages."""
    real = lt.load_corpus

    def load(source="bundled", languages=None, n=None, **options):
        return real("planted", languages, n or 40, **options)

    monkeypatch.setattr(lt, "load_corpus", load)


LANGUAGES = ("qaa", "qab", "qac")


def check(result: Result, tmp_path):
    assert isinstance(result.dataframe, pd.DataFrame)
    assert len(result.verdict) > 80
    assert "nan" not in result.verdict
    page = result.save(tmp_path / result.name)
    assert "<script" in page.read_text()
    for name, table in result.tables.items():
        assert len(pd.read_csv(page.parent / f"{name}.csv")) == len(table)
    assert result.verdict in (page.parent / "verdict.txt").read_text()


def test_faithfulness(model, tmp_path):
    result = faithfulness.run(
        model,
        LANGUAGES,
        n=8,
        max_tokens=48,
        top_k=4,
        budget=0.7,
        draws=20,
        checkpoint=None,
        progress=False,
    )
    check(result, tmp_path)
    table = result.dataframe.set_index(["score", "language"])
    assert table.loc[("lahis", "qaa"), "common_of_top_4"] == 4, "lahis finds the planted four"
    assert table.loc[("taylor", "qaa"), "common_of_top_4"] < 4, "a trained model's mean slope is 0"
    assert table.loc[("verified", "qaa"), "common_of_top_4"] == 4


def test_selectivity_finds_the_planted_heads_selective(model, tmp_path):
    result = selectivity.run(
        model,
        LANGUAGES,
        n=24,
        test_texts=8,
        max_tokens=48,
        rule="tested",
        draws=20,
        match="network",
        permutations=2000,
        progress=False,
    )
    check(result, tmp_path)
    contrasts = result.tables["contrasts"].set_index("heads_of")
    assert (contrasts["lower"] > 0.1).all(), (
        "each specific head is worth 0.28 nats in its language alone"
    )
    assert (contrasts["p"] <= 1 / 21 + 1e-9).all()
    assert (
        "Selective language by language, with an interval above 0 and p ≤ 0.05: qaa, qab, qac"
        in result.verdict
    )
    matrix = result.dataframe.query("heads_of != text_in")
    assert matrix["change"].abs().max() < 0.02


def test_perplexity(model, tmp_path):
    result = perplexity.run(
        model, LANGUAGES, n=24, test_texts=6, max_tokens=48, rule="tested", draws=5, progress=False
    )
    check(result, tmp_path)
    table = result.dataframe
    own = table[(table["condition"] == "qab heads off") & (table["language"] == "qab")].iloc[0]
    assert own["change"] > 0.15
    assert 1 / 6 - 1e-9 <= own["p"] <= 0.5
    assert {"none", "general heads off"} <= set(table["condition"])


def test_stability(model, tmp_path):
    options = {"n": 20, "max_tokens": 48, "methods": ("lahis", "taylor"), "top_k": 4, "draws": 10}
    options |= {"gradients": tmp_path / "gradients", "progress": False}
    result = stability.run(model, LANGUAGES, **options)
    assert len(list((tmp_path / "gradients").iterdir())) == len(LANGUAGES)
    check(result, tmp_path)
    most = result.dataframe.query("texts == 10").set_index(["method", "language"])
    assert most.loc[("lahis", "qaa"), "common_of_top_4"] == 1
    stops = result.tables["stopping"].set_index(["method", "language"])
    assert stops.loc[("lahis", "qaa"), "sure of 80%"] in (10, 15)
    assert stops.loc[("taylor", "qaa"), "sure of 80%"] == "> 20"


def test_the_planted_heads_are_found(tmp_path):
    result = planted.run(n=24, shuffles=4, permutations=2000, progress=False)
    check(result, tmp_path)
    rules = result.tables["rules"].set_index(["score", "rule"])
    for method in ("lahis", "exact"):
        row = rules.loc[(method, "tested")]
        assert (row.specific_found, row.general_found) == (5, 3)
        assert (row.specific_false, row.general_false) == (0, 0)
    scores = result.dataframe.set_index("score")
    assert scores.loc["exact", "auc_needed_worst"] == 1
    assert (result.tables["random_model"]["specific_found"] == 0).all()


def test_shuffling_exchanges_languages_within_texts():
    values = {code: torch.full((5, 1, 2), float(i)) for i, code in enumerate(LANGUAGES)}
    source = gradients_of(values)
    mixed = planted.shuffled(source, torch.Generator().manual_seed(0))
    stacked = torch.stack([mixed[code][:, 0, 0] for code in LANGUAGES])
    assert (stacked.sort(0).values == torch.tensor([[0.0], [1.0], [2.0]])).all()
    assert not all(torch.equal(mixed[code], values[code]) for code in LANGUAGES)


def test_the_shares_of_ranks_by_hand():
    truth = planted_truth()
    values = noise(*truth.grid.shape)
    mask = torch.zeros(truth.grid.shape, dtype=torch.bool)
    mask[0, :3] = True
    yes, no = values[mask], values[~mask]
    expected = float((yes[:, None] > no[None]).float().mean())
    assert planted._auc(values, mask) == pytest.approx(expected)


def test_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "analyses.planted", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--max-tokens", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unrecognized arguments: --max-tokens 3" in done.stderr
    help_text = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"--quick\s+a small run: \{'n': 24", help_text)


def test_parts_are_read_again_under_the_same_settings_alone(tmp_path):
    made = []

    def make(value):
        made.append(value)
        return [{"value": value, "text": "a\u2028b", "nothing": float("nan")}]

    settings = {"model": {"name": "m", "dtype": "float32", "checks": 0.1}, "factor": 0.5}
    parts = Parts(tmp_path, settings)
    parts.rows("weakened 1 0.5 own", lambda: make(1))
    assert parts.rows("weakened 1 0.5 own", lambda: make(9)) == made_rows(1)
    assert parts.rows("weakened 1 0.5 3", lambda: make(2)) != parts.rows(
        "weakened 1 0.5 own", lambda: make(3)
    )
    assert made == [1, 2], "a dot in a name cuts nothing off it"
    other_checks = {**settings, "model": {**settings["model"], "checks": 0.2}}
    assert Parts(tmp_path, other_checks).rows("weakened 1 0.5 own", lambda: make(4)) == made_rows(1)
    assert Parts(tmp_path, {**settings, "factor": 0.25}).rows("weakened 1 0.5 own", lambda: make(5))
    assert made == [1, 2, 5]
    assert Parts(None, settings).rows("x", lambda: make(6))[0]["value"] == 6


def made_rows(value):
    return [{"value": value, "text": "a\u2028b", "nothing": None}]


def test_gradients_are_shared_language_by_language(model, tmp_path, monkeypatch):
    """Experiments on some of the languages find what another has scored, and get what they would have made."""
    corpus, options = lt.load_corpus("bundled", LANGUAGES, 6), {"max_tokens": 24, "progress": False}
    alone = shared_gradients(model, corpus, None, **options)
    first = shared_gradients(model, corpus, tmp_path, **options)
    assert first.languages == list(LANGUAGES)
    assert first.card["corpus"] == corpus.card
    for code in LANGUAGES:
        torch.testing.assert_close(first[code], alone[code], rtol=1e-4, atol=1e-6)

    monkeypatch.setattr("lahis_tl.gradients.batch_gradients", lambda *_: pytest.fail("made again"))
    few = lt.load_corpus("bundled", LANGUAGES[1:], 6)
    assert few["qac"] == corpus["qac"]
    few = replace(few, history=("read otherwise",), dropped={"qac": 3})
    again = shared_gradients(model, few, tmp_path, **options)
    assert again.languages == list(LANGUAGES[1:])
    assert torch.equal(again["qac"], first["qac"])
    with pytest.raises(
        pytest.fail.Exception, match="made again"
    ):  # other bounds are other gradients
        shared_gradients(model, few, tmp_path, max_tokens=20, progress=False)


def test_no_random_set_of_perplexity_holds_a_general_head(model, monkeypatch):
    real, effects = lt.ablation_effect, []

    def kept(*arguments, **options):
        effects.append(real(*arguments, **options))
        return effects[-1]

    monkeypatch.setattr(lt, "ablation_effect", kept)
    sizes = {"n": 6, "test_texts": 2, "max_tokens": 12, "draws": 8}
    result = perplexity.run(model, LANGUAGES, quantile=0.6, progress=False, **sizes)
    sets = result.tables["heads"]
    general = set(sets[sets["set"] == "general"]["label"])
    assert general
    own = [effect for effect in effects if set(effect.heads.labels) != general]
    assert own
    for effect in own:
        assert effect.control_sets
        assert not general & {label for drawn in effect.control_sets for label in drawn.labels}


def test_texts_to_test_on_are_cut_at_their_own_place(model, tmp_path):
    result = perplexity.run(
        model,
        LANGUAGES,
        n=6,
        test_texts=4,
        max_tokens=24,
        test_tokens=12,
        quantile=0.8,
        draws=2,
        gradients=tmp_path,
        progress=False,
    )
    assert result.card["settings"]["max_tokens"] == 12
    assert {place.name.rsplit("-", 1)[1] for place in tmp_path.iterdir()} == {"24"}
