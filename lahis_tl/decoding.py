"""One next-token step after another, on both of TransformerLens's classes, with keys and values kept."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lahis_tl.access import (
    LensModel,
    device_of,
    dtype_of,
    final_hidden,
    full_logits,
    is_bridge,
    model_name,
    unembedding_of,
)
from lahis_tl.errors import ModelError
from lahis_tl.models.hooked import empty_cache


class Decoder:
    """Feeds prompts, then token after token, and gives the logits of what comes next.

    >>> decoder = Decoder(model, [[5, 6, 7], [8, 9]])                        # doctest: +SKIP
    >>> logits = decoder.start()                                             # doctest: +SKIP
    >>> logits = decoder.step(logits.argmax(-1))                             # doctest: +SKIP

    Prompts are padded on the left and every pass is told which tokens are real, so that a prompt gets
    the logits that it gets alone. Masks and other hooks act as in any call of the model.

    Args:
        prompts: token ids, at least one each.
        use_cache: keep the keys and values of earlier tokens; else all is computed anew at each step.
    """

    def __init__(
        self, model: LensModel, prompts: Sequence[Sequence[int]], use_cache: bool = True
    ) -> None:
        device = device_of(model)
        rows = [torch.tensor(list(ids)) for ids in prompts]
        self.model = model
        self.ids: Int[Tensor, "batch pos"] = pad_sequence(
            rows, batch_first=True, padding_side="left"
        ).to(device)
        self.attention_mask: Int[Tensor, "batch pos"] = pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
        ).to(device)
        self._unembed = unembedding_of(model)
        backbone = getattr(getattr(model, "original_model", None), "base_model", None)
        if is_bridge(model) and (self._unembed is None or backbone is None):
            use_cache = False  # only the model's own forward pass is known to be right
        self._backbone: Any = backbone
        self._past: Any = None
        if use_cache and not is_bridge(model):
            self._past = empty_cache(model, len(rows))
        self.use_cache = use_cache

    @torch.no_grad()
    def start(self) -> Float[Tensor, "batch vocab"]:
        """Logits after the prompts, float32.

        Raises:
            ModelError: they are not finite.
        """
        return self._logits(self.ids, self.attention_mask)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Logits after one more token of each prompt, float32."""
        new = tokens.to(self.ids.device)[:, None]
        self.ids = torch.cat([self.ids, new], 1)
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(new)], 1)
        if not self.use_cache:
            return self._logits(self.ids, self.attention_mask)
        return self._logits(new, torch.ones_like(new))

    def _logits(self, ids: Tensor, new_mask: Tensor) -> Float[Tensor, "batch vocab"]:
        if self._unembed is None:
            last = full_logits(self.model, self.ids, self.attention_mask)[:, -1]
        else:
            last = self._hidden(ids, new_mask)[:, -1].to(self._unembed.weight.device)
        if not torch.isfinite(last).all():
            raise ModelError(
                f"{model_name(self.model)} overflows while it decodes (NaN or infinity) in {dtype_of(self.model)}: "
                "load it in float32 or bfloat16"  # padded texts on a bridge in float64, float16 on some models
            )
        return (last if self._unembed is None else self._unembed(last)).float()

    def _hidden(self, ids: Tensor, new_mask: Tensor) -> Float[Tensor, "batch pos d_model"]:
        if is_bridge(self.model):
            return self._hidden_of_bridge(ids)
        if not self.use_cache:
            return final_hidden(self.model, ids, new_mask)
        residual = self.model(
            ids,
            attention_mask=new_mask,  # the cache knows the earlier part
            past_kv_cache=self._past,
            stop_at_layer=self.model.cfg.n_layers,
        )
        return self.model.ln_final(residual) if self.model.cfg.normalization_type else residual

    def _hidden_of_bridge(self, ids: Tensor) -> Float[Tensor, "batch pos d_model"]:
        options: dict[str, Any] = {}
        if "position_ids" in inspect.signature(self._backbone.forward).parameters:
            # Some models would count positions from the padding on.
            positions = (self.attention_mask.cumsum(1) - 1).clamp_min(0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        found = self._backbone(
            input_ids=ids,
            attention_mask=self.attention_mask,
            past_key_values=self._past,
            use_cache=self.use_cache,
            **options,
        )
        if self.use_cache:
            self._past = found.past_key_values
        return found.last_hidden_state
