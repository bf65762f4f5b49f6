"""What the model would say next: after each layer (the logit lens), and with heads scaled."""

from collections.abc import Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lahis_tl.access import (
    LensModel,
    device_of,
    full_logits,
    layer_points,
    model_name,
    run_layers,
    tokenizer_of,
    unembedding_of,
)
from lahis_tl.errors import ModelError
from lahis_tl.masks import HeadMask, hooked_points, masked
from lahis_tl.prompts import Masks, decoding_groups, mask_rows, prompt_ids


@torch.no_grad()
def logit_lens(
    model: LensModel,
    prompts: Sequence[str],
    targets: Sequence[Sequence[int]],
    mask: Masks = None,
    *,
    batch_tokens: int = 4096,
) -> Float[Tensor, "text layer target"]:
    """Log-probability of target tokens at each prompt's end, read from the residual stream after each layer.

    >>> logit_lens(model, ["The sky is"], [[4, 7]])[0, -1]          # doctest: +SKIP

    The residual stream goes through the model's final norm, its statistics taken anew, and the
    unembedding; the last layer's row is the model's own prediction. (nostalgebraist 2020, "interpreting GPT: the
    logit lens".)

    Args:
        targets: for each prompt, token ids; as many for all.
        mask: as in ``generate``.

    Returns:
        nats, float32; at most 0.

    Raises:
        ValueError: as many targets as prompts are needed and others were given.
        ModelError: the model's output is no linear map of its final norm.
    """
    if len(targets) != len(prompts) or len({len(t) for t in targets}) != 1:
        raise ValueError(
            f"{len(prompts)} prompts need as many rows of targets, all of one length; there are "
            f"{len(targets)} rows of lengths {sorted({len(t) for t in targets})}"
        )
    unembed = unembedding_of(model)
    if unembed is None:
        raise ModelError(
            f"{model_name(model)}: its output is no plain unembedding, so no lens can be had"
        )
    encoded = prompt_ids(model, prompts, 0)
    points = layer_points(model, "hook_resid_post")
    found = torch.empty(len(prompts), len(points), len(targets[0]))
    for group in decoding_groups(encoded, 0, batch_tokens):
        ids = pad_sequence([torch.tensor(encoded[i]) for i in group], batch_first=True)
        last = torch.tensor([len(encoded[i]) - 1 for i in group])
        streams = _last_residuals(
            model, points, ids, last, mask_rows(model, mask, len(prompts), group)
        )
        wanted: Int[Tensor, "text target"] = torch.tensor([list(targets[i]) for i in group])
        for layer, stream in enumerate(streams):
            logits = unembed(model.ln_final(stream.to(unembed.weight.device)[:, None])[:, 0])
            nats = logits.log_softmax(-1).gather(1, wanted.to(logits.device))
            found[group, layer] = nats.float().cpu()
    return found


def _last_residuals(model: LensModel, points, ids: Tensor, last: Tensor, mask) -> list[Tensor]:
    streams: dict[int, Tensor] = {}

    def note(layer: int):
        def keep(residual: Float[Tensor, "batch pos d_model"]) -> None:
            rows = torch.arange(len(residual), device=residual.device)
            streams[layer] = residual[rows, last.to(residual.device)]

        return keep

    with (
        nullcontext() if mask is None else masked(model, mask),
        hooked_points(points, {layer: note(layer) for layer in range(len(points))}),
    ):
        run_layers(model, ids.to(device_of(model)))
    return [streams[layer] for layer in range(len(points))]


@torch.no_grad()
def next_tokens(model: LensModel, text: str, mask: HeadMask, k: int = 8) -> pd.DataFrame:
    """What a mask does to the next token of a text.

    >>> next_tokens(model, "La capitale de la France est", mask)          # doctest: +SKIP

    Args:
        k: the most probable tokens of either side are listed, so up to ``2 k``; at most the vocabulary.

    Returns:
        token, before and after (probabilities), change in nats of log-probability; most probable before first.

    Raises:
        ValueError: the text is empty or longer than the context, or the mask is for another grid.
    """
    (ids,) = prompt_ids(model, [text], 0)
    row = torch.tensor([ids], device=device_of(model))
    plain = full_logits(model, row, torch.ones_like(row))[0, -1].float().log_softmax(-1).cpu()
    with masked(model, mask):
        changed = full_logits(model, row, torch.ones_like(row))[0, -1].float().log_softmax(-1).cpu()
    k = min(k, len(plain))
    listed = torch.cat([plain.topk(k).indices, changed.topk(k).indices]).unique()
    listed = listed[plain[listed].argsort(descending=True)]
    tokenizer = tokenizer_of(model)
    return pd.DataFrame(
        {
            "token": [tokenizer.decode([i]) for i in listed.tolist()],
            "before": plain[listed].exp().numpy(),
            "after": changed[listed].exp().numpy(),
            "change": (changed - plain)[listed].numpy(),
        }
    )
