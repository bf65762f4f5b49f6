"""What a run of ``analyses.paper`` does otherwise than the authors, and why a small model may answer otherwise."""

from analyses.paper.plan import Plan
from lahis_tl.presets import ModelPreset


def deviations(plan: Plan) -> list[str]:
    """One sentence each; of the authors' protocol first, then of the sound one."""
    sizes = plan.sizes["authors"]
    bundled = [kind for kind, source in plan.sources.items() if source == "bundled"]
    found = []
    if "texts" in bundled:
        found.append(
            f"Scoring: {sizes['texts']} bundled paragraphs a language in place of 1000 Wikipedia articles; cut at "
            f"{sizes['max_tokens']} tokens in place of 2048."
        )
        found.append(
            f"Perplexity: {sizes['test_texts']} other bundled paragraphs in place of 1000 articles; none that was "
            "scored, while theirs may overlap."
        )
    else:
        found.append(
            f"Scoring and perplexity: {sizes['texts']} and {sizes['test_texts']} Wikipedia articles (dump 20231101; "
            f"theirs is not named), cut at {sizes['max_tokens']} tokens; articles that were scored are not tested."
        )
    found.append(
        "Texts are shuffled by Python's generator from their seeds, so that they are not the very texts of the authors."
    )
    languages = len(plan.languages_of("authors", "heads"))
    if languages < 4:
        found.append(
            f"General heads: kept by {max(2, languages)} languages, since there are fewer than 4 in this run."
        )
    elif languages < 7:
        found.append(
            f"General heads: kept by 4 of only {languages} languages, so that fewer heads can be general by votes "
            "than among more languages."
        )
    found.append("The nine random heads are drawn with a seed; theirs have none.")
    found.append("int(heads × fraction) as in their code, one head at least where that is none.")
    source = "bundled texts" if "summaries" in bundled else "XL-Sum articles of 300 words at most"
    found.append(
        f"Summaries: {sizes['summaries']} {source} a language in place of 500 XL-Sum articles, "
        f"{sizes['summary_tokens']} new tokens in place of 80, greedy, our own prompts; chrF in place of an English "
        "BERTScore."
    )
    found.append(
        "Off-target: both English heads (as the paper says) and the language's own (as the code does) are suppressed; "
        "the language of a summary is named by fastText's compressed lid.176."
    )
    found.append(
        f"Attention transfer: {sizes['jobs']} pairs of jobs for each ordered pair of languages; our own statements in "
        "each language; the enhancing factor is 3."
    )
    questions = "bundled questions" if "questions" in bundled else "XQuAD"
    found.append(
        f"Question answering: {questions}, the first third of the rows for tuning ({sizes['tuning']} at most; theirs "
        f"200), later ones for the test ({sizes['questions']} at most; theirs 800), our own prompts; only the first "
        "line of an answer counts."
    )
    found.append(
        "The sound protocol scores heads on bundled paragraphs. Question answering is the exception where one of its "
        "languages is not bundled: then all of them are scored on the training questions' paragraphs."
    )
    found.append(
        "How the sound protocol chooses heads, from its own scores: importance maps, perplexity with own or general "
        "heads off, and summaries by the authors' rule; heads found at a false discovery rate of 5% by the tested "
        "rule; crossed perplexity, attention transfer and off-target text by the contrastive rule (2% of all heads "
        "for each language, those whose share of its scores exceeds their share elsewhere most); question answering "
        "by the highest scores, without any rule."
    )
    return found


def small_model(known: ModelPreset | None) -> str:
    """Why the paper's claims need not hold for another model than its three."""
    general = (
        "A claim that is not seen here is therefore no evidence against it for the paper's models; one that is seen "
        "here holds in a setting that the paper did not look at."
    )
    if known is None:
        return (
            "Unless this model is one of the paper's three (then name its preset): those have 3 to 8 billion "
            f"parameters. {general}"
        )
    grid = known.grid.size
    return (
        f"A model of {known.parameters / 1e6:.0f} million parameters is none of the paper's three, which have 3 to 8 "
        "billion. SmolLM2-135M was trained mostly on English and writes other languages with what little of them was "
        f"in its data. It has {grid} heads where theirs have 672 to 1024, so that 2% are {known.head_counts(0.02)[0]} "
        "heads in place of 13 to 20; each head does more, and the same heads may have to serve several languages. It "
        "answers few questions rightly and sums up badly, so that accuracy and the quality of summaries have little "
        "room to fall (a floor). Where it can write a language at all it is mostly on target already, which leaves "
        "little to gain by suppressing English heads (a ceiling). Its weights were quantised to 4 bits before they "
        f"were read. {general}"
    )
