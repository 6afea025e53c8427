"""The CUDA sources and how they are launched, without a GPU."""

from __future__ import annotations

import ctypes
import itertools
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mxperts.backend.gpu.cuda import compiler, decode, grouped, single
from mxperts.backend.gpu.cuda.layout import Tiles
from mxperts.backend.gpu.cuda.macros import FUNCTIONS, function_macros, hidden_macros, quantised, weight_macros
from mxperts.errors import BackendUnavailable, MxpertsError
from mxperts.formats import BLOCK_FORMATS, MXFP4, BlockFormat
from mxperts.ops.activation import ACTIVATIONS

needs_compiler = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))
GROUPED = {"MOST_N": "64", "WGMMA": "0"}
LAUNCH = {
    "decode": {"PAIRS": "64", "EXPERTS": "64", "ALL_WARPS": "24", "DEPTH": "4"},
    "single": {"SLOTS": "8", "WARPS1": "8", "DEEP1": "1", "WARPS2": "16", "DEEP2": "2"},
    "sort": {**GROUPED, "SEGMENTS": "32", "EXPERTS": "64"},
    "inputs": {**GROUPED, "SECOND": "0"},
    "grouped": {**GROUPED, "STAGES": "4"},
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
        **quantised(activation),
        **function_macros(list(ACTIVATIONS)[i], i % 2 == 0),
        **LAUNCH[source],
    }
    for capability in ((8, 0), (9, 0)):
        if "WGMMA" in macros:
            macros["WGMMA"] = str(int(capability == (9, 0)))
        if source == "inputs":
            macros["SECOND"] = str(i % 2)
        code = compiler.machine_code(source, macros, capability)
        assert code[:4] == b"\x7fELF"
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(compiler, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert compiler.machine_code(source, macros, (9, 0)) == code


@needs_compiler
@pytest.mark.parametrize("module", [decode, single, grouped])
def test_kernels_and_launchers_agree_about_arguments(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    source = module.__name__.rpartition(".")[2]
    structure = module._Arguments
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
        **quantised(None),
        **function_macros("silu", False),
        **LAUNCH[source],
    }
    compiler.machine_code(source, macros, (8, 0))
    assert len(checks) > 30


@needs_compiler
def test_what_does_not_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cache_folder", lambda: None)
    with pytest.raises(MxpertsError, match=r"decode.cu does not compile for --gpu-architecture=sm_80"):
        compiler.machine_code("decode", {}, (8, 0))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "why_not", lambda: "there is none")
    with pytest.raises(BackendUnavailable, match="there is none"):
        compiler.machine_code("decode", {}, (8, 0))


def test_sources_travel_with_the_package() -> None:
    names = {file.name for file in resources.files("mxperts.backend.gpu.cuda").iterdir()}
    assert {"common.cuh", "grouped.cuh", "wgmma.cuh", *(f"{source}.cu" for source in LAUNCH)} <= names


def test_functions_have_numbers() -> None:
    assert {name.removesuffix("_no_mul") for name in ACTIVATIONS} == set(FUNCTIONS)


def test_items_fill_the_grid() -> None:
    """No split leaves more than a third of the warps without work, unless there is too little of it."""
    for units, steps in itertools.product((4, 90, 720, 5220, 20000), (1, 12, 45, 224)):
        n, workers = decode.parts(units, steps, 132 * 24), 132 * 24
        assert 1 <= n <= min(steps, decode.MOST_PARTS)
        items = units * n
        if steps >= decode.MOST_PARTS and items > workers:
            assert items / (-(-items // workers) * workers) > 2 / 3


def test_groups_are_as_many_as_pairs_or_experts() -> None:
    assert decode.expected_groups(1, 128) == 1
    assert decode.expected_groups(4, 128) == 4
    assert decode.expected_groups(512, 8) == 64
    assert 100 < decode.expected_groups(256, 128) < 128
    assert decode.expected_groups(8, 1) == 1


def test_a_warp_has_several_slices_at_a_time_where_it_has_few() -> None:
    few, many = Tiles(format=MXFP4, rows=2048, k=768), Tiles(format=MXFP4, rows=2880, k=2880)
    assert single.choose(8, few).deep2 == 2
    assert single.choose(4, many).deep2 == 1


def test_tiles_have_room_for_any_spread() -> None:
    assert grouped.most_tiles(1000, 10, 128) >= 10 + (1000 - 10) // 128
    assert grouped.most_tiles(3, 128, 128) == 3
    for pairs, experts in ((1, 1), (128, 1), (129, 1), (5000, 7)):
        uneven = [pairs - (experts - 1)] + [1] * (experts - 1)
        assert grouped.most_tiles(pairs, experts, 128) >= sum(-(-n // 128) for n in uneven)


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_stages_fit(fmt: BlockFormat, shared: int) -> None:
    slice_bytes = Tiles(format=fmt, rows=32, k=64).slice_bytes
    for planes in (1, 2, 3):
        number, size = grouped.stages(slice_bytes, planes, grouped.choose_tile(planes), shared)
        assert size <= shared
        assert number >= 2


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_rings_fit_from_the_smallest_multiprocessor_on(fmt: BlockFormat) -> None:
    """99 KiB of shared memory, as compute capability 8.6 and 8.9 have, less what the most pairs and experts take."""
    slice_bytes = Tiles(format=fmt, rows=32, k=64).slice_bytes
    warps, depth = decode.ring(slice_bytes, (99 << 10) - 25 * 512 - 4 * 1024 - 64)
    assert warps >= 8
    assert depth >= 3
    assert decode.ring(slice_bytes, (227 << 10) - 25 * 512 - 4 * 1024 - 64) == (24, 4)
    with pytest.raises(BackendUnavailable, match="too few"):
        decode.ring(slice_bytes, 20 << 10)
