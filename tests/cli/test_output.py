import csv
import io
import json

from rich.console import Console

from mxperts.cli.output import Output, Table, show, to_csv

TABLE = Table(header=["scheme", "PPL"], rows=[["bf16", "9.25"], ["w_mxfp4", "10.5 ± 0.1"]], note="± is …")
RECORDS = [{"scheme": "bf16", "kl": None}, {"scheme": "w_mxfp4", "kl": 0.1 + 0.2}]


def test_markdown_is_padded_and_right_aligned():
    assert TABLE.markdown() == (
        "| scheme  |        PPL |\n"
        "| ------- | ---------: |\n"
        "| bf16    |       9.25 |\n"
        "| w_mxfp4 | 10.5 ± 0.1 |\n"
        "\n"
        "± is …\n"
    )


def test_narrow_columns_keep_a_valid_rule():
    assert Table(header=["a", "b"], rows=[["1", "2"]]).markdown().splitlines()[1] == "| --- | --: |"


def test_csv_keeps_every_digit():
    rows = list(csv.DictReader(io.StringIO(to_csv(RECORDS))))
    assert rows[0] == {"scheme": "bf16", "kl": ""}
    assert float(rows[1]["kl"]) == 0.1 + 0.2


def test_default_into_a_pipe_is_markdown(capsys):
    show(TABLE, records=RECORDS, document={}, output=None)
    assert capsys.readouterr().out == TABLE.markdown()


def test_default_on_a_terminal_is_a_rich_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(TABLE, records=RECORDS, document={}, output=None)
    printed = capsys.readouterr().out
    assert "|" not in printed
    assert "10.5 ± 0.1" in printed


def test_json_is_the_document(capsys):
    show(TABLE, records=RECORDS, document={"rows": RECORDS}, output=Output.JSON)
    assert json.loads(capsys.readouterr().out) == {"rows": RECORDS}


def test_terminal_table_has_no_colour_under_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    TABLE.show(console)
    assert "\x1b[3" not in console.file.getvalue()
