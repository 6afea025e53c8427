from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mxperts.checkpoint import Checkpoint
from mxperts.cli.progress import Progress
from mxperts.cli.quantize import quantize
from mxperts.errors import ArgumentError

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


def test_rotation(runner: CliRunner, tmp_path: Path) -> None:
    arguments = [str(SOURCE), str(tmp_path / "dst"), "--scheme", "w4a4", "--rotate"]
    result = runner.invoke(app, [*arguments, "hadamard32", "-o", "json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["format"], document["rotation"]) == ("mxperts", "hadamard32")
    scheme = Checkpoint.open(tmp_path / "dst").scheme
    assert scheme is not None
    assert scheme.rotation == "hadamard32"
    again = runner.invoke(app, [*arguments[:1], str(tmp_path / "again"), *arguments[2:], "hadamard32"])
    assert "w_mxfp4_a_mxfp4, rotated by hadamard32: 12 layers quantised" in again.stdout
    wrong = runner.invoke(app, [*arguments[:1], str(tmp_path / "wrong"), *arguments[2:], "hadamard"])
    assert isinstance(wrong.exception, ArgumentError)


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
