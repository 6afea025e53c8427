"""The main kernels compile for GPUs that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxperts.backend.gpu import gptq, grouped, routing
from mxperts.backend.gpu.rule import block_rule, element_rule
from mxperts.formats import MXFP4, MXFP6_E2M3, Role, recipe
from mxperts.ops.activation import bind_activation

backend, arch, warp = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdecimal() else arch, int(warp))
SHARED = 1024 * (64 if backend == "hip" else 99)  # of gfx942; of sm_86 and sm_89, the least of NVIDIA's
POINTERS = {"packed_ptr": "*u8", "scales_ptr": "*u8"}
POINTERS |= dict.fromkeys(("input_scale_ptr", "router_ptr", "y_ptr"), "*fp32")
POINTERS |= dict.fromkeys(("target_ptr", "factor_ptr", "hessian_ptr", "values_ptr", "errors_ptr"), "*fp32")
POINTERS |= dict.fromkeys(("exponents_ptr", "chosen_ptr"), "*i64")
FLOATS = ("x_ptr", "a_ptr", "out_ptr", "bias_ptr")


def build(kernel, float_type, warps=4, **constants):
    signature = {}
    for p in kernel.params:
        if p.is_constexpr:
            signature[p.name] = "constexpr"
        elif p.name in FLOATS:
            signature[p.name] = "*" + float_type
        elif p.name.endswith("_ptr"):
            signature[p.name] = POINTERS.get(p.name, "*i32")
        else:
            signature[p.name] = "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params) if p.name.endswith("_ptr")}
    assert set(constants) == {p.name for p in kernel.params if p.is_constexpr}
    done = compile(ASTSource(kernel, signature, constants, aligned), target=target, options={"num_warps": warps})
    assert done.metadata.shared <= SHARED, done.metadata.shared


mxfp4, mxfp6 = element_rule(MXFP4), element_rule(MXFP6_E2M3)
rule = block_rule(MXFP4, recipe(MXFP4, Role.ACTIVATION))
first = {"K": 2880, "COLUMNS": 2880, "ROWS_OF_X": 4, "INTERLEAVED": True, "HAS_BIAS": True, "SCALE_STEP": 0}
second = {"K": 2880, "COLUMNS": 2880, "HAS_BIAS": True, "GROUPED": True}
bf16 = {"DTYPE": tl.bfloat16, "HIDDEN_DTYPE": tl.bfloat16}
tiles = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}
few = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}
build(
    grouped.gate_up, "bf16", 8, **first, **bf16, **tiles,
    ELEMENT=mxfp4, ACTIVATION=bind_activation("swigluoai"), ROTATED=False, RULE=None, STATIC=False,
)
for rotated in (False, True):
    build(
        grouped.gate_up, "bf16", **first, **bf16, **few,
        ELEMENT=mxfp6, ACTIVATION=bind_activation("silu"), ROTATED=rotated, RULE=rule, STATIC=False,
    )
build(grouped.project, "bf16", **second, **few, ELEMENT=mxfp4, DTYPE=tl.bfloat16)
build(grouped.project, "fp32", **second, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, ELEMENT=mxfp6, DTYPE=tl.float32)
build(grouped.sum_slots, "bf16", COLUMNS=2880, SLOTS=4, WEIGHTED=True, IN_PLACE=True, BLOCK_N=1024)
build(grouped.sum_slots, "bf16", COLUMNS=2880, SLOTS=4, WEIGHTED=True, IN_PLACE=False, BLOCK_N=1024)
build(routing.place_pairs, "bf16", MAPPED=True, TILE=128)
build(routing.place_blocks, "bf16", BLOCK_M=16, TILE=128)
for kernel, candidates in ((gptq._round_block, 4), (gptq._descend, 2)):
    build(kernel, "fp32", gptq.WARPS, RULE=rule, CANDIDATES=candidates, ROWS=gptq.ROWS)
"""


@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "hip gfx942 64"])
def test_main_kernels_compile(target: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *target.split()],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
