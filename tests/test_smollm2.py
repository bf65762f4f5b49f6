"""The real model, end to end. Slow: fetches 98 MB once and runs for a minute or two."""

import re

import pytest
import torch
from scipy.stats import spearmanr
from typer.testing import CliRunner

import lahis_tl as lt
from analyses import benchmark
from lahis_tl import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(2)
    return lt.load_model("smollm2")


def test_it_is_smollm2_and_speaks(model):
    assert lt.grid_of(model).shape == (30, 9)
    loss = lt.head_gradients(
        model, lt.load_corpus("bundled", ["en", "hi"], n=2), max_tokens=64, progress=False
    ).losses
    assert 2 < float(loss["en"].mean()) < 4.5  # nats per token
    text = model.generate(
        "The capital of France is", max_new_tokens=4, do_sample=False, verbose=False
    )
    assert "Paris" in text


def test_first_order_scores_follow_exact_ablation(model):
    """taylor must rank heads like the loss that their removal costs, on the same texts."""
    corpus = lt.load_corpus("bundled", ["fr"], n=4)
    grads = lt.head_gradients(model, corpus, max_tokens=24, progress=False)
    tokenizer = lt.tokenizer_of(model)
    rows = [tokenizer(text)["input_ids"][:24] for text in corpus["fr"]]
    ids = torch.tensor(rows)
    attended = torch.ones_like(ids)
    layers = [0, 1, 2, 10, 20]
    effects, scores = [], []
    with torch.no_grad():
        plain = lt.text_nll(model, ids, attended).mean()
        for layer in layers:
            for head in range(9):
                with lt.masked(model, lt.HeadMask.scaling([(layer, head)], 0.0, lt.grid_of(model))):
                    effects.append(float(lt.text_nll(model, ids, attended).mean() - plain))
                scores.append(float(lt.score(grads, "taylor")["fr"][layer, head]))
    assert spearmanr(scores, effects).statistic > 0.5


def test_the_demo_command(tmp_path):
    result = CliRunner().invoke(
        cli.app,
        [
            "demo",
            "-l",
            "en,fr,zh",
            "--texts",
            "3",
            "--max-tokens",
            "32",
            "--out",
            str(tmp_path),
            "--quiet",
        ],
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"general\s", result.output)
    assert (tmp_path / "heads.html").stat().st_size > 3_000_000
    assert lt.load(tmp_path / "scores").languages == ("en", "fr", "zh")


def test_the_benchmark_measures_all_three_ways():
    result = benchmark.run(lengths={16: 2}, dtypes=("float32",), repeats=1)
    assert {"authors", "floor"} < set(result.table["way"])
    assert (result.table[["ms_per_text", "over_floor"]] > 0).all(axis=None)
    assert "times the floor" in result.verdict
