import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lahis_tl as lt
from lahis_tl.batches import TextKey, make_batches, tokenize

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(lengths, lengths, st.integers(2, 100))
def test_every_text_is_in_one_batch_whole_and_within_the_bound(first, second, bound):
    texts = {c: [list(range(1, n + 1)) for n in ns] for c, ns in (("a", first), ("b", second))}
    seen = []
    for batch in make_batches(texts, bound):
        assert batch.ids.numel() <= bound or len(batch.keys) == 1
        for row, (code, index) in enumerate(batch.keys):
            real = batch.ids[row][batch.attention_mask[row].bool()]
            assert real.tolist() == texts[code][index]
            assert batch.attention_mask[row].sum() == len(texts[code][index])
            seen.append((code, index))
    assert sorted(seen) == sorted(
        (c, i) for c, ns in (("a", first), ("b", second)) for i in range(len(ns))
    )


def test_like_lengths_come_together_longest_first():
    batches = make_batches({"a": [[1] * n for n in (3, 9, 4, 8)]}, 18)
    assert [batch.keys for batch in batches] == [
        [TextKey("a", 1), TextKey("a", 3)],
        [TextKey("a", 2), TextKey("a", 0)],
    ]


def test_odd_characters_are_tokenised(llama):
    texts = [
        "a lone surrogate \ud800 in the middle of it",
        "a NUL \x00 and a mark \u200f and 🙂 here",
        "שלום עולם, a right-to-left text",
    ]
    found = tokenize(llama, lt.load_corpus({"en": texts}))
    assert all(len(ids) >= 2 for ids in found["en"])


def test_the_context_bounds_a_text(tiny):
    model = tiny("gpt2")
    found = tokenize(model, {"a": [[1] * 500]}, max_tokens=300)
    assert len(found["a"][0]) == model.cfg.n_ctx == 96
    assert torch.isfinite(lt.head_gradients(model, {"a": [[1] * 500]}, progress=False)["a"]).all()
