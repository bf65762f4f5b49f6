"""The paper's experiments as its authors' code runs them, as far as the texts at hand allow.

Moving bfloat16 mask, 0.96 quantile, heads of four languages are general, mean of exp(loss), nine unmatched random
heads, answers by substring, tuned mask by ``lahis_tl.authors.soft_mask``. No intervals, as theirs has none.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import lahis_tl as lt
from analyses.attention_transfer import masks_of
from analyses.generating import NONE, generate_under
from analyses.result import Parts, Result
from analyses.xquad_mask import answers
from lahis_tl.access import LensModel
from lahis_tl.authors import mean_exp_perplexity, soft_mask
from lahis_tl.batches import tokenize
from lahis_tl.errors import ArtifactError
from lahis_tl.heads import top_heads
from lahis_tl.identify import language_identifier
from lahis_tl.pairs import encode_pairs
from lahis_tl.questions import Question, load_questions, question_pair
from lahis_tl.tasks import summary_tasks
from lahis_tl.transfer import conflicts, transfer_answers

GENERAL, RANDOM, ENGLISH, OWN = "general heads", "random heads", "English heads", "own heads"
WIKIPEDIA = "wikimedia/wikipedia"
_SCORING_SEED, _TEST_SEED, _XLSUM_SEED, _XQUAD_SEED = 86, 37, 68, 68  # theirs
_RANDOM_HEADS = 9


@dataclass(frozen=True)
class AuthorsProtocol:
    """Their procedures on one model; the importance matrices and the summaries are made once.

    Args:
        sources: where ``texts``, ``summaries`` and ``questions`` come from.
        languages: experiment → the languages that it can be run in.
        sizes: how much; see ``analyses.paper.SIZES``.
        folder: keeps matrices and finished parts.
        about: the model's card, on which parts depend.
    """

    model: LensModel
    sources: Mapping[str, str]
    languages: Mapping[str, Sequence[str]]
    sizes: Mapping[str, Any]
    folder: Path
    about: Mapping[str, Any]
    seed: int = 0
    progress: bool = True

    @cached_property
    def corpora(self) -> tuple[lt.Corpus, lt.Corpus]:
        """Texts to score on, and others for perplexities."""
        scored, tested = self.sizes["texts"], self.sizes["test_texts"]
        codes = self.languages["heads"]
        if self.sources["texts"] == WIKIPEDIA:
            whole = lt.load_corpus(WIKIPEDIA, codes, n=scored + tested, seed=_SCORING_SEED)
        else:
            whole = lt.load_corpus("bundled", codes)
        scoring, rest = whole.split(scored, seed=_SCORING_SEED)
        return scoring, rest.sample(tested, seed=_TEST_SEED)

    @cached_property
    def scores(self) -> lt.HeadScores:
        path = self.folder / "importance"
        try:
            return lt.HeadScores.load(path, self.model)
        except (FileNotFoundError, ArtifactError):  # none yet, or torn by a kill
            scoring, _ = self.corpora
            found = lt.lahis_code(
                self.model,
                scoring,
                max_tokens=self.sizes["max_tokens"],
                checkpoint=self.folder / "importance-parts",
                progress=self.progress,
            )
            found.save(path)
            return found

    @cached_property
    def heads(self) -> lt.LanguageHeads:
        return lt.language_heads(self.scores, quantile=self.sizes["quantile"])

    def own_heads(self, codes: Sequence[str], fraction: float) -> dict[str, lt.HeadSet]:
        """The first int(heads × fraction) specific heads of each language, one at least; without languages that
        have none.

        Raises:
            ValueError: none of them has any.
        """
        count = max(1, int(self.heads.grid.size * fraction))
        found = {code: self.heads.specific[code][:count] for code in codes}
        found = {code: members for code, members in found.items() if len(members)}
        if not found:
            raise ValueError(f"the authors' rule leaves no specific head to {', '.join(codes)}")
        return found

    def random_heads(self, count: int, number: int = 0) -> lt.HeadSet:
        """Heads drawn without regard to layers; seeded, which theirs are not."""
        grid = self.heads.grid
        generator = torch.Generator().manual_seed(self.seed + number)
        drawn = torch.randperm(grid.size, generator=generator)[: min(count, grid.size)]
        return lt.HeadSet.from_flat(grid, drawn.tolist())

    def parts(self, name: str, **settings: Any) -> Parts:
        about = {"model": self.about, "sources": dict(self.sources), "sizes": dict(self.sizes)}
        chosen = {code: members.labels for code, members in self.heads.specific.items()}
        about |= {"chosen": chosen, "general": self.heads.general.labels, **settings}
        return Parts(self.folder / "parts" / name, about)

    def importance(self) -> Result:
        heads = self.heads
        sizes = {code: len(members) for code, members in heads.specific.items()}
        counts = pd.DataFrame(
            [
                {"heads": heads.grid.size, "general": len(heads.general)}
                | {"specific": ", ".join(f"{c} {n}" for c, n in sizes.items())}
                | {"general_heads": " ".join(heads.general.labels)}
            ]
        )
        figures = {
            "authors_heatmap": lt.plots.heatmap(self.scores),
            "authors_layers": lt.plots.heads_per_layer(heads),
            "authors_overlap": lt.plots.overlap(heads),
        }
        tables = {"counts": counts, "sets": heads.to_dataframe()}
        verdict = (
            f"{len(heads.general)} of {heads.grid.size} heads are general; specific to a language: "
            f"{counts['specific'].iloc[0]}."
        )
        return Result("heads", tables, figures, verdict, self._card(self.scores.card))

    def perplexity(self) -> Result:
        """Each language's text without each language's heads, as a ratio to the perplexity of the whole model."""
        _, testing = self.corpora
        ids = tokenize(self.model, testing, self.sizes["max_tokens"])
        codes = self.languages["perplexity"]
        off = self.own_heads(codes, self.sizes["perplexity_fraction"])
        masks = {code: lt.HeadMask.scaling(members, 0.0) for code, members in off.items()}
        masks[RANDOM] = lt.HeadMask.scaling(self.random_heads(_RANDOM_HEADS), 0.0)
        rows = []
        parts = self.parts("perplexity", texts=testing.sha256)
        for code in codes:
            plain = self._perplexity(parts, code, NONE, ids[code], None)
            found = {
                name: self._perplexity(parts, code, name, ids[code], mask)
                for name, mask in masks.items()
            }
            rows += [
                {"off": name, "text_in": code, "plain": plain, "perplexity": found[name]}
                | {"ratio": found[name] / plain, "random_ratio": found[RANDOM] / plain}
                for name in off
            ]
        table = pd.DataFrame(rows)
        square = lt.plots.square(
            table.assign(log=table["ratio"].map(lambda ratio: torch.tensor(ratio).log().item())),
            ("off", "text_in", "log"),
            "Perplexity with heads of one language off (authors' protocol)",
            lt.plots.about_card(self._card({}), f"{len(ids[codes[0]])} texts a language"),
            "log of the ratio<br>to no mask",
            ("language of the heads", "language of the text"),
        )
        own = table[table["off"] == table["text_in"]]
        parted = ", ".join(
            f"{r.text_in} × {r.ratio:.2f} (nine random heads × {r.random_ratio:.2f})"
            for r in own.itertuples()
        )
        verdict = f"With a language's own heads off its mean of exp(loss) is {parted} of that without a mask."
        verdict += _without_heads(codes, off)
        card = self._card({"off": {code: members.labels for code, members in off.items()}})
        return Result("perplexity", {"crossed": table}, {"crossed": square}, verdict, card)

    def _perplexity(
        self,
        parts: Parts,
        code: str,
        name: str,
        ids: Sequence[Sequence[int]],
        mask: lt.HeadMask | None,
    ) -> float:
        def make() -> list[dict[str, Any]]:
            return [{"value": mean_exp_perplexity(self.model, ids, mask)}]

        return parts.rows(f"{code} without {name}", make)[0]["value"]

    @cached_property
    def generations(self) -> pd.DataFrame:
        """Summaries without a mask, with general, random, English and own heads off."""
        codes, sizes = self.languages["summaries"], self.sizes
        source = self.sources["summaries"]
        tasks = summary_tasks(codes, sizes["summaries"], source, _XLSUM_SEED)
        conditions: dict[str, Mapping[str, lt.HeadSet]] = {
            RANDOM: dict.fromkeys(codes, self.random_heads(_RANDOM_HEADS))
        }
        own = self.own_heads(self.languages["heads"], sizes["summary_fraction"])
        asked = {code: own[code] for code in codes if code in own}
        if asked:
            conditions[OWN] = asked
        if "en" in own:
            conditions[ENGLISH] = dict.fromkeys(codes, own["en"])
        if len(self.heads.general):
            conditions[GENERAL] = dict.fromkeys(codes, self.heads.general)
        rows = generate_under(
            self.model,
            tasks,
            conditions,
            {name: {code: [] for code in sets} for name, sets in conditions.items()},
            factor=0.0,
            identify=language_identifier(),
            second=None,
            seed=self.seed,
            parts=self.parts("summaries", tasks=[task.prompt for task in tasks]),
            max_new_tokens=sizes["summary_tokens"],
            progress=self.progress,
        )
        found = pd.DataFrame(rows)
        return found.assign(on_target=(found["identified"] == found["language"]).astype(float))

    def summaries(self) -> Result:
        return self._of_generations("summaries", "chrf", (NONE, RANDOM, GENERAL))

    def off_target(self) -> Result:
        """
        Raises:
            ValueError: English is not among the languages, or alone.
        """
        if "en" not in self.languages["off_target"] or len(self.languages["off_target"]) < 2:
            raise ValueError(
                "English heads are suppressed here, to keep other languages on target: 'en' and another must be "
                "among the languages"
            )
        return self._of_generations("off_target", "on_target", (NONE, ENGLISH, OWN))

    def _of_generations(self, name: str, measure: str, conditions: Sequence[str]) -> Result:
        rows = self.generations
        rows = pd.DataFrame(rows[rows["condition"].isin(conditions)])
        if name == "off_target":  # to suppress English heads keeps other languages on target
            rows = pd.DataFrame(rows[rows["language"] != "en"])
        table = rows.pivot_table(
            index="condition", columns="language", values=measure, sort=False
        ).reindex([c for c in conditions if c in set(rows["condition"])])
        table.insert(0, "mean", table.mean(axis=1))
        means = ", ".join(f"{c} {value:.3g}" for c, value in table["mean"].items())
        called = {"chrf": "chrF", "on_target": "Share in the right language"}[measure]
        verdict = (
            f"{called}, of {rows['number'].nunique()} summaries, mean of the languages: {means}."
        )
        absent = [c for c in conditions if c not in table.index]
        if absent:
            verdict += f" There are no {', '.join(absent)}, so none could be taken away."
        card, records = self._card({"measure": measure}), {"generations": rows.to_dict("records")}
        return Result(name, {measure: table.reset_index()}, {}, verdict, card, records)

    def transfer(self) -> Result:
        codes = self.languages["transfer"]
        sets = self.own_heads(codes, self.sizes["transfer_fraction"])
        if len(sets) < 2:
            raise ValueError(
                f"languages contradict each other here, and of {', '.join(codes)} only {', '.join(sets)} has "
                "specific heads"
            )
        items = [
            item
            for a in sets
            for b in sets
            if a != b
            for item in conflicts(a, b, ["job"], self.sizes["jobs"], seed=self.seed)
        ]
        doses = {"no mask": None, "first × 3": (3.0, 1.0), "second × 0": (1.0, 0.0)}
        parts = self.parts("transfer", items=[item.prompt for item in items])
        rows = []
        for name, dose in doses.items():
            masks = None if dose is None else masks_of(items, sets, *dose)

            def make(name: str = name, masks: Any = masks) -> list[dict[str, Any]]:
                found = transfer_answers(
                    self.model, items, masks, progress=self.progress, description=name
                )
                return found.to_dataframe().to_dict("records")

            rows += [{"condition": name, **row} for row in parts.rows(name, make)]
        found = pd.DataFrame(rows)
        plain = found.head(len(items))["rank_first"].to_numpy()
        table = pd.DataFrame(
            [
                {"condition": name, "prompts": len(group)}
                | {
                    f"says_{who}": (group["says"] == who).mean()
                    for who in ("first", "second", "neither")
                }
                | {"rank_first_better": (group["rank_first"].to_numpy() < plain).mean()}
                for name, group in found.groupby("condition", sort=False)
            ]
        )
        parted = ", ".join(
            f"{row['condition']} {row['says_first']:.1%}" for row in table.to_dict("records")
        )
        verdict = f"The first language's answer is given, of {len(items)} prompts: {parted}."
        verdict += _without_heads(codes, sets)
        card = self._card({"sets": {code: members.labels for code, members in sets.items()}})
        return Result("transfer", {"answers": table}, {}, verdict, card, {"answers": rows})

    def xquad(self) -> Result:
        """A mask tuned on the first rows, tested on later ones; as many random heads beside."""
        codes, sizes = self.languages["xquad"], self.sizes
        count = max(1, int(self.heads.grid.size * sizes["tuned_fraction"]))
        conditions = {
            NONE: dict.fromkeys(codes),
            RANDOM: dict.fromkeys(codes, self.random_heads(count, 1)),
            "best heads": {code: top_heads(self.scores[code], count) for code in codes},
        }
        rows: list[dict[str, Any]] = []
        for code, questions in load_questions(self.sources["questions"], codes).items():
            train, test = self._split(questions)
            asked = [question_pair(q) for q in (*train, *test)]
            parts = self.parts(f"xquad_{code}", asked=asked)
            for name, sets in conditions.items():

                def make(
                    heads: lt.HeadSet | None = sets[code],
                    train: Sequence[Question] = train,
                    test: Sequence[Question] = test,
                ) -> list[dict[str, Any]]:
                    mask = None
                    if heads is not None:
                        pairs = encode_pairs(self.model, [question_pair(q) for q in train])
                        mask = lt.HeadMask(soft_mask(self.model, pairs, heads))
                    return answers(self.model, test, mask, 10, self.progress)

                found = parts.rows(name, make)
                rows += [{"language": code, "condition": name, **row} for row in found]
        table = pd.DataFrame(rows).groupby(["language", "condition"], sort=False)["contains"]
        accuracy = table.agg(["mean", "count"]).reset_index()
        accuracy = accuracy.rename(columns={"mean": "contains", "count": "questions"})
        means = ", ".join(
            f"{name} {group['contains'].mean():.1%}"
            for name, group in accuracy.groupby("condition", sort=False)
        )
        verdict = (
            f"The right answer is a part of what is generated, mean of the languages: {means}."
        )
        card = self._card({"heads": count})
        return Result("xquad", {"accuracy": accuracy}, {}, verdict, card, {"answers": rows})

    def _split(self, questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
        """By row, as they do: paragraphs may be on both sides."""
        third = round(len(questions) * 390 / 1190)
        train = list(questions[:third])
        random.Random(_XQUAD_SEED).shuffle(train)
        return train[: self.sizes["tuning"]], list(questions[third:][: self.sizes["questions"]])

    def _card(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {**more, "model": dict(self.about), "sizes": dict(self.sizes)}


def _without_heads(codes: Sequence[str], sets: Mapping[str, lt.HeadSet]) -> str:
    absent = [code for code in codes if code not in sets]
    return f" The rule leaves no specific head to {', '.join(absent)}." if absent else ""
