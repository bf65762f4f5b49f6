"""The command line, called as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lahis_tl as lt
from lahis_tl import cli

runner = CliRunner()


def run(*arguments):
    return runner.invoke(
        cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"}
    )


@pytest.fixture(scope="module")
def scored(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    texts = folder / "texts"
    texts.mkdir()
    for code, text in {
        "en": "the cat is here in the house",
        "fr": "le chat dort la maison est la",
    }.items():
        (texts / f"{code}.txt").write_text("\n".join(f"{text} {'x' * i}" for i in range(5)))
    result = run("score", checkpoint("llama"), "--corpus", texts, "--out", folder, "--quiet")
    assert result.exit_code == 0, result.output
    return folder


def test_help_teaches_and_names_the_registries():
    for command, words in {
        "": ["demo", "score", "heads", "plot", "ablate", "rerun", "steer"],
        "score": [
            "lahis, lahis_code, sensitivity, taylor",
            "Example",
            "bundled",
            "--fresh",
            "--recompute",
        ],
        "heads": ["authors, contrastive, tested", "quantile", "--fdr"],
        "ablate": ["layer, nearest, network", "Example", "general"],
        "steer": ["Example", "suppresses", "--of", "general"],
        "plot": ["heatmap, difference, counts, layers, overlap"],
        "demo": ["SmolLM2"],
        "explore": ["Example", "--model", "--cdn", "no network"],
    }.items():
        result = run(*command.split(), "--help")
        assert result.exit_code == 0
        for word in words:
            assert word in result.output, (command, word)


def test_score_writes_gradients_scores_and_cards(scored):
    assert lt.load(scored / "scores").method == "lahis"
    assert lt.load(scored / "gradients").languages == ["en", "fr"]
    assert (scored / "scores.json").is_file()


def test_explore_writes_a_page_of_a_folder(scored, checkpoint, tmp_path):
    page = tmp_path / "page.html"
    found = run("explore", scored, "--cdn", "-o", page)
    assert found.exit_code == 0, found.output
    assert str(page) in found.output
    assert '"name":"lahis"' in page.read_text()
    texts = ("--corpus", scored / "texts", "--max-tokens", "6")
    model = ("--model", checkpoint("llama"))
    found = run("explore", scored / "scores.safetensors", *model, *texts, "--cdn", "-o", page)
    assert found.exit_code == 0, found.output
    assert page.read_text().count('"language":') == 2, "a sample of each language"
    for arguments, said in (
        ((scored, *texts), "give --model too"),
        ((tmp_path,), "holds no result that can be shown"),
    ):
        refused = run("explore", *arguments)
        assert refused.exit_code == 2
        assert said in refused.output


def test_heads_and_plots(scored):
    chosen = run("heads", scored / "scores.safetensors", "--quantile", "0.8")
    assert chosen.exit_code == 0, chosen.output
    assert "general" in chosen.output
    heads = lt.load(scored / "heads")
    assert heads.options["quantile"] == 0.8
    for arguments in (
        ("plot", scored / "scores.safetensors"),
        (
            "plot",
            scored / "gradients.safetensors",
            "--kind",
            "difference",
            "-l",
            "fr",
            "--minus",
            "en",
            "--method",
            "taylor",
        ),
        ("plot", scored / "heads.safetensors", "--kind", "counts"),
        ("plot", scored / "scores.safetensors", "--kind", "overlap", "-o", scored / "o.html"),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert Path(result.output.strip().replace("\n", "")).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["score"], 2, "Missing argument"),
        (["score", "x", "--method", "nonsense"], 2, "is not one of lahis"),
        (["heads", "S", "--rule", "contrastive", "--quantile", "0.9"], 2, "has no option quantile"),
        (["heads", "H"], 2, "scores, gradients or effects are needed"),
        (["plot", "S", "--kind", "difference"], 2, "needs --language and --minus"),
        (["plot", "H", "--kind", "heatmap"], 2, "needs scores"),
        (["plot", "S", "--kind", "pie"], 2, "is not one of heatmap"),
        (["heads", "S", "--method", "taylor"], 2, "holds lahis already; --method taylor needs"),
        (["plot", "S", "--kind", "counts", "-l", "fr"], 2, "counts is of all languages"),
    ],
)
def test_wrong_usage(scored, arguments, code, message):
    run("heads", scored / "scores.safetensors", "--quantile", "0.8")
    files = {"S": scored / "scores.safetensors", "H": scored / "heads.safetensors"}
    result = run(*(files.get(a, a) for a in arguments))
    assert result.exit_code == code
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "no/such-model"], "error: cannot load 'no/such-model'"),
        (["score", "smollm2", "-l", "en,xx"], "error: unknown language code 'xx'"),
        (["plot", "nowhere.safetensors"], "error: there is no file"),
    ],
)
def test_bad_input_is_one_line_and_status_1(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lahis-tl", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_ctrl_c_has_its_own_status(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lahis_tl.corpora.load_corpus", interrupted)
    monkeypatch.setattr(sys, "argv", ["lahis-tl", "score", "smollm2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130


def test_parts_are_gone_once_the_gradients_are_whole(scored):
    assert not (scored / "parts").exists()


def test_the_installed_command_knows_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "lahis_tl", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"lahis-tl {lt.__version__}"


@pytest.fixture
def unseen(tmp_path):
    for code, text in {"en": "here the cat is in the house", "fr": "la maison ici le chat"}.items():
        (tmp_path / f"{code}.txt").write_text("\n".join(f"{text} {'la ' * i}" for i in range(1, 4)))
    return tmp_path


def test_ablate_tests_sets_of_a_file_and_labels(scored, checkpoint, unseen):
    file = scored / "contrast"
    made = run(
        "heads",
        scored / "scores.safetensors",
        "--rule",
        "contrastive",
        "--fraction",
        "0.1",
        "-o",
        file,
    )
    assert made.exit_code == 0, made.output
    options = ["--corpus", unseen, "--draws", "3", "--quiet"]
    out = unseen / "out"
    whole = run("ablate", checkpoint("llama"), f"{file}.safetensors", *options, "-o", out)
    assert whole.exit_code == 0, whole.output
    assert "Own language minus the others" in whole.output
    assert "random sets" in whole.output
    assert "…" not in whole.output, "nothing may be cut off"
    assert (out / "ablation.csv").read_text().startswith("heads_of,text_in,change")
    assert (out / "ablation.html").is_file()
    assert not (out / "parts").exists(), "they are whole in the table"
    assert '"sha256"' in (out / "ablation.json").read_text()
    one = run(
        "ablate", checkpoint("llama"), f"{file}.safetensors", "--of", "fr", *options, "-o", out
    )
    assert one.exit_code == 0, one.output
    assert (out / "ablation.csv").read_text().startswith("language,change,lower")
    labels = run("ablate", checkpoint("llama"), "L0H1,L2H3", *options, "-o", out)
    assert labels.exit_code == 0, labels.output


def test_ablate_refuses_scored_texts_and_what_it_does_not_know(scored, checkpoint, unseen):
    file = scored / "contrast.safetensors"
    made = run(
        "heads",
        scored / "scores.safetensors",
        "--rule",
        "contrastive",
        "--fraction",
        "0.1",
        "-o",
        file,
    )
    assert made.exit_code == 0, made.output
    same = run("ablate", checkpoint("llama"), file, "--corpus", scored / "texts", "-o", unseen)
    assert same.exit_code == 1
    assert "scored already" in str(same.exception)
    wrong = run("ablate", checkpoint("llama"), file, "--of", "de", "--corpus", unseen, "-o", unseen)
    assert wrong.exit_code == 2
    assert "the file has en, fr, general, or all" in wrong.output
    outside = run("ablate", checkpoint("llama"), "L9H9", "--corpus", unseen, "-o", unseen)
    assert "L9H9 is outside" in str(outside.exception)
    scores = run("ablate", checkpoint("llama"), scored / "scores.safetensors", "--corpus", unseen)
    assert "make heads of it by" in scores.output


def test_the_tested_rule_needs_gradients(scored):
    tested = run("heads", scored / "gradients.safetensors", "--rule", "tested", "-o", scored / "t")
    assert tested.exit_code == 0, tested.output
    scores = run("heads", scored / "scores.safetensors", "--rule", "tested")
    assert scores.exit_code == 2
    assert "needs gradients or effects" in scores.output


def test_heads_of_exact_effects_and_of_another_model(scored, checkpoint, unseen):
    model = lt.load_model(str(checkpoint("llama")))
    effects = lt.exact_effects(model, lt.load_corpus(unseen), progress=False)
    file = effects.save(unseen / "out" / "effects")
    chosen = run("heads", file, "--quantile", "0.8", "-o", unseen / "out" / "heads")
    assert chosen.exit_code == 0, chosen.output
    assert "score exact" in chosen.output
    other = checkpoint("llama", rms_norm_eps=1e-3, initializer_range=0.03)
    wrong = run("ablate", other, unseen / "out" / "heads.safetensors", "--corpus", unseen)
    assert "is about another model" in str(wrong.exception)


def test_steer_shows_and_keeps_both_texts(scored, checkpoint, tmp_path):
    heads = lt.language_heads(lt.load(scored / "scores"), quantile=0.8)
    file = heads.save(tmp_path / "heads")
    code = next(code for code, members in heads.specific.items() if len(members))
    model, out = checkpoint("llama"), tmp_path / "texts"
    options = ["--max-new-tokens", 8, "--factor", 3, "--out", out]
    one = run("steer", model, file, "le chat dort", "--of", code, *options)
    assert one.exit_code == 0, one.output
    plain, steered = (lt.Generations.load(out / name) for name in ("plain", "steered"))
    again = lt.steer(
        lt.load_model(str(model)),
        "le chat dort",
        heads.specific[code],
        3.0,
        max_new_tokens=8,
        progress=False,
    )
    assert (plain.texts, steered.texts) == (again.plain.texts, again.steered.texts)
    assert f"{', '.join(heads.specific[code].labels)} × 3" in one.output
    assert f"le chat dort{plain.texts[0]}" in one.output, "streamed after its prompt"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("le chat\n\nthe house\n")
    several = run("steer", model, "L0H1,L1H2", "--file", prompts, "--max-new-tokens", 5, "--quiet")
    assert several.exit_code == 0, several.output
    assert several.output.count("no mask:") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["L0H1"], "give prompts"),
        (["L0H1", "le", "--file", "x"], "give prompts"),
        (["L0H1", "--file", "/no/such"], "there is no file /no/such"),
        (["HEADS", "le"], "name one by --of: en, fr, general"),
        (["HEADS", "le", "--of", "de"], "--of de: the file has en, fr, general"),
        (["L9H9", "le"], "outside the model"),
    ],
)
def test_steer_names_bad_input(scored, checkpoint, tmp_path, arguments, message):
    file = lt.language_heads(lt.load(scored / "scores"), quantile=0.8).save(tmp_path / "heads")
    found = run("steer", checkpoint("llama"), *[file if a == "HEADS" else a for a in arguments])
    assert found.exit_code != 0
    assert message in " ".join(
        (found.output + str(found.exception or "")).replace("│", " ").split()
    )


def test_tune_and_export(checkpoint, tmp_path):
    model, pairs = checkpoint("llama"), tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "le chat the cat", "target": " der hund"},
        {"prompt": "the house", "target": " la"},
    ]
    pairs.write_text("\n".join(json.dumps(line) for line in lines * 5))
    tuned = run(
        "tune",
        model,
        pairs,
        "--heads",
        "L0H1,L2H3",
        "--epochs",
        2,
        "-o",
        tmp_path / "mask",
        "--quiet",
    )
    assert tuned.exit_code == 0, tuned.output
    assert "2 heads, 9 pairs, 1 for validation" in tuned.output
    mask = lt.load(tmp_path / "mask")
    assert set(mask.mask.heads()) <= {(0, 1), (2, 3)}
    for kind, file in (("folded", "model.safetensors"), ("ia3", "adapter_model.safetensors")):
        done = run(
            "export", tmp_path / "mask.safetensors", model, "--kind", kind, "-o", tmp_path / kind
        )
        assert done.exit_code == 0, done.output
        assert (tmp_path / kind / file).is_file()
        again = run(
            "export", tmp_path / "mask.safetensors", model, "--kind", kind, "-o", tmp_path / kind
        )
        assert isinstance(again.exception, FileExistsError)


def test_tune_splits_questions_by_paragraph(tmp_path):
    from lahis_tl.cli.using import _read_pairs

    path = Path(lt.__file__).parent / "data" / "squad" / "fr.json"
    train, held_out = _read_pairs(path, "fr", 0.25, 0)
    assert (len(train), len(held_out)) == (54, 18)
    paragraph = {prompt.split("\n")[0] for prompt, _ in train}
    assert not paragraph & {prompt.split("\n")[0] for prompt, _ in held_out}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "M", "no.jsonl"], "there is no file no.jsonl"),
        (["tune", "M", "pairs.txt"], "neither JSON lines"),
        (["tune", "M", "BAD"], 'line 1: not an object with "prompt" and "target"'),
        (["export", "no.safetensors", "M", "-o", "x"], "there is no file no.safetensors"),
        (["export", "no.safetensors", "M", "-o", "x", "--kind", "gguf"], "not one of folded, ia3"),
    ],
)
def test_tune_and_export_name_bad_input(checkpoint, tmp_path, arguments, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[]\n")
    named = {"M": checkpoint("llama"), "BAD": bad}
    found = run(*[named.get(a, a) for a in arguments])
    assert found.exit_code != 0
    assert message in " ".join(
        (found.output + str(found.exception or "")).replace("│", " ").split()
    )


def test_fresh_starts_anew_and_resume_goes_on(checkpoint, tmp_path, monkeypatch):
    from lahis_tl import gradients

    arguments = [
        "score",
        checkpoint("llama"),
        "-l",
        "en",
        "-n",
        3,
        "--max-tokens",
        8,
        "-o",
        tmp_path,
    ]
    arguments += ["--batch-tokens", 8, "--quiet"]
    real, batches = gradients.batch_gradients, []

    def limited(model, batch):
        batches.append(batch.keys)
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(gradients, "batch_gradients", limited)
    stop_at = 3
    assert run(*arguments).exit_code == 130
    assert len(list((tmp_path / "parts").glob("part-*"))) == 2
    batches.clear()
    stop_at = 2
    assert run(*arguments, "--resume").exit_code == 0, "one batch was left"
    assert not (tmp_path / "parts").exists()
    batches.clear()
    stop_at = 3
    assert run(*arguments).exit_code == 130
    batches.clear()
    stop_at = 0
    assert run(*arguments, "--fresh", "--max-tokens", 6).exit_code == 0, "other settings too"
    assert len(batches) == 3


def test_tune_goes_on_and_starts_anew(checkpoint, tmp_path, monkeypatch):
    from lahis_tl import tuning

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "the cat is", "target": " here"}, {"prompt": "le chat", "target": " dort"}]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "tune",
        checkpoint("llama"),
        pairs,
        "--heads",
        "L0H1",
        "--validation",
        0,
        "--quiet",
    ]
    arguments += ["--epochs", 3, "--batch-size", 2, "-o", tmp_path / "mask.v1"]
    real, epochs = tuning._Run.epoch, []

    def limited(self, *others):
        epochs.append(1)
        if len(epochs) == stop_at:
            raise KeyboardInterrupt
        return real(self, *others)

    monkeypatch.setattr(tuning._Run, "epoch", limited)
    for way, expected in (("--resume", 1), ("--fresh", 3)):
        epochs.clear()
        stop_at = 3
        assert run(*arguments).exit_code == 130
        assert len(list((tmp_path / "mask.v1-parts").glob("part-*"))) == 3
        epochs.clear()
        stop_at = 0
        done = run(*arguments, way)
        assert done.exit_code == 0, done.output
        assert len(epochs) == expected
        assert not (tmp_path / "mask.v1-parts").exists()


def test_score_says_what_memory_it_takes_and_recomputes(checkpoint, tmp_path):
    arguments = ["score", checkpoint("llama"), "-l", "en", "-n", 2, "--max-tokens", 8, "--quiet"]
    plain = run(*arguments, "-o", tmp_path / "a")
    assert "GB at the peak: weights" in plain.output, plain.output
    assert "activations of 2 x 8 tokens" in plain.output, plain.output
    again = run(*arguments, "--recompute", "-o", tmp_path / "b")
    assert again.exit_code == 0, again.output
    first, second = (lt.load(tmp_path / name / "gradients") for name in "ab")
    assert (first["en"] == second["en"]).all()
