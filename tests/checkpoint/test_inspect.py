"""What ``inspect_checkpoint`` counts, and what it finds odd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxperts.checkpoint import inspect_checkpoint
from mxperts.checkpoint.inspect import EXPERTS, KINDS, Anomaly

QUARK = "quark-qwen3_moe-mxfp4"
EXPERT = "model.layers.0.mlp.experts.1.up_proj"


def test_sizes(fixtures: Path) -> None:
    before, after = (inspect_checkpoint(fixtures / n) for n in ("bf16-qwen3_moe", QUARK))
    assert (before.layout, after.layout) == (None, "quark")
    assert before.values == after.values
    assert before.values[EXPERTS] == 4 * 3 * 64 * 32
    assert after.bits_per_value(EXPERTS) == 4.25
    assert before.bits_per_value() == 16
    for kind in set(KINDS) - {EXPERTS}:
        assert before.nbytes[kind] == after.nbytes[kind]
    file = fixtures / QUARK / "model.safetensors"
    assert sum(after.nbytes.values()) == sum(t.nbytes for t in load_file(file).values())
    assert after.anomalies is None


def test_input_scales_are_no_values(fixtures: Path) -> None:
    assert (
        inspect_checkpoint(fixtures / "quark-qwen3_moe-mxfp4_fp8").values == inspect_checkpoint(fixtures / QUARK).values
    )


def test_fused_experts_are_experts(fixtures: Path) -> None:
    before, after = (inspect_checkpoint(fixtures / n) for n in ("bf16-gpt_oss", "gpt_oss-gpt_oss-mxfp4"))
    assert before.values == after.values
    assert after.bits_per_value(EXPERTS) == 4.25


def test_groups_by_layer(fixtures: Path) -> None:
    groups = inspect_checkpoint(fixtures / "quark-qwen3_moe_2l-mxfp4-mixed_layers").groups
    found = {(g.modules, g.scheme): (g.layers, g.count) for g in groups}
    up = "model.layers.*.mlp.experts.*.up_proj"
    assert found[up, "w_mxfp4_a_mxfp4"] == ("0", 4)
    assert found[up, "w_mxfp6_e2m3_a_mxfp6_e2m3"] == ("1", 4)
    assert found["model.layers.*.self_attn.q_proj", "bf16"] == ("0-1", 2)
    assert found["lm_head", "bf16"] == ("", 1)


def test_exports_have_nothing_odd(fixtures: Path) -> None:
    for name in (QUARK, "gpt_oss-gpt_oss-mxfp4", "llmcompressor-qwen3_moe-mxfp8"):
        assert inspect_checkpoint(fixtures / name, check=True).anomalies == ()


def odd(name: str, change: Callable[[Tensor], object]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        change(tensors[name])

    return apply


@pytest.mark.parametrize(
    ("fixture", "change", "expected"),
    [
        (
            QUARK,
            odd(f"{EXPERT}.weight_scale", lambda t: t[:3].fill_(255)),
            (EXPERT, "blocks with scale 0xFF, which are NaN", 3),
        ),
        (
            QUARK,
            odd(f"{EXPERT}.weight_scale", lambda t: t[0].fill_(0)),
            (EXPERT, "scales 0x00 of blocks that are not zeros", 1),
        ),
        (QUARK, odd(f"{EXPERT}.weight_scale", lambda t: t[0].fill_(200)), (EXPERT, "scales beyond 2^±64", 1)),
        (QUARK, odd(f"{EXPERT}.weight", lambda t: t[:2].fill_(0)), (EXPERT, "blocks of zeros", 2)),
        (
            QUARK,
            odd("lm_head.weight", lambda t: t[0, :5].fill_(torch.nan)),
            ("lm_head.weight", "values that are NaN", 5),
        ),
        (
            QUARK,
            odd("model.norm.weight", lambda t: t[0].fill_(-torch.inf)),
            ("model.norm.weight", "values that are Inf", 1),
        ),
        (
            "llmcompressor-qwen3_moe-mxfp8",
            odd(f"{EXPERT}.weight", lambda t: t.view(torch.uint8)[0, :2].fill_(0xFF)),
            (EXPERT, "codes that are NaN", 2),
        ),
        (
            "gpt_oss-gpt_oss-mxfp4",
            odd("model.layers.0.mlp.experts.down_proj_scales", lambda t: t[2, 0].fill_(255)),
            ("model.layers.0.mlp.experts.down_proj", "blocks with scale 0xFF, which are NaN", 2),
        ),
    ],
)
def test_anomalies(copy: Callable[[str], Path], fixture: str, change, expected: tuple[str, str, int]) -> None:  # type: ignore[no-untyped-def]
    folder = copy(fixture)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    name, what, count = expected
    assert inspect_checkpoint(folder, check=True).anomalies == (Anomaly(tensor=name, what=what, count=count),)
