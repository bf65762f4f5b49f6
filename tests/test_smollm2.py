"""The real model, end to end. Slow: fetches 98 MB once and runs for a minute or two."""

import re

import pytest
import torch
from typer.testing import CliRunner

import lahis_tl as lt
from analyses import benchmark, benchmark_effects
from lahis_tl import cli
from lahis_tl.statistics import rank_correlation

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


def test_scores_follow_exact_ablation(model):
    """
    Every fifth head of all layers, on the texts that were scored. The rank correlation of lahis was 0.74 when
    this was written; it is no better than that, since single heads of the first layers do far more than a
    first-order score says. Curvature fills most of the gap.
    """
    corpus = lt.load_corpus("bundled", ["fr"], n=8)
    grid = lt.grid_of(model)
    heads = [grid.head(index) for index in range(2, grid.size, 5)]
    effects = lt.exact_effects(model, corpus, heads, max_tokens=32, progress=False)["fr"].mean(0)
    grads = lt.head_gradients(model, corpus, max_tokens=32, curvature_draws=8, progress=False)
    chosen = ~torch.isnan(effects)
    assert int(chosen.sum()) == len(heads)
    found = {
        method: rank_correlation(lt.score(grads, method)["fr"][chosen], effects[chosen])
        for method in ("lahis", "sensitivity", "second_order")
    }
    assert found["lahis"] > 0.5
    assert found["lahis"] > found["sensitivity"], "the sign of the gradient should tell something"
    assert found["second_order"] > 0.8


def test_french_text_is_written_cached_batched_and_alone_alike(model):
    prompts = ["La ville de Paris est", "The weather", "Il était une fois, dans un petit village,"]
    options = {"max_new_tokens": 16, "progress": False}
    together = lt.generate(model, prompts, **options)
    assert [lt.generate(model, p, use_cache=False, **options)[0] for p in prompts] == list(together)
    assert lt.language_identifier()(prompts[2] + together.texts[2])[0] == "fr"
    ones = lt.generate(model, prompts, lt.HeadMask.ones(lt.grid_of(model)), **options)
    assert list(ones) == list(together)


def test_conflicts_are_asked_and_attention_is_shared_out(model):
    items = [item for pair in (("fr", "en"), ("zh", "hi")) for item in lt.conflicts(*pair, n=1)]
    found = lt.transfer_answers(model, items, progress=False)
    assert (found.ranks >= 1).all()
    spans = [{"first": item.spans[0], "second": item.spans[1]} for item in items]
    mass = lt.attention_mass(model, [item.prompt for item in items], spans, progress=False)
    torch.testing.assert_close(mass.mass.sum(-1), torch.ones(6, 30, 9), atol=1e-4, rtol=0)
    assert (mass["first"].amax((1, 2)) > 0.05).all(), "some head looks at the first statement"


def test_a_mask_ships_as_folded_checkpoint_and_as_adapter(model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pairs = [("The capital of France is", " Paris"), ("Die Hauptstadt von Italien ist", " Rom")]
    heads = lt.HeadSet.from_flat(lt.grid_of(model), range(3, 270, 14))
    tuned = lt.tune_mask(model, pairs, heads, epochs=3, learning_rate=0.1, progress=False)
    assert tuned.history["train_nll"].iloc[-1] < tuned.history["train_nll"].iloc[0] - 0.1
    prompt = "La capitale de l'Espagne est"
    ids = torch.tensor([lt.tokenizer_of(model)(prompt)["input_ids"]])
    with torch.no_grad(), lt.masked(model, tuned.mask):
        expected = model(ids, attention_mask=torch.ones_like(ids))
    folded = AutoModelForCausalLM.from_pretrained(
        lt.export_folded(tuned, "smollm2", tmp_path / "folded")
    ).eval()
    assert float((folded(ids).logits - expected).abs().max()) <= 1e-4
    whole = folded.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    found = lt.generate(model, prompt, tuned.mask, max_new_tokens=10, progress=False)[0]
    assert list(found.tokens) == whole.tolist()[: len(found.tokens)]
    plain = AutoModelForCausalLM.from_pretrained(
        lt.export_folded(lt.HeadMask.ones(lt.grid_of(model)), "smollm2", tmp_path / "plain")
    )
    adapter = PeftModel.from_pretrained(
        plain, lt.export_ia3(tuned, "smollm2", tmp_path / "adapter")
    )
    assert float((adapter.eval()(ids).logits - expected).abs().max()) <= 1e-4


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


def test_the_benchmark_of_exact_effects_and_the_profile():
    result = benchmark_effects.run(lengths=(16,), tokens=32, every=15, repeats=1, progress=False)
    table = result.dataframe.set_index("way")
    assert table.loc["ours", "over_ours"] == 1
    assert (table["ms_per_head_and_text"] > 0).all()
    assert (
        0.55 < table.loc["ours", "floor_share"] < 0.65
    )  # half the layers and the whole unembedding
    profile = benchmark.profile(16, 2)
    assert profile["beyond_ms"].is_monotonic_decreasing
    assert len(profile) > 5
