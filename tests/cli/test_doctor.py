import itertools
import json

import pytest
import torch

import mxperts as mx
from mxperts.backend.cpu import jit
from mxperts.backend.cpu.paths import available
from mxperts.cli import app, doctor
from mxperts.integrations.transformers.loading import TAKEN_OVER
from mxperts.integrations.vllm import plugin


def test_everything_is_shown(runner):
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stdout
    for expected in ("torch", "processor", "threads", "backend reference on cpu", "self-check reference on cpu"):
        assert expected in result.stdout


def test_json(runner):
    document = json.loads(runner.invoke(app, ["doctor", "--output", "json"]).stdout)
    assert document["self_check"]["reference on cpu"] == "ok"
    assert document["self_check"]["cpu on cpu"] == "ok"
    assert f"paths here: {available()};" in document["backends"]["cpu"]["cpu"]
    assert document["versions"]["torch"] == torch.__version__


def test_the_folder_of_compiled_kernels(runner, monkeypatch, tmp_path):
    for folder, shown in ((tmp_path, str(tmp_path)), (None, "not kept")):
        monkeypatch.setattr(jit, "cache_folder", lambda folder=folder: folder)
        assert "| compiled CPU kernels" in (table := runner.invoke(app, ["doctor"]).stdout)
        assert shown in table
        document = json.loads(runner.invoke(app, ["doctor", "-o", "json"]).stdout)
        assert document["kernel_cache"] == (None if folder is None else str(folder))


def test_hooks_are_listed_with_what_they_replace(runner, monkeypatch):
    monkeypatch.setattr(plugin, "state", lambda: "in every process of vllm 0.33.0")
    document = json.loads(runner.invoke(app, ["doctor", "-o", "json"]).stdout)["hooks"]
    assert document["vllm"]["where"] == "in every process of vllm 0.33.0"
    assert [h["replaced"] for h in document["vllm"]["hooks"]] == [h.replaced for h in plugin.HOOKS]
    assert "mxperts.install()" in document["transformers"]["where"]
    assert len(document["transformers"]["hooks"]) == len(TAKEN_OVER)
    table = runner.invoke(app, ["doctor"]).stdout
    for hook in plugin.HOOKS:
        assert f"| hook in vllm: {hook.replaced}" in table
        assert f"{hook.by}: {hook.why}" in table


@pytest.mark.parametrize("switch", ["0", "perhaps"])
def test_without_hooks_it_says_why(runner, monkeypatch, switch):
    monkeypatch.setenv(plugin.SWITCH, switch)
    found = json.loads(runner.invoke(app, ["doctor", "-o", "json"]).stdout)["hooks"]["vllm"]
    assert found["where"].startswith(f"none: {plugin.SWITCH}")
    assert found["hooks"] == []


def test_golden_block_holds_every_value_and_every_tie():
    assert len(doctor.GOLDEN_VALUES) == len(doctor.GOLDEN_CODES) == 32
    magnitudes = mx.MXFP4.element.magnitudes
    assert {abs(v) for v in doctor.GOLDEN_VALUES} >= set(magnitudes)
    assert {abs(v) for v in doctor.GOLDEN_VALUES} >= {(a + b) / 2 for a, b in itertools.pairwise(magnitudes)}


def test_a_wrong_bit_is_found_and_fails(runner, monkeypatch):
    monkeypatch.setattr(doctor, "GOLDEN_SCALE", 128)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_a_wrong_result_is_found_and_fails(runner, monkeypatch):
    run = mx.fused_experts
    monkeypatch.setattr(mx, "fused_experts", lambda *a, **k: run(*a, **k) * (1 + 2**-7))
    result = runner.invoke(app, ["doctor", "-o", "json"])
    assert result.exit_code == 1
    for wrong in json.loads(result.stdout)["self_check"].values():
        assert wrong.startswith("WRONG: layer")
        assert "prepared layer" in wrong
