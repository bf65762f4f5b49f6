"""The paper's experiments in one report: it holds every section, a second start skips what is finished, what cannot be
reached is named, and verdicts follow their rule."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from torch import nn

import lahis_tl as lt
from analyses import generating, paper
from analyses.paper import steps
from analyses.paper.authors import WIKIPEDIA
from analyses.paper.claims import CLAIMS, NOT_SEEN, SEEN, UNDECIDED, Evidence, together
from analyses.paper.plan import SIZES as SIZES_OF
from analyses.paper.plan import differences, make_plan
from analyses.paper.render import Fold, markdown, page
from analyses.paper.report import PROTOCOLS, TITLES
from analyses.result import scored_ids
from lahis_tl.errors import ArtifactError
from lahis_tl.presets import PRESETS
from lahis_tl.statistics import FEWEST_TEXTS
from lahis_tl.tasks import TASKS, summary_tasks

LANGUAGES = ("en", "fr", "es")
BUNDLED = {"texts": "bundled", "summaries": "bundled", "questions": "bundled"}
AT_HAND = {"quick": BUNDLED, "full": BUNDLED, "paper": {**BUNDLED, "texts": WIKIPEDIA}}
SIZES = {
    "authors": {"texts": 4, "test_texts": 2, "max_tokens": 24, "quantile": 0.8, "summaries": 1}
    | {"summary_tokens": 10, "jobs": 1, "tuning": 2, "questions": 2},
    "scoring": {"n": 5, "max_tokens": 24},
    "heads": {"draws": 5, "permutations": 100, "top_k": 4},
    "perplexity": {"test_texts": 2, "draws": 3, "quantile": 0.8, "languages": 2},
    "selectivity": {"test_texts": 2, "draws": 3, "fraction": 0.25},
    "summaries": {"prompts": 1, "draws": 2, "max_new_tokens": 8, "quantile": 0.6},
    "transfer": {"prompts": 1, "draws": 2, "factors": (2.0,), "fraction": 0.1},
    "off_target": {"prompts": 1, "draws": 2, "max_new_tokens": 8, "fraction": 0.1},
    "xquad": {"epochs": 1, "random_sets": 1, "top_k": 4}
    | {"shares": (0.1, 0.05, 0.05), "max_new_tokens": 4},
}


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing with a browser is tested elsewhere, and slow."""

    def write(figure, path, **options):
        Path(path).write_bytes(b"a picture")
        return Path(path)

    monkeypatch.setattr(lt.plots, "write", write)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes no language; here it counts as one that does."""
    real = generating.competence

    def all_written(*arguments, **options):
        found = real(*arguments, **options)
        found.table["writes"] = True
        return found

    monkeypatch.setattr(generating, "competence", all_written)


def start(speaker: nn.Module, out: Path, **options) -> Path:
    name = lt.card_of(speaker)["name"]
    given = {"languages": LANGUAGES, "dtype": "float32", "quick": True, "sizes": SIZES}
    return paper.run(name, out, progress=False, **{**given, **options})


def test_every_experiment_in_both_protocols_and_one_report(
    speaker: nn.Module, pictures, writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, docs = tmp_path / "run", tmp_path / "docs"
    report = start(speaker, out, docs=docs)
    text, website = report.read_text(), report.with_suffix(".html").read_text()
    for name in TITLES:
        for protocol in PROTOCOLS:
            assert (out / name / protocol / "finished.json").is_file(), (name, protocol)
    assert "ot run" not in text
    for title in (
        *TITLES.values(),
        "What the paper claims, and what was found",
        "The paper's figures beside ours",
        "What differs from the authors' settings",
        "Why a small model may differ",
        "Settings",
        "Time and memory",
    ):
        assert f"## {title}\n" in text
        assert f"<h2>{title.replace(chr(39), '&#x27;')}</h2>" in website
    assert text.count("second-hand") >= 3
    assert "78.5" in text
    assert "55.28 |" in text
    for claim in CLAIMS:
        assert claim.text in text
    verdicts = re.findall(r"\*\*(✓ seen|✗ not seen|\? undecided at this n)\*\* \|", text)
    assert len(verdicts) == len(CLAIMS)
    assert website.count("plotly-graph-div") >= 10
    assert not re.search(r"<script[^>]+src=", website)
    assert len(website) < 7_000_000, "plotly is embedded once"
    assert "nan" not in re.findall(r"\w+", text)
    # The pictures of the small report lie beside it.
    shown = re.findall(r"!\[.+?\]\((.+?)\)", (docs / "report.md").read_text())
    assert len(shown) >= 10
    assert all((docs / path).is_file() and "/" not in path for path in shown)

    # Every language was scored once for all experiments; the two of the questions once more, on other texts.
    assert len(list((out / "gradients").iterdir())) == len(LANGUAGES) + 2

    # A second start computes nothing, and does not even load the model.
    def never(*_, **__):
        raise AssertionError("everything is finished")

    monkeypatch.setattr(lt, "load_model", never)
    assert start(speaker, out).read_text() == text
    monkeypatch.undo()
    # Other settings are refused, the difference named.
    with pytest.raises(ArtifactError, match=r"languages is \['en', 'fr', 'es'\] there, \['en'"):
        start(speaker, out, languages=("en", "fr"))
    with pytest.raises(
        ArtifactError, match=r"sizes\.scoring\.n is 5 there, 6 asked.*another --out"
    ):
        start(speaker, out, sizes={**SIZES, "scoring": {**SIZES["scoring"], "n": 6}})


def test_what_was_interrupted_goes_on(
    speaker: nn.Module, pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an experiment: what stood before stays, the experiment itself is taken up again."""
    real = steps.run_step

    def killed(plan, folder, name, protocol, *rest):
        if (name, protocol) == ("perplexity", "authors"):
            monkeypatch.setattr(
                "analyses.paper.authors.mean_exp_perplexity", lambda *_: 1 / 0 if _ else None
            )
        return real(plan, folder, name, protocol, *rest)

    monkeypatch.setattr(steps, "run_step", killed)
    only = ("heads", "perplexity")
    with pytest.raises(ZeroDivisionError):
        start(speaker, tmp_path, only=only)
    monkeypatch.undo()
    first = tmp_path / "heads" / "sound" / "finished.json"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "perplexity" / "authors" / "finished.json").is_file()
    assert "Not run yet." in (tmp_path / "report.md").read_text()
    importance = tmp_path / "authors" / "importance.safetensors"
    scored = importance.stat().st_mtime_ns
    text = start(speaker, tmp_path, only=only).read_text()
    assert first.stat().st_mtime_ns == before
    assert importance.stat().st_mtime_ns == scored
    about = json.loads((tmp_path / "perplexity" / "authors" / "finished.json").read_text())
    assert about["resumed"]
    assert "≥ " in text


def test_an_experiment_that_is_refused_is_reported_with_the_reason(
    speaker: nn.Module, pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_, **__):
        raise lt.CorpusError("rule authors finds no heads specific to fr")

    monkeypatch.setattr(steps.attention_transfer, "run", refuses)
    text = start(speaker, tmp_path, only=("transfer",)).read_text()
    assert "Not run: rule authors finds no heads specific to fr" in text
    assert "not run: rule authors finds no heads specific to fr | **not run** |" in text
    assert (tmp_path / "transfer" / "authors" / "finished.json").is_file()
    assert not (tmp_path / "transfer" / "sound" / "finished.json").is_file()


@pytest.mark.parametrize(("codes", "refused"), [(("fr", "es"), 2), (("en",), 2), (("ja",), 4)])
def test_languages_that_an_experiment_cannot_do_without(
    speaker: nn.Module, pictures, writer, tmp_path: Path, codes: tuple[str, ...], refused: int
) -> None:
    """Without English, with English alone, without texts: refused with the reason, and reported."""
    text = start(speaker, tmp_path, languages=codes, only=("off_target", "xquad")).read_text()
    sections = text.split("## The paper's figures beside ours")[0]
    assert sections.count("\nNot run: ") == refused
    assert "Traceback" not in text
    assert "min()" not in text
    if codes == ("ja",):
        assert "Not run: there are no texts for it in ja" in text
    else:
        assert "'en'" in text
        assert "must be among the languages" in text.replace("\n", " ")
    assert start(speaker, tmp_path, languages=codes, only=("off_target", "xquad")).is_file()


def test_a_language_without_specific_heads_is_left_out(
    speaker: nn.Module, pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lt.language_heads

    def none_for_french(*arguments, **options):
        found = real(*arguments, **options)
        sets = {**found.specific, "fr": found.specific["fr"][:0]}
        return replace(found, specific=sets)

    monkeypatch.setattr("analyses.paper.authors.lt.language_heads", none_for_french)
    monkeypatch.setattr(steps, "_sound", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(speaker, tmp_path, only=("perplexity",))
    table = pd.read_csv(tmp_path / "perplexity" / "authors" / "crossed.csv")
    assert set(table["off"]) == {"en"}
    assert set(table["text_in"]) == {"en", "fr"}
    said = (tmp_path / "perplexity" / "authors" / "verdict.txt").read_text()
    assert said.strip().endswith("The rule leaves no specific head to fr.")


def test_a_begun_run_keeps_its_data_sets_and_dtype(tmp_path: Path, monkeypatch) -> None:
    """Whether the hub can be reached, and on which processor it goes on, does not make it another run."""
    monkeypatch.setattr("analyses.paper.plan.reachable", lambda strict: AT_HAND["paper"])
    monkeypatch.setattr("analyses.paper.plan._fast_dtype", lambda known: "float32")
    asked = ("llama-3.2-3b", None, None, False, "auto", None, None, 0, tmp_path)
    first = make_plan(*asked)
    (tmp_path / "settings.json").write_text(json.dumps(first.settings))
    monkeypatch.undo()
    again = make_plan(*asked)
    assert again.settings == first.settings
    assert (again.size, again.dtype, again.wanted) == ("paper", "float32", first.wanted)
    assert len(first.wanted) == 2
    assert (
        make_plan("llama-3.2-3b", None, "float16", False, "bundled", None, None, 0, tmp_path).dtype
        == "float16"
    )
    with pytest.raises(lt.CorpusError, match="data='hub' asks for: texts: the data set wikimedia"):
        make_plan("llama-3.2-3b", None, None, False, "hub", None, None, 0)


def test_english_is_not_cut_off() -> None:
    plan = make_plan("smollm2", ["fr", "es", "de", "en"], None, True, "bundled", None, None, 0)
    assert plan.languages_of("sound", "off_target") == ["fr", "es", "en"]
    assert plan.languages_of("authors", "off_target") == ["fr", "es", "en"]
    assert plan.languages_of("sound", "heads") == ["fr", "es", "de", "en"]


def test_errors_of_several_lines_break_no_table() -> None:
    table = pd.DataFrame({"why": ["one\ntwo | three"]})
    found = markdown([(1, "Report", [table, ["four\nfive"]])], lambda p: Path(), Path())
    assert "| one two \\| three |\n" in found
    assert "- four five\n" in found


def test_a_model_that_cannot_be_reached_is_named_with_what_to_do(tmp_path: Path) -> None:
    report = paper.run("llama-3.2-3b", tmp_path, progress=False)
    text = report.read_text()
    assert "- the weights of llama-3.2-3b: cannot load 'meta-llama/Llama-3.2-3B'" in text
    assert "Accept the licence on https://huggingface.co/meta-llama/Llama-3.2-3B" in text
    assert "hf download meta-llama/Llama-3.2-3B" in text
    for wanted in ("wikimedia/wikipedia", "csebuetnlp/xlsum", "google/xquad"):
        assert wanted in text
    assert text.count("Not run: the model is wanted, see above.") == 2 * len(TITLES)
    assert text.count("**not run**") == len(CLAIMS)
    assert "13 (int(), as in the code), 14 (rounded up)" in text
    assert "6.43 GB" in text
    assert "an estimate" in text
    assert "plotly" not in report.with_suffix(".html").read_text()
    # Nothing is bound to these settings yet: where the data sets can be had, the same folder serves.
    paper.run("llama-3.2-3b", tmp_path, languages=("en", "hi"), progress=False)


def test_languages_without_texts_are_left_out_of_an_experiment() -> None:
    plan = make_plan("aya-23-8b", None, None, False, "bundled", None, None, 0)
    assert plan.languages == PRESETS["aya-23-8b"].languages
    assert plan.languages_of("sound", "heads") == ["en", "es", "de", "zh", "hi", "vi"]
    assert plan.languages_of("sound", "xquad") == ["en", "es"], "of four, as many as are run"
    assert plan.languages_of("sound", "summaries") == ["en", "es", "de", "zh", "hi", "vi"]
    hub = replace(plan, sources={**plan.sources, "summaries": "csebuetnlp/xlsum"})
    assert hub.languages_of("sound", "summaries") == ["en", "es", "zh", "hi", "vi"]
    everything = replace(
        plan,
        sizes=SIZES_OF["paper"],
        sources={"texts": "wikimedia/wikipedia", "summaries": "bundled", "questions": "xquad"},
    )
    assert everything.languages_of("authors", "heads") == list(plan.languages)
    assert "ja" not in everything.languages_of("authors", "xquad")
    assert "th" in everything.languages_of("authors", "xquad")


@pytest.mark.parametrize(
    ("model", "device", "fast", "dtype"),
    [
        ("smollm2", "cpu", False, "float32"),
        ("smollm2", "cpu", True, "bfloat16"),
        ("smollm2", "cuda", False, "bfloat16"),
        ("llama-3.2-3b", "cpu", False, "bfloat16"),  # in float32 it would take twice the memory
        ("some/folder", "cpu", False, "bfloat16"),
    ],
)
def test_a_small_model_runs_in_what_the_processor_can_do(model, device, fast, dtype, monkeypatch):
    monkeypatch.setattr("analyses.paper.plan.local_device", lambda: device)
    monkeypatch.setattr("analyses.paper.plan.has_bfloat16_arithmetic", lambda: fast)
    assert make_plan(model, None, None, True, "bundled", None, None, 0).dtype == dtype
    assert make_plan(model, None, "float16", True, "bundled", None, None, 0).dtype == "float16"


@pytest.mark.parametrize("size", SIZES_OF)
def test_no_size_asks_for_more_texts_than_are_bundled(size: str, monkeypatch) -> None:
    monkeypatch.setattr("analyses.paper.plan.reachable", lambda strict: AT_HAND[size])
    plan = make_plan("llama-3.2-3b", None, None, size == "quick", "auto", None, None, 0)
    assert plan.size == size
    scored = plan.sizes["scoring"]["n"]
    for name, wanted in (("summaries", 8), ("off_target", 12)):
        codes = plan.languages_of("sound", name)
        _, aside = lt.load_corpus("bundled", codes).split(scored, seed=0)
        prompts = plan.sizes[name]["prompts"]
        assert len(aside.ids or ()) >= wanted + prompts, "those of the gate and of the task"
        assert summary_tasks(codes, prompts, without=scored_ids(codes, scored, 0))
    for name in ("perplexity", "selectivity"):
        assert scored + plan.sizes[name]["test_texts"] <= 80
    codes = plan.languages_of("authors", "summaries")
    assert summary_tasks(codes, plan.sizes["authors"]["summaries"])


@pytest.mark.parametrize("size", ["full", "paper"])
def test_a_whole_run_is_large_enough_to_decide(size: str) -> None:
    sizes = SIZES_OF[size]
    for name in ("perplexity", "selectivity", "summaries", "transfer", "off_target"):
        assert 1 / (sizes[name]["draws"] + 1) <= 0.05, "the least p"
    for name in ("perplexity", "selectivity"):
        assert sizes[name]["test_texts"] >= FEWEST_TEXTS
    assert sizes["summaries"]["prompts"] >= FEWEST_TEXTS
    assert len(TASKS) * sizes["off_target"]["prompts"] >= FEWEST_TEXTS
    assert sizes["xquad"]["random_sets"] >= FEWEST_TEXTS


def test_a_size_that_is_asked_for_is_kept() -> None:
    asked = {"authors": {"summaries": 20}}
    plan = make_plan("smollm2", None, None, True, "bundled", None, asked, 0)
    assert plan.sizes["authors"]["summaries"] == 20
    assert plan.sizes["authors"]["texts"] == SIZES_OF["quick"]["authors"]["texts"]
    assert SIZES_OF["quick"]["authors"]["summaries"] != 20


def test_paragraphs_are_the_witnesses_not_their_questions() -> None:
    row = {"condition": "best heads", "language": "en", "questions": 21, "paragraphs": 3}
    row |= {"contains_change": 0.2, "contains_lower": 0.1, "contains_upper": 0.3}
    claim = next(c for c in CLAIMS if "answers more questions" in c.text)
    (few,) = claim.evidence({"conditions": pd.DataFrame([row])})
    assert (few.n, few.verdict) == (3, UNDECIDED)
    (enough,) = claim.evidence({"conditions": pd.DataFrame([{**row, "paragraphs": 4}])})
    assert (enough.n, enough.verdict) == (4, SEEN)
    assert str(enough).endswith("n 4")


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no experiment lens; there are heads, perplex"):
        paper.run("smollm2", only=("lens",))
    with pytest.raises(ValueError, match="data='web' is neither"):
        paper.run("smollm2", data="web")
    with pytest.raises(ValueError, match="there is no preset 'llama'; there are aya-23-8b"):
        paper.run("some/folder", preset="llama")
    assert differences([1], [1]) == []
    assert differences({"a": 1}, {}) == ["a is 1 there, None asked"]


@pytest.mark.parametrize(
    ("value", "lower", "upper", "p", "verdict"),
    [
        (1.0, 0.5, 1.5, 0.02, SEEN),
        (1.0, 0.5, 1.5, 0.05, SEEN),
        (1.0, 0.5, 1.5, None, SEEN),
        (1.0, 0.5, 1.5, 0.06, UNDECIDED),  # random heads do as much now and then
        (1.0, -0.1, 1.5, 0.02, UNDECIDED),
        (1.0, 0.5, 1.5, 0.51, NOT_SEEN),  # more than half of the random sets do as much
        (1.0, -0.1, 1.5, 0.5, UNDECIDED),
        (-1.0, -1.5, -0.5, 0.3, NOT_SEEN),
        (0.0, 0.0, 0.0, 1.0, UNDECIDED),  # nothing changed in any text: a floor or a ceiling
        (-1.0, -2.0, 0.0, None, NOT_SEEN),
        (0.0, -0.1, 0.1, None, UNDECIDED),
    ],
)
def test_the_rule_of_verdicts(value, lower, upper, p, verdict) -> None:
    assert Evidence("fr", value, lower, upper, p).verdict == verdict


def test_too_few_texts_decide_nothing() -> None:
    assert Evidence("fr", 1.0, 0.5, 1.5, 0.02, 3).verdict == UNDECIDED
    assert Evidence("fr", 1.0, 0.5, 1.5, 0.02, 4).verdict == SEEN
    assert Evidence("fr", -1.0, -1.0, -1.0, None, 1).verdict == UNDECIDED


def test_too_few_random_sets_decide_nothing() -> None:
    row = {"condition": "general heads", "change": -4.0, "lower": -6.0, "upper": -2.0, "p": 2 / 3}
    row |= {"prompts": 6}

    def verdict(**more) -> str:
        table = pd.DataFrame([{**row, **more}])
        (found,) = claim("summaries become worse").evidence({"effects": table})
        return found.verdict

    assert verdict(draws=2) == UNDECIDED
    assert verdict(draws=19) == NOT_SEEN
    assert verdict(draws=19, p=0.05) == SEEN
    best = {"language": "fr", "condition": "best heads", "paragraphs": 7}
    best |= {"nll_against_random": -0.4, "nll_against_random_lower": -0.6}
    best |= {"nll_against_random_upper": -0.1}
    for runs, expected in ((1, UNDECIDED), (3, UNDECIDED), (4, SEEN)):
        tables = {"conditions": pd.DataFrame([{**best, "random_runs": runs}])}
        (found,) = claim("as many random heads").evidence(tables)
        assert (found.n, found.verdict) == (runs, expected)


def test_a_claim_is_what_more_than_half_of_its_effects_are() -> None:
    seen, not_seen = Evidence("a", 1.0, 0.5, 2.0, 0.01), Evidence("b", -1.0, -2.0, -0.5, 1.0)
    undecided = Evidence("c", 1.0, -1.0, 2.0, 0.2)
    assert together([seen, seen, not_seen]) == SEEN
    assert together([seen, not_seen]) == UNDECIDED
    assert together([seen, not_seen, undecided]) == UNDECIDED
    assert together([not_seen]) == NOT_SEEN
    assert together([]) == UNDECIDED
    assert together([seen, seen, undecided], every=True) == UNDECIDED
    assert together([seen, seen, not_seen], every=True) == NOT_SEEN
    assert together([seen, seen], every=True) == SEEN
    assert together([], every=True) == UNDECIDED
    assert [c.every for c in CLAIMS if "Every language" in c.text] == [True]


def claim(text: str):
    return next(found for found in CLAIMS if text in found.text)


def test_claims_read_the_tables_in_the_direction_that_is_claimed() -> None:
    effects = {"value": 10.0, "random_change": 0.0, "lower": -6.0, "upper": -2.0, "p": 0.05}
    table = pd.DataFrame([{"condition": "general heads", "change": -4.0, **effects}])
    (found,) = claim("summaries become worse").evidence({"effects": table})
    assert (found.value, found.lower, found.upper, found.verdict) == (4.0, 2.0, 6.0, SEEN)
    table = pd.DataFrame([{"condition": "English heads", "change": -4.0, **effects}])
    (found,) = claim("English heads suppressed").evidence({"effects": table})
    assert (found.value, found.verdict) == (-4.0, NOT_SEEN)
    row = {"language": "fr", "condition": "best heads", "nll_against_random": -0.4}
    row |= {"nll_against_random_lower": -0.6, "nll_against_random_upper": -0.1}
    row |= {"contains_change": 0.1, "contains_lower": -0.1, "contains_upper": 0.2}
    tables = {"conditions": pd.DataFrame([row, {"language": "fr", "condition": "no mask"}])}
    (found,) = claim("as many random heads").evidence(tables)
    assert (found.value, found.lower, found.upper, found.verdict) == (0.4, 0.1, 0.6, SEEN)
    (found,) = claim("answers more questions").evidence(tables)
    assert (found.value, found.lower, found.verdict) == (0.1, -0.1, UNDECIDED)
    rows = [
        {"condition": f"{heads} heads off", "language": "fr", "change": 1.0, "p": 0.02}
        | {"change_lower": 0.5, "change_upper": 1.5}
        for heads in ("fr", "de", "general")
    ]
    (found,) = claim("Without its own heads").evidence({"perplexity": pd.DataFrame(rows)})
    assert found == Evidence("fr", 1.0, 0.5, 1.5, 0.02)
    counts = pd.DataFrame({"language": ["fr", "de"], "heads": [0, 2], "fdr": [0.05, 0.05]})
    none, some = claim("specific to it").evidence({"specific": counts})
    assert none.verdict == UNDECIDED, "that none is found does not show that there is none"
    assert (some.verdict, str(some)) == (SEEN, "de 2")
    assert claim("summaries become worse").evidence({}) == []


def test_the_report_shows_texts_as_texts() -> None:
    table = pd.DataFrame({"a|b": ["<script>", "**bold** `x<y`"], "n": [1.23456, float("nan")]})
    found = [(1, "A <title>", [table, ["one"], Fold("more", ("*so*",))])]
    text = markdown(found, lambda picture: Path(), Path())
    assert "| a\\|b | n |" in text
    assert "| <script> | 1.23 |" in text
    website = page(found)
    assert "<script" not in website
    assert "&lt;script&gt;" in website
    assert "<b>bold</b> <code>x&lt;y</code>" in website
    assert "<em>so</em>" in website
