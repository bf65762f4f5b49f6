import pytest
import torch
from torch import nn

from lahis_tl import losses
from lahis_tl.access import Unembedding
from lahis_tl.losses import chunked_nll, predicted_positions

UNEMBEDDINGS = {
    "plain": Unembedding(torch.randn(50, 8, dtype=torch.float64)),
    "bias": Unembedding(
        torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    ),
    "scaled": Unembedding(torch.randn(50, 8, dtype=torch.float64), scale=0.0625),
    "softcapped": Unembedding(torch.randn(50, 8, dtype=torch.float64), scale=2.0, softcap=3.0),
}


@pytest.mark.parametrize("kind", UNEMBEDDINGS)
def test_chunked_loss_and_gradient_equal_cross_entropy(kind, monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", 150)  # three rows a block
    unembedding = UNEMBEDDINGS[kind]
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 50, (10,)), torch.rand(10, dtype=torch.float64)
    ours = chunked_nll(hidden, targets, unembedding)
    plain = nn.functional.cross_entropy(unembedding(hidden), targets, reduction="none")
    torch.testing.assert_close(ours, plain)
    (found,) = torch.autograd.grad((ours * weights).sum(), hidden)
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda h: chunked_nll(h, targets, unembedding), hidden)


def test_half_precision_is_summed_in_float32():
    weight = torch.randn(50, 8)
    hidden, targets = torch.randn(4, 8), torch.randint(0, 50, (4,))
    low = chunked_nll(hidden.bfloat16(), targets, Unembedding(weight.bfloat16()))
    assert low.dtype == torch.float32
    reference = Unembedding(weight.bfloat16().float())(hidden.bfloat16().float())
    expected = nn.functional.cross_entropy(reference, targets, reduction="none")
    torch.testing.assert_close(low, expected, rtol=2e-2, atol=2e-2)


def test_no_block_of_logits_is_larger_than_the_bound(monkeypatch):
    rows = []
    plain = Unembedding.__call__
    monkeypatch.setattr(losses, "_BLOCK", 150)
    monkeypatch.setattr(
        Unembedding, "__call__", lambda self, h: rows.append(len(h)) or plain(self, h)
    )
    chunked_nll(torch.randn(10, 8), torch.randint(0, 50, (10,)), Unembedding(torch.randn(50, 8)))
    assert rows == [3, 3, 3, 1]


def test_positions_predict_where_both_tokens_are_real():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert predicted_positions(mask).tolist() == [[True, True, False], [False, True, True]]


def test_left_padding_changes_nothing(tiny):
    # In float64 Hugging Face's own mask turns rows of padding into NaN, hence float32.
    for name, backend in (("llama", "auto"), ("llama", "bridge"), ("gpt2", "auto")):
        model = tiny(name, backend, "float32")
        ids = torch.tensor([[5, 6, 7, 8]])
        alone = losses.text_nll(model, ids, torch.ones_like(ids))
        padded = torch.tensor([[0, 0, 5, 6, 7, 8]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        torch.testing.assert_close(
            losses.text_nll(model, padded, mask), alone, rtol=1e-5, atol=1e-6
        )
