import math
from unittest.mock import patch

import pytest
import torch
from micro import A, B, micro_bridge

import lahis_tl as lt
from lahis_tl import evaluation
from lahis_tl.ablation import Selectivity
from lahis_tl.controls import matched_random_heads
from lahis_tl.errors import ArtifactError, ModelError
from lahis_tl.evaluation import Evaluator


def loss(model, text):
    ids = torch.tensor([text])
    with torch.no_grad():
        return float(lt.text_nll(model, ids, torch.ones_like(ids)))


@pytest.fixture
def pair():
    return lt.load_corpus(
        {
            "en": ["the cat is in the house", "the house is here", "here is the cat in the house"],
            "fr": [
                "le chat dort ici la maison",
                "la maison est ici",
                "le chat est ici la maison dort",
            ],
        },
        min_chars=5,
    )


def test_losses_keep_the_order_of_texts(llama, token_ids):
    evaluator = Evaluator(llama, token_ids, batch_tokens=24)
    head = lt.HeadSet(lt.grid_of(llama), ["L1H2"])
    plain, without = evaluator.nll([None, lt.HeadMask.scaling(head, 0.0)], progress=False)
    for language, texts in token_ids.items():
        for i, text in enumerate(texts):
            assert float(evaluator.by_language(plain)[language][i]) == pytest.approx(
                loss(llama, text), rel=1e-6
            )
            with lt.masked(llama, lt.HeadMask.scaling(head, 0.0)):
                expected = loss(llama, text)
            assert float(evaluator.by_language(without)[language][i]) == pytest.approx(
                expected, rel=1e-6
            )


def test_perplexity_by_hand():
    """ "ab" has loss ln 2, "ba" ln(1 + e²) (see the micro model)."""
    found = lt.perplexity(micro_bridge(), {"x": [[A, B], [B, A]]}, progress=False)
    losses = [math.log(2), math.log(1 + math.e**2)]
    assert found.per_token("x").value == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert found.mean_exp("x") == pytest.approx((2 + 1 + math.e**2) / 2, rel=1e-5)
    row = found.to_dataframe().iloc[0]
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert "bits_per_byte" not in row
    with pytest.raises(ValueError, match="the texts' bytes are not known"):
        found.bits_per_byte("x")


def test_tokens_weigh_alike_and_bytes_are_counted(llama, pair):
    found = lt.perplexity(llama, pair, progress=False)
    nll, n = found.nll["en"].double(), found.n_tokens["en"]
    assert found.per_token("en").value == pytest.approx(float((nll * n).sum() / n.sum()), rel=1e-6)
    bits = float((nll * n).sum()) / math.log(2)
    assert found.bits_per_byte("en").value == pytest.approx(
        bits / int(found.n_bytes["en"].sum()), rel=1e-6
    )
    # The tokenizer adds no BOS, so the first token is not predicted, and its bytes do not count.
    tokenizer = lt.tokenizer_of(llama)
    ids = tokenizer(pair["en"][0])["input_ids"]
    rest = len(tokenizer.decode(ids)) - len(tokenizer.decode(ids[:1]))
    assert int(found.n_bytes["en"][0]) == rest
    interval = found.per_token("en")
    assert interval.lower < interval.value < interval.upper


def test_a_set_beside_its_controls(llama, pair):
    heads = lt.HeadSet(lt.grid_of(llama), ["L0H1", "L2H3"])
    effect = lt.ablation_effect(llama, pair, heads, draws=7, seed=5, progress=False)
    assert list(effect.control_sets) == matched_random_heads(heads, 7, match="nearest", seed=5)
    tokenizer = lt.tokenizer_of(llama)
    ids = tokenizer(pair["fr"][1])["input_ids"]
    with lt.masked(llama, lt.HeadMask.scaling(heads, 0.0)):
        expected = loss(llama, ids)
    assert float(effect.change["fr"][1]) == pytest.approx(expected - loss(llama, ids), abs=1e-6)
    mean = 0.0
    with lt.masked(llama, lt.HeadMask.scaling(effect.control_sets[3], 0.0)):
        rows = [tokenizer(text)["input_ids"] for text in pair["en"]]
        mean += sum(loss(llama, ids) for ids in rows) / 3
    mean -= sum(loss(llama, ids) for ids in rows) / 3
    assert float(effect.controls["en"][3]) == pytest.approx(mean, abs=1e-6)
    table = effect.to_dataframe().set_index("language")
    above = int((effect.controls["en"] >= effect.change["en"].mean()).sum())
    assert table.p["en"] == (1 + above) / 8
    assert table.lower["en"] <= table.change["en"] <= table.upper["en"]


def test_the_selectivity_matrix_is_its_cells(llama, pair):
    grid = lt.grid_of(llama)
    sets = {"fr": lt.HeadSet(grid, ["L1H1"]), "en": lt.HeadSet(grid, ["L0H0", "L2H2"])}
    result = lt.selectivity(llama, sets, pair, draws=3, progress=False)
    assert (result.rows, result.columns) == (("fr", "en"), ("en", "fr"))
    for row, heads in sets.items():
        alone = lt.ablation_effect(llama, pair, heads, draws=3, progress=False)
        for column in result.columns:
            assert torch.allclose(result.change[row, column], alone.change[column], atol=1e-6)
            i, j = result.rows.index(row), result.columns.index(column)
            assert torch.allclose(result.controls[i, :, j], alone.controls[column], atol=1e-6)
    m = result.matrix
    assert result.contrast("fr").value == pytest.approx(float(m[0, 1] - m[0, 0]), abs=1e-6)
    both = (float(m[0, 1] - m[0, 0]) + float(m[1, 0] - m[1, 1])) / 2
    assert result.contrast().value == pytest.approx(both, abs=1e-6)
    assert len(result.to_dataframe()) == 4


RUNS = {
    "effect": lambda model, texts, heads, **options: lt.ablation_effect(
        model, texts, heads, draws=4, **options
    ),
    "selectivity": lambda model, texts, heads, **options: lt.selectivity(
        model, {"en": heads, "fr": heads[:1]}, texts, draws=2, **options
    ),
    "sweep": lambda model, texts, heads, **options: lt.sweep_heads(
        model, texts, heads, (1, 2), draws=2, **options
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_run_goes_on_where_it_stopped(llama, pair, tmp_path, kind):
    run, heads = RUNS[kind], lt.HeadSet(lt.grid_of(llama), ["L0H1", "L2H3"])
    options = {"batch_tokens": 16, "progress": False}
    expected = run(llama, pair, heads, **options)
    real, calls = evaluation.text_nll, []

    def counted(*arguments):
        calls.append(1)
        return real(*arguments)

    def interrupted(*arguments):
        if len(calls) == 12:
            raise KeyboardInterrupt
        return counted(*arguments)

    with patch.object(evaluation, "text_nll", counted):
        run(llama, pair, heads, **options)
    whole, calls = len(calls), []
    with patch.object(evaluation, "text_nll", interrupted), pytest.raises(KeyboardInterrupt):
        run(llama, pair, heads, checkpoint=tmp_path, **options)
    batches = len(Evaluator(llama, pair, batch_tokens=16).batches)
    finished, calls = 12 // batches, []
    assert finished >= 2, "masks, of which one is begun"
    with patch.object(evaluation, "text_nll", counted):
        again = run(llama, pair, heads, checkpoint=tmp_path, **options)
    assert len(calls) == whole - finished * batches
    for name, tensor in expected._tensors().items():
        assert torch.equal(again._tensors()[name], tensor)
    with pytest.raises(ArtifactError, match="seed was 0, now 1"):
        run(llama, pair, heads, checkpoint=tmp_path, seed=1, **options)


def test_a_loss_that_is_not_finite_is_not_kept(llama, pair, tmp_path):
    heads = lt.HeadSet(lt.grid_of(llama), ["L0H1"])
    with (
        patch.object(evaluation, "text_nll", lambda _, ids, mask: torch.full([len(ids)], math.nan)),
        pytest.raises(ModelError, match="6 losses are not finite"),
    ):
        lt.ablation_effect(llama, pair, heads, draws=2, checkpoint=tmp_path, progress=False)
    found = lt.ablation_effect(llama, pair, heads, draws=2, checkpoint=tmp_path, progress=False)
    assert found.change["en"].isfinite().all()


def test_contrast_and_p_value_by_hand():
    change = {
        ("a", "a"): torch.tensor([3.0, 3.0]),
        ("a", "b"): torch.tensor([1.0, 1.0]),
        ("b", "a"): torch.tensor([0.0, 0.0]),
        ("b", "b"): torch.tensor([1.0, 1.0]),
    }
    # Contrasts of the random sets: row a: 0, 2, 5; row b: 0, 0, 3.
    controls = torch.tensor(
        [[[0.0, 0.0], [2.0, 0.0], [5.0, 0.0]], [[0.0, 0.0], [1.0, 1.0], [0.0, 3.0]]]
    )
    result = Selectivity(("a", "b"), ("a", "b"), change, controls)
    assert result.contrast("a") == lt.Interval(2, 2, 2)
    assert result.contrast().value == 1.5
    assert result.p_value("a") == 3 / 4  # 2 and 5 are at least 2; the observed one counts too
    assert result.p_value() == 2 / 4  # means 0, 1, 4


def test_sweeps(llama, pair):
    grid = lt.grid_of(llama)
    ranked = lt.HeadSet(grid, ["L1H1", "L0H2", "L2H0"])
    by_count = lt.sweep_heads(llama, pair, ranked, counts=(1, 3), draws=2, progress=False)
    whole = lt.ablation_effect(llama, pair, ranked, draws=2, progress=False)
    assert torch.allclose(by_count.change["fr"][1], whole.change["fr"], atol=1e-6)
    by_factor = lt.sweep_factors(llama, pair, ranked, factors=(1.0, 0.0), draws=2, progress=False)
    assert torch.allclose(by_factor.change["en"][0], torch.zeros(3), atol=1e-6)
    assert torch.allclose(by_factor.change["en"][1], whole.change["en"], atol=1e-6)
    assert list(by_factor.to_dataframe().columns[:2]) == ["factor", "language"]
    with pytest.raises(
        ValueError, match=r"counts \[1, 4\] must lie between 1 and the 3 ranked heads"
    ):
        lt.sweep_heads(llama, pair, ranked, counts=(1, 4))


def test_texts_that_were_scored_are_refused(llama, pair):
    scored, unseen = pair.split(1)
    grads = lt.head_gradients(llama, scored, progress=False)
    heads = lt.language_heads(grads, "contrastive", fraction=0.2)
    with pytest.raises(ValueError, match=r"scored already \(1 in en, 1 in fr\)"):
        lt.selectivity(llama, heads, pair, draws=2, progress=False)
    assert lt.selectivity(llama, heads, unseen, draws=2, progress=False).rows
    with pytest.raises(ValueError, match="scored already"):
        lt.ablation_effect(llama, pair, heads.specific["fr"], scored=grads.card)


def test_what_selectivity_refuses(llama, pair):
    heads = lt.HeadSet(lt.grid_of(llama), ["L0H1"])
    with pytest.raises(ValueError, match="has en, fr, not de"):
        lt.selectivity(llama, {"de": heads}, pair)
    with pytest.raises(ValueError, match="no language has specific heads"):
        lt.selectivity(llama, {"fr": heads[:0]}, pair)
    with pytest.raises(ValueError, match="a second one"):
        lt.selectivity(llama, {"fr": heads}, pair.select(["fr"]))


def test_a_mask_with_a_row_for_each_text_is_refused(llama, token_ids):
    mask = lt.HeadMask.ones(lt.grid_of(llama), texts=3)
    with pytest.raises(ValueError, match=r"shape \(3, 3, 4\) has a row for each text"):
        lt.perplexity(llama, {"en": token_ids["en"]}, mask, progress=False)
