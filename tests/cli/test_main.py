import subprocess

import pytest

import mxperts
from mxperts.cli import app, main
from mxperts.errors import FormatError


def test_version(runner):
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"mxperts {mxperts.__version__}\n")


COMMANDS = ["generate", "chat", "serve", "eval", "quantize", "convert", "inspect", "verify", "demo", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(runner, command):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: mxperts {command}" in result.stdout


def test_unknown_options_are_usage_errors(runner):
    result = runner.invoke(app, ["eval", "--no-such-option"])
    assert result.exit_code == 2
    assert "no-such-option" in result.stderr


def test_errors_are_one_message(runner):
    result = runner.invoke(app, ["eval", "--schemes", "w_mxfp5"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown scheme 'w_mxfp5'")
    assert "Traceback" not in result.stderr


def test_debug_shows_where_it_failed(runner):
    result = runner.invoke(app, ["--debug", "eval", "--schemes", "w_mxfp5"])
    assert isinstance(result.exception, FormatError)


def test_interruption_exits_with_130(runner, monkeypatch):
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mxperts.cli.compared.parse", interrupt)
    assert runner.invoke(app, ["eval", "--schemes", "all"]).exit_code == 130


def test_unforeseen_errors_are_one_message_too(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mxperts", "eval", "--schemes", "all"])
    monkeypatch.setattr("mxperts.cli.compared.parse", lambda text: 1 / 0)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith("internal error: ZeroDivisionError: division by zero")


def test_the_installed_command_reports_errors_on_stderr(command):
    arguments = [command, "eval", "no/such/model", "--text", __file__]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: " in done.stderr
    assert "no/such/model" in done.stderr
    assert "Traceback" not in done.stderr
