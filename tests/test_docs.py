"""The pages in docs/: their tables are what the code says, and the tests they name exist."""

import math
import re
from pathlib import Path

import pytest

from mxperts.backend.cpu.decode import Integers
from mxperts.backend.cpu.paths import PATHS
from mxperts.checkpoint import LAYOUTS, Rule
from mxperts.formats import BLOCK_FORMATS, FP8_ACTIVATIONS, MXFP4, PRESETS, BlockFormat, Encoding, Recipe, Role, Scheme

ROOT = Path(__file__).parents[1]
PAGES = (
    *("formats.md", "numerics.md", "cpu.md", "gpu.md", "serving.md", "evaluation.md", "quantization.md", "verify.md"),
)


def read(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def number(v: float) -> str:
    """A short exact name: a decimal number or a power of two."""
    mantissa, exponent = math.frexp(v)
    return f"2^{exponent - 1}" if abs(mantissa) == 0.5 and abs(exponent) > 4 else f"{v:.10g}"


def codes(found: list[int]) -> str:
    return ", ".join(f"0x{c:02X}" for c in found) or "none"


def format_row(fmt: BlockFormat) -> list[str]:
    element = fmt.element
    integer = element.encoding is Encoding.TWOS_COMPLEMENT
    bits = "two's complement / 64" if integer else f"1.{element.exponent_bits}.{element.mantissa_bits}"
    return [
        f"`{fmt.name}`",
        element.name,
        bits,
        "none" if integer else str(element.bias),
        str(element.emax),
        number(element.max),
        "none" if integer else number(element.decode(1 << element.mantissa_bits)),
        number(element.smallest),
        codes([c for c, v in enumerate(element.values) if math.isinf(v)]),
        codes([c for c, v in enumerate(element.values) if math.isnan(v)]),
        f"0x{element.sign_bit:02X}" if element.has_signed_zero else "none",
        f"{fmt.bits_per_value:g}",
        f"{fmt.pack_elements} in {fmt.pack_bytes} byte{'s' * (fmt.pack_bytes > 1)}",
    ]


def formats_table() -> str:
    header = ["format", "element", "sign.exponent.mantissa", "bias", "emax", "max", "min normal", "smallest"]
    header += ["Inf", "NaN", "-0", "bits per value", "packing"]
    return table(header, [format_row(f) for f in BLOCK_FORMATS])


def describe(recipe: Recipe) -> str:
    """A recipe in words, without what is the same for most."""
    even = f"({recipe.even_bits})" if recipe.even_bits is not None else ""
    words = [f"{recipe.scale_rule.value}{even}"]
    words += [recipe.rounding.value] if recipe.rounding.value != "nearest_even" else []
    words += [f"-0 {recipe.signed_zero.value}"]
    words += [f"Inf {recipe.inf.value}"] if recipe.inf.value != "block_nan" else []
    words += [f"NaN {recipe.nan.value}"] if recipe.nan.value != "block_nan" else []
    words += [f"zero block {recipe.zero_block_scale}"] if recipe.zero_block_scale else []
    return ", ".join(words)


def presets_table() -> str:
    """Formats as rows, presets as blocks of rows; roles share a cell where they are the same."""
    rows = []
    for preset in PRESETS.values():
        for fmt in BLOCK_FORMATS:
            if fmt.name not in preset.formats:
                continue
            weight, activation = (describe(preset.recipe(fmt, role)) for role in Role)
            if fmt.element.encoding is Encoding.TWOS_COMPLEMENT:
                weight, activation = (text.replace(", -0 keep", "") for text in (weight, activation))
            rows.append([f"`{preset.name}`", f"`{fmt.name}`", weight, "same" if activation == weight else activation])
    return table(["preset", "format", "weights", "activations"], rows)


def paths_table() -> str:
    rows = []
    for path in PATHS:
        takes = "8-bit integers" if path.integers else "everything"
        rows.append([f"`{path.name}`", ", ".join(path.features) or "nothing", takes, path.summary])
    return table(["path", "needs", "takes", "how"], rows)


def holding(scheme: Scheme) -> str:
    """The layouts that can hold experts of a scheme."""
    expert = Rule(pattern="model.layers.0.mlp.experts.0.up_proj", scheme=scheme)
    return ", ".join(layout.NAME for layout in LAYOUTS.values() if layout.refuses(expert, "gpt_oss") is None)


def layouts_table() -> str:
    rows = [[f"`{f}`", holding(Scheme.of(f)), holding(Scheme.of(MXFP4, f))] for f in BLOCK_FORMATS]
    rows += [[f"`{name}`", "", holding(Scheme.of(MXFP4, name))] for name in FP8_ACTIVATIONS]
    return table(["format", "weights", "activations"], rows)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("formats.md", formats_table()),
        ("numerics.md", presets_table()),
        ("cpu.md", paths_table()),
        ("checkpoints.md", layouts_table()),
    ],
)
def test_tables_are_what_the_code_says(page: str, expected: str) -> None:
    assert expected in read(page), f"docs/{page} should contain:\n{expected}"


def test_the_integer_formats_are_named() -> None:
    names = [f"`{f.name}`" for f in BLOCK_FORMATS if Integers.of(f.element) is not None]
    assert f"Elements of {', '.join(names[:-1])} and {names[-1]} are 8-bit integers" in read("cpu.md")


@pytest.mark.parametrize(
    ("page", "nth", "folder"), [("cpu.md", 0, "cpu"), ("gpu.md", 0, "gpu"), ("gpu.md", 1, "gpu/cuda")]
)
def test_every_file_of_a_backend_is_in_its_map(page: str, nth: int, folder: str) -> None:
    files = {f.name for f in (ROOT / "src/mxperts/backend" / folder).glob("[!_]*.py")}
    rows = re.findall(r"^\| file \| what \|\n(.*?)\n\n", read(page), re.MULTILINE | re.DOTALL)[nth]
    assert set(re.findall(r"`(\w+\.py)`", rows)) == files


def test_the_paths_of_gpus_are_what_the_code_says() -> None:
    pytest.importorskip("triton")
    from mxperts.backend.gpu.paths import PATHS  # only now: Triton reads how its kernels are to run when they are made

    for path in PATHS:
        assert re.search(rf"^\| `{path.name}` \|.*\| {re.escape(path.summary)} \|$", read("gpu.md"), re.MULTILINE)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_every_presets_source_is_named(preset: object) -> None:
    assert f"`{preset.name}`: {preset.source}" in re.sub(r"\s+", " ", read("numerics.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_test_and_file_that_a_page_names_exists(page: str) -> None:
    defined = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        defined.update(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", read(page)))
    assert named
    assert named <= defined, f"no such tests: {sorted(named - defined)}"
    paths = set(re.findall(r"`((?:src|tests|docs)/[\w/.]+)`", read(page)))
    assert [p for p in sorted(paths) if not (ROOT / p).exists()] == []
