import csv
import io
import json
import re
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
