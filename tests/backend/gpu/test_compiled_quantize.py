"""What the kernels that quantise are compiled to, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from mxperts.backend.gpu.rule import block_rule
from mxperts.formats import Recipe, ScaleRule, Rounding, SignedZero, NonFinite, format

quantize = importlib.import_module("mxperts.backend.gpu.quantize")
backend, arch, lanes = json.loads(sys.argv[1])
target = GPUTarget(backend, arch, lanes)
everything = Recipe(
    scale_rule=ScaleRule.RCEIL, rounding=Rounding.HALF_AWAY, signed_zero=SignedZero.DROP, nan=NonFinite.SATURATE
)
POINTERS = {"x_ptr": "*bf16", "out_ptr": "*bf16", "packed_ptr": "*u8", "scales_ptr": "*u8", "scale_ptr": "*fp32"}


def assembly(kernel, **constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return compile(source, target=target, options={"num_warps": quantize.WARPS}).asm


found = {}
for name, recipe, whole in (("mxfp4", Recipe(), True), ("mxfp6_e2m3", everything, False), ("mxint8", everything, True)):
    rule = block_rule(format(name), recipe)
    blocks = {"WHOLE": whole, "COUNT": quantize.blocks_per_program(1 << 20, 2)}
    found["quantize " + name] = assembly(quantize._quantize, RULE=rule, PIECES=quantize.PIECES, **blocks)
    found["dequantize " + name] = assembly(quantize._dequantize, ELEMENT=rule.element, **blocks)
    found["fake_quantize " + name] = assembly(quantize._fake_quantize, RULE=rule, ROTATED=False, **blocks)
    found["fake_quantize rotated " + name] = assembly(quantize._fake_quantize, RULE=rule, ROTATED=True, **blocks)
found["fp8_static"] = assembly(quantize._fake_quantize_fp8_static, COUNT=4096, ROTATED=False)
dynamic = {"ROWS": 1, "COLUMNS": 4096, "CHUNKS": 2}
found["fp8_dynamic"] = assembly(quantize._fake_quantize_fp8_dynamic, ROTATED=False, **dynamic)
found["fp8_dynamic rotated"] = assembly(quantize._fake_quantize_fp8_dynamic, ROTATED=True, **dynamic)
print(json.dumps({k: asm["ptx" if backend == "cuda" else "amdgcn"] for k, asm in found.items()}))
"""


def compiled(cache: Path, *target: object) -> dict[str, str]:
    """The assembly of every kernel; in a process of its own, where Triton does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, json.dumps(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def has_backend(name: str) -> bool:
    return (Path(pytest.importorskip("triton").__file__).parent / "backends" / name).is_dir()


@pytest.mark.skipif(not has_backend("nvidia"), reason="this Triton has no NVIDIA backend")
@pytest.mark.parametrize("capability", [80, 90])
def test_nvidia(capability: int, tmp_path: Path) -> None:
    """No kernel flushes subnormal numbers; where blocks lie one after the other, memory is read 16 bytes a thread."""
    found = compiled(tmp_path, "cuda", capability, 32)
    assert [name for name, ptx in found.items() if ".ftz" in ptx] == []
    wide = ["quantize mxfp4", "fake_quantize mxfp4", "quantize mxint8", "fake_quantize mxint8"]
    assert [name for name in wide if "ld.global.v4" not in found[name]] == []
    assert [name for name in wide if name.startswith("fake") and "st.global.v4" not in found[name]] == []


@pytest.mark.skipif(not has_backend("amd"), reason="this Triton has no AMD backend")
def test_amd(tmp_path: Path) -> None:
    """No kernel flushes subnormal numbers."""
    found = compiled(tmp_path, "hip", "gfx942", 64)
    keeps = [".amdhsa_float_denorm_mode_32 3", ".amdhsa_float_denorm_mode_16_64 3"]
    assert [name for name, asm in found.items() if not all(mode in asm for mode in keeps)] == []
