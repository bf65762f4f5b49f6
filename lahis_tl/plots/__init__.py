"""Results as interactive plotly figures. Each function takes a result, returns a figure, shows nothing."""

from lahis_tl.plots.attention import attention_change, attention_pattern
from lahis_tl.plots.evidence import (
    agreement,
    beside_draws,
    curves,
    intervals,
    selectivity_matrix,
    set_effect,
    square,
    sweep,
    tuning,
)
from lahis_tl.plots.maps import difference, heads_per_layer, heatmap, language_counts, overlap
from lahis_tl.plots.page import figure_data, for_paper, write, write_page
from lahis_tl.plots.style import CATEGORICAL, DIVERGING, SEQUENTIAL, about_card, dress
from lahis_tl.plots.tokens import ColoredText, token_text

__all__ = [
    "CATEGORICAL",
    "DIVERGING",
    "SEQUENTIAL",
    "ColoredText",
    "about_card",
    "agreement",
    "attention_change",
    "attention_pattern",
    "beside_draws",
    "curves",
    "difference",
    "dress",
    "figure_data",
    "for_paper",
    "heads_per_layer",
    "heatmap",
    "intervals",
    "language_counts",
    "overlap",
    "selectivity_matrix",
    "set_effect",
    "square",
    "sweep",
    "token_text",
    "tuning",
    "write",
    "write_page",
]
