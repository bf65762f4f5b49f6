"""Adapters of ``peft`` trained on the same pairs, as a baseline for tuned masks."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import lahis_tl as lt
from lahis_tl.models.sources import open_source
from lahis_tl.pairs import encode_pairs, pad_pairs
from lahis_tl.questions import Question, answer_scores, question_pair, question_prompt

ADAPTERS = ("ia3", "lora")


def adapter_answers(
    name: str,
    adapter: str,
    train: Sequence[Question],
    test: Sequence[Question],
    options: Mapping[str, Any],
    max_new_tokens: int,
    seed: int,
    batch_size: int = 4,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train an adapter with peft's own settings and answer the test questions.

    Args:
        name: of the model, loaded afresh in float32.
        options: epochs and learning_rate, as for the masks.

    Returns:
        the rows of ``analyses.xquad_mask.answers``, and parameters and seconds.

    Raises:
        ValueError: an unknown adapter, or peft is not installed.
    """
    if adapter not in ADAPTERS:
        raise ValueError(f"adapter {adapter!r} is not one of {', '.join(ADAPTERS)}")
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "adapters need a package that is not installed: pip install peft"
        ) from error
    model = lt.load_model(name)  # for its tokens and context only
    source = open_source(
        name,
        dtype=torch.float32,
        device=torch.device("cpu"),
        revision=None,
        trust_remote_code=False,
    )
    kind: Any = peft.IA3Config if adapter == "ia3" else peft.LoraConfig
    torch.manual_seed(seed)
    adapted: Any = peft.get_peft_model(source.hf, kind(task_type="CAUSAL_LM"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options["learning_rate"], weight_decay=0.0)
    pairs = encode_pairs(model, [question_pair(q) for q in train])
    start = time.perf_counter()
    adapted.train()
    for _ in range(options["epochs"]):
        for first in range(0, len(pairs), batch_size):
            _losses(adapted, pairs[first : first + batch_size]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - start
    adapted.eval()
    rows = []
    with torch.no_grad():
        for question in test:
            (pair,) = encode_pairs(model, [question_pair(question)])
            nll = float(_losses(adapted, [pair])[0])
            ids = source.tokenizer(question_prompt(question), return_tensors="pt").input_ids
            whole = adapted.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=source.tokenizer.eos_token_id,
            )
            text = source.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
            row = {"id": question.id, "paragraph": question.paragraph, "text": text, "nll": nll}
            rows.append(row | answer_scores(text, question))
    return rows, {
        "parameters": sum(p.numel() for p in trained),
        "seconds": seconds,
        "kept_epoch": options["epochs"],
    }


def _losses(adapted: Any, pairs: Sequence[Any]) -> torch.Tensor:
    """Mean NLL of each target's tokens."""
    ids, mask, wanted = pad_pairs(pairs)
    logits = adapted(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll * wanted).sum(1) / wanted.sum(1)
