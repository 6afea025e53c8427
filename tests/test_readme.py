"""The README's Python examples run word for word, and its tables say what the code says."""

import re
from pathlib import Path

import pytest

from mxperts.formats import BLOCK_FORMATS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_python_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_format_table(fmt):
    element = fmt.element
    cells = [f"`{fmt.name}`", element.name, element.exponent_bits, element.mantissa_bits, element.bias]
    cells += [f"±{element.max:g}", f"{element.smallest:g}", f"{fmt.bits_per_value:g}"]
    assert "| " + " | ".join(map(str, cells)) + " |" in README
