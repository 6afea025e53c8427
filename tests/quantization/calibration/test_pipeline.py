"""Quantising layer by layer: what methods are given is what the finished model reads; interrupted runs go on."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxperts as mx
from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.names import SPELLINGS, split_expert
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.integrations.transformers import is_experts
from mxperts.integrations.transformers.linear import StoredLinear
from mxperts.quantization import quantize_checkpoint
from mxperts.quantization.calibration import Calibration
from mxperts.quantization.calibration.text import windows
from mxperts.quantization.leaves import leaves
from mxperts.rotation import rotate_input, rotate_weight

_spec = importlib.util.spec_from_file_location("calibration_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_conftest)
Recorder = _conftest.Recorder

FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
FAMILIES = ("qwen3_moe_2l", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def rtn(problem: Any) -> mx.MXTensor:
    return mx.quantize(problem.weight, problem.format, preset=problem.preset, scale_rule=problem.scale_rule)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_nearest_is_the_same_as_without_text(tmp_path: Path, family: str, calibration: Calibration) -> None:
    source = FIXTURES / f"bf16-{family}"
    options: dict[str, Any] = {"exclude": ["lm_head"]}
    quantize_checkpoint(source, tmp_path / "text", "w4a4", method=rtn, calibration=calibration, **options)
    quantize_checkpoint(source, tmp_path / "plain", "w4a4", **options)
    ours, plain = Checkpoint.open(tmp_path / "text"), Checkpoint.open(tmp_path / "plain")
    assert ours.config == plain.config
    assert set(ours.names) == set(plain.names)
    for name in plain.names:
        assert torch.equal(ours.tensor(name).view(torch.uint8), plain.tensor(name).view(torch.uint8)), name


class Seen:
    """Every input of a loaded model's quantised layers, over the whole text, by the module's name."""

    def __init__(self, model: nn.Module, ids: Tensor, step: int) -> None:
        self.linears: dict[str, list[Tensor]] = {}
        self.experts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.modules = dict(model.named_modules())
        for name, module in self.modules.items():
            if isinstance(module, StoredLinear):
                module.register_forward_pre_hook(
                    lambda m, args, name=name: self.linears.setdefault(name, []).append(args[0].flatten(0, -2))
                )
            elif is_experts(module):
                module.register_forward_pre_hook(
                    lambda m, args, name=name: self.experts.setdefault(name, []).append(args)
                )
        with torch.no_grad():
            for part in ids.split(step):
                model(part, use_cache=False)

    def routed(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """Inputs of an expert and how much each counts."""
        rows, shares = [], []
        for x, index, weights in self.experts[name]:
            token, slot = torch.nonzero(index == expert, as_tuple=True)
            rows.append(x[token])
            shares.append(weights[token, slot].float())
        return torch.cat(rows), torch.cat(shares)


def expected_moments(x: Tensor, share: Tensor | None, scheme: mx.Scheme, rotation: str | None) -> tuple[Tensor, Tensor]:
    """x̂ᵀx̂ and xᵀx̂ in float64, by definition."""
    assert isinstance(scheme.activation, mx.BlockFormat)
    dtype = x.dtype
    x = x if rotation is None else rotate_input(x)
    read = mx.fake_quantize(x, scheme.activation).to(dtype).double()
    weights = torch.ones(len(x)).double() if share is None else share.double().square()
    total = weights.sum()
    return (read.T * weights) @ read / total, (x.double().T * weights) @ read / total


@pytest.mark.parametrize(
    ("family", "rotation"), [*((family, None) for family in FAMILIES), ("qwen3_moe_2l", "hadamard32")]
)
def test_inputs_are_those_of_the_finished_model(
    tmp_path: Path, family: str, rotation: str | None, calibration: Calibration
) -> None:
    source, scheme = FIXTURES / f"bf16-{family}", mx.Scheme("w_mxfp4_a_mxfp6_e2m3")
    recorder = Recorder()
    summary = quantize_checkpoint(
        source, tmp_path / "dst", scheme, method=recorder, calibration=calibration, exclude=[], rotation=rotation
    )
    model: Any = mx.load(tmp_path / "dst", backend="reference").eval()
    seen = Seen(model, windows(calibration, source, model.config), step=2)
    checkpoint, result = Checkpoint.open(source), Checkpoint.open(tmp_path / "dst")
    checked = 0
    for group in leaves(checkpoint, result.scheme.names).values():
        for leaf in group:
            if leaf.module not in result.mx or leaf.part != ".weight":
                continue
            weight = leaf.view(checkpoint.tensor(leaf.source.name))
            given = recorder.inputs_of(weight if rotation is None else rotate_weight(weight))
            expert = split_expert(leaf.module)
            share = None
            if expert is None:
                x = torch.cat(seen.linears[leaf.module])
            else:
                path = expert[0].replace("block_sparse_moe", "mlp")
                x, share = seen.routed(path, expert[1])
                if expert[2] in SPELLINGS["down_proj"]:
                    x = between(result, seen.modules[path], expert, x, scheme, rotation)
            if given is None:
                assert 4 * len(x) < leaf.shape[1]
                assert leaf.module in summary.few_inputs
                continue
            moment, cross = expected_moments(x, share, scheme, rotation)
            assert given.rows <= len(x)
            torch.testing.assert_close(given.moment.double(), moment, rtol=1e-4, atol=1e-6 * moment.abs().max().item())
            torch.testing.assert_close(given.cross.double(), cross, rtol=1e-4, atol=1e-6 * cross.abs().max().item())
            turned = x.float() if rotation is None else rotate_input(x)
            assert torch.equal(given.amax, turned.abs().amax(0))
            checked += 1
    assert checked >= summary.modules - len(summary.few_inputs) > 0
    assert "lm_head" in result.mx
    assert "lm_head" not in summary.few_inputs


def between(
    result: Checkpoint, module: Any, expert: tuple[str, int, str], x: Tensor, scheme: mx.Scheme, rotation: str | None
) -> Tensor:
    """What the second projection of an expert reads when the first is quantised."""
    parts = []
    for group in (SPELLINGS["gate_proj"], SPELLINGS["up_proj"], SPELLINGS["gate_up_proj"]):
        for name in group:
            leaf = f"{expert[0]}.{expert[1]}.{name}"
            if leaf in result.mx:
                bias = result.tensor(f"{leaf}.bias") if f"{leaf}.bias" in result.tensors else None
                parts.append(
                    mx.mx_linear(
                        x,
                        result.mx_tensor(leaf),
                        bias,
                        activation=scheme.activation,
                        rotation=rotation,
                        backend="reference",
                    )
                )
    return module.mxperts.gate.apply(torch.cat(parts, -1), interleaved=not module.is_concatenated)  # type: ignore[no-any-return]


class Interruption(Exception):
    pass


@pytest.mark.parametrize("family", ["qwen3_moe_2l", "deepseek_v3"])
def test_an_interrupted_run_goes_on(tmp_path: Path, family: str, calibration: Calibration) -> None:
    source = FIXTURES / f"bf16-{family}"
    options: dict[str, Any] = {"exclude": ["lm_head"], "calibration": calibration}
    whole = Recorder()
    quantize_checkpoint(source, tmp_path / "whole", "w4a4", method=whole, **options)
    calls = len(whole.problems)
    for at in (1, calls // 2 + 1, calls - 1):

        def interrupt(number: int, at: int = at) -> None:
            if number == at:
                raise Interruption

        dst = tmp_path / f"dst{at}"
        with pytest.raises(Interruption):
            quantize_checkpoint(source, dst, "w4a4", method=Recorder(interrupt), **options)
        assert not dst.exists()
        again = Recorder()
        summary = quantize_checkpoint(source, dst, "w4a4", method=again, **options)
        assert folder_bytes(dst) == folder_bytes(tmp_path / "whole")
        assert summary.resumed == (at > calls // 2)
        assert len(again.problems) == calls if summary.resumed == 0 else len(again.problems) < calls
        assert not list(tmp_path.glob("*.partial"))


def test_few_inputs_survive_an_interruption(tmp_path: Path, calibration: Calibration) -> None:
    source = FIXTURES / "bf16-qwen3_moe_2l"
    few = Calibration(text=calibration.text, tokens=8, backend="reference")
    recorder = Recorder()
    whole = quantize_checkpoint(source, tmp_path / "whole", "w4a4", method=recorder, calibration=few)
    assert whole.few_inputs
    assert any("layers.0" in name for name in whole.few_inputs)

    def interrupt(number: int) -> None:
        if number == len(recorder.problems) - 1:
            raise Interruption

    with pytest.raises(Interruption):
        quantize_checkpoint(source, tmp_path / "dst", "w4a4", method=Recorder(interrupt), calibration=few)
    again = quantize_checkpoint(source, tmp_path / "dst", "w4a4", method=Recorder(), calibration=few)
    assert set(again.few_inputs) == set(whole.few_inputs)


def test_another_text_or_method_is_another_run(tmp_path: Path, calibration: Calibration) -> None:
    source = FIXTURES / "bf16-qwen3_moe_2l"

    def interrupt(number: int) -> None:
        raise Interruption

    with pytest.raises(Interruption):
        quantize_checkpoint(
            source, tmp_path / "dst", method=Recorder(interrupt), scheme="w4a4", calibration=calibration
        )
    other = Calibration(text=calibration.text, tokens=64, backend="reference")
    with pytest.raises(CheckpointError, match="begun with another calibration text"):
        quantize_checkpoint(source, tmp_path / "dst", method=Recorder(), scheme="w4a4", calibration=other)
    with pytest.raises(CheckpointError, match="begun with another method"):
        quantize_checkpoint(source, tmp_path / "dst", method=rtn, scheme="w4a4", calibration=calibration)


def test_lost_hidden_states_are_told(tmp_path: Path, calibration: Calibration) -> None:
    source = FIXTURES / "bf16-qwen3_moe_2l"
    calls = 4

    def interrupt(number: int) -> None:
        if number == calls - 1:
            raise Interruption

    with pytest.raises(Interruption):
        quantize_checkpoint(
            source, tmp_path / "dst", method=Recorder(interrupt), scheme="w4a4", calibration=calibration
        )
    shutil.rmtree(tmp_path / "dst.partial" / "calibration")
    with pytest.raises(CheckpointError, match="has lost what enters layer 0; delete the folder"):
        quantize_checkpoint(source, tmp_path / "dst", method=Recorder(), scheme="w4a4", calibration=calibration)


def test_a_dry_run_reads_the_text_and_writes_nothing(tmp_path: Path, calibration: Calibration) -> None:
    recorder = Recorder()
    source = FIXTURES / "bf16-qwen3_moe_2l"
    summary = quantize_checkpoint(
        source, tmp_path / "dst", "w4a4", method=recorder, calibration=calibration, dry_run=True
    )
    assert summary.modules == 24
    assert not recorder.problems
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.json"]


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="needs a text"):
        quantize_checkpoint(FIXTURES / "bf16-mixtral", tmp_path / "dst", "w4a4", calibration=Calibration())
