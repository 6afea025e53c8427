"""Compiled code: kept, found again, never in the way; kernels and threads."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from numba import carray

import mxperts as mx
from mxperts.backend.cpu import jit
from mxperts.backend.cpu.memory import long_pointer

SAID = "mxperts: compiling CPU kernels for this machine, "


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where machine code is kept in this test; nothing has been announced."""
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    jit._announce.cache_clear()
    yield tmp_path
    jit._announce.cache_clear()


def adder(tag: str = "", summand: int = 1) -> Any:
    """A kernel as the next process would have it."""

    @jit.kernel(tag, parallel=False)
    def add(x: int) -> int:
        return x + summand

    return add


def hits(function: Any) -> int:
    """How often compiled code was found."""
    return sum(function.stats.cache_hits.values())


def test_compiled_code_is_found_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mxperts"):
        assert [adder()(1), adder("another", 2)(1)] == [2, 3]
        (said,) = (r.getMessage() for r in caplog.records)
        assert said.startswith(SAID)
        assert said.endswith(f"once (kept in {folder})")
        caplog.clear()
        jit._announce.cache_clear()
        again = adder()
        assert again(1) == 2
        assert hits(again) == 1
        assert not caplog.records


def test_what_one_factory_makes_is_told_apart_by_its_tag(folder: Path) -> None:
    assert [adder("one", 1)(0), adder("two", 2)(0)] == [1, 2]
    found = [adder("one", 1), adder("two", 2)]
    assert [f(0) for f in found] == [1, 2]
    assert [hits(f) for f in found] == [1, 1]


def test_native_functions_are_kept_and_can_be_called_by_address(folder: Path) -> None:
    def make() -> Any:
        @jit.native(2, "store")
        def store(address: int, value: int) -> None:
            carray(long_pointer(address), 1)[0] = value

        return store

    for value in (5, 7):
        store, target = make(), torch.zeros(1, dtype=torch.int64)
        store.ctypes(target.data_ptr(), value)
        assert target.item() == value
        assert store.address
    assert store.cache_hits == 1


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("change", ["empty", "cut", "random", "folder", "gone"])
def test_files_that_cannot_be_read_are_made_again(folder: Path, kind: str, change: str) -> None:
    """The index of a function's code, and the code."""
    assert adder()(1) == 2
    (file,) = folder.glob(f"*.{kind}")
    content = file.read_bytes()
    file.unlink()
    if change == "folder":
        file.mkdir()
    elif change != "gone":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "random": bytes(range(256))}[change])
    again = adder()
    assert again(1) == 2
    assert hits(again) == 0
    if change != "folder":
        after = adder()
        assert after(1) == 2
        assert hits(after) == 1


def test_a_folder_that_can_no_longer_be_written(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    add = adder()
    shutil.rmtree(folder)
    folder.touch()
    with caplog.at_level(logging.WARNING, "mxperts"):
        assert add(1) == 2
    assert "compiled kernels cannot be kept" in caplog.text
    assert add(2) == 3
    folder.unlink()


def test_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "cache_folder", lambda: None)
    assert adder()(1) == 2


def test_where_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder_of(platform: str) -> Path:
        monkeypatch.setattr(sys, "platform", platform)
        return jit._user_cache()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert folder_of("linux") == tmp_path / "xdg"
    assert folder_of("win32") == tmp_path / "local"
    assert folder_of("darwin") == Path.home() / "Library" / "Caches"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA")
    assert folder_of("linux") == Path.home() / ".cache"
    assert folder_of("win32") == Path.home() / "AppData" / "Local"

    monkeypatch.undo()
    monkeypatch.setattr(jit, "_user_cache", lambda: tmp_path)
    assert jit.cache_folder.__wrapped__() == tmp_path / "mxperts" / "cpu" / jit.source_stamp()
    (tmp_path / "file").touch()
    monkeypatch.setattr(jit, "_user_cache", lambda: tmp_path / "file")
    assert jit.cache_folder.__wrapped__() is None


# Threads


def layers(count: int) -> list[Callable[[], torch.Tensor]]:
    """Calls that differ in shape, format and number of tokens."""
    made = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        fmt = ("mxfp4", "mxfp6_e2m3")[i % 2]
        gate_up = mx.quantize(torch.randn(4, 64 + 32 * i, 40, generator=g), fmt)
        down = mx.quantize(torch.randn(4, 40, 32 + 16 * i, generator=g), fmt)
        x, ids = torch.randn(3 + 20 * i, 40, generator=g).bfloat16(), torch.randint(4, (3 + 20 * i, 2), generator=g)
        arguments = (x, gate_up, down, ids, torch.rand(len(x), 2, generator=g))
        made.append(lambda arguments=arguments: mx.fused_experts(*arguments, activation_format="mxfp4", backend="cpu"))
    return made


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_of_several_threads_at_once(threads: int) -> None:
    calls, before = layers(4), torch.get_num_threads()
    expected = [call() for call in calls]
    wrong: list[int] = []
    together = Barrier(len(calls))

    def work(i: int) -> None:
        torch.set_num_threads(threads)
        together.wait()
        for _ in range(25):
            if not torch.equal(calls[i](), expected[i]):
                wrong.append(i)

    workers = [Thread(target=work, args=(i,)) for i in range(len(calls))]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


PROCESS = """
import json, threading, torch
import mxperts as mx
from mxperts.backend.cpu.jit import threading_layer

torch.set_num_threads(THREADS)
g = torch.Generator().manual_seed(0)
w = mx.quantize(torch.randint(-1, 2, (70, 40), generator=g) / 8, "mxfp4", backend="reference")
x = torch.randint(-3, 4, (4, 30, 40), generator=g).bfloat16()
results = [None] * 4

def work(i):
    for _ in range(20):
        results[i] = mx.mx_linear(x[i], w, activation="mxfp4", backend="cpu")

workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
expected = mx.mx_linear(x, w, activation="mxfp4", backend="reference")
same = torch.equal(torch.stack(results), expected) and bool(expected.any())
print(json.dumps({"same": same, "threads": torch.get_num_threads(), "pool": threading_layer()}))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path, in_new_process: Callable[..., Any]) -> None:
    """The first calls of a process, by four threads at once; then the same with Numba's own thread pool."""
    cache, script = tmp_path / "cache", PROCESS.replace("THREADS", "2")
    found, warnings = in_new_process(script, XDG_CACHE_HOME=cache)
    assert (found["same"], found["threads"]) == (True, 2)
    assert len(warnings) == 1
    assert SAID in warnings[0]
    files = sorted(cache.rglob("*"))
    assert any(file.suffix == ".nbc" for file in files)
    found, warnings = in_new_process(
        script, XDG_CACHE_HOME=cache, NUMBA_THREADING_LAYER="workqueue", OMP_NUM_THREADS="3"
    )
    assert found == {"same": True, "threads": 2, "pool": "workqueue"}
    assert not warnings
    assert sorted(cache.rglob("*")) == files
