"""An estimate, not a measurement: what scoring large models on many languages would take.

Plain arithmetic from a model's shape. Assumed:

* every product with a weight costs 2 FLOPs for a number and token, attention 4 · tokens · width more in each layer (no
  saving by causality). Scoring is one forward pass and one backward pass to the activations alone, which takes each
  product with a weight once again and those of attention twice. An exact effect is a forward pass from the ablated
  layer on, with the unembedding.
* the GPUs reach the given share of their peak, all the time, and texts are shared out without loss.
* activations kept for the backward pass: 8 · (width + MLP width) + 2.7 · heads · tokens numbers a token and layer,
  which is what SmolLM2 as a HookedTransformer was measured to keep (68 MB a text of 32 tokens, 1798 MB of 512,
  float32).
* the loss holds two blocks of 2^24 float32 numbers, whatever the vocabulary.
* a model that does not fit on one GPU is split by layers over as few as leave room for one text; layers follow one
  another, so that only one of them computes at a time.

    python -m analyses.benchmark_estimate
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analyses.result import Result

_LOSS_BYTES = 2 * 2**24 * 4


@dataclass(frozen=True)
class Shape:
    """A model with gated MLPs and grouped key-value heads."""

    layers: int
    heads: int
    key_value_heads: int
    width: int
    mlp_width: int
    vocabulary: int
    tied: bool

    @property
    def layer(self) -> int:
        """Weights of one layer, norms left out."""
        head = self.width // self.heads
        return self.width * (2 * self.width + 2 * self.key_value_heads * head + 3 * self.mlp_width)

    @property
    def unembedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.unembedding * (1 if self.tied else 2)

    def scoring_flops(self, tokens: int) -> float:
        """Of one token in a text of so many."""
        attention = 4 * tokens * self.width * self.layers
        return 4 * (self.layers * self.layer + self.unembedding) + 3 * attention

    def effects_flops(self, tokens: int) -> float:
        """Of the exact effects of all heads, for one token."""
        layer = 2 * self.layer + 4 * tokens * self.width
        above = self.layers * (self.layers + 1) / 2  # layers from each one on, summed
        return self.heads * (above * layer + self.layers * 2 * self.unembedding)

    def activation_bytes(self, tokens: int, bytes_each: int) -> float:
        """Kept for the backward pass of one text."""
        numbers = 8 * (self.width + self.mlp_width) + 2.7 * self.heads * tokens
        return tokens * self.layers * numbers * bytes_each


# From the models' published configurations.
SHAPES = {
    "Aya-23-8B": Shape(32, 32, 8, 4096, 14336, 256_000, tied=True),
    "Llama-3.1-70B": Shape(80, 64, 8, 8192, 28672, 128_256, tied=False),
}


def run(
    shapes: Mapping[str, Shape] = SHAPES,
    languages: int = 100,
    texts: int = 1000,
    tokens: int = 512,
    gpus: int = 8,
    memory_gb: float = 80.0,
    peak_tflops: float = 312.0,
    utilisation: float = 0.4,
    bytes_each: int = 2,
) -> Result:
    """One row a model. Defaults: A100 80 GB in bfloat16.

    Args:
        texts: for each language.
        utilisation: share of the peak that is reached; assumed.

    Raises:
        ValueError: a model does not fit on the GPUs.
    """
    rows = []
    total = languages * texts * tokens
    for name, shape in shapes.items():
        weights = shape.parameters * bytes_each
        text = shape.activation_bytes(tokens, bytes_each)
        room = memory_gb * 1e9 - _LOSS_BYTES
        split = math.ceil((weights + text) / room)
        if split > gpus:
            raise ValueError(f"{name} needs {split} GPUs of {memory_gb} GB, there are {gpus}")
        copies = gpus // split
        speed = copies * peak_tflops * 1e12 * utilisation  # one GPU of a copy computes at a time
        scoring, exact = shape.scoring_flops(tokens) * total, shape.effects_flops(tokens) * total
        rows.append(
            {"model": name, "parameters": shape.parameters, "heads": shape.layers * shape.heads}
            | {"scoring_flops": scoring, "scoring_hours": scoring / speed / 3600}
            | {"exact_flops": exact, "exact_hours": exact / speed / 3600}
            | {"gpus_a_copy": split, "weights_gb_a_gpu": weights / split / 1e9}
            | {"activations_gb_a_text": text / 1e9, "loss_gb": _LOSS_BYTES / 1e9}
            | {"texts_at_once": int((room * split - weights) // text)}
            | {"gradients_gb": languages * texts * shape.layers * shape.heads * 4 / 1e9}
        )
    about = (
        f"An estimate for {languages} languages of {texts} texts of {tokens} tokens on {gpus} GPUs of "
        f"{memory_gb:.0f} GB at {utilisation:.0%} of {peak_tflops:.0f} TFLOP/s: "
    )
    hours = "; ".join(
        f"{r['model']} {r['scoring_hours']:.1f} hours to score, {r['exact_hours']:.0f} for all exact effects"
        for r in rows
    )
    return Result("benchmark_estimate", {"estimate": pd.DataFrame(rows)}, {}, about + hours + ".")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--languages", type=int, default=100)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--out", type=Path, help="folder for the table")
    given = vars(parser.parse_args())
    out = given.pop("out")
    result = run(**given)
    table = result.dataframe.set_index("model").T
    print(f"{table.to_string(float_format='{:.3g}'.format)}\n\n{result.verdict}")
    if out:
        print(f"\nWritten to {result.save(out)}")
