import pytest
import torch
from conftest import REQUIRED
from micro import A, B, micro_bridge

import lahis_tl as lt
from lahis_tl.access import full_logits
from lahis_tl.batches import make_batches
from lahis_tl.curvature import batch_curvature


def exact_fisher(model, text):
    """Mean over positions of the variance, under the model's own prediction, of d log p / dm."""
    grid, ids = lt.grid_of(model), torch.tensor([text])

    def logits(factors):
        with lt.masked(model, factors):
            return full_logits(model, ids, torch.ones_like(ids))[0, :-1]

    ones = torch.ones(grid.shape, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(logits, ones)  # [pos, vocab, layer, head]
    p = logits(ones).softmax(-1)[:, :, None, None]
    mean = (p * slopes).sum(1, keepdim=True)
    return (p * (slopes - mean) ** 2).sum(1).mean(0)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", REQUIRED)
def test_draws_average_to_the_fisher_information(tiny, token_ids, name, backend):
    """Soft caps and logit scales (Gemma 2, Cohere) are among the architectures."""
    model = tiny(name, backend)
    texts = {"en": token_ids["en"][:2]}
    (batch,) = make_batches(texts, 64)
    draws = batch_curvature(model, batch, 200, seed=0)
    for row, key in enumerate(batch.keys):
        expected = exact_fisher(model, texts["en"][key.row])
        error = draws[:, row].std(0) / 200**0.5
        standardised = (draws[:, row].mean(0) - expected) / error
        assert float(standardised.abs().max()) < 5
        assert float((error / expected).median()) < 0.2, "too noisy to show anything"


def test_micro_model_by_hand():
    """
    Text "ba": logits (3, 5) + m1-part (3, 4); the slope of the log odds in m1 is 4 - 3 = 1, its Fisher
    information p(1 - p) with p = 1/(1 + e²). Head 0 reads nothing at b. The labels take p or 1 - p.
    """
    (batch,) = make_batches({"x": [[B, A]]}, 64)
    draws = batch_curvature(micro_bridge(), batch, 2000, seed=1)[:, 0, 0]
    p = 1 / (1 + torch.tensor(2.0).exp())
    assert float(draws[:, 0].abs().max()) < 1e-9
    assert {round(float(v), 4) for v in draws[:, 1]} == {
        round(float(p**2), 4),
        round(float((1 - p) ** 2), 4),
    }
    assert float(draws[:, 1].mean()) == pytest.approx(float(p * (1 - p)), rel=0.1)


def test_it_comes_with_the_gradients(llama, token_ids, tmp_path):
    options = {"curvature_draws": 3, "progress": False}
    grads = lt.head_gradients(llama, token_ids, checkpoint=tmp_path / "run", **options)
    plain = lt.head_gradients(llama, token_ids, progress=False)
    assert torch.equal(grads["en"], plain["en"])
    assert (grads.curvature["en"] >= 0).all()
    assert (grads.curvature_error["en"] > 0).any()
    again = lt.head_gradients(llama, token_ids, checkpoint=tmp_path / "run", **options)
    assert torch.equal(again.curvature["fr"], grads.curvature["fr"])
    other = lt.head_gradients(llama, token_ids, seed=1, **options)
    assert not torch.equal(other.curvature["fr"], grads.curvature["fr"])
    loaded = lt.load(grads.save(tmp_path / "grads"))
    assert torch.equal(loaded.curvature["fr"], grads.curvature["fr"])
    h = grads.curvature["fr"]
    expected = (0.5 * h / (1 + h) - grads["fr"]).mean(0)
    torch.testing.assert_close(lt.score(grads, "second_order")["fr"], expected)
    torch.testing.assert_close(
        lt.score(grads, "second_order", alpha=0.0)["fr"], lt.score(grads, "taylor")["fr"]
    )


def test_one_draw_has_no_error(llama, token_ids):
    with pytest.raises(ValueError, match="curvature_draws=1 must be 0, or 2 and more"):
        lt.head_gradients(llama, token_ids, curvature_draws=1)
    grads = lt.head_gradients(llama, token_ids, progress=False)
    with pytest.raises(
        ValueError, match=r"needs gradients and curvature, but these are only gradients"
    ):
        lt.score(grads, "second_order")
