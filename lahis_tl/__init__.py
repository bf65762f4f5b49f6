"""Find, prove, see and use the attention heads by which a multilingual language model handles its languages.

Names are imported when first used, so that ``import lahis_tl`` itself is quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lahis_tl import plots
    from lahis_tl.ablation import AblationEffect, Selectivity, ablation_effect, selectivity
    from lahis_tl.access import grid_of, tokenizer_of
    from lahis_tl.artifacts import load
    from lahis_tl.attention import AttentionMass, attention_mass
    from lahis_tl.authors import lahis_code
    from lahis_tl.cards import card_of
    from lahis_tl.confusion import judge_text, judge_texts, pass_rates
    from lahis_tl.controls import matched_random_heads, score_matched_heads
    from lahis_tl.corpora import Corpus, load_corpus
    from lahis_tl.effects import HeadEffects, exact_effects
    from lahis_tl.errors import ArtifactError, CorpusError, LahisError, ModelError
    from lahis_tl.evaluation import TextLosses, perplexity
    from lahis_tl.explorer import explore
    from lahis_tl.export import export_folded, export_ia3
    from lahis_tl.foreign import import_scores, score_agreement
    from lahis_tl.gate import Competence, competence
    from lahis_tl.generation import Generation, Generations, Steered, generate, steer
    from lahis_tl.gradients import HeadGradients, head_gradients
    from lahis_tl.heads import Head, HeadGrid, HeadSet
    from lahis_tl.identify import LanguageIdentifier, language_identifier
    from lahis_tl.lens import logit_lens, next_tokens
    from lahis_tl.live import widget
    from lahis_tl.losses import text_nll, token_nll
    from lahis_tl.masks import HeadMask, masked
    from lahis_tl.means import mean_head_outputs
    from lahis_tl.memory import MemoryEstimate, memory_estimate, recomputed
    from lahis_tl.models import load_model
    from lahis_tl.overlaps import HeadOverlap, head_overlap
    from lahis_tl.pairs import target_losses
    from lahis_tl.patterns import AttentionPatterns, attention_patterns, head_pattern
    from lahis_tl.per_token import TokenEffects, token_effects
    from lahis_tl.presets import PRESETS, ModelPreset, preset
    from lahis_tl.questions import Question, load_questions, split_by_paragraph
    from lahis_tl.reruns import Rerun, rerun
    from lahis_tl.scores import HeadScores, register_score, score, score_methods
    from lahis_tl.selection import LanguageHeads, language_heads
    from lahis_tl.sequential import UntilSure, score_until
    from lahis_tl.statistics import Interval, ScoreCertainty, score_certainty
    from lahis_tl.sweeps import Sweep, sweep_factors, sweep_heads
    from lahis_tl.switched import label_tokens, switched_gradients, switched_perplexity
    from lahis_tl.tasks import Task, continuation_tasks, instruction_tasks, summary_tasks
    from lahis_tl.tested import SpecificityTest, specificity_test
    from lahis_tl.transfer import Conflict, TransferAnswers, conflicts, transfer_answers
    from lahis_tl.tuning import TunedMask, tune_mask
    from lahis_tl.verified import VerifiedScores, verified_scores

__version__ = version("lahis-tl")

_HOME = {
    "means": ["mean_head_outputs"],
    "access": ["grid_of", "tokenizer_of"],
    "artifacts": ["load"],
    "authors": ["lahis_code"],
    "cards": ["card_of"],
    "controls": ["matched_random_heads", "score_matched_heads"],
    "corpora": ["Corpus", "load_corpus"],
    "effects": ["HeadEffects", "exact_effects"],
    "errors": ["ArtifactError", "CorpusError", "LahisError", "ModelError"],
    "gradients": ["HeadGradients", "head_gradients"],
    "heads": ["Head", "HeadGrid", "HeadSet"],
    "losses": ["text_nll", "token_nll"],
    "masks": ["HeadMask", "masked"],
    "models": ["load_model"],
    "evaluation": ["TextLosses", "perplexity"],
    "overlaps": ["HeadOverlap", "head_overlap"],
    "scores": ["HeadScores", "register_score", "score", "score_methods"],
    "selection": ["LanguageHeads", "language_heads"],
    "ablation": [
        "AblationEffect",
        "Selectivity",
        "ablation_effect",
        "selectivity",
    ],
    "sequential": ["UntilSure", "score_until"],
    "statistics": ["Interval", "ScoreCertainty", "score_certainty"],
    "sweeps": ["Sweep", "sweep_factors", "sweep_heads"],
    "switched": ["label_tokens", "switched_gradients", "switched_perplexity"],
    "tested": ["SpecificityTest", "specificity_test"],
    "verified": ["VerifiedScores", "verified_scores"],
    "generation": ["Generation", "Generations", "Steered", "generate", "steer"],
    "attention": ["AttentionMass", "attention_mass"],
    "lens": ["logit_lens", "next_tokens"],
    "transfer": ["Conflict", "TransferAnswers", "conflicts", "transfer_answers"],
    "identify": ["LanguageIdentifier", "language_identifier"],
    "confusion": ["judge_text", "judge_texts", "pass_rates"],
    "gate": ["Competence", "competence"],
    "tasks": ["Task", "continuation_tasks", "instruction_tasks", "summary_tasks"],
    "tuning": ["TunedMask", "tune_mask"],
    "pairs": ["target_losses"],
    "questions": ["Question", "load_questions", "split_by_paragraph"],
    "export": ["export_folded", "export_ia3"],
    "patterns": ["AttentionPatterns", "attention_patterns", "head_pattern"],
    "per_token": ["TokenEffects", "token_effects"],
    "explorer": ["explore"],
    "live": ["widget"],
    "foreign": ["import_scores", "score_agreement"],
    "memory": ["MemoryEstimate", "memory_estimate", "recomputed"],
    "reruns": ["Rerun", "rerun"],
    "presets": ["ModelPreset", "PRESETS", "preset"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "PRESETS",
    "AblationEffect",
    "ArtifactError",
    "AttentionMass",
    "AttentionPatterns",
    "Competence",
    "Conflict",
    "Corpus",
    "CorpusError",
    "Generation",
    "Generations",
    "Head",
    "HeadEffects",
    "HeadGradients",
    "HeadGrid",
    "HeadMask",
    "HeadOverlap",
    "HeadScores",
    "HeadSet",
    "Interval",
    "LahisError",
    "LanguageHeads",
    "LanguageIdentifier",
    "MemoryEstimate",
    "ModelError",
    "ModelPreset",
    "Question",
    "Rerun",
    "ScoreCertainty",
    "Selectivity",
    "SpecificityTest",
    "Steered",
    "Sweep",
    "Task",
    "TextLosses",
    "TokenEffects",
    "TransferAnswers",
    "TunedMask",
    "UntilSure",
    "VerifiedScores",
    "ablation_effect",
    "attention_mass",
    "attention_patterns",
    "card_of",
    "competence",
    "conflicts",
    "continuation_tasks",
    "exact_effects",
    "explore",
    "export_folded",
    "export_ia3",
    "generate",
    "grid_of",
    "head_gradients",
    "head_overlap",
    "head_pattern",
    "import_scores",
    "instruction_tasks",
    "judge_text",
    "judge_texts",
    "label_tokens",
    "lahis_code",
    "language_heads",
    "language_identifier",
    "load",
    "load_corpus",
    "load_model",
    "load_questions",
    "logit_lens",
    "masked",
    "matched_random_heads",
    "mean_head_outputs",
    "memory_estimate",
    "next_tokens",
    "pass_rates",
    "perplexity",
    "plots",
    "preset",
    "recomputed",
    "register_score",
    "rerun",
    "score",
    "score_agreement",
    "score_certainty",
    "score_matched_heads",
    "score_methods",
    "score_until",
    "selectivity",
    "specificity_test",
    "split_by_paragraph",
    "steer",
    "summary_tasks",
    "sweep_factors",
    "sweep_heads",
    "switched_gradients",
    "switched_perplexity",
    "target_losses",
    "text_nll",
    "token_effects",
    "token_nll",
    "tokenizer_of",
    "transfer_answers",
    "tune_mask",
    "verified_scores",
    "widget",
]


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module("lahis_tl.plots")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lahis_tl' has no attribute {name!r}")
    value = getattr(import_module(f"lahis_tl.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
