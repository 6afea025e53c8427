"""benchmarks/recipes.py: the table it prints, and that it goes on where it was."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recipes.py"


@pytest.fixture(scope="module")
def recipes():
    spec = importlib.util.spec_from_file_location("recipes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recipes"]


def row(group, recipe, kl, seed=0, seconds=4.0):
    return {
        "group": group,
        "recipe": recipe,
        "seed": seed,
        "kl": kl,
        "kl_stderr": 0.001,
        "expert_bits": 4.25,
        "same_top": 0.9,
        "layers": 4,
        "quantize_seconds": seconds,
    }


def test_names_are_unique_and_only_what_reads_no_text_has_one_seed(recipes):
    plan = [(recipe.group, recipe.name, seed) for recipe, seed in recipes.plan(["*"], 3)]
    assert len(plan) == len(set(plan))
    assert ("W4A4", "round to nearest", 1) not in plan
    assert ("W4A4", "Hadamard", 1) not in plan
    assert ("W4A4", "Hadamard, GPTQ", 2) in plan
    assert [seed for *_, seed in plan] == sorted(seed for *_, seed in plan)
    (chosen,) = recipes.plan(["W4A4, Hadamard"], 3)
    assert chosen[0].options == {"rotation": "hadamard32"}


def test_seeds_are_averaged_and_compared_with_rounding_to_nearest(recipes):
    rows = [
        row("W4A16", recipes.RTN, 0.04, seconds=4.0),
        row("W4A16", "GPTQ", 0.01, seed=0, seconds=40.0),
        row("W4A16", "GPTQ", 0.03, seed=1, seconds=20.0),
        row("5 bits, A16", "mixed", 0.01, seconds=8.0),
    ]
    lines = recipes.table(rows).splitlines()
    gptq, mixed = (next(line for line in lines if f"| {name} |" in line) for name in ("GPTQ", "mixed"))
    assert gptq == "| W4A16 | GPTQ | 4.25 | 0.0200 ± 0.0010 | 0.01 to 0.03 | 0.50 | 90.0 | 5.00 s, 5.0x |"
    assert "| 0.25 |" in mixed
    assert "| 2.00 s, 2.0x |" in mixed
    assert "| W4A16 | 0.3 | 0.500 | GPTQ |" in lines
    assert "| mixed formats at 5 bits | 0.4 | 0.250 | mixed |" in lines
    assert not any(line.startswith("| W4A4") for line in lines)  # nothing was measured of it


def test_what_was_measured_is_not_measured_again(recipes, tmp_path, monkeypatch, capsys):
    save = tmp_path / "rows.jsonl"
    arguments = ["recipes.py", "--only", "W4A16, round*", "--max-tokens", "512", "--device", "cpu", "--save", str(save)]
    monkeypatch.setattr(sys, "argv", arguments)
    for expected in ("1 measurements to make, 0 are there", "0 measurements to make, 1 are there"):
        with pytest.raises(SystemExit) as end:
            recipes.main()
        assert end.value.code == 0
        assert expected in capsys.readouterr().err
    (line,) = save.read_text().splitlines()
    found = json.loads(line)
    assert 0 < found["kl"] < 0.1
    assert found["expert_bits"] == 4.25
    assert found["model"] == "shipped"
    assert found["conditions"]["versions"]["torch"]
    for model, there in (("shipped", True), ("larger", False)):
        monkeypatch.setattr(sys, "argv", ["recipes.py", model, "--table", "--save", str(save)])
        with pytest.raises(SystemExit):
            recipes.main()
        assert ("| W4A16 | round to nearest | 4.25 |" in capsys.readouterr().out) == there
