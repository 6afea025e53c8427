"""The shipped digests: complete, and what the definition gives."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mxperts.errors import ArgumentError
from mxperts.formats import BLOCK_FORMATS, MXFP4, MXFP8_E5M2, PRESETS, all_schemes
from mxperts.verification import golden
from mxperts.verification.cases import Experts, Linear, Packing, cases
from mxperts.verification.numbers import families


def test_every_input_has_its_digest_and_every_pattern_occurs() -> None:
    found = {name for name in golden.digests() if "/inputs/every." in name}
    assert len(found) == 2 * len(BLOCK_FORMATS)
    for fmt in (MXFP4, MXFP8_E5M2):
        for family in families(fmt):
            assert golden.digest(family.patterns) == golden.digests()[f"{fmt}/inputs/{family.name}"]
            if family.name.startswith("every."):
                assert len(set(family.patterns.ravel().tolist())) == 1 << 16


def test_every_preset_and_scheme_has_golden_bytes() -> None:
    names = golden.digests()
    for fmt in BLOCK_FORMATS:
        for preset in PRESETS:
            assert f"{fmt}/quantize/{preset}/every.bfloat16.codes" in names
            assert f"{fmt}/fake_quantize/{preset}/ties.float32.values" in names
    for scheme in all_schemes():
        assert f"{scheme}/mx_linear/bfloat16.values" in names
        assert f"{scheme}/fused_experts/bfloat16.72.values" in names
    assert golden.DIGESTS.stat().st_size < 1 << 20


def test_the_definition_gives_the_golden_bytes() -> None:
    """All of them: `python tests/golden/make/verification.py --check`, minutes."""
    checked = 0
    for case in cases([MXFP4], ["compressed_tensors"]):
        if isinstance(case, Experts | Linear) and case.activation not in ("none", "fp8_dynamic", "mxfp4"):
            continue
        for name, data in (case.inputs() | case.answer_files()).items():
            if name in golden.digests():
                assert golden.digest(data) == golden.digests()[name], name
                checked += 1
    assert checked > 60


def test_raw_files_are_what_their_digests_say(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    golden.write(folder, [c for c in cases([MXFP4], ["ocp"]) if isinstance(c, Packing)], lambda name: None)
    index = json.loads((folder / golden.INDEX).read_text())
    assert index["mxfp4/packing.packed"]["shape"] == [16, 32]
    for line in (folder / golden.DIGESTS.name).read_text().splitlines():
        sha, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha == golden.digests()[name]
    with pytest.raises(ArgumentError, match="exists; name a folder that does not"):
        golden.write(folder, [], lambda name: None)


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        golden.write(tmp_path / "golden", cases([MXFP4], ["ocp"]), interrupt)
    assert list(tmp_path.iterdir()) == []
