"""What heads put out on average, for mean ablation."""

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, device_of, grid_of, run_layers
from lahis_tl.batches import TokenIds, make_batches, tokenize
from lahis_tl.corpora import Corpus
from lahis_tl.masks import hooked_heads
from lahis_tl.processes import shows


@torch.no_grad()
def mean_head_outputs(
    model: LensModel,
    corpus: Corpus | TokenIds,
    *,
    max_tokens: int | None = 512,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Float[Tensor, "layer head d_head"]:
    """Each head's output z averaged over all tokens of all texts, float32.

    >>> means = mean_head_outputs(model, corpus)                         # doctest: +SKIP
    >>> with masked(model, HeadMask.mean_ablation(heads, means)):        # doctest: +SKIP
    ...     loss = model(ids, attention_mask=attention_mask, return_type="loss")
    """
    grid, device = grid_of(model), device_of(model)
    sums = [torch.zeros(()) for _ in range(grid.n_layers)]
    n_tokens = 0
    for batch in tqdm(
        make_batches(tokenize(model, corpus, max_tokens), batch_tokens),
        unit="batch",
        disable=not shows(progress),
    ):
        mask = batch.attention_mask.to(device)

        def add(layer: int, mask: Tensor = mask):
            def note(z: Tensor) -> None:
                real = mask.to(z.device).bool()
                sums[layer] = sums[layer] + z[real].double().sum(0).cpu()

            return note

        with hooked_heads(model, {layer: add(layer) for layer in range(grid.n_layers)}):
            run_layers(model, batch.ids.to(device))
        n_tokens += int(mask.sum())
    return (torch.stack(sums) / n_tokens).float()
