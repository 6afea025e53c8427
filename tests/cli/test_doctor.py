import itertools
import json

import torch

import mxperts as mx
from mxperts.cli import app, doctor


def test_everything_is_shown(runner):
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stdout
    for expected in ("torch", "processor", "threads", "backend reference on cpu", "self-check reference on cpu"):
        assert expected in result.stdout


def test_json(runner):
    document = json.loads(runner.invoke(app, ["doctor", "--output", "json"]).stdout)
    assert document["self_check"]["reference on cpu"] == "ok"
    assert document["versions"]["torch"] == torch.__version__


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
