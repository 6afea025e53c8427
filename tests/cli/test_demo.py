import json

from mxperts import models
from mxperts.cli import app, demo
from mxperts.formats import Scheme


def test_demo_writes_everything(runner, checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "shipped", lambda: checkpoint)
    monkeypatch.setattr(models, "heldout", lambda: text_file)
    monkeypatch.setattr(demo, "ALL", (Scheme("w_mxfp4"), Scheme("w_mxfp4_a_mxfp4")))
    monkeypatch.setattr(demo, "PROMPT", "Now is")
    result = runner.invoke(app, ["demo", "--dir", str(tmp_path / "demo"), "--new-tokens", "8"])
    assert result.exit_code == 0, result.stderr
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {
        "checkpoints",
        "kl.png",
        "table.csv",
        "table.json",
        "table.md",
    }
    table = (tmp_path / "demo" / "table.md").read_text(encoding="utf-8")
    assert result.stdout.startswith(table)
    for sample in ("unquantised", "w_mxfp4", "w_mxfp4_a_mxfp4"):
        assert f"### {sample}\n" in result.stdout
    rows = json.loads((tmp_path / "demo" / "table.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["name"] == "unquantised"
    assert (tmp_path / "demo" / "checkpoints" / "w_mxfp4" / "config.json").exists()
