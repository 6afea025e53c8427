"""MXTensor: what it accepts, what it refuses and how it says so."""

import re

import pytest
import torch

import mxperts as mx
from mxperts.errors import FormatError
from mxperts.formats import BLOCK_FORMATS, BlockFormat

each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


def random_bytes(*shape: int, below: int = 256) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.uint8)


def example(fmt: BlockFormat = mx.MXFP4, *rows: int, k: int = 64) -> mx.MXTensor:
    return mx.MXTensor.from_codes(
        random_bytes(*rows, k, below=1 << fmt.element.bits), random_bytes(*rows, fmt.blocks(k)), fmt
    )


@each_format
@pytest.mark.parametrize("k", [1, 32, 33, 40, 64])
def test_codes_are_given_back_without_padding(fmt: BlockFormat, k: int) -> None:
    codes = random_bytes(3, 2, k, below=1 << fmt.element.bits)
    scales = random_bytes(3, 2, fmt.blocks(k))
    t = mx.MXTensor.from_codes(codes, scales, fmt)
    assert torch.equal(t.codes(), codes)
    assert torch.equal(t.scales, scales)
    assert t.shape == (3, 2, k)
    assert (t.ndim, len(t), t.k, t.format) == (3, 3, k, fmt)
    assert t.packed.shape == (3, 2, fmt.packed_size(k))
    assert t.nbytes == fmt.nbytes(3, 2, k)


@each_format
def test_the_padding_of_the_last_block_is_zero_codes(fmt: BlockFormat) -> None:
    codes = torch.full((2, 33), (1 << fmt.element.bits) - 1, dtype=torch.uint8)
    t = mx.MXTensor.from_codes(codes, random_bytes(2, 2), fmt)
    whole = mx.MXTensor.from_packed(t.packed, t.scales, fmt)
    assert whole.shape == (2, 64)
    assert torch.equal(whole.codes()[:, :33], codes)
    assert not whole.codes()[:, 33:].any()


@each_format
def test_packed_bytes_are_wrapped_without_a_copy(fmt: BlockFormat) -> None:
    packed, scales = random_bytes(4, 2 * fmt.block_bytes), random_bytes(4, 2)
    t = mx.MXTensor.from_packed(packed, scales, fmt.name)
    assert t.packed.data_ptr() == packed.data_ptr()
    assert t.scales.data_ptr() == scales.data_ptr()
    assert t.shape == (4, 64)
    assert mx.MXTensor.from_packed(packed, scales, fmt, k=33).shape == (4, 33)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (mx.MXFP8_E4M3, torch.float8_e4m3fn),
        (mx.MXFP8_E5M2, torch.float8_e5m2),
        (mx.MXINT8, torch.int8),
        (mx.MXFP4, torch.uint8),
    ],
    ids=str,
)
def test_other_one_byte_dtypes_are_reinterpreted(fmt: BlockFormat, dtype: torch.dtype) -> None:
    packed, scales = random_bytes(2, fmt.block_bytes), random_bytes(2, 1)
    t = mx.MXTensor.from_packed(packed.view(dtype), scales.view(torch.float8_e8m0fnu), fmt)
    assert torch.equal(t.packed, packed)
    assert torch.equal(t.scales, scales)
    assert t.packed.dtype is t.scales.dtype is torch.uint8


@pytest.mark.parametrize("rows", [(0,), (0, 3), (3, 0)], ids=str)
def test_there_may_be_no_rows(rows: tuple[int, ...]) -> None:
    t = example(mx.MXFP6_E2M3, *rows)
    assert t.shape == (*rows, 64)
    assert t.codes().shape == (*rows, 64)
    assert t.nbytes == 0


def test_indexing_the_first_dimension() -> None:
    t = example(mx.MXFP6_E3M2, 5, 4, k=40)
    assert torch.equal(t[2].codes(), t.codes()[2])
    assert t[2].packed.data_ptr() == t.packed[2].data_ptr()
    assert t[1:3].shape == (2, 4, 40)
    picked = torch.tensor([4, 0, 4])
    assert torch.equal(t[picked].codes(), t.codes()[picked])
    assert torch.equal(t[picked].scales, t.scales[picked])
    assert t[2][3].shape == (40,)


def test_the_blocked_dimension_cannot_be_indexed() -> None:
    with pytest.raises(FormatError, match=r"^cannot index the blocked dimension of an MXTensor; use codes"):
        example()[0]


def test_the_meta_device_knows_shapes() -> None:
    t = mx.MXTensor.from_codes(
        torch.empty(2, 40, dtype=torch.uint8, device="meta"),
        torch.empty(2, 2, dtype=torch.uint8, device="meta"),
        "mxfp4",
    )
    assert t.device.type == "meta"
    assert t.packed.shape == (2, 32)
    assert t.codes().shape == (2, 40)
    assert example().to("meta").device.type == "meta"


def test_contiguous_and_repr() -> None:
    t = example(mx.MXFP4, 4)
    strided = t[::2]
    assert not strided.packed.is_contiguous()
    assert strided.contiguous().packed.is_contiguous()
    assert torch.equal(strided.contiguous().codes(), strided.codes())
    assert repr(t) == "MXTensor(mxfp4, shape=(4, 64), nbytes=136, device='cpu')"


def test_tensors_compare_by_identity_and_are_frozen() -> None:
    t = example()
    assert t != example()
    with pytest.raises(AttributeError):
        t.k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("packed", "scales", "k", "text"),
    [
        (
            torch.zeros(2, 16),
            random_bytes(2, 1),
            None,
            "packed must have a one-byte dtype such as uint8, not torch.float32",
        ),
        (
            random_bytes(2, 16),
            torch.zeros(2, 1),
            None,
            "scales must have a one-byte dtype such as uint8, not torch.float32",
        ),
        (
            random_bytes(2, 17),
            random_bytes(2, 1),
            None,
            "a row of 17 bytes does not hold whole blocks of mxfp4, which take 16 bytes each",
        ),
        (
            random_bytes(2, 32),
            random_bytes(2, 1),
            None,
            "scales must have shape (2, 2), one byte for each block of 32 values, not (2, 1); "
            "packed codes have shape (2, 32)",
        ),
        (random_bytes(2, 32), random_bytes(3, 2), None, "scales must have shape (2, 2), one byte for each block"),
        (
            random_bytes(2, 32),
            random_bytes(2, 2),
            65,
            "packed codes of mxfp4 with 65 values a row must have shape (2, 48), not (2, 32): "
            "a block of 32 takes 16 bytes",
        ),
        (
            random_bytes(2, 32),
            random_bytes(2, 2),
            32,
            "packed codes of mxfp4 with 32 values a row must have shape (2, 16)",
        ),
        (random_bytes(), random_bytes(1), None, "packed must have at least one dimension"),
        (random_bytes(16), random_bytes(), None, "scales must have at least one dimension"),
        (
            random_bytes(2, 16),
            torch.zeros(2, 1, dtype=torch.uint8, device="meta"),
            None,
            "packed codes are on cpu but scales on meta",
        ),
    ],
)
def test_packed_bytes_that_do_not_fit_are_refused(
    packed: torch.Tensor, scales: torch.Tensor, k: int | None, text: str
) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(text)}"):
        mx.MXTensor.from_packed(packed, scales, "mxfp4", k=k)


@pytest.mark.parametrize(
    ("codes", "fmt", "text"),
    [
        (torch.full((2, 32), 16, dtype=torch.uint8), mx.MXFP4, "code 16 has more than the 4 bits of E2M1"),
        (torch.full((2, 32), 64, dtype=torch.uint8), mx.MXFP6_E2M3, "code 64 has more than the 6 bits of E2M3"),
        (
            torch.zeros(2, 32, dtype=torch.int32),
            mx.MXFP4,
            "codes must have a one-byte dtype such as uint8, not torch.int32",
        ),
        (torch.tensor(3, dtype=torch.uint8), mx.MXFP4, "codes must have at least one dimension"),
        (torch.zeros(2, 33, dtype=torch.uint8), mx.MXFP4, "scales must have shape (2, 2)"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: torch.Tensor, fmt: BlockFormat, text: str) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(text)}"):
        mx.MXTensor.from_codes(codes, random_bytes(2, 1), fmt)


@pytest.mark.parametrize("name", ["packed", "scales"])
def test_the_record_itself_takes_only_uint8(name: str) -> None:
    parts = {"packed": random_bytes(2, 16), "scales": random_bytes(2, 1)}
    parts[name] = parts[name].view(torch.int8)
    with pytest.raises(FormatError, match=f"^{name} must be uint8, not torch.int8; MXTensor.from_packed takes"):
        mx.MXTensor(**parts, format=mx.MXFP4, k=32)


@pytest.mark.parametrize("index", [(slice(None), slice(0, 16)), (..., slice(0, 16)), (0, 0), None])
def test_only_the_first_dimension_is_indexed(index: object) -> None:
    t = mx.quantize(torch.ones(2, 32), mx.MXFP4)
    with pytest.raises(mx.FormatError, match="along its first dimension only"):
        t[index]
