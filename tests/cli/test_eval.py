import csv
import io
import json
import subprocess

import pytest

from mxperts.cli import app


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
