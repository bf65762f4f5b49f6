"""The explorer page: what it packs, what it refuses, and what it does in a real browser with the network cut."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_browser
from torch import nn

import lahis_tl as lt
from lahis_tl.explorer import page_of
from lahis_tl.explorer.payload import Payload

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
ARABIC = ["<s>", "مرحبا", " بالعالم", " يا", " صديقي"]


def some_scores(grid: lt.HeadGrid, languages: tuple[str, ...], seed: int = 0) -> lt.HeadScores:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(languages), *grid.shape, generator=generator) ** 4 / 100
    return lt.HeadScores(
        values, languages, "lahis", "nats per token", "high: matters", (8,) * len(languages)
    )


def some_gradients(grid: lt.HeadGrid, languages: tuple[str, ...], n: int = 8) -> lt.HeadGradients:
    generator = torch.Generator().manual_seed(1)
    gradients = {c: torch.randn(n, *grid.shape, generator=generator) / 100 for c in languages}
    losses = {c: torch.full((n,), 3.0) for c in languages}
    counts = {c: torch.full((n,), 20) for c in languages}
    return lt.HeadGradients(gradients, losses, counts)


def some_samples(
    grid: lt.HeadGrid, tokens: dict[str, list[list[str]]]
) -> tuple[lt.AttentionPatterns, lt.TokenEffects]:
    generator = torch.Generator().manual_seed(2)
    patterns, effects = {}, {}
    for code, texts in tokens.items():
        patterns[code], effects[code] = [], []
        for text in texts:
            n = len(text)
            # About as unlike one another as SmolLM2's, which take 2.7 bits a weight.
            logits = 4 * torch.randn(*grid.shape, n, n, generator=generator)
            logits[..., 0] += 5
            future = torch.ones(n, n).triu(1).bool()
            patterns[code].append(logits.masked_fill(future, -torch.inf).softmax(-1).half())
            effects[code].append(torch.randn(*grid.shape, n, generator=generator) / 100)
    return lt.AttentionPatterns(tokens, patterns), lt.TokenEffects(tokens, effects)


def unpacked(page: str) -> tuple[dict[str, Any], bytes]:
    about = re.search(r'id="data-about">([^<]*)</script>', page)
    block = re.search(r'id="data-block">([^<]*)</script>', page)
    assert about
    assert block
    return json.loads(about[1]), gzip.decompress(base64.b64decode(block[1]))


def numbers(place: dict[str, Any], block: bytes) -> np.ndarray:
    kind = {"f32": np.float32, "f16": np.float16, "u8": np.uint8, "i8": np.int8}[place["as"]]
    found = np.frombuffer(block, kind, place["n"], place["at"]).astype(np.float64)
    return found * place.get("scale", 1.0)


def test_what_is_packed_comes_out_again() -> None:
    grid, languages = lt.HeadGrid(3, 4), ("en", "fr")
    grads = some_gradients(grid, languages)
    samples = some_samples(grid, {"fr": [["le", " chat", " dort"]]})
    about, block = unpacked(page_of(Payload([grads, *samples], None), "cdn"))
    certain = lt.score_certainty(grads, top_k=12)  # the grid has no more heads
    (found,) = about["maps"]
    assert found["name"] == "lahis"
    assert found["texts"] == [8, 8]
    for place, wanted in (
        (found["values"], certain.values),
        (found["certain"]["lower"], certain.lower),
    ):
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(
            numbers(place, block), wanted.flatten(), rtol=1e-3, atol=1e-6 * scale
        )
    (sample,) = about["samples"]
    rows, columns = torch.tril_indices(3, 3)
    weights = (numbers(sample["pattern"], block) / sample["pattern"]["steps"]) ** 2
    wanted = samples[0]["fr"][0][..., rows, columns].flatten()
    np.testing.assert_allclose(weights, wanted.float(), atol=0.07)
    scales = numbers(sample["effects"]["scales"], block).repeat(3)
    effects = numbers(sample["effects"]["steps"], block) / 31 * scales
    np.testing.assert_allclose(
        effects, samples[1]["fr"][0].flatten(), atol=float(scales.max()) / 60
    )


def test_scores_and_their_certainty_are_one_map_and_exact_effects_another() -> None:
    grid = lt.HeadGrid(2, 3)
    grads = some_gradients(grid, ("en", "fr"))
    effects = {c: g.clone() for c, g in grads.gradients.items()}
    effects["en"][:, 0, 0] = torch.nan
    exact = lt.HeadEffects(effects, grads.losses, grads.n_tokens)
    heads = lt.language_heads(lt.score(grads), "contrastive", fraction=0.3)
    about = Payload(
        [lt.score(grads), lt.score_certainty(grads, top_k=2), exact, heads], "T"
    ).describe()
    assert [m["name"] for m in about["maps"]] == ["lahis", "exact effect (zero ablation)"]
    assert about["maps"][0]["certain"].keys() == {"lower", "upper", "selection"}
    assert about["maps"][0]["sign"].startswith("high")
    assert about["maps"][1]["exact"]
    assert about["rules"][0]["specific"]["fr"] == heads.specific["fr"].flat_indices()


def test_what_is_given_goes_before_what_is_derived() -> None:
    grads = some_gradients(lt.HeadGrid(6, 5), ("en", "fr"))
    given = lt.score_certainty(grads, top_k=3, level=0.5)
    for results in ([grads, given], [given, grads], [lt.score(grads), given, grads]):
        about, block = unpacked(page_of(Payload(results, None), "cdn"))
        (found,) = about["maps"]
        assert (found["topK"], found["level"]) == (3, 50)
        chances = numbers(found["certain"]["selection"], block)
        np.testing.assert_allclose(chances, given.selection.flatten(), atol=1 / 500)
        assert chances.reshape(2, -1).sum(1) == pytest.approx(3, abs=0.1)
        lower = numbers(found["certain"]["lower"], block)
        np.testing.assert_allclose(lower, given.lower.flatten(), rtol=1e-3, atol=1e-8)


def test_rules_have_names_of_their_own() -> None:
    scores = some_scores(lt.HeadGrid(6, 5), ("en", "fr"))
    rules = [lt.language_heads(scores, "contrastive", fraction=f) for f in (0.1, 0.3, 0.3)]
    names = [rule["name"] for rule in Payload([scores, *rules], None).describe()["rules"]]
    assert len(set(names)) == 3
    assert "fraction 0.1" in names[0]


def test_a_page_for_32_by_32_heads_stays_small(tmp_path: Path) -> None:
    grid, languages = (
        lt.HeadGrid(32, 32),
        ("en", "fr", "de", "es", "it", "pt", "ru", "zh", "hi", "vi"),
    )
    grads = some_gradients(grid, languages)
    tokens = {code: [[f"{code}{i}" for i in range(20)]] for code in languages[:5]}
    results = [grads, lt.language_heads(lt.score(grads)), *some_samples(grid, tokens)]
    small = lt.explore(results, tmp_path / "small.html", plotlyjs="cdn")
    whole = lt.explore(results, tmp_path / "whole.html")
    assert small.stat().st_size < 1_000_000
    assert whole.stat().st_size < 6_000_000


def test_results_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    small, large = lt.HeadGrid(2, 3), lt.HeadGrid(4, 3)
    a, b = some_scores(small, ("en", "fr")), some_scores(large, ("en",))
    page = tmp_path / "heads.html"
    with pytest.raises(
        ValueError, match="2 layers × 3 heads and head_scores of 4 layers × 3 heads"
    ):
        lt.explore([a, b], page)
    with pytest.raises(ValueError, match="two results hold different 'lahis' scores"):
        lt.explore([a, some_scores(small, ("en", "fr"), seed=3)], page)
    with pytest.raises(ValueError, match="nothing to show"):
        lt.explore([], page)
    with pytest.raises(ValueError, match="nothing to map"):
        lt.explore(some_samples(small, {"en": [["a", "b"]]}), page)
    with pytest.raises(ValueError, match="cannot show attention_mass"):
        lt.explore([a, lt.AttentionMass(("start", "rest"), torch.rand(1, 2, 3, 2))], page)
    with pytest.raises(ValueError, match="neither 'inline' nor 'cdn'"):
        lt.explore(a, page, plotlyjs="net")
    with pytest.raises(ValueError, match="give both, model= and samples="):
        lt.explore(a, page, samples={"en": [[1, 2]]})
    cards = [{"model": {"name": n, "weights_sha256": n}} for n in ("one", "two")]
    first, second = (
        lt.HeadScores(a.values, a.languages, m, card=c) for m, c in zip("xy", cards, strict=True)
    )
    with pytest.raises(ValueError, match="different models, one and two"):
        lt.explore([first, second], page)
    assert not page.exists()


def test_a_model_shows_its_heads_on_texts(speaker: nn.Module, tmp_path: Path) -> None:
    corpus = lt.load_corpus("bundled", ["en", "hi"], n=3)
    grads = lt.head_gradients(speaker, corpus, max_tokens=16, progress=False)
    saved = grads.save(tmp_path / "gradients")
    page = lt.explore(
        [saved], tmp_path / "heads.html", model=speaker, samples=corpus.sample(1), max_tokens=12
    )
    about, _ = unpacked(page.read_text("utf-8"))
    assert [s["language"] for s in about["samples"]] == ["en", "hi"]
    assert all(len(s["tokens"]) == 12 and s["pattern"] and s["effects"] for s in about["samples"])


# In a browser.

GRID, LANGUAGES = lt.HeadGrid(6, 5), ("en", "fr", "ar")
TOKENS = {
    "en": [["The", " cat", EVIL, " sleeps"], [" again", " it", " does"]],
    "fr": [["Le", " chat", " dort"]],
    "ar": [ARABIC],
}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    grads = some_gradients(GRID, LANGUAGES)
    scores = lt.score(grads)
    results = [
        grads,
        lt.score(grads, "taylor"),
        lt.language_heads(scores, "contrastive", fraction=0.1),
        lt.language_heads(scores, quantile=0.8, min_languages=3),
        *some_samples(GRID, TOKENS),
    ]
    folder = tmp_path_factory.mktemp("explorer")
    return lt.explore(results, folder / "heads.html", title=f"Heads {EVIL}")


class Opened:
    """A page in the browser, with what it wrote to the console and asked of the network."""

    def __init__(self, browser: Any, file: Path, fragment: str = "", **options: Any):
        options = {"viewport": {"width": 1400, "height": 1100}, **options}
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(file.as_uri() + fragment)
        self.page.wait_for_selector("html[data-ready=yes]")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: Any) -> None:
        asked = [url for url in self.asked if not url.startswith(("file:", "data:", "blob:"))]
        self.context.close()
        assert not self.errors
        assert not asked


def cell(page: Any, label: str, panel: int = 0) -> tuple[float, float]:
    """Where a head lies on the screen."""
    layer, head = map(int, re.findall(r"\d+", label))
    return tuple(
        page.evaluate(
            """([layer, head, panel]) => {
                const map = document.getElementById('map'), box = map.getBoundingClientRect();
                const suffix = panel ? panel + 1 : '', full = map._fullLayout;
                const [x, y] = [full[`xaxis${suffix}`], full[`yaxis${suffix}`]];
                return [box.left + x._offset + x.d2p(head), box.top + y._offset + y.d2p(layer)];
            }""",
            [layer, head, panel],
        )
    )


def click(page: Any, label: str, panel: int = 0, shift: bool = False) -> None:
    page.wait_for_timeout(400)  # two clicks at once are a double-click, which zooms out
    x, y = cell(page, label, panel)
    page.mouse.move(x, y)
    page.wait_for_timeout(150)  # plotly looks for what lies under the pointer now and then
    if shift:
        page.keyboard.down("Shift")
    page.mouse.click(x, y)
    if shift:
        page.keyboard.up("Shift")


def settled(page: Any, wanted: str) -> None:
    page.wait_for_function(
        "wanted => document.getElementById('head-name').textContent === wanted",
        arg=f"Head {wanted}",
    )


@needs_browser
def test_a_click_keys_and_search_choose_a_head(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        click(page, "L3H2")
        settled(page, "L3H2")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        settled(page, "L4H3")
        assert "L4H3" in page.url
        page.fill("#search", "l5 h4")
        settled(page, "L5H4")
        page.fill("#search", "L9H9")
        assert (
            page.evaluate("document.getElementById('search').validationMessage")
            == "from L0H0 to L5H4"
        )
        page.locator("#map").focus()
        page.keyboard.press("ArrowDown")
        settled(page, "L5H4")  # the edge
        cells = page.locator("#facts tbody tr").all_inner_texts()
        assert [row.split("\t")[0] for row in cells] == list(LANGUAGES)
        assert "in top 20" in page.inner_text("#facts thead")
        assert "kept by" in page.inner_text("#head-sets")


@needs_browser
def test_the_head_panel_shows_the_heads_own_numbers(browser: Any, page_file: Path) -> None:
    certain = lt.score_certainty(some_gradients(GRID, LANGUAGES))
    with Opened(browser, page_file, "#head=L2H1&language=fr") as page:
        cells = page.locator("#facts tbody tr").nth(1).locator("td").all_inner_texts()
        assert cells[0] == "fr"
        assert float(cells[1]) == pytest.approx(float(certain.values[1, 2, 1]), rel=5e-3)
        lower, upper = map(float, cells[2].split(" to "))
        assert lower == pytest.approx(float(certain.lower[1, 2, 1]), rel=1e-2)
        assert upper == pytest.approx(float(certain.upper[1, 2, 1]), rel=1e-2)
        order = certain.values[1].flatten().argsort(descending=True).tolist()
        assert int(cells[3]) == order.index(2 * 5 + 1) + 1
        page.keyboard.press("ArrowDown")
        drawn = page.evaluate("document.getElementById('scores').data[0]")
        assert drawn["y"] == pytest.approx(certain.values[:, 3, 1].tolist(), rel=2e-3)
        gap = certain.upper[:, 3, 1] - certain.values[:, 3, 1]
        assert drawn["error_y"]["array"] == pytest.approx(gap.tolist(), rel=2e-2)
        shown = page.evaluate("document.getElementById('map').data[0].z[2][1]")
        assert shown == pytest.approx(float(certain.values[1, 2, 1]), rel=2e-3)


@needs_browser
def test_views_answer_and_come_back_from_the_address(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        page.select_option("#view", "difference")
        page.select_option("#language", "fr")
        page.select_option("#minus", "ar")
        axis = page.evaluate("document.getElementById('map').layout.coloraxis")
        assert axis["cmin"] == -axis["cmax"], "centred on 0"
        page.select_option("#view", "all")
        maps = "document.getElementById('map').data.filter(t => t.type === 'heatmap').length"
        assert page.evaluate(maps) == 3
        click(page, "L1H4", panel=2)
        settled(page, "L1H4")
        assert page.input_value("#language") == "ar", "a click in a language's panel chooses it"
        assert (
            page.evaluate("getComputedStyle(document.getElementById('tokens')).direction") == "rtl"
        )
        page.select_option("#score", label="taylor")
        page.select_option("#view", "count")
        address = page.url
        assert "count" in address
    with Opened(browser, page_file, "#" + address.split("#")[1]) as page:
        settled(page, "L1H4")
        assert page.input_value("#view") == "count"
        assert page.input_value("#score") == "1"
        most = page.evaluate(
            "Math.max(...document.getElementById('map').data[0].z.flatMap(r => [...r]))"
        )
        assert 1 <= most <= 3


@needs_browser
def test_a_set_is_gathered_and_copied_as_python(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        click(page, "L1H1", shift=True)
        click(page, "L4H0", shift=True)
        click(page, "L1H1", shift=True)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Space")
        wanted = 'lt.HeadSet(lt.HeadGrid(6, 5), ["L1H2", "L4H0"])'
        assert page.input_value("#code") == wanted
        assert eval(page.input_value("#code"), {"lt": lt}) == lt.HeadSet(GRID, ["L1H2", "L4H0"])
        page.click("#clear")
        page.click("#lasso")
        corners = [cell(page, label) for label in ("L0H0", "L0H2", "L2H2", "L2H0")]
        grow = [(-9, -9), (9, -9), (9, 9), (-9, 9)]
        path = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(corners, grow, strict=True)]
        page.mouse.move(*path[0])
        page.mouse.down()
        for x, y in [*path[1:], path[0]]:
            page.mouse.move(x, y, steps=8)
        page.mouse.up()
        page.wait_for_function(
            "() => document.getElementById('set-size').textContent === 'Set: 9 heads'"
        )
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click("#copy")
        page.wait_for_function("() => document.getElementById('copy').textContent === 'Copied'")
        assert page.evaluate("navigator.clipboard.readText()") == page.input_value("#code")
        page.click("#clear")
        page.click("#take")
        rule = lt.language_heads(
            lt.score(some_gradients(GRID, LANGUAGES)), "contrastive", fraction=0.1
        )
        size = len(rule.specific[page.input_value("#language")])
        assert page.inner_text("#set-size") == f"Set: {size} heads"


@needs_browser
def test_texts_are_text_whatever_they_hold(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, "#text=0") as page:
        assert page.title() == f"Heads {EVIL}"
        assert page.inner_text("#title") == f"Heads {EVIL}"
        tokens = page.locator("#tokens span").all_inner_texts()
        assert tokens[2] == EVIL
        page.locator("#tokens span").nth(3).click()
        assert "Attention of the outlined token" in page.inner_text("#legend")
        page.locator("#pattern").scroll_into_view_if_needed()
        x, y = page.evaluate(
            """() => { const p = document.getElementById('pattern'), b = p.getBoundingClientRect(), f = p._fullLayout;
                return [b.left + f.xaxis._offset + f.xaxis.d2p(2), b.top + f.yaxis._offset + f.yaxis.d2p(3)]; }"""
        )
        page.mouse.move(x - 3, y)
        page.mouse.move(x, y)
        page.wait_for_selector("#pattern .hoverlayer text")
        assert "</script>" in page.locator("#pattern .hoverlayer").text_content()
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0


@needs_browser
def test_tokens_and_pattern_are_the_heads(browser: Any, page_file: Path) -> None:
    patterns, effects = some_samples(GRID, TOKENS)
    with Opened(browser, page_file, "#head=L3H4&text=2") as page:
        titles = [s.get_attribute("title") for s in page.locator("#tokens span").all()]
        found = [float(re.findall(r"-?\d[\d.e-]*", t)[0]) for t in titles]
        assert found == pytest.approx(effects["fr"][0][3, 4].tolist(), rel=0.06, abs=1e-3)
        rows = page.evaluate("document.getElementById('pattern').data[0].z.map(r => [...r])")
        for q, row in enumerate(rows):
            assert row == pytest.approx(patterns["fr"][0][3, 4, q, : q + 1].tolist(), abs=0.07)
        page.locator("#tokens span").nth(2).click()
        weight = page.locator("#tokens span").nth(0).get_attribute("title")
        assert float(weight.split()[2]) == pytest.approx(rows[2][0], abs=6e-3)
        page.locator("#extremes button").first.click()
        best = max(
            (float(e[3, 4].max()), code, i)
            for code, each in effects.effects.items()
            for i, e in enumerate(each)
        )
        names = [(code, i) for code, texts in TOKENS.items() for i in range(len(texts))]
        assert page.input_value("#sample") == str(names.index(best[1:]))


@needs_browser
def test_dark_and_light(browser: Any, page_file: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with Opened(browser, page_file, color_scheme="dark") as page:
        assert page.evaluate(ground) == "rgb(20, 22, 26)"
        ink = page.evaluate("document.getElementById('map')._fullLayout.font.color")
        assert ink == "#e6e9ee"
        page.click("#theme")
        assert page.evaluate(ground) == "rgb(255, 255, 255)"
        address = page.url
        assert "theme=light" in address
    with Opened(browser, page_file, color_scheme="light") as page:
        assert page.evaluate(ground) == "rgb(255, 255, 255)"


@needs_browser
@pytest.mark.parametrize("width", [1400, 800])
def test_nothing_is_wider_than_the_window(browser: Any, page_file: Path, width: int) -> None:
    with Opened(browser, page_file, "#view=all", viewport={"width": width, "height": 900}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_pages_with_little_or_odd_content_open(browser: Any, tmp_path: Path) -> None:
    odd = ("constructor", "__proto__", "<b>x</b> &amp;")
    scores = some_scores(GRID, odd)
    rule = lt.language_heads(some_scores(GRID, ("en", "fr")), "contrastive", fraction=0.1)
    exact = torch.full((1, *GRID.shape), torch.nan)
    exact[0, 2, :3] = torch.tensor([0.1, 0.3, 0.2])
    few = lt.HeadEffects({"en": exact}, {"en": torch.ones(1)}, {"en": torch.ones(1).long()})
    for name, results in {"odd": [scores, rule], "heads": [rule], "few": [few]}.items():
        file = lt.explore(results, tmp_path / f"{name}.html")
        for fragment in ("", "#rule=none&head=L9H9&text=7&view=count&language=zz&set=L1H1,x"):
            with Opened(browser, file, fragment) as page:
                page.keyboard.press("ArrowDown")
                if name == "few":
                    click(page, "L2H0")
                    settled(page, "L2H0")
                    assert "rank of 3" in page.inner_text("#facts thead")
                    assert "interval" not in page.inner_text("#facts thead"), "one text has none"
                    click(page, "L4H4")
                    settled(page, "L4H4")
                if name == "odd":
                    assert page.locator("#facts tbody tr td:first-child").all_inner_texts() == list(
                        odd
                    )


@needs_browser
def test_zoom_stays_when_heads_are_gathered(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as page:
        (x0, y0), (x1, y1) = cell(page, "L1H1"), cell(page, "L3H3")
        page.mouse.move(x0, y0)
        page.mouse.down()
        page.mouse.move(x1, y1, steps=6)
        page.mouse.up()
        page.wait_for_timeout(400)
        across = "document.getElementById('map')._fullLayout.xaxis.range"
        zoomed = page.evaluate(across)
        assert zoomed[1] - zoomed[0] < 3
        click(page, "L2H2", shift=True)
        assert page.inner_text("#set-size") == "Set: 1 head"
        assert page.evaluate(across) == pytest.approx(zoomed)


@needs_browser
def test_a_model_of_70b_can_be_walked(browser: Any, tmp_path: Path) -> None:
    grid = lt.HeadGrid(72, 64)
    file = lt.explore(some_scores(grid, ("en", "fr", "zh")), tmp_path / "large.html")
    with Opened(browser, file) as page:
        click(page, "L70H63")
        settled(page, "L70H63")
        assert page.locator("#texts").is_hidden()
        page.select_option("#view", "all")
        click(page, "L3H2", panel=1)
        settled(page, "L3H2")


@needs_browser
def test_without_its_network_a_small_page_says_what_it_lacks(browser: Any, tmp_path: Path) -> None:
    file = lt.explore(some_scores(GRID, LANGUAGES), tmp_path / "small.html", plotlyjs="cdn")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("#trouble:not([hidden])")
    assert "could not be fetched" in page.inner_text("#trouble")
    context.close()
