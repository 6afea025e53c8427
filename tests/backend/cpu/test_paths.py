"""Which instructions run a problem, how they can be forced, and what is said of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mxperts as mx
from mxperts.backend.cpu import paths
from mxperts.backend.cpu.paths import PATHS, careful_path, choose, use_path
from mxperts.formats import Activation, parse_activation

AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx2", "fma")
ZEN4 = (*AVX512, "avx512vnni", "avx512bf16")
ICE_LAKE = (*AVX512, "avx512vnni")
CASCADE_LAKE = tuple(f for f in ICE_LAKE if f != "avx512vbmi")
HASWELL = ("avx2", "fma", "sse2")
OLDER = ("sse2", "avx2")

CpuWith = Callable[..., None]


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch) -> CpuWith:
    """Makes this a CPU with some features."""
    monkeypatch.setattr(paths, "_best", paths._best.__wrapped__)

    def set_features(*features: str) -> None:
        monkeypatch.setattr(paths, "cpu_features", lambda: frozenset(features))

    return set_features


@pytest.mark.parametrize(
    ("features", "weight", "activation", "accumulation", "expected"),
    [
        (ZEN4, "mxfp4", "mxfp4", "auto", "avx512_vnni"),
        (ZEN4, "mxint8", "mxfp6_e2m3", "auto", "avx512_vnni"),
        (ZEN4, "mxfp4", "mxfp4", "exact", "avx512_bf16"),
        (ZEN4, "mxfp4", None, "auto", "avx512_bf16"),
        (ZEN4, "mxfp4", "fp8_static", "auto", "avx512_bf16"),
        (ZEN4, "mxfp6_e3m2", "mxfp4", "auto", "avx512_bf16"),
        (ZEN4, "mxfp4", "mxfp8_e4m3", "auto", "avx512_bf16"),
        (ZEN4, "mxfp8_e5m2", "mxfp8_e5m2", "auto", "avx512_bf16"),
        (ICE_LAKE, "mxfp4", "mxint8", "auto", "avx512_vnni"),
        (ICE_LAKE, "mxfp4", "mxint8", "exact", "avx2"),
        (ICE_LAKE, "mxfp8_e4m3", None, "auto", "avx2"),
        (CASCADE_LAKE, "mxfp4", "mxfp4", "auto", "avx2"),
        (HASWELL, "mxfp4", "mxfp4", "auto", "avx2"),
        (OLDER, "mxfp4", "mxfp4", "auto", "portable"),
        ((), "mxint8", None, "exact", "portable"),
    ],
)
def test_the_best_path_that_can(
    features: tuple[str, ...], weight: str, activation: Activation, accumulation: str, expected: str, cpu_with: CpuWith
) -> None:
    cpu_with(*features)
    assert choose(mx.format(weight), parse_activation(activation), accumulation).name == expected


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("avx512_vnni", "avx512f, avx512bw, avx512vl, avx512vbmi, avx512vnni"),
        ("avx512_bf16", "avx512f, avx512bw, avx512vl, avx512vbmi, avx512bf16"),
        ("avx2", "fma"),
    ],
)
def test_a_path_that_the_cpu_lacks_is_refused(path: str, missing: str, cpu_with: CpuWith) -> None:
    cpu_with(*OLDER)
    with pytest.raises(mx.BackendUnavailable, match=f"^path '{path}': this CPU lacks {missing}$"), use_path(path):
        pass
    assert careful_path().name == "portable"
    assert mx.backends()["cpu"].split("; ")[1] == "paths here: portable"
    with use_path("portable"):
        assert choose(mx.MXFP4, None, "auto").name == "portable"


@pytest.mark.parametrize("path", [p.name for p in PATHS])
def test_every_path_runs_or_says_what_is_missing(path: str) -> None:
    x, w = torch.full((3, 32), 2.0), mx.quantize(torch.full((5, 32), 3.0), "mxfp4")
    (missing,) = (p.missing() for p in PATHS if p.name == path)
    if missing:
        with pytest.raises(mx.BackendUnavailable, match=missing[0]), use_path(path):
            pass
        return
    with use_path(path):
        y = mx.mx_linear(x, w, activation="mxfp4", backend="cpu")
        assert mx.explain("mx_linear", weight="mxfp4", activation="mxfp4").how.startswith(f"path {path}: ")
    assert torch.equal(y, torch.full((3, 5), 192.0))


def test_an_unknown_path() -> None:
    with pytest.raises(mx.ArgumentError, match="unknown path 'avx3'; did you mean avx2"), use_path("avx3"):
        pass


def test_a_forced_path_that_cannot_run_a_problem_is_not_replaced(cpu_with: CpuWith) -> None:
    cpu_with(*ZEN4)
    x, w = torch.ones(3, 32), mx.quantize(torch.ones(5, 32), "mxfp4")
    e3m2 = mx.quantize(torch.ones(5, 32), "mxfp6_e3m2")
    with use_path("avx512_vnni"):
        for activation, what in ((None, "no MX format"), ("fp8_dynamic", "fp8_dynamic"), ("mxfp8_e4m3", "mxfp8_e4m3")):
            message = f"path 'avx512_vnni' cannot run this: inputs in {what} are not 8-bit integers"
            with pytest.raises(mx.BackendUnavailable, match=message):
                mx.mx_linear(x, w, activation=activation, backend="cpu")
        with pytest.raises(mx.BackendUnavailable, match="weights in mxfp6_e3m2 are not 8-bit integers"):
            mx.mx_linear(x, e3m2, activation="mxfp4", backend="cpu")
        with pytest.raises(mx.BackendUnavailable, match="accumulation='exact' asks for float32 throughout"):
            choose(mx.MXFP4, mx.MXFP4, "exact")


def test_forcing_ends_with_the_block_and_holds_for_one_thread(cpu_with: CpuWith) -> None:
    cpu_with(*ZEN4)

    def chosen() -> str:
        return choose(mx.MXFP4, None, "auto").name

    elsewhere: list[str] = []
    with use_path("portable"):
        with use_path("avx2"):
            assert chosen() == "avx2"
        assert chosen() == "portable"
        thread = threading.Thread(target=lambda: elsewhere.append(chosen()))
        thread.start()
        thread.join()
    assert elsewhere == ["avx512_bf16"]
    with pytest.raises(ZeroDivisionError), use_path("portable"):
        raise ZeroDivisionError
    assert chosen() == "avx512_bf16"


def test_a_cpu_that_llvm_does_not_know_has_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise RuntimeError

    monkeypatch.setattr(paths.llvm, "get_host_cpu_features", unknown)
    assert paths.cpu_features.__wrapped__() == frozenset()


def test_what_is_said_of_them(cpu_with: CpuWith) -> None:
    cpu_with(*ZEN4)
    expected = "path avx512_vnni: exact 8-bit integer products, weights decoded by permutes, sums in float32"
    assert mx.explain(weight="mxfp4", activation="mxfp4").how == expected
    assert mx.explain("mx_linear", weight="mxfp8_e4m3").how.startswith("path avx512_bf16: bf16 products")
    assert mx.explain("quantize", weight="mxfp4").how == "exact, in integer arithmetic"
    listed, pool = mx.backends()["cpu"].split("; ")[1:]
    assert listed == "paths here: avx512_vnni, avx512_bf16, avx2, portable"
    assert pool in ("threads by omp", "threads by tbb", "threads by workqueue")
    assert mx.explain().backend.name == "reference"  # dense weights
    assert mx.explain().refused[0] == ("cpu", "its weights are packed; these are dense")


ANY_CPU = """
import json, torch
import mxperts as mx
from mxperts.backend.cpu.paths import use_path

g = torch.Generator().manual_seed(0)
gate_up = mx.quantize(torch.randint(-1, 2, (3, 80, 40), generator=g) / 8, "mxfp4", backend="reference")
down = mx.quantize(torch.randint(-1, 2, (3, 40, 40), generator=g) / 8, "mxfp4", backend="reference")
x, ids = torch.randint(-3, 4, (9, 40), generator=g).bfloat16(), torch.randint(3, (9, 2), generator=g)

def layer(backend, fmt):
    weights = torch.ones(9, 2)
    return mx.fused_experts(
        x, gate_up, down, ids, weights, activation="relu2", activation_format=fmt, backend=backend
    )

same = []
with use_path("portable"):
    for fmt in (None, "mxfp4"):
        expected = layer("reference", fmt)
        same.append(bool(expected.any()) and torch.equal(layer("cpu", fmt), expected))
print(json.dumps([mx.explain(weight="mxfp4").how, same]))
"""


def test_any_cpu_without_a_cache_folder(tmp_path: Path, in_new_process: Callable[..., Any]) -> None:
    """Code for no CPU in particular; where nothing can be kept, there is one warning and everything works."""
    no_folder = tmp_path / "file"
    no_folder.touch()
    (how, same), warnings = in_new_process(
        ANY_CPU, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", XDG_CACHE_HOME=no_folder
    )
    assert same == [True, True]
    assert len(warnings) == 1
    assert warnings[0].endswith("(not kept: the user's cache folder cannot be written)")
    assert how.startswith("path portable: ")
