"""Other tools compute the numbers that benchmarks compare ours with; and the benchmarks' own arithmetic. No times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import HOOKED_LINE, VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lahis_tl as lt
from analyses import benchmark_common as common
from analyses import benchmark_estimate as estimate
from analyses import benchmark_growth as growth
from analyses import benchmark_loading as loading
from analyses import benchmark_others as others
from analyses import benchmark_ways as ways
from analyses.benchmark_tuning import tuning_steps
from lahis_tl.losses import text_nll
from lahis_tl.masks import hooked_heads
from lahis_tl.pairs import EncodedPair
from lahis_tl.verified import Costs

BACKENDS = ["hooked", "bridge"]
needs_captum = pytest.mark.skipif(not ways.HAS_CAPTUM, reason="captum is not installed")


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB, (3, 10), generator=generator).tolist()


@pytest.fixture(scope="module")
def hf(checkpoint: Callable[..., Path]) -> Any:
    """The Hugging Face model of ``tiny("llama")``."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float64)
    return model.eval().requires_grad_(False)


def assert_all_agree(numbers: dict[str, Callable[[], Tensor]]) -> None:
    ours = numbers["ours"]()
    assert ours.nan_to_num().abs().max() > 0.01
    assert ours.nan_to_num().std() > 0.003, "heads that are alike would hide a mix-up"
    for name, way in numbers.items():
        torch.testing.assert_close(
            way(), ours, rtol=1e-4, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_to_score_gives_our_numbers(tiny, hf, texts, backend):
    model = tiny("llama", backend)
    numbers = others.scoring_ways(model, hf, texts, batch=2)
    assert {"TransformerLens script, text by text", "TransformerLens script, our batches"} < set(
        numbers
    )
    assert ("TransformerLens script, retain_grad" in numbers) == (backend == "hooked")
    assert any(name.startswith("captum") for name in numbers) == ways.HAS_CAPTUM
    assert_all_agree(numbers)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_to_exact_effects_gives_our_numbers(tiny, hf, texts, backend):
    model = tiny("llama", backend)
    grid = lt.grid_of(model)
    heads = lt.HeadSet(grid, [(layer, head) for layer in (0, 2) for head in range(grid.n_heads)])
    numbers = others.effect_ways(model, hf, texts, heads, batch=2)
    assert len(numbers) == (6 if ways.HAS_CAPTUM else 4)
    assert_all_agree(numbers)
    assert numbers["ours"]()[:, 1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plain_training_script_finds_our_factors(tiny, texts, backend):
    model = tiny("llama", backend)
    pairs = [EncodedPair(tuple(ids[: 10 - i]), 4) for i, ids in enumerate(texts)]
    heads = lt.HeadSet(lt.grid_of(model), [(0, 1), (0, 3), (2, 0)])
    batches = [pairs[:2], pairs[2:], pairs[1:]]
    ours = tuning_steps(model, batches, heads)
    assert ((ours - 1).abs() > 1e-3).all()
    torch.testing.assert_close(ways.tune_plain(model, batches, heads), ours, rtol=1e-4, atol=1e-5)


@needs_captum
def test_captum_ablates_whole_layers_alone(hf, texts):
    heads = lt.HeadSet(lt.HeadGrid(3, 4), [(1, 2)])
    with pytest.raises(ValueError, match="all heads of a layer"):
        ways.effects_captum(hf, torch.tensor(texts), heads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attribution_patching_is_the_slope_on_the_way_to_the_other_text(tiny, texts, backend):
    model = tiny("llama", backend)
    ids = torch.tensor(texts)
    clean, grid = ids.roll(1, 0), lt.grid_of(model)
    shares = torch.zeros(len(ids), *grid.shape, dtype=torch.float64, requires_grad=True)
    to: list[Tensor] = [torch.empty(0)] * grid.n_layers

    def keep(z: Tensor, layer: int) -> None:
        to[layer] = z.detach().clone()

    def move(z: Tensor, layer: int) -> Tensor:
        return z + shares[:, layer, None, :, None] * (to[layer] - z.detach())

    layers = range(grid.n_layers)
    ones = torch.ones_like(ids)
    with hooked_heads(model, {i: lambda z, i=i: keep(z, i) for i in layers}):
        text_nll(model, clean, ones)
    with hooked_heads(model, {i: lambda z, i=i: move(z, i) for i in layers}):
        text_nll(model, ids, ones).sum().backward()
    found = ways.attribution_patching_scores(model, clean, ids)
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, shares.grad.float(), rtol=1e-4, atol=1e-6)


def test_without_captum_its_rows_are_missing_and_the_verdict_says_so(tiny, hf, texts, monkeypatch):
    monkeypatch.setattr(ways, "HAS_CAPTUM", False)
    numbers = others.scoring_ways(tiny("llama"), hf, texts, batch=2)
    assert not any(name.startswith("captum") for name in numbers)
    table = pd.DataFrame({"way": ["ours", "x"], "over_ours": [1.0, 0.5], "difference": [0.0, 1e-7]})
    verdict = others._verdict({"scoring": table})
    assert "captum is not installed" in verdict
    assert "ours is the slower beside x" in verdict


def test_a_way_with_other_numbers_is_seen():
    numbers = {
        "ours": lambda: torch.tensor([1.0, -4.0]),
        "wrong": lambda: torch.tensor([1.0, -3.0]),
    }
    rows = others.measure(numbers, 1, 1, {"another question": lambda: torch.zeros(1)})
    found = {row["way"]: row["difference"] for row in rows}
    assert found["ours"] == 0
    assert found["wrong"] == pytest.approx(0.25)
    assert found["another question"] != found["another question"]  # not compared


def test_rounds_go_through_all_ways_in_turn():
    calls: list[str] = []
    times = common.in_turn({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=2)
    assert "".join(calls) == "ab" * 3  # the first warms up
    assert [len(each) for each in times.values()] == [2, 2]


def test_medians_and_ratios_are_taken_round_by_round():
    ours, other = common.compared({"ours": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 4.0]}, "ours", per=2)
    assert (other["ms"], other["ms_low"], other["ms_high"]) == (2000, 1000, 3000)
    assert (other["over_ours"], other["low"], other["high"]) == (2, 1, 3)
    assert ours["over_ours"] == 1


def test_peak_memory_sees_what_is_freed_again():
    def run() -> None:
        torch.ones(16 * 2**20).sum()  # 64 MB

    assert 60 < common.peak_mb(run) < 90


def test_texts_are_cut_to_length_from_each_language_in_turn(speaker):
    tokenizer = lt.tokenizer_of(speaker)
    found = common.cut_texts(tokenizer, 7, 5, ("en", "fr"))
    assert [len(ids) for ids in found] == [7] * 5
    english = tokenizer("\n".join(lt.load_corpus("bundled", ["en"])["en"]))["input_ids"]
    assert found[0] + found[2] + found[4] == english[:21]


def test_the_growth_fit_recovers_a_known_slope():
    sizes = [1.0, 2.0, 4.0, 8.0, 16.0]
    slope, low, high = growth.growth_slope(sizes, [5 * size**1.5 for size in sizes])
    assert slope == pytest.approx(1.5)
    assert high - low < 1e-6
    # log2 values 0, 1, 1, 3, 4: slope 1, residuals 0.2, 0.2, −0.8, 0.2, 0.2; error √(0.8/3/10), t(3) = 3.182
    slope, low, high = growth.growth_slope(sizes, [1.0, 2.0, 2.0, 8.0, 16.0])
    assert slope == pytest.approx(1.0)
    assert (low, high) == (pytest.approx(0.480, abs=1e-3), pytest.approx(1.520, abs=1e-3))


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [([1, 2], [1, 2], "2 sizes"), ([1, 2, 3], [1, 0, 2], "above 0, but the least is 0")],
)
def test_a_growth_that_cannot_be_fitted_is_refused(sizes, values, message):
    with pytest.raises(ValueError, match=message):
        growth.growth_slope(sizes, values)


def test_growth_measures_every_size_of_every_axis():
    base = {"texts": 8, "tokens": 6, "layers": 1, "heads": 2, "vocabulary": 64}
    axes = {"heads": (1, 2, 4), "vocabulary": (32, 64, 128)}
    result = growth.run(axes, base, width=16, rounds=1, progress=False)
    points, table = result.tables["points"], result.dataframe
    assert len(points) == 2 * 3 * 2
    assert (points["seconds"] > 0).all()
    assert list(zip(table["axis"], table["way"], strict=True)) == [
        (axis, way) for axis in axes for way in ("scoring", "exact effects")
    ]
    figure = result.figures["benchmark_growth"]
    assert len(figure.data) == 8
    assert figure.layout.yaxis.title.text == "time (s)"
    assert figure.layout.paper_bgcolor == "white"


def test_the_random_models_have_the_sizes_asked_for():
    model = growth.random_llama(layers=2, heads=4, vocabulary=40, width=16)
    assert lt.grid_of(model).shape == (2, 4)
    costs = Costs.of(model)
    assert costs.unembedding == 40 * 16


def _shape_of(config: Any) -> estimate.Shape:
    return estimate.Shape(
        *(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads),
        *(config.hidden_size, config.intermediate_size, config.vocab_size),
        tied=config.tie_word_embeddings,
    )


def test_the_estimate_counts_the_weights_and_products_of_a_real_model(hf):
    shape = _shape_of(hf.config)
    matrices = [p for p in hf.parameters() if p.ndim == 2]
    assert shape.parameters == sum(p.numel() for p in matrices)
    # Without attention over the text, an exact effect costs two for every product that is left.
    costs = Costs(
        torch.full((shape.layers,), float(shape.layer), dtype=torch.float64),
        float(shape.unembedding),
        shape.heads,
    )
    assert shape.effects_flops(tokens=0) == 2 * costs.exact
    assert shape.scoring_flops(tokens=0) == 4 * costs.forward
    per_token = shape.scoring_flops(8) - shape.scoring_flops(0)
    assert per_token == 3 * 4 * 8 * shape.width * shape.layers


def test_published_shapes_have_the_published_sizes():
    sizes = {name: shape.parameters / 1e9 for name, shape in estimate.SHAPES.items()}
    assert sizes["Aya-23-8B"] == pytest.approx(8.03, abs=0.01)
    assert sizes["Llama-3.1-70B"] == pytest.approx(70.6, abs=0.1)


def test_the_estimated_activations_are_near_what_was_measured():
    smollm2 = estimate.Shape(30, 9, 3, 576, 1536, 49152, tied=True)
    assert smollm2.parameters == pytest.approx(134.5e6, rel=0.01)
    for tokens, measured_mb in {32: 68, 64: 154, 128: 320, 512: 1798}.items():
        found = smollm2.activation_bytes(tokens, 4) / 1e6
        assert found == pytest.approx(measured_mb, rel=0.1)


def test_the_estimate_follows_its_assumptions():
    one = estimate.run().dataframe.set_index("model")
    twice = estimate.run(texts=2000, utilisation=0.8).dataframe.set_index("model")
    aya, large = one.loc["Aya-23-8B"], one.loc["Llama-3.1-70B"]
    assert twice.loc["Aya-23-8B", "scoring_flops"] == 2 * aya["scoring_flops"]
    assert twice.loc["Aya-23-8B", "scoring_hours"] == pytest.approx(aya["scoring_hours"])
    assert aya["gradients_gb"] == pytest.approx(100 * 1000 * 1024 * 4 / 1e9)
    assert (aya["gpus_a_copy"], large["gpus_a_copy"]) == (1, 3)
    with pytest.raises(ValueError, match=r"Llama-3.1-70B needs 3 GPUs of 80.0 GB, there are 2"):
        estimate.run(gpus=2)


def test_every_way_to_load_gives_the_same_model(checkpoint, hf, texts):
    folder, ids = str(checkpoint("llama")), torch.tensor(texts)
    expected = hf.float()(input_ids=ids).logits
    hf.double()
    loaded: list[nn.Module] = [loading.unchecked(folder, "bridge"), loading.plain_bridge(folder)]
    if HOOKED_LINE:
        loaded += [loading.unchecked(folder, "hooked"), loading.plain_hooked(folder)]
    for model in loaded:
        with torch.no_grad():
            torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-3)
    table = loading.run(folder, rounds=1).dataframe
    assert len(table) == (7 if HOOKED_LINE else 4)
    assert table.iloc[-1]["way"] == "transformers"
    assert (table["ms"] > 0).all()


def test_the_machine_is_named():
    about = common.machine()
    assert about["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "transformer-lens"} < set(about["versions"])
