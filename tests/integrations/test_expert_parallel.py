"""Experts spread over processes: the bits are those of one process, and no more bytes travel than are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from expert_parallel_worker import FIXTURES, logits_of, tokens
from transformers.utils import logging

import mxperts as mx
from mxperts.distributed import Wire
from mxperts.errors import BackendUnavailable
from mxperts.formats import Scheme
from mxperts.integrations.transformers import mx_experts, quantizer
from mxperts.quantization import quantize_checkpoint

expert_parallel = pytest.importorskip(
    "mxperts.integrations.transformers.expert_parallel", reason="needs transformers >= 5.23", exc_type=ImportError
)

STORED = {
    "quark-qwen3_moe-mxfp4": "w4a4",
    "quark-gpt_oss-mxfp4": "w4a4",
    "quark-deepseek_v3-mxfp4": "w4a4",
    "quark-qwen3_moe-mxfp4_weight_only": "w4a16",
    "gpt_oss-gpt_oss-mxfp4": "w4a16",
    "quark-qwen3_moe-mxfp4_mxfp6_e2m3": "w4a6",
    "quark-deepseek_v3-mxfp6_e2m3": "w_mxfp6_e2m3_a_mxfp6_e2m3",
    "quark-gpt_oss-mxfp4_fp8": "w_mxfp4_a_fp8",
    "llmcompressor-qwen3_moe-mxfp8": "w8a8",
    "quark-qwen3_moe-mxfp4-attention": "w4a4",
}
"""Exporters' checkpoints, and the scheme of their experts."""
LOADED = [
    *((f"bf16-{family}", scheme) for family in ("gpt_oss", "deepseek_v3") for scheme in ("w4a16", "w4a6", "w8a8")),
    ("bf16-qwen3_moe", "w_mxfp4_a_fp8_dynamic"),
]
"""Unquantised ones, quantised while they load."""
ROTATED = FIXTURES / "bf16-qwen3_moe"
CASES = [*((name, None) for name in STORED), *LOADED]
FOR_FOUR = [
    ("quark-qwen3_moe-mxfp4", None),
    ("gpt_oss-gpt_oss-mxfp4", None),
    ("quark-qwen3_moe-mxfp4_mxfp6_e2m3", None),
    ("bf16-deepseek_v3", "w8a8"),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module", params=[(2, CASES), (4, FOR_FOUR)], ids=["2", "4"])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    """The number of processes, and what the first of them found; gloo joins them."""
    n, cases = request.param
    out = tmp_path_factory.mktemp("spread") / "results.pt"
    quantize_checkpoint(ROTATED, out.parent / "rotated", "w4a4", rotation="hadamard32")
    worker = Path(__file__).with_name("expert_parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run([*command, worker, out, json.dumps(cases)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return n, torch.load(out)


def cases_of(found: Any) -> list[tuple[str, str | None]]:
    return [case for case in found if isinstance(case, tuple)]


def scheme_of(name: str, scheme: str | None) -> Scheme:
    return Scheme(scheme or STORED[name])


def test_logits_are_those_of_one_process(spread: tuple[int, Any]) -> None:
    n, found = spread
    for name, scheme in cases_of(found):
        model: Any = mx.load(FIXTURES / name, **({"scheme": scheme} if scheme else {}))
        case = found[name, scheme]
        assert torch.equal(case["logits"], logits_of(model)), (name, scheme)
        assert torch.equal(case["one token"], logits_of(model, 1)[:, :1]), (name, scheme)
        assert case["experts"] == [m.num_experts // n for _, m in mx_experts(model)]


def test_rotated_rows_travel_as_they_are_and_give_the_same(spread: tuple[int, Any]) -> None:
    _, found = spread
    assert torch.equal(found["rotated"], logits_of(mx.load(ROTATED, scheme="w4a4", rotation="hadamard32")))
    assert not torch.equal(found["rotated"], logits_of(mx.load(ROTATED, scheme="w4a4")))


def test_each_process_has_its_share_of_the_experts_and_no_more(spread: tuple[int, Any]) -> None:
    n, found = spread
    model: Any = mx.load(FIXTURES / "quark-qwen3_moe-mxfp4")
    whole = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert found["quark-qwen3_moe-mxfp4", None]["bytes"] * n == whole


def test_rows_travel_in_the_activation_format(spread: tuple[int, Any]) -> None:
    _, found = spread
    for name, scheme in cases_of(found):
        counted = found[name, scheme]["traffic"]
        hidden = transformers.AutoConfig.from_pretrained(FIXTURES / name).hidden_size
        rows, rest = divmod(counted["stock_inputs"], 2 * hidden)
        assert rest == 0
        assert rows > 0
        activation = scheme_of(name, scheme).activation
        wire = Wire(hidden=hidden, dtype=torch.bfloat16, activation=activation)
        assert counted["inputs"] == rows * wire.row_bytes
        assert counted["outputs"] == 2 * counted["stock_outputs"]  # float32, not rounded
        if str(activation) == "mxfp4":
            assert counted["inputs"] / counted["stock_inputs"] <= 0.28


def test_other_ways_to_ask_for_it(spread: tuple[int, Any]) -> None:
    _, found = spread
    model: Any = mx.load(FIXTURES / "quark-qwen3_moe-mxfp4")
    expected = logits_of(model)
    assert torch.equal(found["fsdp"]["logits"], expected)
    assert found["fsdp"]["traffic"]["exchanges"] > 0
    assert torch.equal(found["install"], expected)
    assert torch.equal(found["with gradients"], expected)
    assert "no autograd formula" in found["backward"]
    assert torch.equal(found["generate"], model.generate(tokens(), max_new_tokens=5, do_sample=False))


def test_a_part_of_a_model_is_not_saved(spread: tuple[int, Any]) -> None:
    assert "load the model in one process to save it" in spread[1]["save"]


def config(n: int, **more: Any) -> transformers.DistributedConfig:
    return transformers.DistributedConfig(tp_size=n, ep_size=n, **{"tp_plan": {}, **more})


@pytest.mark.parametrize(
    ("name", "spread_as", "message"),
    [
        ("quark-qwen3_moe-mxfp4", {"n": 3}, "4 experts cannot be spread evenly over 3 processes"),
        ("llmcompressor-qwen3_moe-mxfp4-attention", {"n": 2, "tp_plan": None}, "cannot be split by tensor parallelism"),
    ],
)
def test_what_cannot_be_spread_is_refused(name: str, spread_as: dict[str, Any], message: str) -> None:
    model: Any = mx.load(FIXTURES / name)
    model.config.distributed_config = config(**spread_as)
    with pytest.raises(mx.ArgumentError, match=message):
        expert_parallel.check(model)


def test_experts_of_several_formats_are_refused() -> None:
    model: Any = mx.load(FIXTURES / "quark-qwen3_moe_2l-mxfp4-mixed_experts")
    model.config.distributed_config = config(2)
    with pytest.raises(mx.ArgumentError, match="its experts differ in format"):
        expert_parallel.check(model)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    dense.save_pretrained(tmp_path)
    with pytest.raises(mx.ArgumentError, match="LlamaForCausalLM has no experts"):
        mx.load(tmp_path, distributed_config=config(2))


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer.transformers, "__version__", "5.22.1")
    with pytest.raises(BackendUnavailable, match=r"several processes needs transformers >= 5\.23, not 5\.22\.1"):
        mx.load(FIXTURES / "quark-qwen3_moe-mxfp4", distributed_config=config(2))


def test_what_the_caller_gave_is_not_changed() -> None:
    given = config(2)
    model_config = transformers.AutoConfig.from_pretrained(FIXTURES / "quark-qwen3_moe-mxfp4")
    completed = expert_parallel.complete(given, model_config)
    assert (given.tp_plan, given.ep_implementation) == ({}, "auto")
    assert set(completed.tp_plan.values()) == {"replicate"}
    assert completed.ep_implementation == "mxperts"
