import math
from unittest.mock import patch

import pytest
import torch
from conftest import HOOKED_LINE
from micro import A, B, micro_bridge, micro_hooked

import lahis_tl as lt
from lahis_tl import gradients as module
from lahis_tl.access import unembedding_of
from lahis_tl.losses import token_nll

MICRO = [
    pytest.param(micro_hooked, marks=pytest.mark.skipif(not HOOKED_LINE, reason="3.9 only")),
    micro_bridge,
]


@pytest.mark.parametrize("build", MICRO)
def test_micro_model_by_hand(build):
    """
    Text "ab": at a, head 0 gives z=1 and writes (1, 2); logits (1, 0) + (1, 2) = (2, 2), so b has p = 1/2,
    and dL/dlogits = (1/2, -1/2). dL/dm0 = 1/2·1 - 1/2·2 = -1/2; head 1 reads 0 there.
    Text "ba": at b, head 1 gives z=1 and writes (3, 4); logits (0, 1) + (3, 4) = (3, 5); a has
    p = 1/(1 + e²), and dL/dm1 = (p - 1)·3 + (1 - p)·4 = 1 - p.
    Text "abb": the first loss as in "ab"; at b both heads see half an a and half a b, z = (1/2, 1/2);
    logits (0, 1) + (1, 2)/2 + (3, 4)/2 = (2, 4); q = 1/(1 + e²) goes to a; dL/dlogits = (q, -q), and
    dL/dm0 = (q·1 - q·2)/2, dL/dm1 = (q·3 - q·4)/2, each -q/2. The mean over two positions halves all.
    """
    q = 1 / (1 + math.e**2)
    grads = lt.head_gradients(build(), {"x": [[A, B], [B, A], [A, B, B]]}, progress=False)
    expected = torch.tensor([[-0.5, 0.0], [0.0, 1 - q], [(-0.5 - q / 2) / 2, -q / 4]])
    torch.testing.assert_close(grads["x"][:, 0], expected, rtol=1e-5, atol=1e-6)
    losses = torch.tensor([math.log(2), -math.log(q), (math.log(2) - math.log(1 - q)) / 2])
    torch.testing.assert_close(grads.losses["x"], losses, rtol=1e-5, atol=1e-6)
    assert grads.n_tokens["x"].tolist() == [1, 1, 2]
    scores = {name: lt.score(grads, name)["x"][0] for name in ("lahis", "lahis_code", "taylor")}
    g0, g1 = expected.T
    torch.testing.assert_close(scores["taylor"], -expected.mean(0), rtol=1e-5, atol=1e-6)
    assert scores["lahis"][0] == pytest.approx(-float(g0[g0 < 0].sum()) / 3, rel=1e-5)
    assert scores["lahis_code"][1] == pytest.approx(float(g1.abs().mean()) * 1000 / 3, rel=1e-5)


def test_a_model_without_a_plain_unembedding_uses_its_own_logits():
    bridge = micro_bridge()
    assert unembedding_of(bridge) is None
    loss = token_nll(bridge, torch.tensor([[A, B]]), torch.ones(1, 2, dtype=torch.int64))
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)


def test_results_keep_the_order_of_texts(llama, token_ids):
    all_at_once = lt.head_gradients(llama, token_ids, progress=False)
    for language, texts in token_ids.items():
        for index, text in enumerate(texts):
            alone = lt.head_gradients(llama, {"x": [text]}, progress=False)
            torch.testing.assert_close(
                all_at_once[language][index], alone["x"][0], rtol=1e-5, atol=1e-8
            )


def test_cutting_is_feeding_the_first_tokens(llama, token_ids):
    cut = lt.head_gradients(llama, token_ids, max_tokens=4, progress=False)
    short = {code: [text[:4] for text in texts] for code, texts in token_ids.items()}
    expected = lt.head_gradients(llama, short, progress=False)
    torch.testing.assert_close(cut["en"], expected["en"])
    assert cut.n_tokens["en"].tolist() == [3, 3, 3]


def test_texts_and_their_token_ids_give_the_same(llama):
    corpus = lt.load_corpus({"fr": ["le chat dort ici, la maison est"]})
    ids = lt.tokenizer_of(llama)(corpus["fr"][0])["input_ids"]
    by_text = lt.head_gradients(llama, corpus, progress=False)
    by_ids = lt.head_gradients(llama, {"fr": [ids]}, progress=False)
    torch.testing.assert_close(by_text["fr"], by_ids["fr"], rtol=0, atol=0)
    assert by_text.card["corpus"]["sha256"] == corpus.sha256


def test_an_interrupted_run_goes_on_where_it_stopped(llama, token_ids, tmp_path):
    whole = lt.head_gradients(llama, token_ids, batch_tokens=12, progress=False)
    real, calls = module.batch_gradients, []

    def interrupted(model, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, batch)

    options = {"batch_tokens": 12, "checkpoint": tmp_path / "run", "progress": False}
    with patch.object(module, "batch_gradients", interrupted), pytest.raises(KeyboardInterrupt):
        lt.head_gradients(llama, token_ids, **options)
    done = len(list((tmp_path / "run").glob("part-*")))
    assert done == 2
    (tmp_path / "run" / "part-000001.safetensors").write_bytes(b"torn")
    calls.clear()
    with patch.object(module, "batch_gradients", side_effect=real) as again:
        resumed = lt.head_gradients(llama, token_ids, **options)
    assert again.call_count == len(token_ids["en"] + token_ids["fr"]) - 1
    for language in token_ids:
        torch.testing.assert_close(resumed[language], whole[language], rtol=0, atol=0)


def test_a_checkpoint_of_other_settings_is_refused(llama, token_ids, tmp_path):
    lt.head_gradients(llama, token_ids, checkpoint=tmp_path, progress=False)
    with pytest.raises(lt.ArtifactError, match=r"settings.max_tokens was 512, now 8"):
        lt.head_gradients(llama, token_ids, max_tokens=8, checkpoint=tmp_path, progress=False)
    with pytest.raises(lt.ArtifactError, match="content_sha256"):
        lt.head_gradients(llama, {"en": [[3, 4]]}, checkpoint=tmp_path, progress=False)


def test_nan_losses_name_the_text(llama, token_ids):
    point = llama.hook_dict["blocks.0.attn.hook_z"]

    def poison(z, hook):
        z = z.clone()
        z[-1] = float("nan")
        return z

    point.add_hook(poison)
    try:
        with pytest.raises(lt.ModelError, match="the loss of text 0 of 'en' is not finite"):
            lt.head_gradients(llama, {"en": token_ids["en"][:1]}, progress=False)
    finally:
        llama.reset_hooks()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"en": [[5, 6], [7]]}, r"text 1 of 'en' has 1 token"),
        ({"en": [[5, 6], []]}, r"text 1 of 'en' has 0 token"),
        ({"en": []}, "no text to tokenise in 'en'"),
        ({"en": [[5, 6]], "fr": []}, "no text to tokenise in 'fr'"),
        ({}, "no text to tokenise"),
    ],
)
def test_texts_too_short_are_refused(llama, texts, message):
    with pytest.raises(lt.CorpusError, match=message):
        lt.head_gradients(llama, texts, progress=False)


def test_bad_settings_are_refused(llama, token_ids):
    with pytest.raises(ValueError, match="max_tokens=1"):
        lt.head_gradients(llama, token_ids, max_tokens=1, progress=False)
    with pytest.raises(ValueError, match="batch_tokens=1"):
        lt.head_gradients(llama, token_ids, batch_tokens=1, progress=False)


def test_gradients_as_a_table(llama, token_ids):
    grads = lt.head_gradients(llama, token_ids, progress=False)
    frame = grads.to_dataframe()
    assert len(frame) == 5 * 12
    row = frame[
        (frame.language == "fr") & (frame.text == 1) & (frame.layer == 2) & (frame["head"] == 3)
    ]
    assert float(row.gradient.iloc[0]) == float(grads["fr"][1, 2, 3])
    with pytest.raises(KeyError, match="there are en, fr"):
        grads["de"]


def test_a_checkpoint_of_other_weights_or_a_torn_one_is_refused(checkpoint, token_ids, tmp_path):
    model = lt.load_model(str(checkpoint("llama")))
    lt.head_gradients(model, token_ids, checkpoint=tmp_path, progress=False)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    with pytest.raises(lt.ArtifactError, match=r"model.weights_sha256 was"):
        lt.head_gradients(model, token_ids, checkpoint=tmp_path, progress=False)
    (tmp_path / "run.json").write_text("{torn")
    with pytest.raises(lt.ArtifactError, match=r"run\.json is damaged"):
        lt.head_gradients(model, token_ids, checkpoint=tmp_path, progress=False)


def test_a_text_of_padding_has_no_loss(llama):
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    with pytest.raises(ValueError, match="text 1 of the batch has no token to predict"):
        lt.text_nll(llama, ids, torch.tensor([[1, 1, 1], [1, 0, 0]]))
