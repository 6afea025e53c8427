import csv
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import mxperts
from mxperts.cli import app
from mxperts.quantization import quantize_checkpoint

TEXT = "Now is the winter of our discontent made glorious summer by this sun of York; "


@pytest.fixture
def arguments(checkpoint, text_file):
    return ["eval", str(checkpoint), "--text", str(text_file)]


def test_one_model_has_a_perplexity_and_nothing_to_compare(runner, arguments):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("| scheme ")
    assert "KLD" not in result.stdout


def test_schemes_are_compared_with_the_model_itself(runner, arguments):
    result = runner.invoke(app, [*arguments, "--schemes", "w4a4,w_mxfp4", "--output", "json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["name"] for row in document["rows"]] == ["tiny", "w_mxfp4", "w_mxfp4_a_mxfp4"]
    assert [round(row["expert_bits"], 3) for row in document["rows"]] == [16, 4.25, 4.25]
    assert document["rows"][0]["divergence"] is None
    assert document["conditions"]["tokens"] == 4 * 63
    assert document["conditions"]["versions"]["torch"]
    assert len(document["conditions"]["text_sha256"]) == 64
    assert "[3/3]" in result.stderr


def test_models_are_compared_with_the_first(runner, arguments, checkpoint):
    result = runner.invoke(app, [*arguments[:2], str(checkpoint), *arguments[2:], "--output", "csv"])
    assert result.exit_code == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["kl"] for row in rows] == ["", "0.0"]
    assert rows[1]["router_agreement"] == "1.0"


def test_plot(runner, arguments, tmp_path):
    pytest.importorskip("matplotlib")
    result = runner.invoke(app, [*arguments, "--schemes", "w4a4", "--plot", str(tmp_path / "kl.png")])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "kl.png").exists()


def test_text_is_required_for_other_models(runner, checkpoint):
    result = runner.invoke(app, ["eval", str(checkpoint)])
    assert result.exit_code == 2
    assert "--text" in result.stderr


def test_schemes_take_one_model(runner, arguments, checkpoint):
    result = runner.invoke(app, [*arguments, str(checkpoint), "--schemes", "all"])
    assert result.exit_code == 2
    assert "--schemes" in result.stderr


def test_the_base_can_be_named_apart(runner, arguments, checkpoint, tmp_path):
    quantize_checkpoint(checkpoint, tmp_path / "packed", "w4a4")
    result = runner.invoke(
        app, ["eval", str(tmp_path / "packed"), "--base", *arguments[1:], "--schemes", "w_mxfp8_e4m3", "-o", "json"]
    )
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows] == ["tiny", "w_mxfp8_e4m3", "packed"]
    assert rows[2]["load"].keys() == rows[2]["router_agreement"].keys()
    assert rows[2]["worst"][0]["text"] in TEXT


def test_folders_of_one_name_are_told_apart(runner, arguments, checkpoint, tmp_path):
    paths = [shutil.copytree(checkpoint, tmp_path / letter / "tiny") for letter in "ab"]
    result = runner.invoke(app, ["eval", *map(str, paths), *arguments[2:], "--output", "csv"])
    assert result.exit_code == 0, result.stderr
    assert [row["scheme"] for row in csv.DictReader(io.StringIO(result.stdout))] == [str(path) for path in paths]


def test_report(runner, arguments, tmp_path):
    pytest.importorskip("matplotlib")
    result = runner.invoke(app, [*arguments, "--schemes", "w4a4", "--report", str(tmp_path / "out.html"), "--layers"])
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "w_mxfp4_a_mxfp4" in page
    assert len(list(tmp_path.glob("out-*.png"))) == page.count('<img class="light"') == 5
    assert "out.html, and 5 pictures" in result.stderr
    assert re.search(r"^\| w_mxfp4_a_mxfp4 \| 1 +\| +\d+\.\d\d \| ", result.stdout, re.MULTILINE)
    assert "accumulated, with everything quantised" in result.stdout


def test_layers_as_csv_and_json(runner, arguments):
    result = runner.invoke(app, [*arguments, "--schemes", "w4a4,w_mxfp4", "--layers", "-o", "csv"])
    assert result.exit_code == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0]) == ["scheme", "module", "layer", "part", "own", "accumulated"]
    assert len(rows) == 2 * 2 * 4
    assert [row["scheme"] for row in rows] == ["w_mxfp4"] * 8 + ["w_mxfp4_a_mxfp4"] * 8  # as the scoreboard has them
    assert "[2/2] w_mxfp4: layers, " in result.stderr
    result = runner.invoke(app, [*arguments, "--schemes", "w_mxfp4", "--layers", "-o", "json"])
    document = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (layers,) = document["layers"]
    assert [float(row["own"]) for row in rows[:8]] == [part["own"] for part in layers["parts"]]


def test_the_base_is_run_once(runner, arguments, tmp_path):
    file = tmp_path / "base.safetensors"
    once = [*arguments, "--schemes", "w4a4", "--base-logits", str(file), "-o", "csv"]
    first = runner.invoke(app, [*once, "--base-top-k", "4"])
    assert first.exit_code == 0, first.stderr
    assert f"written: {file}" in first.stderr
    again = runner.invoke(app, once)
    assert again.exit_code == 0, again.stderr
    assert "tiny: not run" in again.stderr
    assert "[1/1]" in again.stderr
    rows = [list(csv.DictReader(io.StringIO(result.stdout))) for result in (first, again)]
    speed = {"seconds", "tokens_per_second"}
    assert [[(k, v) for k, v in row.items() if k not in speed] for row in rows[0]] == [
        [(k, v) for k, v in row.items() if k not in speed] for row in rows[1]
    ]
    for changes, message in (
        (["--max-tokens", "100"], "other tokens: another text, amount of it, or tokenizer"),
        (["--dtype", "float32"], "at dtype bfloat16, not float32"),
        (["--base-top-k", "0"], "holds the 4 most likely tokens, not all"),
    ):
        result = runner.invoke(app, [*once, *changes])
        assert result.exit_code == 1
        assert message in result.stderr
        assert "[1/" not in result.stderr  # before any model is run


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A copy of the checkpoint whose files can be changed."""
    return shutil.copytree(checkpoint, tmp_path / "changed")


def fails_early(runner, arguments: list[str], message: str, monkeypatch) -> None:
    """The command must end in one message before any model is loaded."""
    monkeypatch.setattr("mxperts.cli.compared.load_model", lambda *a, **k: pytest.fail("a model is loaded"))
    result = runner.invoke(app, arguments)
    assert result.exit_code in (1, 2), result.output
    assert not isinstance(result.exception, BaseException) or isinstance(result.exception, SystemExit)
    assert message in re.sub(r"[\s│]+", " ", result.stderr)


def test_another_tokenizer_or_vocabulary_is_refused(runner, arguments, changed, monkeypatch):
    both = [*arguments, "--base", str(changed)]
    tokenizer = json.loads((changed / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["N"], words["o"] = words["o"], words["N"]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    fails_early(runner, both, "the tokenizers of changed and tiny differ: ", monkeypatch)
    config = json.loads((changed / "config.json").read_text(encoding="utf-8"))
    (changed / "config.json").write_text(json.dumps(config | {"vocab_size": 99}), encoding="utf-8")
    fails_early(runner, both, "changed has a vocabulary of 99 tokens but tiny of", monkeypatch)


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(runner, arguments, changed):
    for file in changed.glob("tokenizer*"):
        file.unlink()
    result = runner.invoke(app, [*arguments, str(changed)])
    assert result.exit_code == 0, result.stderr
    assert "changed has no tokenizer; it is taken to have that of tiny" in result.stderr


def test_what_cannot_come_to_an_end_is_refused_early(runner, arguments, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    compared = [*arguments, "--schemes", "w4a4"]
    missing = str(tmp_path / "missing" / "x")
    for options, message in (
        (["--report", missing], "there is no folder"),
        (["--plot", missing], "there is no folder"),
        (["--base-logits", missing], "there is no folder"),
        (["--report", str(tmp_path)], "it is a folder"),
        (["--base-top-k", "5"], "goes with --base-logits only"),
    ):
        fails_early(runner, [*compared, *options], message, monkeypatch)
    fails_early(runner, [*arguments, "--layers"], "compares models with the base", monkeypatch)
    (tmp_path / "short.txt").write_text("N", encoding="utf-8")
    fails_early(runner, [*arguments[:3], str(tmp_path / "short.txt")], "a text of 1 tokens", monkeypatch)
    (tmp_path / "latin.txt").write_bytes("müde".encode("latin-1"))
    fails_early(
        runner, [*arguments[:3], str(tmp_path / "latin.txt")], "not a text in UTF-8: byte 1 is 0xfc", monkeypatch
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails_early(runner, [*compared, "--report", str(tmp_path / "a.html")], "pip install 'mxperts[plot]'", monkeypatch)


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of choices and one of perplexity, and their data."""
    for task, rows, lines in (
        (
            "choices",
            [{"q": "Now is the", "c": ["winter of", "ummer by"], "a": i % 2} for i in range(4)],
            [
                'doc_to_text: "{{q}} "',
                'doc_to_choice: "{{c}}"',
                'doc_to_target: "{{a}}"',
                "metric_list: [{metric: acc}]",
            ],
        ),
        (
            "pages",
            [{"page": TEXT * (1 + i)} for i in range(2)],
            ['doc_to_text: ""', 'doc_to_target: "{{page}}"', "metric_list: [{metric: bits_per_byte}]"],
        ),
    ):
        data = tmp_path / f"{task}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        kind = {"choices": "multiple_choice", "pages": "loglikelihood_rolling"}[task]
        head = [f"task: local_{task}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {data}}}}}"]
        (tmp_path / f"{task}.yaml").write_text("\n".join([*head, f"output_type: {kind}", "test_split: test", *lines]))
    return tmp_path


def test_tasks_of_packed_models_are_what_the_harness_says(runner, checkpoint, tasks, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    arguments = [
        "eval",
        str(checkpoint),
        "--tasks",
        "local_pages,local_ch*",
        "--include-path",
        str(tasks),
        "-o",
        "json",
    ]
    result = runner.invoke(app, [*arguments, "--schemes", "w_mxfp4,w4a4"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["name"] for row in document["rows"]] == ["tiny", "w_mxfp4", "w_mxfp4_a_mxfp4"]
    assert document["conditions"]["tasks"] == ["local_pages", "local_choices"]
    assert document["conditions"]["lm_eval"]

    # People's own scripts: a checkpoint's path is all that the harness gets.
    quantize_checkpoint(checkpoint, tmp_path / "w4a4", "w4a4")
    mxperts.install()
    model = HFLM(pretrained=str(tmp_path / "w4a4"), device="cpu", batch_size=8)
    assert model.model.model.layers[0].mlp.experts.down_proj.dtype == torch.uint8
    manager = TaskManager(include_path=str(tasks))
    found = lm_eval.simple_evaluate(model=model, tasks=["local_pages", "local_choices"], task_manager=manager)[
        "results"
    ]
    scores = {score["task"]: score for score in document["rows"][2]["scores"]}
    assert scores["local_pages"]["value"] == found["local_pages"]["bits_per_byte,none"]
    assert scores["local_choices"]["value"] == found["local_choices"]["acc,none"]
    assert scores["local_choices"]["stderr"] == found["local_choices"]["acc_stderr,none"]
    assert scores["local_choices"]["samples"] == 4
    assert document["rows"][0]["scores"][0]["value"] != scores["local_pages"]["value"]


def test_limit_and_table(runner, checkpoint, tasks):
    pytest.importorskip("lm_eval")
    arguments = ["eval", str(checkpoint), "--tasks", "local_choices", "--include-path", str(tasks), "--limit", "2"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^\| local_choices +\| acc ↑ +\| tiny +\| +0 \| +2 \| +\d\.\d+ ± ", result.stdout, re.MULTILINE)
    assert "[1/1] tiny: local_choices acc " in result.stderr


def test_unknown_tasks_are_told_near_names(runner, checkpoint, tasks):
    pytest.importorskip("lm_eval")
    arguments = ["eval", str(checkpoint), "--include-path", str(tasks), "--tasks"]
    result = runner.invoke(app, [*arguments, "local_choises"])
    assert result.exit_code == 1
    assert "error: lm-eval knows no task 'local_choises': is it local_choices" in result.stderr
    result = runner.invoke(app, [*arguments, "local_choices", "--limit", "1.5"])
    assert "limit must be a whole number of documents or a share between 0 and 1, not 1.5" in result.stderr


def test_a_task_without_data_is_an_error_before_a_model_is_loaded(runner, tasks):
    pytest.importorskip("lm_eval")
    (tasks / "choices.jsonl").unlink()
    result = runner.invoke(app, ["eval", "no/such/model", "--include-path", str(tasks), "--tasks", "local_choices"])
    assert result.exit_code == 1
    assert "error: lm-eval cannot load local_choices: " in result.stderr
    assert "choices.jsonl" in result.stderr


def test_tasks_name_the_extra_that_is_missing(runner, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = runner.invoke(app, ["eval", "--tasks", "hellaswag"])
    assert result.exit_code == 1
    assert "pip install 'mxperts[eval]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(["--tasks", "x", "--stride", "4"], "--stride"), (["--tasks", "x", "--plot", "x.png"], "--plot")]
    + [([option, "2"], option) for option in ("--limit", "--num-fewshot")],
)
def test_options_of_texts_and_tasks_do_not_mix(runner, arguments, option):
    result = runner.invoke(app, ["eval", *arguments])
    assert result.exit_code == 2
    assert option in result.stderr
    assert "--tasks" in result.stderr


def test_into_a_pipe_the_command_prints_markdown_and_progress_apart(command, arguments):
    done = subprocess.run(
        [command, *arguments, "--max-tokens", "100"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    header, rule, *rows = done.stdout.splitlines()
    assert header.startswith("| scheme")
    assert set(rule) <= set("|- :")
    assert len(rows) == 1
    assert "[1/1] tiny: PPL " in done.stderr
