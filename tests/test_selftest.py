"""The self-test must refuse a model on which the mask does not act; each fault is put in on purpose."""

import pytest
import torch
from conftest import N_LAYERS

import lahis_tl as lt
from lahis_tl import selftest
from lahis_tl.access import head_points
from lahis_tl.selftest import check_logits, check_mask_acts

BACKENDS = ["hooked", "bridge"]


@pytest.fixture(params=BACKENDS)
def model(request, tiny):
    return tiny("llama", request.param, "float32")


def test_a_sound_model_passes_and_reports_figures(model):
    figures = check_mask_acts(model)
    assert figures["ones"]["max"] == 0
    assert figures["zero L0H1"]["max"] < 1e-5
    slope = figures["slope"]
    assert slope["finite_difference"] == pytest.approx(slope["gradient_norm"], rel=0.02)


def test_a_hook_that_does_not_fire_is_found(model, monkeypatch):
    points = list(head_points(model))
    points[1] = points[0]  # layer 1 is never hooked, layer 0 twice
    monkeypatch.setattr(selftest, "head_points", lambda model: points)
    monkeypatch.setattr("lahis_tl.masks.head_points", lambda model: points)
    with pytest.raises(
        lt.ModelError, match=r"zero mask on L1H2 is not the head's removal.*differ by"
    ):
        check_mask_acts(model)


def test_a_hook_that_fires_twice_is_found(model, monkeypatch):
    run = selftest.full_logits
    monkeypatch.setattr(selftest, "full_logits", lambda *a: (run(*a), run(*a))[1])
    with pytest.raises(lt.ModelError, match=rf"should fire once .* {{0: 2, .*{N_LAYERS - 1}: 2}}"):
        check_mask_acts(model)


def test_a_mask_that_acts_on_the_wrong_head_is_found(model, monkeypatch):
    real = selftest.HeadMask.scaling
    monkeypatch.setattr(
        selftest.HeadMask,
        "scaling",
        lambda heads, factor, grid: real([(h[0], (h[1] + 1) % 4) for h in heads], factor, grid),
    )
    with pytest.raises(lt.ModelError, match="is not the head's removal"):
        check_mask_acts(model)


def test_a_wrong_gradient_is_found(model, monkeypatch):
    real = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: tuple(1.2 * g for g in real(*a, **k))
    )
    with pytest.raises(lt.ModelError, match=r"gradient has norm [\d.]+, but by finite differences"):
        check_mask_acts(model)


def test_the_projection_is_put_back(model):
    before = [p.clone() for p in model.parameters()]
    check_mask_acts(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_logits_with_nan_never_pass():
    good = torch.randn(4, 5)
    with pytest.raises(lt.ModelError, match="NaN or infinity"):
        check_logits("x", good, good * float("nan"), torch.float32)
    with pytest.raises(lt.ModelError, match="differ by nan"):
        check_logits("x", good * float("nan"), good, torch.float32)
