"""Golden bytes of ``mxperts verify``: the digests in src/mxperts/verification/golden.sha256.

    pip install ml_dtypes==0.6.0
    PYTHONPATH=src python tests/golden/make/verification.py [--check]

Every answer is computed by ``mxperts.verification.definition`` in exact rational arithmetic; no backend takes part. The
tables of elements are first compared with those of ml_dtypes. A few minutes.
"""

from __future__ import annotations

import argparse
import math
import sys

import ml_dtypes
import numpy as np

from mxperts.formats import BLOCK_FORMATS, PRESETS, ElementFormat
from mxperts.verification.cases import cases
from mxperts.verification.definition import elements, is_inf
from mxperts.verification.golden import DIGESTS, digest, digests

OTHERS = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "INT8": np.int8,
}


def check_elements(element: ElementFormat) -> None:
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    theirs = codes.view(OTHERS[element.name]).astype(np.float64) / (64 if element.name == "INT8" else 1)
    for code, (ours, other) in enumerate(zip(elements(element), theirs, strict=True)):
        same = abs(other) == ours if ours is not None else math.isinf(other) == is_inf(element, code)
        assert same, (element, code, ours, other)
        assert ours is not None or not math.isfinite(other), (element, code, ours, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    check = parser.parse_args().check
    found: dict[str, str] = {}
    answers: dict[object, dict[str, str]] = {}
    for fmt in BLOCK_FORMATS:
        check_elements(fmt.element)
        for case in cases([fmt], list(PRESETS)):
            found |= {name: digest(data) for name, data in case.inputs().items() if name not in found}
            if case.work not in answers:
                answers[case.work] = {part: digest(data) for part, data in case.answer().items()}
            found |= {f"{case.name}.{part}": sha for part, sha in answers[case.work].items()}
        print(f"{fmt}: {len(found)} digests", file=sys.stderr)
    if check:
        assert found == digests(), "golden.sha256 is not what the definition gives"
    else:
        DIGESTS.write_text("".join(f"{sha}  {name}\n" for name, sha in found.items()), encoding="ascii")


if __name__ == "__main__":
    main()
