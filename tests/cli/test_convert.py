from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mxperts.checkpoint import LAYOUTS, Checkpoint, rotated
from mxperts.cli import app as mxperts
from mxperts.cli.convert import convert
from mxperts.cli.options import Layout
from mxperts.cli.progress import Progress

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
SOURCE = FIXTURES / "quark-qwen3_moe-mxfp4"

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(convert)


def test_converts_and_reports(runner: CliRunner, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    result = runner.invoke(app, [str(SOURCE), str(dst), "--format", "compressed-tensors"])
    assert result.exit_code == 0, result.output
    assert len(Checkpoint.open(dst).mx) == 12
    assert "| experts |     0.013 |    0.013 |" in result.stdout
    assert f"quark to compressed-tensors: 12 weights in w_mxfp4_a_mxfp4; written to {dst}, 1 file\n" in result.stdout


def test_dry_run_and_documents(runner: CliRunner, tmp_path: Path) -> None:
    options = [str(SOURCE), str(tmp_path / "dst"), "--format", "compressed-tensors", "--dry-run"]
    result = runner.invoke(app, [*options, "--max-shard-size", "10KB", "-o", "json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["dry_run"], document["files"], document["schemes"]) == (True, 3, {"w_mxfp4_a_mxfp4": 12})
    assert "would be written to" in runner.invoke(app, options).stdout
    (experts, *_) = csv.DictReader(io.StringIO(runner.invoke(app, [*options, "-o", "csv"]).stdout))
    assert experts == {"kind": "experts", "bytes_before": "13056", "bytes_after": "13056"}
    assert list(tmp_path.iterdir()) == []


def test_says_that_it_goes_on(runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Progress, done: int, total: int) -> None:
        raise KeyboardInterrupt

    arguments = [str(SOURCE), str(tmp_path / "dst"), "--format", "compressed-tensors"]
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "__call__", interrupt)
        result = runner.invoke(app, arguments)
    assert result.exit_code != 0
    assert "the same command goes on from" in result.stderr
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "going on from" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--format", "gguf"]])
def test_usage_errors(runner: CliRunner, tmp_path: Path, arguments: list[str]) -> None:
    assert runner.invoke(app, [str(SOURCE), str(tmp_path / "dst"), *arguments]).exit_code == 2


@pytest.mark.parametrize(
    ("source", "format", "says"),
    [
        ("quark-qwen3_moe-mxfp6_e3m2", "compressed-tensors", "no weights in mxfp6_e3m2"),
        ("quark-gpt_oss-mxfp4", "gpt-oss", "no words for activation formats"),
        ("quark-qwen3_moe-mxfp4", "quark", "in the quark layout already"),
        ("bf16-qwen3_moe", "quark", "`mxperts quantize --format quark`"),
        ("no-such-folder", "quark", "is no folder"),
    ],
)
def test_refusals_are_one_message(runner: CliRunner, tmp_path: Path, source: str, format: str, says: str) -> None:
    arguments = ["convert", str(FIXTURES / source), str(tmp_path / "dst"), "--format", format]
    result = runner.invoke(mxperts, arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_formats_are_the_layouts_but_that_of_rotated_weights() -> None:
    assert {layout.value for layout in Layout} == {layout.NAME for layout in LAYOUTS.values()} - {rotated.NAME}
