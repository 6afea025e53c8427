from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mxperts.cli.inspect import inspect
from mxperts.errors import CheckpointError

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"
MIXED = FIXTURES / "quark-qwen3_moe_2l-mxfp4-mixed_layers"

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(inspect)


def test_table(runner: CliRunner) -> None:
    result = runner.invoke(app, [str(MIXED)])
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if "up_proj" in line and "mxfp6" in line)
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells == ["model.layers.*.mlp.experts.*.up_proj", "w_mxfp6_e2m3_a_mxfp6_e2m3", "1", "4", "0.006", "6.250"]
    assert "quark layout, model type qwen3_moe" in result.stdout


def test_documents(runner: CliRunner) -> None:
    document = json.loads(runner.invoke(app, [str(MIXED), "--output", "json"]).stdout)
    assert document["bits_per_value"]["experts"] == 5.25
    assert document["anomalies"] is None
    lines = runner.invoke(app, [str(MIXED), "--output", "csv"]).stdout.splitlines()
    assert lines[0] == "modules,layers,scheme,count,nbytes,values"


def test_deep(runner: CliRunner, tmp_path: Path) -> None:
    assert "Nothing odd" in runner.invoke(app, [str(MIXED), "--deep"]).stdout
    folder = shutil.copytree(MIXED, tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight: 1 values that are NaN" in runner.invoke(app, [str(folder), "--deep"]).stdout


def test_errors(runner: CliRunner, tmp_path: Path) -> None:
    assert runner.invoke(app, [str(tmp_path / "nothing")]).exit_code == 1
    assert isinstance(runner.invoke(app, [str(tmp_path)]).exception, CheckpointError)
