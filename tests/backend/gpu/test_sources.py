"""The CUDA sources and how they are launched, without a GPU."""

from __future__ import annotations

import ctypes
import itertools
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mxperts.backend.gpu.cuda import compiler, folded, grouped, single
from mxperts.backend.gpu.cuda.layout import Tiles
from mxperts.backend.gpu.cuda.macros import (
    FUNCTIONS,
    function_macros,
    hidden_macros,
    quantised,
    result_macros,
    weight_macros,
)
from mxperts.errors import BackendUnavailable, MxpertsError
from mxperts.formats import (
    BLOCK_FORMATS,
    FP8_DYNAMIC,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    Activation,
    BlockFormat,
)
from mxperts.ops.activation import ACTIVATIONS
from mxperts.ops.prepare import ExpertsLayout

needs_compiler = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))
GROUPED = {"MOST_N": "64", "STEP_N": "8", "LEAST_N": "8", "UNITS": "8", "WGMMA": "0", "FOLDED": "0"}
LAUNCH = {
    "single": {"WARPS1": "8", "DEEP1": "1", "WARPS2": "16", "DEEP2": "2"},
    "sort": {**GROUPED, "SEGMENTS": "32", "EXPERTS": "64", "CLUSTER": "1"},
    "inputs": {**GROUPED, "SECOND": "0"},
    "narrow": {**GROUPED, "SHARE": "1", "CHUNK": "16", "DEPTH": "4", "BLOCKS": "1", "EXACT": "0"},
    "wide": {**GROUPED, "STAGES": "4"},
    "combine": GROUPED,
}
ACTIVATION_FORMATS = (None, *BLOCK_FORMATS, "fp8_static", "fp8_dynamic")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@needs_compiler
@pytest.mark.parametrize("source", LAUNCH)
@pytest.mark.parametrize("i", range(9))
def test_every_choice_compiles(source: str, i: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight format, activation format, function and dtype once at least, for the oldest and the newest."""
    monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path)
    activation = ACTIVATION_FORMATS[i]
    macros = {
        **weight_macros(BLOCK_FORMATS[i % 6]),
        **hidden_macros(DTYPES[i % 3], activation).macros(),
        **result_macros(DTYPES[(i + i % 2) % 3]),
        **quantised(activation),
        **function_macros(list(ACTIVATIONS)[i], i % 2 == 0),
        **LAUNCH[source],
    }
    capabilities = ((8, 0), (9, 0)) if source != "wide" else ((9, 0),)
    for capability in capabilities:
        if source == "inputs":
            macros.update(SECOND=str(i % 2), WGMMA=str(i // 2 % 2))
        if source == "wide" and i % 2:
            macros.update(UNITS="16", MOST_N="48")
        elif source == "wide":
            macros.update(STEP_N="16", LEAST_N="64")
        if source == "narrow":
            macros.update(SHARE=str(2 ** (i % 3)), UNITS=str(8 >> i % 3), EXACT=str(i // 3 % 2))
        code = compiler.machine_code(source, macros, capability)
        assert code[:4] == b"\x7fELF"
    assert len(list(tmp_path.iterdir())) == len(capabilities)
    monkeypatch.setattr(compiler, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert compiler.machine_code(source, macros, (9, 0)) == code


@needs_compiler
@pytest.mark.parametrize(
    ("weight", "activation"), [(MXFP4, MXFP4), (MXFP6_E2M3, FP8_DYNAMIC), (MXFP6_E3M2, MXFP6_E3M2)]
)
def test_products_in_fp8_compile(weight: BlockFormat, activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels that the launcher asks for, as it asks for them."""
    compiled: list[str] = []

    class Compiled:
        def __init__(self, source: str, macros: dict[str, str], device: int, **options: Any) -> None:
            assert compiler.machine_code(source, macros, (9, 0))[:4] == b"\x7fELF"
            compiled.append(source)

    for module in (folded, grouped):
        monkeypatch.setattr(module, "Kernel", Compiled)
    monkeypatch.setattr(folded, "device_of", lambda index: grouped.Device(132, 232448, 233472, True))
    layout = ExpertsLayout(weight=weight, experts=8, hidden=128, intermediate=96, gated=True, interleaved=False)
    folded._kernels.__wrapped__(layout, torch.bfloat16, activation, "silu", 32, 0)
    assert compiled == ["sort", "fold", "fold", "folded", "wide", "combine"]


@needs_compiler
@pytest.mark.parametrize(("module", "source"), [(single, "single"), (grouped, "narrow")])
def test_kernels_and_launchers_agree_about_arguments(
    module: ModuleType, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = module.Arguments
    fields = [name for base in reversed(structure.__mro__) for name, *_ in vars(base).get("_fields_", ())]
    constants = {"limit", "alpha", "beta", "linear_beta"}
    checks = [
        f"static_assert(__INTADDR__(&((Args*)0)->{'constants.' * (name in constants)}{name})"
        f" == {getattr(structure, name).offset});"
        for name in fields
    ]
    checks.append(f"static_assert(sizeof(Args) == {ctypes.sizeof(structure)});")
    texts = dict(compiler._texts(source))
    texts[f"{source}.cu"] += "\n" + "\n".join(checks)
    monkeypatch.setattr(compiler, "_texts", lambda name: texts)
    monkeypatch.setattr(compiler, "cache_folder", lambda: None)
    macros = {
        **weight_macros(MXFP4),
        **hidden_macros(torch.bfloat16, None).macros(),
        **result_macros(torch.bfloat16),
        **quantised(None),
        **function_macros("silu", False),
        **LAUNCH[source],
    }
    compiler.machine_code(source, macros, (8, 0))
    assert len(checks) > 30


@needs_compiler
def test_what_does_not_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cache_folder", lambda: None)
    with pytest.raises(MxpertsError, match=r"single.cu does not compile for --gpu-architecture=sm_80"):
        compiler.machine_code("single", {}, (8, 0))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "why_not", lambda: "there is none")
    with pytest.raises(BackendUnavailable, match="there is none"):
        compiler.machine_code("single", {}, (8, 0))


def test_sources_travel_with_the_package() -> None:
    names = {file.name for file in resources.files("mxperts.backend.gpu.cuda").iterdir()}
    headers = {f"{name}.cuh" for name in ("common", "grouped", "overlap", "product", "weights", "wgmma")}
    assert headers | {f"{source}.cu" for source in LAUNCH} <= names


def test_functions_have_numbers() -> None:
    assert {name.removesuffix("_no_mul") for name in ACTIVATIONS} == set(FUNCTIONS)


def test_tiles_have_room_for_any_spread() -> None:
    assert grouped.most_tiles(1000, 10, 128) >= 10 + (1000 - 10) // 128
    assert grouped.most_tiles(3, 128, 128) == 3
    for pairs, experts in ((1, 1), (128, 1), (129, 1), (5000, 7)):
        uneven = [pairs - (experts - 1)] + [1] * (experts - 1)
        assert grouped.most_tiles(pairs, experts, 128) >= sum(-(-n // 128) for n in uneven)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_stages_fit(fmt: BlockFormat) -> None:
    shared = 227 << 10
    slice_bytes = Tiles(format=fmt, rows=32, k=64).slice_bytes
    for planes, each in itertools.product((1, 2, 3), (1, 20, 50, 128, 1000)):
        number, size = grouped.stages(grouped.wide(each, planes), slice_bytes, planes, shared)
        assert size <= shared
        assert number >= 2
