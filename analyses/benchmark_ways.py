"""The same numbers by other tools, as they are mostly written today.

First-order effects of removing a head, −z · dL/dz summed over the head (``taylor``): by a plain TransformerLens
script, by its attribution patching, by captum. Exact effects of zeroing it: by a plain loop of ``run_with_hooks``, by
its activation patching, by captum. Each takes texts of one length, [text, pos], and gives nats per token as float32
[text, layer, head]. And the factors that a plain training script finds.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import lahis_tl as lt
from lahis_tl.access import LensModel, grid_of
from lahis_tl.pairs import EncodedPair, pad_pairs

HAS_CAPTUM = find_spec("captum") is not None
Texts = Int[Tensor, "text pos"]
PerHead = Float[Tensor, "text layer head"]


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Weights ask for gradients, as they do by default where nobody has said otherwise."""
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)
        model.zero_grad()


def mean_nll(logits: Float[Tensor, "text pos vocab"], ids: Texts) -> Float[Tensor, " text"]:
    """Mean next-token NLL of each text, from all logits at once."""
    rows = logits[:, :-1].flatten(0, 1).float()
    nll = nn.functional.cross_entropy(rows, ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(ids), -1).mean(1)


def z_names(model: LensModel) -> list[str]:
    return [f"blocks.{layer}.attn.hook_z" for layer in range(grid_of(model).n_layers)]


def taylor_plain(model: LensModel, ids: Texts, batch: int = 1) -> PerHead:
    """A plain script: keep z and its gradient by hooks, ``loss.backward()``, all weights asking for gradients.

    Args:
        batch: texts in one pass.
    """
    found, kept, slopes = [], {}, {}

    def keep(value: Tensor, hook: Any, into: dict[str, Tensor], name: str) -> None:
        into[name] = value.detach()

    def hooks(into: dict[str, Tensor]) -> list[Any]:  # by alias: a bridge's points have other names
        return [(name, partial(keep, into=into, name=name)) for name in z_names(model)]

    with trainable(model), model.hooks(fwd_hooks=hooks(kept), bwd_hooks=hooks(slopes)):
        for rows in ids.split(batch):
            model.zero_grad()
            (model(rows, return_type="loss") * len(rows)).backward()
            found.append(_taylor(model, kept, slopes))
    return torch.cat(found)


def taylor_retained(model: LensModel, ids: Texts) -> PerHead:
    """The same with ``retain_grad`` on z; of a HookedTransformer alone, since a bridge hands out views of z."""
    names, found = set(z_names(model)), []
    kept: dict[str, Tensor] = {}

    def keep(z: Tensor, hook: Any) -> None:
        z.retain_grad()
        kept[hook.name] = z

    with trainable(model):
        for rows in ids.split(1):
            model.zero_grad()
            model.run_with_hooks(
                rows, return_type="loss", fwd_hooks=[(names.__contains__, keep)]
            ).backward()
            slopes = {name: z.grad for name, z in kept.items()}
            found.append(_taylor(model, {name: z.detach() for name, z in kept.items()}, slopes))
    return torch.cat(found)


def _taylor(model: LensModel, kept: Any, slopes: Any) -> PerHead:
    return torch.stack([-(kept[n] * slopes[n]).sum((1, 3)) for n in z_names(model)], 1).float()


def taylor_cached(model: LensModel, ids: Texts) -> PerHead:
    """TransformerLens's cache of activations and gradients, on which its attribution patching stands."""
    from transformer_lens.tools.analysis import attribution_patching

    found = []
    with trainable(model):
        for rows in ids.split(1):
            cache = attribution_patching.cache_activation_and_gradient(
                *(model, rows, lambda logits, rows=rows: mean_nll(logits, rows)[0]),
                # Of the lowest point that is kept, a bridge gives no gradient.
                names_filter=["hook_embed", *z_names(model)],
            )
            found.append(_taylor(model, cache.activations, cache.gradients))
    return torch.cat(found)


def attribution_patching_scores(model: LensModel, clean: Texts, ids: Texts) -> PerHead:
    """TransformerLens's attribution patching of each text's heads towards another text of the same length.

    A head's first-order change on the way to the other text's z, summed over positions. Removal is that way to zero,
    which it does not offer.
    """
    from transformer_lens.tools.analysis import attribution_patching

    grid = grid_of(model)
    found = torch.zeros(len(ids), *grid.shape)
    with trainable(model):
        for row in range(len(ids)):
            one = ids[row : row + 1]
            result = attribution_patching.attribution_patch(
                model, clean[row : row + 1], one, lambda logits, one=one: mean_nll(logits, one)[0]
            )
            for node, value in result.node_scores.items():
                if node.kind == "attn_head_out":
                    found[row, node.layer, node.head] += value
    return found


def taylor_captum(hf: Any, ids: Texts, batch: int = 1) -> PerHead:
    """captum's gradient × activation on the input of each output projection of a Llama of Hugging Face's."""
    from captum.attr import LayerGradientXActivation  # pyright: ignore[reportMissingImports]

    found = []
    method = LayerGradientXActivation(_forward(hf), _projections(hf))
    with trainable(hf), _quiet():
        for rows in ids.split(batch):
            parts = method.attribute(
                rows, additional_forward_args=rows, attribute_to_layer_input=True
            )
            heads = [
                torch.as_tensor(part).unflatten(-1, (hf.config.num_attention_heads, -1))
                for part in parts
            ]
            found.append(torch.stack([-each.sum((1, 3)) for each in heads], 1).float())
    return torch.cat([each.detach() for each in found])


def tune_plain(
    model: LensModel, batches: Sequence[Sequence[EncodedPair]], heads: lt.HeadSet
) -> Float[Tensor, " head"]:
    """A plain script that trains factors for an epoch: hooks on z, all logits, all weights asking for gradients."""
    factors = nn.Parameter(torch.ones(len(heads)))
    optimizer = torch.optim.AdamW([factors], lr=1e-2, weight_decay=0.0)

    def scale(z: Tensor, hook: Any, layer: int) -> Tensor:
        row = torch.ones(heads.grid.n_heads, dtype=z.dtype)
        for place, head in enumerate(heads):
            if head.layer == layer:
                row[head.head] = factors[place]
        return z * row[:, None]

    layers = sorted({head.layer for head in heads})
    hooks = [(f"blocks.{layer}.attn.hook_z", partial(scale, layer=layer)) for layer in layers]
    with trainable(model), model.hooks(fwd_hooks=hooks):
        for batch in batches:
            ids, mask, wanted = pad_pairs(batch)
            log_p = model(ids, attention_mask=mask)[:, :-1].float().log_softmax(-1)
            nll = -log_p.gather(-1, ids[:, 1:, None])[..., 0] * wanted
            (nll.sum(1) / wanted.sum(1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
    return factors.detach()


@torch.no_grad()
def effects_plain(model: LensModel, ids: Texts, heads: lt.HeadSet, batch: int = 1) -> PerHead:
    """A plain loop over heads and texts: ``run_with_hooks`` with a hook that zeroes one head."""
    found = _empty(ids, heads)
    for start in range(0, len(ids), batch):
        rows = ids[start : start + batch]
        clean = model(rows, return_type="loss", loss_per_token=True).mean(1)
        for layer, head in heads:

            def zero(z: Tensor, hook: Any, head: int = head) -> Tensor:
                z[:, :, head] = 0
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
            loss = model.run_with_hooks(
                rows, return_type="loss", loss_per_token=True, fwd_hooks=hooks
            )
            found[start : start + batch, layer, head] = loss.mean(1) - clean
    return found


@torch.no_grad()
def effects_patching(model: LensModel, ids: Texts, heads: lt.HeadSet) -> PerHead:
    """TransformerLens's activation patching of whole heads, with zeros for the other run's z."""
    from transformer_lens import patching

    found = _empty(ids, heads)
    index = pd.DataFrame([tuple(head) for head in heads], columns=["layer", "head"])
    d_head = int(model.cfg.d_head)
    zeros = torch.zeros(1, ids.shape[1], grid_of(model).n_heads, d_head)
    cache: Any = dict.fromkeys(z_names(model), zeros)
    with mock.patch("transformer_lens.patching.tqdm", list):  # a bar for every text
        for row, one in enumerate(ids.split(1)):
            clean = mean_nll(model(one), one)[0]
            values = patching.generic_activation_patch(
                *(model, one, cache, lambda logits, one=one: mean_nll(logits, one)[0]),
                *(patching.layer_head_vector_patch_setter, "z"),
                index_df=index,
            )
            found[row, index["layer"].to_list(), index["head"].to_list()] = values - clean
    return found


@torch.no_grad()
def effects_captum(hf: Any, ids: Texts, heads: lt.HeadSet, batch: int = 1) -> PerHead:
    """captum's feature ablation of each output projection's input, a feature a head; whole layers alone."""
    from captum.attr import LayerFeatureAblation  # pyright: ignore[reportMissingImports]

    found = _empty(ids, heads)
    n_heads = heads.grid.n_heads
    layers = sorted({head.layer for head in heads})
    if len(heads) != len(layers) * n_heads:
        raise ValueError("captum's layer ablation takes all heads of a layer")
    with _quiet():
        for layer in layers:
            module = _projections(hf)[layer]
            feature = torch.arange(n_heads).repeat_interleave(module.in_features // n_heads)
            method = LayerFeatureAblation(_forward(hf), module)
            for start in range(0, len(ids), batch):
                rows = ids[start : start + batch]
                part = method.attribute(
                    *(rows, 0),
                    additional_forward_args=rows,
                    layer_mask=feature[None, None],
                    attribute_to_layer_input=True,
                )
                by_head = torch.as_tensor(part).unflatten(-1, (n_heads, -1))[:, 0, :, 0]
                found[start : start + batch, layer] = -by_head
    return found


def _empty(ids: Texts, heads: lt.HeadSet) -> PerHead:
    return torch.full((len(ids), *heads.grid.shape), float("nan"))


def _projections(hf: Any) -> list[Any]:
    return [block.self_attn.o_proj for block in hf.model.layers]


def _forward(hf: Any) -> Any:
    return lambda ids, wanted: mean_nll(hf(input_ids=ids, use_cache=False).logits, wanted)


@contextmanager
def _quiet() -> Iterator[None]:
    """captum warns that token ids have no gradient, which nobody asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="captum")
        yield
