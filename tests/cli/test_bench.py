import csv
import io
import json

import pytest
import torch

from mxperts.benchmark.model import write_random_model
from mxperts.benchmark.roofline import Matmul
from mxperts.cli import app

TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96}
TINY |= {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LAYER = ["bench", "layer", "4,2,64,32", "--tokens", "1,2", "--backends", "reference", "--peers", "bf16"]
LAYER += ["--rounds", "1", "--time-budget", "0.2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("mxperts.benchmark.device.host.Matmul", lambda: Matmul(size=64))
    monkeypatch.setattr("mxperts.benchmark.device.host.last_level_cache", lambda: 1 << 12)


def test_layer_prints_markdown_into_a_pipe(runner):
    result = runner.invoke(app, LAYER)
    assert result.exit_code == 0, result.stderr
    header, _rule, *rows = result.stdout.partition("\n\n")[0].splitlines()
    assert [cell.strip() for cell in header.split("|")[1:6]] == ["shape", "tokens", "scheme", "contender", "ms"]
    contenders = [row.split("|")[4].strip() for row in rows]
    assert contenders == ["dequantise-first", "mxperts reference", "bf16"] * 2
    assert "checking mxperts reference" in result.stderr


def test_layer_as_json(runner):
    result = runner.invoke(app, [*LAYER, "--output", "json", "--schemes", "w6a6"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["conditions"]["threads"] == 1
    assert [row["tokens"] for row in document["rows"]] == [1, 1, 1, 2, 2, 2]
    first = document["rows"][0]
    assert first["contender"] == "dequantise-first"
    assert first["scheme"] == "w_mxfp6_e2m3_a_mxfp6_e2m3"
    assert first["median_ms"] > 0
    assert first["speedup"] == 1.0


def test_layer_as_csv_and_saved(runner, tmp_path):
    file = tmp_path / "rows.jsonl"
    result = runner.invoke(app, [*LAYER, "--output", "csv", "--save", str(file), "--no-baseline"])
    assert result.exit_code == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["contender"] for row in rows] == ["mxperts reference", "bf16"] * 2
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["contender"] for line in saved] == [row["contender"] for row in rows]
    assert float(rows[0]["median_ms"]) == saved[0]["median_ms"]


def test_layer_draws(runner, tmp_path):
    pytest.importorskip("matplotlib")
    result = runner.invoke(app, [*LAYER, "--plot", str(tmp_path / "times.png")])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "times.png").exists()


def test_a_wrong_contender_ends_in_an_error(runner, monkeypatch):
    monkeypatch.setattr("mxperts.benchmark.contenders.dense.Dense.limit", 1e-9)
    result = runner.invoke(app, LAYER)
    assert result.exit_code == 1
    assert "bf16: wrong: relative rms error" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["4,2,64"], "four sizes"),
        (["--schemes", "w_mxfp5"], "unknown scheme"),
        (["--schemes", "none"], "unquantised"),
        (["--peers", "vlm-cpu"], "vllm-cpu"),
        (["--backends", "cpus"], "unknown backend"),
        (["--device", "tpu"], "'cpu' and 'cuda'"),
        (["--device", "cuda:x"], "'cuda:x' is not there"),
        (["--peers", "humming"], "does not run on 'cpu'"),
    ],
)
def test_what_cannot_be_run_is_one_message(runner, arguments, message):
    result = runner.invoke(app, ["bench", "layer", *arguments])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["layer", "model"])
def test_a_missing_device_is_one_message(runner, command):
    result = runner.invoke(app, ["bench", command, "--device", "cuda"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: device 'cuda' is not there")


def test_tokens_are_numbers(runner):
    result = runner.invoke(app, ["bench", "layer", "--tokens", "1,two"])
    assert result.exit_code == 2
    assert "--tokens" in result.stderr


MODEL = ["bench", "model", "--pp", "4", "--tg", "2", "-r", "1", "--time-budget", "0.5", "--backends", "reference"]


def test_model_rows_are_as_in_llama_bench(runner, checkpoint, tmp_path):
    file = tmp_path / "rows.jsonl"
    result = runner.invoke(app, [*MODEL, str(checkpoint), "--scheme", "w4a8", "--save", str(file)])
    assert result.exit_code == 0, result.stderr
    header, _rule, *rows = result.stdout.partition("\n\n")[0].splitlines()
    names = [cell.strip() for cell in header.split("|")[1:-1]]
    found = [dict(zip(names, (cell.strip() for cell in row.split("|")[1:-1]), strict=True)) for row in rows]
    assert [(row["contender"], row["test"]) for row in found][:4] == [
        ("dequantise-first", "pp4"),
        ("dequantise-first", "tg2"),
        ("mxperts reference", "pp4"),
        ("mxperts reference", "tg2"),
    ]
    assert found[0]["model"] == "tiny"
    assert found[0]["scheme"] == "w_mxfp4_a_mxfp8_e4m3"
    assert float(found[2]["tokens/s"].rstrip("*")) > 0
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["test"] for row in saved[:2]] == ["pp4", "tg2"]
    assert saved[0]["conditions"]["versions"]["torch"]


def test_model_as_json_without_baseline(runner, checkpoint, monkeypatch):
    monkeypatch.setattr("mxperts.cli.bench.default_backends", lambda: ["reference"])
    arguments = [*MODEL[:-2], str(checkpoint), "--no-baseline", "--peers", "none", "--output", "json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["contender"] for row in document["rows"]] == ["mxperts reference"] * 2
    assert document["rows"][0]["tokens"] == 4


def test_random_models_are_written_run_and_removed(runner, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written = []

    def write(name, folder, **more):
        written.append((name, folder, more))
        write_random_model(name, folder, **more, **TINY)

    monkeypatch.setattr("mxperts.cli.bench.write_random_model", write)
    result = runner.invoke(app, [*MODEL, "--random", "qwen3-30b-a3b", "--layers", "1", "--no-baseline"])
    assert result.exit_code == 0, result.stderr
    assert "qwen3-30b-a3b, 1 layers" in result.stdout
    assert written[0][2] == {"layers": 1, "scheme": "w_mxfp4", "seed": 0}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--random", "qwen4"], 1, "unknown model 'qwen4'"),
        (["shipped", "--random", "gpt-oss-20b"], 2, "takes the place of a model"),
        (["--pp", "x"], 1, "no number of tokens"),
        (["--peers", "llama.c"], 1, "unknown peer"),
        (["--device", "tpu"], 1, "run on 'cpu' in this version"),
    ],
)
def test_models_that_cannot_be_run_are_one_message(runner, arguments, code, message):
    result = runner.invoke(app, ["bench", "model", *arguments])
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize("command", ["layer", "model"])
def test_help_has_an_example(runner, command):
    result = runner.invoke(app, ["bench", command, "--help"])
    assert result.exit_code == 0
    assert f"Example: mxperts bench {command}" in result.stdout
