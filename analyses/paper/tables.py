"""Which of an experiment's tables the report of ``analyses.paper`` shows, which columns, and what they are called."""

from collections.abc import Iterator, Mapping

import pandas as pd

# What columns are called in the report; those not named keep their own name.
CALLED = {
    "lower": "from",
    "upper": "to",
    "share_lower": "from",
    "share_upper": "to",
    "change_lower": "from",
    "change_upper": "to",
    "nll_lower": "from",
    "nll_upper": "to",
    "line_rate_lower": "from",
    "line_rate_upper": "to",
    "p_change": "p",
    "share": "share of general heads",
    "chance": "by chance",
    "jaccard": "overlap of the best",
    "off": "heads off",
    "condition": "heads masked",
    "plain": "no mask",
    "perplexity": "mean of exp(loss)",
    "random_ratio": "nine random heads",
    "change": "change",
    "random_change": "random sets",
    "own_minus_others": "own minus others (nats)",
    "says_first": "first answer",
    "says_second": "second answer",
    "says_neither": "neither",
    "rank_first_better": "rank of the first better",
    "line_rate": "right in every line",
    "contains": "holds the answer",
    "parameters": "numbers",
    "nll": "NLL",
    "nll_change": "change of NLL",
    "f1": "F1",
}
CAPTIONS = {
    "counts": "How many heads above the 0.96 quantile many languages keep (general), or few (specific)",
    "general": "General heads by the authors' rule on scores of float32, beside heads exchanged within their layers",
    "specific": "Heads specific to a language at a false discovery rate of 5%",
    "overlap": "Overlap (Jaccard) of the best heads of two languages",
    "layers": "Where the specific heads are: shares of the layers' thirds",
    "crossed": "Perplexity (mean of exp(loss)) of a language's text with the heads of one language off",
    "perplexity": "Loss with sets of heads off, and its change against no mask",
    "contrasts": "Heads of a language off: change of the loss in its own language minus that in the others",
    "chrf": "chrF of summaries by language",
    "on_target": "Share of summaries in the language of their text",
    "answers": "Whose answer is given",
    "conditions": "Masks and what they change",
    "rates": "Texts in the right language in every line, by language",
    "accuracy": "Questions whose right answer is a part of what is generated",
}
# The effects of two experiments.
EFFECTS = {
    "summaries": "chrF of summaries with heads off, and its change against no mask",
    "off_target": "Share of texts on target with heads off, and its change against no mask",
}
# experiment → protocol → (table, columns that the report shows; none for all)
TABLES: dict[str, dict[str, dict[str, str]]] = {
    "heads": {
        "authors": {"counts": "heads general specific"},
        "sound": {
            "general": "share share_lower share_upper chance p",
            "specific": "language heads",
            "overlap": "a b jaccard lower upper chance p",
            "layers": "",
        },
    },
    "perplexity": {
        "authors": {"crossed": "off text_in plain perplexity ratio random_ratio"},
        "sound": {
            "perplexity": "condition language nats_per_token bits_per_byte change change_lower change_upper p",
            "contrasts": "heads_of own_minus_others lower upper p",
        },
    },
    "summaries": {
        "authors": {"chrf": ""},
        "sound": {"effects": "condition value change lower upper random_change p texts"},
    },
    "transfer": {
        "authors": {
            "answers": "condition prompts says_first says_second says_neither rank_first_better"
        },
        "sound": {
            "conditions": "condition says_first says_second says_neither change lower upper random_change p_change "
            "prompts"
        },
    },
    "off_target": {
        "authors": {"on_target": ""},
        "sound": {
            "effects": "condition value change lower upper random_change p texts",
            "rates": "condition language line_rate line_rate_lower line_rate_upper",
        },
    },
    "xquad": {
        "authors": {"accuracy": "language condition contains questions"},
        "sound": {
            "conditions": "language condition parameters nll nll_change nll_lower nll_upper contains exact f1 "
            "questions paragraphs"
        },
    },
}


def shown_tables(
    name: str, protocol: str, tables: Mapping[str, pd.DataFrame]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Caption and table of those that an experiment has."""
    for table, columns in TABLES[name][protocol].items():
        if table in tables:
            caption = EFFECTS[name] if table == "effects" else CAPTIONS[table]
            yield caption, _columns(tables[table], columns)


def _columns(table: pd.DataFrame, columns: str) -> pd.DataFrame:
    chosen = [name for name in columns.split() if name in table] or list(table)
    found = pd.DataFrame(table[chosen])
    return found.set_axis([CALLED.get(name, name.replace("_", " ")) for name in chosen], axis=1)
