from unittest.mock import patch

import pytest
import torch
from conftest import REQUIRED
from micro import A, B, micro_bridge

import lahis_tl as lt
from lahis_tl import effects as module
from lahis_tl.batches import make_batches
from lahis_tl.masks import hooked_heads
from lahis_tl.means import mean_head_outputs
from lahis_tl.replay import record


def one(text):
    ids = torch.tensor([text])
    return ids, torch.ones_like(ids)


@torch.no_grad()
def naive(model, texts, ablate):
    """Text by text and head by head, a whole forward pass each: the slow road to the same numbers."""
    grid = lt.grid_of(model)
    rows = []
    for index, text in enumerate(texts):
        plain = lt.text_nll(model, *one(text))
        row = torch.empty(grid.size, dtype=torch.float64)
        for i in range(grid.size):
            with ablate(model, index, grid.head(i)):
                row[i] = float(lt.text_nll(model, *one(text)) - plain)
        rows.append(row.reshape(grid.shape))
    return torch.stack(rows)


def zero(model, index, head):
    return lt.masked(model, lt.HeadMask.scaling([head], 0.0, lt.grid_of(model)))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", REQUIRED)
def test_the_fast_road_is_the_slow_one(tiny, token_ids, name, backend):
    model = tiny(name, backend)
    ids, attention_mask = one(token_ids["en"][0])
    assert record(model, ids, attention_mask).residuals, (
        "this architecture should not need whole passes"
    )
    found = lt.exact_effects(model, token_ids, progress=False)
    for language, texts in token_ids.items():
        expected = naive(model, texts, zero)
        torch.testing.assert_close(found[language].double(), expected, rtol=1e-5, atol=1e-7)
        assert expected.abs().max() > 1e-3, "an ablation should matter, or this shows nothing"


def test_mean_ablation_is_the_masks(llama, token_ids):
    means = mean_head_outputs(llama, token_ids, progress=False)
    found = lt.exact_effects(llama, token_ids, ablation="mean", progress=False)

    def ablate(model, index, head):
        return lt.masked(
            model, lt.HeadMask.mean_ablation(lt.HeadSet(lt.grid_of(model), [head]), means)
        )

    expected = naive(llama, token_ids["en"], ablate)
    torch.testing.assert_close(found["en"].double(), expected, rtol=1e-4, atol=1e-6)


def test_resampling_takes_the_head_from_another_text(llama, token_ids):
    found = lt.exact_effects(llama, token_ids, ablation="resample", seed=3, progress=False)
    # Two French texts of 7 and 12 tokens: each is the other's donor, the short one begun again.
    texts = token_ids["fr"]

    def outputs(text, layer):
        kept = []
        with hooked_heads(llama, {layer: kept.append}):
            lt.text_nll(llama, *one(text))
        return kept[0]

    def ablate(model, index, head):
        donor = outputs(texts[1 - index], head.layer)[0, :, head.head]
        width = len(texts[index])
        replacement = donor[torch.arange(width) % len(texts[1 - index][:width])]

        def edit(z):
            z = z.clone()
            z[0, :, head.head] = replacement
            return z

        return hooked_heads(model, {head.layer: edit})

    expected = naive(llama, texts, ablate)
    torch.testing.assert_close(found["fr"].double(), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="needs two texts or more, but 'x' has 1"):
        lt.exact_effects(llama, {"x": [texts[0]]}, ablation="resample", progress=False)


def test_micro_model_by_hand():
    """
    Text "ab": logits (2, 2), loss ln 2. Without head 0 they are (1, 0), loss ln(1 + e). Head 1 reads 0 there.
    The micro bridge has no plain unembedding, so this is the road of whole passes.
    """
    effects = lt.exact_effects(micro_bridge(), {"x": [[A, B]]}, progress=False)
    expected = torch.tensor([1.0]).exp().add(1).log() - torch.tensor(2.0).log()
    assert float(effects["x"][0, 0, 0]) == pytest.approx(float(expected), rel=1e-5)
    assert float(effects["x"][0, 0, 1]) == pytest.approx(0, abs=1e-6)


def test_some_heads_alone(llama, token_ids):
    whole = lt.exact_effects(llama, token_ids, progress=False)
    some = lt.exact_effects(
        llama, token_ids, ["L2H0", "L0H3", "L0H1"], batch_tokens=24, progress=False
    )
    assert some.heads.labels == ["L0H1", "L0H3", "L2H0"]
    for head in some.heads:
        found, expected = (e["en"][:, head.layer, head.head] for e in (some, whole))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.isnan(some["en"][:, 1]).all()
    with pytest.raises(ValueError, match=r"effects of .en. are not known for all heads"):
        lt.score(some)
    assert lt.score(whole).method == "exact"


def test_nothing_is_changed_behind(llama, token_ids):
    ids, attention_mask = one(token_ids["en"][2])
    before = lt.text_nll(llama, ids, attention_mask)
    lt.exact_effects(llama, token_ids, progress=False)
    assert torch.equal(lt.text_nll(llama, ids, attention_mask), before)
    assert not any(point.fwd_hooks for point in llama.hook_dict.values())
    assert not any(block._forward_pre_hooks for block in llama.blocks)


def test_an_interrupted_run_goes_on_where_it_stopped(llama, token_ids, tmp_path):
    options = {"batch_tokens": 24, "checkpoint": tmp_path / "run", "progress": False}
    whole = lt.exact_effects(llama, token_ids, batch_tokens=24, progress=False)
    real, calls = module._layer_effects, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    with patch.object(module, "_layer_effects", interrupted), pytest.raises(KeyboardInterrupt):
        lt.exact_effects(llama, token_ids, **options)
    with patch.object(module, "_layer_effects", side_effect=real) as again:
        resumed = lt.exact_effects(llama, token_ids, **options)
    batches = len(make_batches(token_ids, 24))
    assert again.call_count == 3 * batches - 4
    for language in token_ids:
        torch.testing.assert_close(resumed[language], whole[language], rtol=0, atol=0)
    with pytest.raises(lt.ArtifactError, match=r"settings.ablation was 'zero', now 'mean'"):
        lt.exact_effects(llama, token_ids, ablation="mean", **options)


def test_saving_and_loading(llama, token_ids, tmp_path):
    effects = lt.exact_effects(llama, token_ids, ablation="mean", progress=False)
    again = lt.load(effects.save(tmp_path / "effects"), model=llama)
    assert again.ablation == "mean"
    assert torch.equal(again["fr"], effects["fr"])
    frame = effects.to_dataframe()
    assert list(frame.columns) == ["language", "text", "layer", "head", "effect"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ablation": "half"}, ValueError, "'half' is not one of zero, mean, resample"),
        ({"heads": ["L9H0"]}, IndexError, "L9H0 is outside"),
        ({"heads": []}, ValueError, "no heads to ablate"),
        ({"max_tokens": 1}, ValueError, "max_tokens=1"),
    ],
)
def test_bad_input(llama, token_ids, options, error, message):
    with pytest.raises(error, match=message):
        lt.exact_effects(llama, token_ids, progress=False, **options)


def test_a_model_that_overflows_is_named(llama, token_ids):
    def poison(z):
        return z * float("nan")

    with (
        hooked_heads(llama, {0: poison}),
        pytest.raises(lt.ModelError, match="loss of text 2 of 'en' is not finite"),
    ):
        lt.exact_effects(llama, token_ids, progress=False)
