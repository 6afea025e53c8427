"""``mxperts verify`` of a machine and of a checkpoint: tables, exit codes, and options that mean nothing."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mxperts.backend import cpu
from mxperts.cli import app
from mxperts.verification import cases, exact

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
QUARK = str(FIXTURES / "quark-qwen3_moe-mxfp4")
BF16 = str(FIXTURES / "bf16-qwen3_moe")
HERE = ["verify", "--device", "cpu", "--format", "mxfp4", "--preset", "ocp"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only quantising of ties and of tails, and packing."""
    everything = cases.cases

    def is_quick(case: cases.Case) -> bool:
        return isinstance(case, cases.Packing) or (
            isinstance(case, cases.Quantize) and not case.family.name.startswith("every.")
        )

    monkeypatch.setattr(cases, "cases", lambda *a: [c for c in everything(*a) if is_quick(c)])
    monkeypatch.setattr(exact, "cases", cases.cases)


@pytest.mark.usefixtures("few")
def test_a_right_machine(runner: CliRunner) -> None:
    result = runner.invoke(app, [*HERE, "--backend", "all"])
    assert result.exit_code == 0, result.output
    assert (
        "| backend          | format | operation     | presets, or activations | numbers | wrong | first |"
        in result.stdout
    )
    for place in ("cpu on cpu", "reference on cpu"):
        for operation in ("quantize", "fake_quantize", "packing"):
            assert f"| {place:<16} | mxfp4  | {operation:<13} |" in result.stdout
    assert "none of them are wrong" in result.stdout


@pytest.mark.usefixtures("few")
def test_a_wrong_bit_is_in_the_table_and_the_exit_code(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.fake_quantize
    monkeypatch.setattr(cpu, "fake_quantize", lambda x, *a: torch.where(x == 1, 0, right(x, *a)))
    result = runner.invoke(app, [*HERE[:-1], "all"])
    assert result.exit_code == 1
    rows = [line.strip("| ").split("|") for line in result.stdout.splitlines() if "| fake_quantize" in line]
    assert len(rows) == 8  # what is wrong is said of each preset
    assert all(int(row[5]) > 0 and "found 0x00000000 (0)" in row[6] for row in rows)
    passed = next(line for line in result.stdout.splitlines() if "| quantize" in line)
    assert "8 presets" in passed


@pytest.mark.usefixtures("few")
def test_documents(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.quantize

    def wrong(*a: object) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scales = right(*a)
        return packed, scales ^ 1

    monkeypatch.setattr(cpu, "quantize", wrong)
    result = runner.invoke(app, [*HERE, "-o", "json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    by_operation = {check["operation"]: check for check in document["checks"]}
    assert document["wrong"] == by_operation["quantize"]["wrong"] > 0
    assert by_operation["fake_quantize"]["wrong"] == 0
    result = runner.invoke(app, [*HERE, "-o", "csv"])
    records = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [int(r["wrong"]) > 0 for r in records if r["operation"] == "quantize"] == [True]


@pytest.mark.usefixtures("few")
def test_export(runner: CliRunner, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    export = ["verify", "--format", "mxfp4", "--preset", "ocp", "--export", str(folder)]
    assert runner.invoke(app, export).exit_code == 0
    assert (folder / "mxfp4/quantize/ocp/ties.float32.codes").stat().st_size == 9141 * 32
    again = runner.invoke(app, export)
    assert again.exit_code == 1
    assert "exists; name a folder that does not" in again.stderr


def test_unknown_names(runner: CliRunner) -> None:
    for option, message in (("--preset", "unknown preset 'x'"), ("--format", "unknown MX format 'x'")):
        result = runner.invoke(app, ["verify", option, "x"])
        assert result.exit_code == 1
        assert message in result.stderr
    result = runner.invoke(app, ["verify", "--backend", "gpu", "--device", "cpu"])
    assert result.exit_code == 1
    assert "backend 'gpu' cannot run" in result.stderr


def test_a_checkpoint(runner: CliRunner) -> None:
    result = runner.invoke(app, ["verify", QUARK])
    assert result.exit_code == 0, result.output
    assert "36 tensors, 12 quantised weights; 0 errors, 0 warnings, 1 note." in result.stdout


def test_a_checkpoint_and_its_source(runner: CliRunner) -> None:
    result = runner.invoke(app, ["verify", QUARK, "--source", BF16, "-o", "json"])
    assert result.exit_code == 0, result.output
    matches = {match["preset"]: match for match in json.loads(result.stdout)["matches"]}
    assert matches["quark"]["differing"] == 0 < matches["ocp"]["differing"]
    assert runner.invoke(app, ["verify", QUARK, "--source", BF16, "--preset", "quark"]).exit_code == 0
    result = runner.invoke(app, ["verify", QUARK, "--source", BF16, "--preset", "ocp"])
    assert result.exit_code == 1
    assert "| error " in result.stdout


def test_a_damaged_checkpoint(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "| error " in result.stdout
    assert "cannot read" in result.stdout


def test_nothing_found_is_an_empty_csv(runner: CliRunner) -> None:
    result = runner.invoke(app, ["verify", BF16, "-o", "csv"])
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize(
    "options",
    [
        ["--source", BF16],
        [QUARK, "--preset", "quark"],
        [QUARK, "--backend", "cpu"],
        [QUARK, "--source", BF16, "--backend", "all"],
        [QUARK, "--format", "mxfp4"],
        [QUARK, "--export", "x"],
        ["--export", "x", "--backend", "cpu"],
    ],
)
def test_options_that_mean_nothing_are_usage_errors(runner: CliRunner, options: list[str]) -> None:
    result = runner.invoke(app, ["verify", *options])
    assert result.exit_code == 2
    assert "is of no use for" in result.stderr
