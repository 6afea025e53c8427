from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from mxperts.checkpoint import Checkpoint
from mxperts.cli.progress import Progress
from mxperts.cli.quantize import quantize

SOURCE = Path(__file__).parent.parent / "fixtures" / "checkpoints" / "bf16-qwen3_moe"

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(quantize)


def test_quantizes_and_reports(runner: CliRunner, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    result = runner.invoke(
        app, [str(SOURCE), str(dst), "--scheme", "w4a4", "--preset", "quark", "--scale-rule", "even"]
    )
    assert result.exit_code == 0, result.output
    assert len(Checkpoint.open(dst).mx) == 12
    assert "| experts |     0.049 |    0.013 |   3.76x |" in result.stdout
    assert "w_mxfp4_a_mxfp4: 12 layers quantised" in result.stdout


def test_exclude_and_layer(runner: CliRunner, tmp_path: Path) -> None:
    options = ["--exclude", "lm_head", "--exclude", "*self_attn*", "--layer", "*experts.1.*=mxfp6_e2m3"]
    result = runner.invoke(app, [str(SOURCE), str(tmp_path / "dst"), "--scheme", "mxfp4", *options, "-o", "json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert "model.layers.0.self_attn.q_proj" in document["excluded"]
    schemes = {str(m.scheme) for m in Checkpoint.open(tmp_path / "dst").mx.values()}
    assert schemes == {"w_mxfp4_a_mxfp4", "w_mxfp6_e2m3_a_mxfp6_e2m3"}


def test_other_layouts(runner: CliRunner, tmp_path: Path) -> None:
    source = SOURCE.with_name("bf16-gpt_oss")
    options = ["--format", "gpt-oss", "--scheme", "w4a16", "-o", "json"]
    result = runner.invoke(app, [str(source), str(tmp_path / "dst"), *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == "gpt-oss"
    assert "model.layers.0.mlp.experts.down_proj_blocks" in Checkpoint.open(tmp_path / "dst").names


def test_dry_run_writes_nothing(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(app, [str(SOURCE), str(tmp_path / "dst"), "--dry-run", "--output", "csv"])
    assert result.exit_code == 0, result.output
    (experts, *_) = csv.DictReader(io.StringIO(result.stdout))
    assert experts == {"kind": "experts", "bytes_before": "49152", "bytes_after": "13056"}
    assert list(tmp_path.iterdir()) == []


def test_says_that_it_goes_on(runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Progress, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "__call__", interrupt)
        result = runner.invoke(app, [str(SOURCE), str(tmp_path / "dst")])
    assert result.exit_code != 0
    assert "the same command goes on from" in result.stderr
    result = runner.invoke(app, [str(SOURCE), str(tmp_path / "dst")])
    assert result.exit_code == 0, result.output
    assert "going on from" in result.stderr


def test_usage_errors(runner: CliRunner, tmp_path: Path) -> None:
    for arguments in ([], [str(SOURCE), "dst", "--layer", "mxfp4"]):
        assert runner.invoke(app, arguments).exit_code == 2


def test_a_source_that_is_not_there(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(app, [str(tmp_path / "nothing"), str(tmp_path / "dst")])
    assert result.exit_code == 1
    assert "is no folder" in str(result.exception) + result.stderr


TWO_LAYERS = SOURCE.with_name("bf16-qwen3_moe_2l")


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """512 token ids."""
    (tmp_path / "ids.json").write_text(json.dumps([(i * i + 7 * i) % 31 for i in range(512)]))
    return tmp_path / "ids.json"


def test_calibrates(runner: CliRunner, tmp_path: Path, ids: Path) -> None:
    options = ["--scheme", "w4a4", "--method", "gptq", "--text", str(ids), "--context", "64", "--tokens", "256"]
    result = runner.invoke(app, [str(TWO_LAYERS), str(tmp_path / "dst"), *options, "--backend", "reference"])
    assert result.exit_code == 0, result.output
    assert "w_mxfp4_a_mxfp4: 24 layers quantised" in result.stdout
    runner.invoke(app, [str(TWO_LAYERS), str(tmp_path / "plain"), "--scheme", "w4a4"])
    ours, plain = Checkpoint.open(tmp_path / "dst"), Checkpoint.open(tmp_path / "plain")
    assert ours.config == plain.config
    assert any(not torch.equal(t.packed, plain.mx_tensor(name).packed) for name, t in ours.mx_tensors())


def test_layers_with_few_inputs_are_named(runner: CliRunner, tmp_path: Path, ids: Path) -> None:
    options = ["--method", "gptq", "--text", str(ids), "--context", "8", "--tokens", "8", "--backend", "reference"]
    result = runner.invoke(app, [str(TWO_LAYERS), str(tmp_path / "dst"), *options])
    assert result.exit_code == 0, result.output
    assert "layers had too few inputs in the text and were quantised without: model.layers.0.mlp." in result.stdout
    result = runner.invoke(app, [str(TWO_LAYERS), str(tmp_path / "again"), *options, "-o", "json"])
    assert json.loads(result.stdout)["few_inputs"]


def test_a_recipe_and_what_wins(runner: CliRunner, tmp_path: Path, ids: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'scheme = "w4a4"\nmethod = "gptq"\ntext = "ids.json"\ncontext = 64\nseed = 1\nbits = 5.5\nsmooth = true\n'
        '[[layer]]\npattern = "*layers.0*"\nmethod = "rtn"\n'
    )
    options = ["--recipe", str(tmp_path / "recipe.toml"), "--scheme", "w4a6", "--backend", "reference", "-o", "json"]
    result = runner.invoke(app, [str(TWO_LAYERS), str(tmp_path / "dst"), *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scheme"] == "w_mxfp4_a_mxfp6_e2m3"
    schemes = {str(m.scheme) for m in Checkpoint.open(tmp_path / "dst").mx.values()}
    assert schemes == {"w_mxfp4_a_mxfp6_e2m3", "w_mxfp6_e2m3_a_mxfp6_e2m3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "needs a text"),
        (["--bits", "5"], "needs a text"),
        (["--smooth"], "needs a text"),
        (["--method", "gtpq"], "did you mean gptq"),
        (["--seed", "1"], "seed: nothing is calibrated; name a text, or a method that needs one"),
        (["--method", "gptq", "--text", "nothing.txt"], "cannot read the calibration text"),
        (["--recipe", "nothing.toml"], "cannot read the recipe"),
        (["--bits", "5", "--dry-run"], "dry run"),
    ],
)
def test_what_cannot_be_calibrated(runner: CliRunner, tmp_path: Path, options: list[str], message: str) -> None:
    result = runner.invoke(app, [str(SOURCE), str(tmp_path / "dst"), *options])
    assert result.exit_code == 1
    assert message in str(result.exception) + result.stderr
    assert list(tmp_path.iterdir()) == []
