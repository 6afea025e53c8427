"""``mxperts doctor``: what is installed, what this machine can do, and whether the numbers are right here."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
import typer

import mxperts as mx
from mxperts import models
from mxperts.cli.options import OutputOption
from mxperts.cli.output import Table, show
from mxperts.errors import BackendUnavailable, IntegrationError, MxpertsError
from mxperts.evaluation.environment import OPTIONAL_PACKAGES, environment, versions
from mxperts.ops.dispatch import BACKENDS

# fmt: off
GOLDEN_VALUES = [
    # Values of E2M1 are themselves; the largest, 6, makes the scale 2^0.
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.0,
    # Ties go to the even code: 0.25 → 0, 0.75 and 1.25 → 1, 1.75 and 2.5 → 2, 3.5 and 5 → 4; others to the nearest.
    0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0, 0.26, 0.74, 2.51, 3.49, 4.99, 5.01,
]
# fmt: on
"""A block of MXFP4 in which every value of E2M1 and every tie occurs."""
GOLDEN_CODES = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0, 0, 2, 2, 4, 4, 6, 6, 0, 10, 14, 1, 1, 5, 5, 6, 7]
"""Its codes as a weight, derived by hand; -0.25 rounds to zero, which has no sign in a weight."""
GOLDEN_SCALE = 127


def doctor(output: OutputOption = None) -> None:
    """Show versions, processor, accelerators and backends, and check the numbers of every backend bit by bit."""
    from mxperts.backend.cpu import jit, paths  # takes a second, which `mxperts --help` need not wait for

    found = environment()
    checks = dict(self_checks())
    folder = jit.cache_folder()
    document: dict[str, Any] = {
        **found,
        "optional": versions(OPTIONAL_PACKAGES),
        "cpu_features": sorted(paths.cpu_features()),
        "memory_bytes": memory_bytes(),
        "shipped_model": shipped_model(),
        "kernel_cache": None if folder is None else str(folder),
        "backends": {device: backends(device) for device in ("cpu", "cuda")},
        "self_check": checks,
        "hooks": hooks(),
    }
    rows = list(table_rows(document))
    show(
        Table(header=["item", "value"], rows=rows, left=2),
        records=[{"item": item, "value": value} for item, value in rows],
        document=document,
        output=output,
    )
    if any(result != "ok" for result in checks.values() if not result.startswith("unavailable")):
        raise typer.Exit(1)


def self_checks() -> Iterator[tuple[str, str]]:
    """By backend and device, whether its numbers are right."""
    for backend, device in itertools.product(BACKENDS, devices()):
        if backend.device not in (None, device):
            continue
        try:
            wrong = [*wrong_codes(backend.name, device), *wrong_results(backend.name, device)]
        except BackendUnavailable as error:
            yield f"{backend.name} on {device}", f"unavailable: {error}"
            continue
        yield f"{backend.name} on {device}", f"WRONG: {'; '.join(wrong)}" if wrong else "ok"


def wrong_codes(backend: str, device: str) -> Iterator[str]:
    """What is wrong where a backend quantises the golden block and gives its values back."""
    x = torch.tensor(GOLDEN_VALUES, device=device)
    quantized = mx.quantize(x, mx.MXFP4, backend=backend)
    values = mx.dequantize(quantized, torch.float32, backend=backend).tolist()
    codes, scales = quantized.codes().tolist(), quantized.scales.tolist()
    if (codes, scales) != (GOLDEN_CODES, [GOLDEN_SCALE]):
        yield f"codes {codes}, scale {scales}"
    if values != [mx.MXFP4.element.values[code] for code in GOLDEN_CODES]:
        yield f"values {values}"


def wrong_results(backend: str, device: str) -> Iterator[str]:
    """What is wrong where a backend runs a layer of 0.5s and -0.5s, its weights as they are and prepared.

    Of 32 inputs of 1 every gate is 16 and every up row 16, or -16 in the second expert. ``relu2`` makes 16^3 of them,
    and half of that, 32 times, is 2^16. Nothing is rounded.
    """
    gate_up, down = torch.full((2, 64, 32), 0.5, device=device), torch.full((2, 32, 32), 0.5, device=device)
    gate_up[1, 32:] = -0.5
    first, second = (mx.quantize(w, mx.MXFP4, backend=backend) for w in (gate_up, down))
    x = torch.ones(3, 32, dtype=torch.bfloat16, device=device)
    index = torch.tensor([[0, 1], [1, 0], [0, -1]], device=device)
    routing = torch.tensor([[1.0, 0.5], [1.0, 0.25], [0.5, 1.0]], device=device)
    expected = torch.tensor([0.5, -0.75, 0.5])[:, None].expand(3, 32) * 2**16

    def wrong(how: str, weights: Any, down: mx.MXTensor | None) -> Iterator[str]:
        y = mx.fused_experts(x, weights, down, index, routing, activation="relu2", backend=backend).float().cpu()
        if not torch.equal(y, expected):
            yield f"{how}layer {y.tolist()}"

    yield from wrong("", first, second)
    yield from wrong("prepared ", mx.prepare(first, second, backend=backend), None)


def hooks() -> dict[str, Any]:
    """By program that mxperts plugs into: where its hooks are, and what each of them replaces."""
    from mxperts.integrations.transformers.loading import hooks_of_install  # takes seconds
    from mxperts.integrations.vllm import plugin

    try:
        in_vllm = plugin.state()
    except IntegrationError as error:
        in_vllm = f"none: {error}"
    on = () if in_vllm.startswith("none") else plugin.HOOKS
    found = {
        "transformers": ("in processes that call mxperts.install()", hooks_of_install()),
        "vllm": (in_vllm, on),
    }
    return {
        program: {
            "where": where,
            "hooks": [{"replaced": h.replaced, "by": h.by, "why": h.why} for h in hooks],
        }
        for program, (where, hooks) in found.items()
    }


def memory_bytes() -> int | None:
    """Physical memory; None where the operating system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shipped_model() -> str:
    """Folder of the model that comes with mxperts, or why there is none."""
    try:
        return str(models.shipped())
    except MxpertsError as error:
        return f"missing: {error}"


def backends(device: str) -> dict[str, str]:
    """What the backends for a type of device are, or why they cannot run; without such a device, only its own."""
    found = mx.backends(device)
    there = device in devices()
    return {b.name: found[b.name] for b in BACKENDS if b.device == device or (there and b.device is None)}


def devices() -> list[str]:
    """Where tensors can be."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def table_rows(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The document as lines for people."""
    for name, version in document["versions"].items():
        yield name, version or "not installed"
    for name, version in document["optional"].items():
        if name != "python":
            yield f"{name} (optional)", version or "not installed"
    yield "platform", document["platform"]
    yield "processor", document["processor"]
    simd = [f for f in document["cpu_features"] if f.startswith(("avx", "amx", "neon", "sve"))]
    yield "vector features", " ".join(simd) or "none"
    memory = document["memory_bytes"]
    yield "memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"
    yield "threads", str(document["threads"])
    yield "accelerators", ", ".join(document["accelerators"]) or "none"
    yield "shipped model", document["shipped_model"]
    cache = document["kernel_cache"]
    yield "compiled CPU kernels", cache or "not kept: the user's cache folder cannot be written"
    for device, backends in document["backends"].items():
        for name, summary in backends.items():
            yield f"backend {name} on {device}", summary
    for name, result in document["self_check"].items():
        yield f"self-check {name}", result
    for program, found in document["hooks"].items():
        yield f"hooks in {program}", found["where"]
        for hook in found["hooks"]:
            yield f"hook in {program}: {hook['replaced']}", f"{hook['by']}: {hook['why']}"
