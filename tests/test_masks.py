import pytest
import torch
from conftest import N_HEADS, N_LAYERS, VOCAB
from micro import A, B, micro_bridge
from transformer_lens.hook_points import HookPoint

import lahis_tl as lt
from lahis_tl.access import full_logits, head_points

IDS = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(8))
BACKENDS = ["hooked", "bridge"]


def run(model, ids=IDS):
    with torch.no_grad():
        return full_logits(model, ids, torch.ones_like(ids))


@pytest.fixture(params=BACKENDS)
def model(request, tiny):
    return tiny("llama", request.param)


def hooks_left(model):
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in head_points(model))


def test_per_text_mask_equals_each_text_under_its_own(model):
    factors = torch.rand(3, N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(1)) * 2
    with lt.masked(model, factors):
        together = run(model)
    for row in range(3):
        with lt.masked(model, factors[row]):
            torch.testing.assert_close(
                together[row : row + 1], run(model, IDS[row : row + 1]), rtol=0, atol=1e-5
            )


def test_mask_acts_on_loss_cache_and_run_with_hooks(model):
    mask = lt.HeadMask.scaling(["L1H2"], 0.0, lt.grid_of(model))
    attended = torch.ones_like(IDS)
    plain = model(IDS, attention_mask=attended, return_type="loss")
    name = "blocks.1.attn.hook_z"
    with lt.masked(model, mask):
        loss = model(IDS, attention_mask=attended, return_type="loss")
        _, cache = model.run_with_cache(IDS, attention_mask=attended)
        hooked = model.run_with_hooks(
            IDS, attention_mask=attended, return_type="loss", fwd_hooks=[]
        )
        ours = lt.text_nll(model, IDS, attended).mean()
    assert abs(loss - plain) > 1e-4
    torch.testing.assert_close(hooked, loss)
    torch.testing.assert_close(ours.to(loss.dtype), loss, rtol=1e-5, atol=1e-6)
    assert cache[name][:, :, 2].abs().max() == 0
    assert cache[name][:, :, 1].abs().max() > 0


def test_a_head_before_the_masked_one_does_not_notice(model):
    name = "blocks.0.attn.hook_z"
    attended = torch.ones_like(IDS)
    _, before = model.run_with_cache(IDS, attention_mask=attended)
    with lt.masked(model, lt.HeadMask.scaling(["L1H0"], 0.0, lt.grid_of(model))):
        _, during = model.run_with_cache(IDS, attention_mask=attended)
    torch.testing.assert_close(during[name], before[name], rtol=0, atol=0)


def test_mean_ablation_puts_the_mean_in_the_heads_place(model, token_ids):
    means = lt.mean_head_outputs(model, token_ids, progress=False)
    assert means.shape == (N_LAYERS, N_HEADS, model.cfg.d_head)
    rows = []
    for texts in token_ids.values():
        for text in texts:
            ids = torch.tensor([text])
            _, cache = model.run_with_cache(ids, attention_mask=torch.ones_like(ids))
            rows.append(cache["blocks.1.attn.hook_z"][0])
    expected = torch.cat(rows).mean(0)
    torch.testing.assert_close(means[1], expected.float(), rtol=1e-4, atol=1e-6)
    mask = lt.HeadMask.mean_ablation(lt.HeadSet(lt.grid_of(model), ["L1H2"]), means)
    attended = torch.ones_like(IDS)
    with lt.masked(model, mask):
        _, cache = model.run_with_cache(IDS, attention_mask=attended)
    z = cache["blocks.1.attn.hook_z"]
    torch.testing.assert_close(
        z[:, :, 2], means[1, 2].to(z).expand_as(z[:, :, 2]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_padding_does_not_reach_the_means_of_models_with_windows(tiny, token_ids, name, backend):
    """Rows of padding have nothing to attend to within a window; they must not give NaN to other rows."""
    windowed = tiny(name, backend)
    padded = lt.mean_head_outputs(windowed, token_ids, progress=False)
    alone = lt.mean_head_outputs(windowed, token_ids, batch_tokens=2, progress=False)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_mean_ablation_mask_is_towards_the_mean(model, token_ids):
    means = lt.mean_head_outputs(model, token_ids, progress=False)
    attended = torch.ones_like(IDS)
    factors = torch.ones(N_LAYERS, N_HEADS, dtype=torch.float64, requires_grad=True)
    with lt.masked(model, lt.HeadMask(factors, fill=means)):
        (gradient,) = torch.autograd.grad(lt.text_nll(model, IDS, attended).sum(), factors)
    losses = []
    for sign in (1, -1):
        moved = torch.ones(N_LAYERS, N_HEADS, dtype=torch.float64)
        moved[1, 2] += sign * 1e-2
        with lt.masked(model, lt.HeadMask(moved, fill=means)), torch.no_grad():
            losses.append(lt.text_nll(model, IDS, attended).sum())
    torch.testing.assert_close(
        gradient[1, 2], (losses[0] - losses[1]).double() / 2e-2, rtol=1e-2, atol=2e-4
    )


def test_factors_above_one_and_nested_masks_multiply(model):
    grid = lt.grid_of(model)
    with (
        lt.masked(model, lt.HeadMask.scaling(["L1H2"], 2.0, grid)),
        lt.masked(model, lt.HeadMask.scaling(["L1H2"], 3.0, grid)),
    ):
        nested = run(model)
    with lt.masked(model, lt.HeadMask.scaling(["L1H2"], 6.0, grid)):
        torch.testing.assert_close(nested, run(model), rtol=0, atol=1e-5)


def test_hooks_come_off_also_after_exceptions_and_leave_others_alone(model):
    before = run(model)
    point = head_points(model)[0]
    seen = []
    point.add_hook(lambda z, hook: seen.append(z.shape))
    count = hooks_left(model)
    with (
        pytest.raises(RuntimeError, match="inside"),
        lt.masked(model, torch.zeros(N_LAYERS, N_HEADS)),
    ):
        run(model)
        raise RuntimeError("inside")
    assert hooks_left(model) == count
    seen.clear()
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    assert len(seen) == 1
    model.reset_hooks()
    assert hooks_left(model) == 0


def test_hooks_come_off_when_attaching_fails(model, monkeypatch):
    last, attach = head_points(model)[2], HookPoint.add_hook

    def add_hook(self, *args, **kwargs):
        if self is last:
            raise RuntimeError("cannot attach")
        return attach(self, *args, **kwargs)

    monkeypatch.setattr(HookPoint, "add_hook", add_hook)
    zeros = torch.zeros(N_LAYERS, N_HEADS)
    with pytest.raises(RuntimeError, match="cannot attach"), lt.masked(model, zeros):
        pass
    assert hooks_left(model) == 0


def test_a_mask_that_met_no_forward_pass_says_so(model):
    with (
        pytest.warns(UserWarning, match="the mask had no effect"),
        lt.masked(model, torch.zeros(N_LAYERS, N_HEADS)),
    ):
        pass


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4), r"shape \(2, 4\), for 2 layers × 4 heads, but the model has 3 layers × 4 heads"),
        ((4, 3), r"\(4, 3\)"),
        ((2, 3, 5), r"\(2, 3, 5\)"),
    ],
)
def test_a_mask_of_the_wrong_shape_is_refused_with_both_shapes(model, shape, message):
    with pytest.raises(ValueError, match=message), lt.masked(model, torch.ones(shape)):
        pass
    assert hooks_left(model) == 0


def test_a_mask_for_another_number_of_texts_is_refused(model):
    mask = torch.zeros(2, N_LAYERS, N_HEADS)
    with pytest.raises(ValueError, match="called with 3"), lt.masked(model, mask):
        run(model)
    assert hooks_left(model) == 0


def test_bad_masks_are_refused():
    grid = lt.HeadGrid(2, 3)
    with pytest.raises(ValueError, match=r"not \(4,\)"):
        lt.HeadMask(torch.ones(4))
    with pytest.raises(ValueError, match="finite number, not nan"):
        lt.HeadMask.scaling(["L0H0"], float("nan"), grid)
    with pytest.raises(ValueError, match=r"grid=lahis_tl.grid_of\(model\)"):
        lt.HeadMask.scaling(["L0H0"], 0.0)
    with pytest.raises(IndexError, match="head L2H0 is outside the model's 2 layers × 3 heads"):
        lt.HeadMask.scaling(["L2H0"], 0.0, grid)
    with pytest.raises(ValueError, match=r"fill is for \(1, 3\) heads"):
        lt.HeadMask(torch.ones(2, 3), fill=torch.ones(1, 3, 4))


def test_a_mask_knows_its_heads():
    grid = lt.HeadGrid(2, 3)
    heads = lt.HeadSet(grid, ["L1H2", "L0H1"])
    mask = lt.HeadMask.scaling(heads, 0.5)
    assert mask.heads().labels == ["L0H1", "L1H2"]
    assert mask.factors[1, 2] == 0.5
    assert len(lt.HeadMask.ones(grid).heads()) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_inside_the_block(backend, tiny):
    """The backward pass recomputes the forward one, so the mask must still be there."""
    model = tiny("llama", backend)
    factors = torch.ones(N_LAYERS, N_HEADS, requires_grad=True)
    attended = torch.ones_like(IDS)
    with lt.masked(model, factors):
        (plain,) = torch.autograd.grad(lt.text_nll(model, IDS, attended).sum(), factors)

        def loss(offset):
            return lt.text_nll(model, IDS, attended).sum() + offset

        from torch.utils.checkpoint import checkpoint

        again = checkpoint(loss, torch.zeros((), requires_grad=True), use_reentrant=False)
        (recomputed,) = torch.autograd.grad(again, factors)
    torch.testing.assert_close(plain, recomputed)


def test_mean_ablation_leaves_other_heads_exactly_alone_in_half_precision(tiny, request):
    model = tiny("llama", "auto", "bfloat16")
    means = torch.full((N_LAYERS, N_HEADS, model.cfg.d_head), 3.0)
    name = "blocks.0.attn.hook_z"
    attended = torch.ones_like(IDS)
    _, plain = model.run_with_cache(IDS, attention_mask=attended)
    mask = lt.HeadMask.mean_ablation(lt.HeadSet(lt.grid_of(model), ["L0H1"]), means)
    with lt.masked(model, mask):
        _, cache = model.run_with_cache(IDS, attention_mask=attended)
    others = [0, 2, 3]
    torch.testing.assert_close(cache[name][:, :, others], plain[name][:, :, others], rtol=0, atol=0)
    assert (cache[name][:, :, 1] == 3).all()


def test_means_of_a_model_without_a_plain_unembedding():
    means = lt.mean_head_outputs(micro_bridge(), {"x": [[A, B], [B, A]]}, progress=False)
    # z of head 0: a sees 1, b after a sees 1/2, b alone 0, a after b 1/2; head 1 is the mirror image
    torch.testing.assert_close(means[0, :, 0], torch.tensor([0.5, 0.5]))


def test_heads_of_another_model_are_refused():
    grid, other = lt.HeadGrid(2, 3), lt.HeadGrid(40, 40)
    heads = lt.HeadSet(other, ["L1H1"])
    with pytest.raises(
        ValueError, match="belong to a model of 40 layers × 40 heads, not of 2 layers"
    ):
        lt.HeadMask.scaling(heads, 0.0, grid)
    with pytest.raises(ValueError, match="belong to a model of 40"):
        lt.HeadMask.mean_ablation(heads, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="must be finite"):
        lt.HeadMask(torch.full((2, 3), float("nan")))


def test_a_fill_of_another_width_is_refused(model):
    mask = lt.HeadMask(torch.zeros(N_LAYERS, N_HEADS), fill=torch.zeros(N_LAYERS, N_HEADS, 1))
    with pytest.raises(ValueError, match="fill has d_head 1"), lt.masked(model, mask):
        run(model)
