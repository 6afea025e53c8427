"""Commands under torchrun: one voice, one text, one end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from mxperts.cli import app, processes


def torchrun(n: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=600)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is one of two processes that torchrun started."""
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_two_processes_generate_the_text_of_one(checkpoint: Path, runner: CliRunner) -> None:
    arguments = ["generate", str(checkpoint), "--scheme", "w4a4", "-p", "Now is", "-n", "6"]
    one = runner.invoke(app, arguments)
    two = torchrun(2, "-m", "mxperts", *arguments)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout == one.stdout != ""
    assert two.stderr.count("6 tokens in") == 1


FAILING = """
import importlib, os, sys
from mxperts.cli import main
from mxperts.errors import MxpertsError
generate = importlib.import_module("mxperts.cli.generate")
proceed = generate.continue_text
def continue_text(*args, **kwargs):
    if os.environ["RANK"] == "1":
        raise MxpertsError("only here")
    return proceed(*args, **kwargs)
generate.continue_text = continue_text
main()
"""


def test_an_error_in_one_process_ends_all(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = torchrun(2, str(script), "generate", str(checkpoint), "--scheme", "w4a4", "-p", "Now is", "-n", "6")
    assert done.returncode == 1
    assert "process 1 of 2: error: only here" in done.stderr
    assert "tokens in" not in done.stderr


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "."], "`mxperts inspect` runs in one process"),
        (["bench", "layer"], "`mxperts bench layer` runs in one process"),
        (["generate"], "is needed under torchrun"),
        (["generate", "-p", "x", "--device", "meta"], "each process takes a device of its own"),
    ],
)
def test_what_processes_cannot_share_is_refused(
    arguments: list[str], message: str, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    result = runner.invoke(app, arguments)
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # as job schedulers set it
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (processes.count(), processes.number(), processes.distributed_config()) == (1, 0, None)


@pytest.mark.usefixtures("second_of_two")
def test_only_the_first_process_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    with processes.together():
        print("result")
        processes.complain("error: alike in all")
    print("after")
    assert capfd.readouterr() == ("after\n", "")


@pytest.mark.usefixtures("second_of_two")
def test_an_error_of_one_process_is_said_by_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.os, "_exit", lambda code: sys.exit(code + 40))

    def fail() -> None:
        with processes.together():
            processes.complain("error: out of memory")
            sys.exit(1)

    with pytest.raises(SystemExit) as end:
        fail()
    assert end.value.code == 41  # at once: no group is taken leave of
    assert "process 1 of 2: error: out of memory" in capfd.readouterr().err


def test_all_processes_choose_from_the_same_numbers() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        scores = torch.randn(2, 7).T
        assert torch.equal(processes.SameLogits()(torch.zeros(7, 1), scores), scores)
    finally:
        dist.destroy_process_group()
