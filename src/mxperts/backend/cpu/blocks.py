"""The arithmetic of one block of 32, compiled into kernels: quantising, scaling, encoding, packing, rounding.

It is all integer operations on the bits of float32 numbers, so that no result depends on whether the processor flushes
subnormal numbers, and the numbers that a format and a recipe come down to are arguments, so that one compiled kernel
serves them all. It is emitted as operations on vectors of 32 lanes, which LLVM turns into the instructions of whatever
machine it runs on. (A loop in Numba would leave the vectors to LLVM: it unrolls some loops of 32 into scalar
instructions, and Numba makes every integer 64 bits wide.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mxperts.backend.cpu import simd
from mxperts.backend.cpu.lanes import Lanes, branch
from mxperts.backend.cpu.rule import BLOCK, INF, BlockRule, bits_of
from mxperts.formats import SCALE_BIAS, SCALE_MAX, SCALE_NAN

_SIGN = -(1 << 31)
_MAGNITUDE = 0x7FFFFFFF
_FRACTION = 0x7FFFFF
_NAN = 0x7FC00000
_LEAST_NORMAL_SCALE = SCALE_BIAS - 126 + 16
"""From this scale byte on no product of an element, 2^-16 or more, is subnormal in float32."""
_NO_SUBNORMAL_ELEMENT = _LEAST_NORMAL_SCALE + 2
"""From this scale byte on no number that is subnormal in float32 is as much as half of the smallest element."""


class _Rule:
    """A BlockRule in LLVM IR, a tuple or the address of its integers: those as Lanes of one, by name."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    def __getattr__(self, name: str) -> Lanes:
        b, i = self.builder, BlockRule._fields.index(name)
        if isinstance(self.value.type, ir.IntType):
            field = b.load(b.inttoptr(b.add(self.value, self.value.type(8 * i)), self.value.type.as_pointer()))
        else:
            field = b.extract_value(self.value, i)
        return Lanes(self.builder, field).cast(32)


# Pieces of code: Lanes in, Lanes out


def _without_subnormals(magnitude: Lanes) -> Lanes:
    """Bits as if float32 had no subnormal numbers but exponent fields below 0; zero counts as 2^-149."""
    # The integer of a subnormal's bits, as a float, has its exponent and fraction but for a factor of 2^149.
    subnormal = magnitude.at_least(1).to_float() - (149 << 23)
    return magnitude.select(magnitude.is_(">=", 1 << 23), subnormal)


def round_to_elements(bits: Lanes, rule: _Rule) -> tuple[Lanes, Lanes]:
    """A block's elements, not multiplied by their scale, and its scale byte.

    A block that becomes NaN has elements +0 and byte 255.
    """
    magnitude = bits & _MAGNITUDE
    top = magnitude.largest()
    special = top.is_(">=", INF)

    def with_specials() -> list[Lanes]:
        number = magnitude.select(magnitude.is_("<=", INF), 0).largest()
        nan = (rule.nan_saturates ^ 1).select(top.is_(">", INF), 0)
        inf = (rule.inf_saturates ^ 1).select(number.is_("==", INF), 0)
        return [number, nan | inf]

    top, poisoned = branch(bits.builder, special, with_specials, lambda: [top, top.like(0)])
    byte = _scale_byte(top, rule)
    elements = _round(magnitude, bits & _SIGN, byte, rule)

    def saturated_or_poisoned(elements: Lanes) -> Lanes:
        largest = rule.largest.splat() | (bits & _SIGN)
        return elements.select(magnitude.is_("<", INF), largest).select(poisoned.is_("==", 0), 0)

    elements = elements.when(special, saturated_or_poisoned)
    byte = rule.zero_scale.select(top.is_("==", 0), byte)
    return elements, byte.select(poisoned.is_("==", 0), SCALE_NAN)


def _scale_byte(top: Lanes, rule: _Rule) -> Lanes:
    """The scale byte of a block whose largest magnitude has these bits."""
    # Inf, which is 2^128 here, plus a carry would be beyond int32: exponents are 128 lower meanwhile
    field = (_without_subnormals(top) - (128 << 23) + rule.scale_carry >> 23) + 128
    byte = (field - rule.scale_offset).at_least(0).at_most(SCALE_MAX)
    return byte.select(field.is_("<", rule.overflow), SCALE_MAX)


def _round(magnitude: Lanes, sign: Lanes, byte: Lanes, rule: _Rule) -> Lanes:
    """Elements, as float32 bits, of numbers times 2^(127 - byte); of Inf and NaN anything."""
    scaled = magnitude.when(byte.is_("<", _NO_SUBNORMAL_ELEMENT), _without_subnormals)
    scaled -= ((byte - SCALE_BIAS) << 23).splat()
    mantissa = (scaled & _FRACTION) | (1 << 23)
    field = scaled >> 23
    exponent = field.at_least((rule.emin + 127).splat()).at_most((rule.etop + 127).splat())
    # So many bits of the mantissa are rounded away: more than 25 leave nothing, less than 1 only Inf and NaN would have
    drop = (exponent - field + (23 - rule.mantissa_bits).splat()).at_most(25)
    added = (rule.half.splat() << (drop - 1)) + ((mantissa >> drop) & rule.even.splat())
    quanta = (mantissa + added - rule.down.splat()) >> drop
    value = quanta.to_float().times((exponent - rule.mantissa_bits.splat()) << 23)
    limit = rule.largest.splat().when(
        rule.below.is_("!=", 0), lambda limit: limit + ((sign >> 31) & rule.below.splat())
    )
    value = value.at_most(limit)

    def without_some_zeros(sign: Lanes) -> Lanes:
        signed = value | (magnitude & rule.keep_rounded.splat())
        return sign.select(signed.is_("!=", 0), 0)

    return value | sign.when(rule.keep_zero.is_("==", 0), without_some_zeros)


def scale(elements: Lanes, byte: Lanes) -> Lanes:
    """Elements times 2^(byte - 127), as float32 bits: exact, Inf beyond its range, NaN for byte 255."""
    return branch(
        elements.builder,
        _scales_to_normal(byte),
        lambda: [elements.times((byte << 23).splat())],
        lambda: [_scale_to_subnormal(elements, byte)],
    )[0]


def _scale_to_bf16(elements: Lanes, byte: Lanes) -> Lanes:
    """The same rounded to bfloat16, which holds all that is normal exactly, as its bits."""
    return branch(
        elements.builder,
        _scales_to_normal(byte),
        lambda: [elements.times((byte << 23).splat()) >> 16],
        lambda: [_to_bf16(_scale_to_subnormal(elements, byte))],
    )[0]


def _scales_to_normal(byte: Lanes) -> Any:
    limit = ir.IntType(32)(SCALE_NAN - _LEAST_NORMAL_SCALE)
    return byte.builder.icmp_unsigned("<", (byte - _LEAST_NORMAL_SCALE).value, limit)


def _scale_to_subnormal(elements: Lanes, byte: Lanes) -> Lanes:
    """The same for the smallest scales and 255. No bit is lost: elements are multiples of 2^-16."""
    magnitude = elements & _MAGNITUDE
    scaled = magnitude + ((byte - SCALE_BIAS) << 23).splat()
    drop = ((scaled >> 23) ^ -1).at_most(23) + 2  # 1 - field; what is not subnormal is not looked at
    subnormal = ((scaled & _FRACTION) | (1 << 23)) >> drop
    value = scaled.select(scaled.is_(">=", 1 << 23), subnormal)
    value = value.select(magnitude.is_("!=", 0), 0)
    value = value.select(magnitude.is_("<", INF), magnitude) | (elements & _SIGN)
    return value.select(byte.is_("!=", SCALE_NAN), _NAN)


def encode(elements: Lanes, rule: _Rule) -> Lanes:
    """The codes of elements."""
    magnitude = elements & _MAGNITUDE
    sign = elements >> 31
    drop = (23 - rule.mantissa_bits).splat()
    normal = (magnitude >> drop) - rule.code_offset.splat()
    code = normal.select(magnitude.is_(">=", rule.normal.splat()), magnitude.times(rule.unit.splat()).to_int())
    negated = sign & rule.negate.splat()
    return ((code ^ negated) - negated) | (sign & rule.sign_bit.splat())


def decode(codes: Lanes, rule: _Rule) -> Lanes:
    """The elements of codes; those of formats that have them may be Inf and NaN."""
    b = codes.builder
    quantum = ((2 * SCALE_BIAS << 23) - rule.unit).splat()

    def integers() -> list[Lanes]:
        return [codes.cast(8).cast(32, signed=True).to_float().times(quantum)]

    def floats() -> list[Lanes]:
        magnitude = codes & (rule.sign_bit - 1).splat()
        normal = (magnitude + rule.code_offset.splat()) << (23 - rule.mantissa_bits).splat()
        subnormal = magnitude.to_float().times(quantum)
        value = normal.select((magnitude >> rule.mantissa_bits.splat()).is_("!=", 0), subnormal)
        return [value | (codes << (32 - rule.bits).splat()) & _SIGN]

    def floats_of_8() -> list[Lanes]:
        (value,) = floats()
        magnitude = codes & 0x7F
        value = value.select(magnitude.is_("!=", rule.inf_code.splat()), (value & _SIGN) | INF)
        return [value.select(magnitude.is_("<=", rule.nan_code.splat()), _NAN)]

    def of_8() -> list[Lanes]:
        return branch(b, rule.negate.is_("!=", 0), integers, floats_of_8)

    return branch(b, rule.bits.is_("==", 8), of_8, floats)[0]


def _each_width(rule: _Rule, code: Callable[[int], Sequence[Lanes]]) -> list[Lanes]:
    """What ``code`` gives for the rule's 4, 6 or 8 bits."""
    b, is_4, is_6 = rule.builder, rule.bits.is_("==", 4), rule.bits.is_("==", 6)
    return branch(b, is_4, lambda: code(4), lambda: branch(b, is_6, lambda: code(6), lambda: code(8)))


def _pack(codes: Lanes, bits: int) -> Lanes:
    """Codes as a little-endian bit stream: ``4 * bits`` integers of 8 bits."""
    packed = codes.cast(8)
    if bits == 8:
        return packed
    pairs = packed.regroup(16, 16)
    low = (1 << bits) - 1
    pairs = (pairs & low) | (pairs >> 8 - bits & low << bits)
    if bits == 4:
        return pairs.cast(8)
    fours = pairs.regroup(8, 32)
    fours = (fours & 0xFFF) | (fours >> 4 & 0xFFF000)
    return fours.regroup(32, 8).pick([i for i in range(32) if i % 4 < 3])


def _unpack(packed: Lanes, bits: int) -> Lanes:
    """The 32 codes of ``4 * bits`` packed bytes."""
    if bits == 8:
        return packed.cast(32)
    if bits == 4:
        pairs = packed.cast(16)
        return ((pairs | pairs << 4) & 0x0F0F).regroup(32, 8).cast(32)
    fours = packed.pick([i // 4 * 3 + i % 4 if i % 4 < 3 else 24 for i in range(32)]).regroup(8, 32)
    pairs = (fours & 0xFFF | (fours & 0xFFF000) << 4).regroup(16, 16)
    return (pairs & 0x3F | (pairs & 0xFC0) << 2).regroup(32, 8).cast(32)


def _from_fp16(half: Lanes) -> Lanes:
    magnitude = half & 0x7FFF
    subnormal = magnitude.to_float().times(bits_of(2.0**-24))
    value = ((magnitude << 13) + (112 << 23)).select(magnitude.is_(">=", 0x400), subnormal)
    value = value.select(magnitude.is_("<", 0x7C00), (magnitude << 13) + (224 << 23))
    return value | (half & 0x8000) << 16


def _to_bf16(bits: Lanes) -> Lanes:
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.select((bits & _MAGNITUDE).is_("<=", INF), 0x7FC0)


def _to_fp16(bits: Lanes) -> Lanes:
    magnitude = bits & _MAGNITUDE
    normal = (magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1) >> 13).at_most(0x7C00)
    # Added to 1/2, whose unit in the last place is the smallest float16, a number below 2^-14 leaves its code there
    subnormal = magnitude.plus(126 << 23) - (126 << 23)
    value = normal.select(magnitude.is_(">=", 113 << 23), subnormal)
    return value.select(magnitude.is_("<=", INF), 0x7E00) | (bits >> 16 & 0x8000)


def _to_e4m3(bits: Lanes) -> Lanes:
    magnitude = (bits & _MAGNITUDE).at_most(bits_of(448.0))
    normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1)) & ~0xFFFFF
    # Added to 2^14, whose unit in the last place is the smallest E4M3 number, and subtracted again
    subnormal = magnitude.plus(bits_of(2.0**14)).plus(bits_of(-(2.0**14)))
    value = normal.select(magnitude.is_(">=", bits_of(2.0**-6)), subnormal) | (bits & _SIGN)
    return value.select((bits & _MAGNITUDE).is_("<=", INF), _NAN)


# Memory. bfloat16 comes as int16 and float16 as uint16, so that the type tells which it is.


class Memory:
    """A place in a contiguous array, where a block or the first ``count`` numbers of one are."""

    def __init__(self, context: Any, builder: Any, type_: Any, array: Any, at: Any = None, count: Any = None) -> None:
        self.type = type_.dtype
        self.builder = builder
        self.count = count
        data = context.make_array(type_)(context, builder, array).data
        self.start = data if at is None else builder.gep(data, [at])

    def load_lanes(self, count: int, bits: int) -> Lanes:
        """``count`` integers of ``bits``."""
        type_ = ir.VectorType(ir.IntType(bits), count)
        value = self.builder.load(self._pointer(type_))
        value.align = 1
        return Lanes(self.builder, value)

    def store_lanes(self, lanes: Lanes) -> None:
        """All of them, one after the other."""
        self.builder.store(lanes.value, self._pointer(lanes.value.type)).align = 1

    def load(self) -> Lanes:
        """A block of float32, bfloat16 or float16 as float32 bits; zeros where it is cut off."""
        bits = 32 if self.type == types.float32 else 16
        if self.count is None:
            loaded = self.load_lanes(BLOCK, bits)
        else:
            (loaded,) = branch(
                self.builder,
                self._is_whole(),
                lambda: [self.load_lanes(BLOCK, bits)],
                lambda: [self._load_first(ir.VectorType(ir.IntType(bits), BLOCK))],
            )
        if bits == 32:
            return loaded
        wide = loaded.cast(32)
        return wide << 16 if self.type == types.int16 else _from_fp16(wide)

    def store(self, elements: Lanes, byte: Lanes) -> None:
        """Elements times 2^(byte - 127), rounded once to what the array holds; none where the block is cut off."""
        if self.type == types.float32:
            values = scale(elements, byte)
        elif self.type == types.int16:
            values = _scale_to_bf16(elements, byte).cast(16)
        else:
            values = _to_fp16(scale(elements, byte)).cast(16)
        if self.count is None:
            self.store_lanes(values)
        else:
            with self.builder.if_else(self._is_whole()) as (whole, cut_off):
                with whole:
                    self.store_lanes(values)
                with cut_off:
                    self._store_first(values)

    def _pointer(self, type_: Any) -> Any:
        return self.builder.bitcast(self.start, ir.PointerType(type_))

    def _is_whole(self) -> Any:
        return self.builder.icmp_signed("==", self.count, ir.IntType(64)(BLOCK))

    def _load_first(self, type_: Any) -> Lanes:
        arguments = [self._pointer(type_), ir.IntType(32)(1), self._is_in(), ir.Constant(type_, [0] * BLOCK)]
        name = f"llvm.masked.load.v{BLOCK}i{type_.element.width}.p0"
        return Lanes(self.builder, simd.call(self.builder, name, type_, arguments))

    def _store_first(self, lanes: Lanes) -> None:
        type_ = lanes.value.type
        arguments = [lanes.value, self._pointer(type_), ir.IntType(32)(1), self._is_in()]
        name = f"llvm.masked.store.v{BLOCK}i{type_.element.width}.p0"
        simd.call(self.builder, name, ir.VoidType(), arguments)

    def _is_in(self) -> Any:
        """Which lanes are among the first ``count``."""
        count = Lanes(self.builder, self.count).cast(32).splat()
        return count.is_(">", Lanes(self.builder, ir.Constant(count.value.type, list(range(BLOCK)))))


# What other kernels call


@intrinsic  # type: ignore[untyped-decorator]
def quantize_block(typing: Any, x: Any, q: Any, rule: Any) -> Any:
    """Round 32 numbers to elements: ``quantize_block(x, q, rule)``.

    Args:
        x: float32 [32], contiguous; or bfloat16 as int16, float16 as uint16.
        q: float32 [32], gets the elements, not multiplied by the scale; +0 in a block that becomes NaN.
        rule: from ``block_rule``.

    Returns:
        The scale byte, 255 for a block that becomes NaN.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (Memory(context, builder, signature.args[i], args[i]) for i in (0, 1))
        elements, byte = round_to_elements(source.load(), _Rule(builder, args[2]))
        target.store_lanes(elements)
        return byte.cast(64).value

    return types.int64(x, q, rule), generate


@intrinsic  # type: ignore[untyped-decorator]
def scale_block(typing: Any, q: Any, byte: Any, out: Any) -> Any:
    """Multiply 32 elements by 2^(byte - 127): ``scale_block(q, byte, out)``, float32 [32] both.

    No product is rounded: it is exact, or beyond the range of float32 and so Inf. Byte 255 gives NaN. ``out`` may also
    be bfloat16 as int16 or float16 as uint16, and is then rounded to.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (Memory(context, builder, signature.args[i], args[i]) for i in (0, 2))
        target.store(source.load(), Lanes(builder, args[1]).cast(32))
        return context.get_dummy_value()

    return types.none(q, types.int64, out), generate


@intrinsic  # type: ignore[untyped-decorator]
def encode_block(typing: Any, q: Any, codes: Any, rule: Any) -> Any:
    """The codes of 32 elements: ``encode_block(q, codes, rule)``, float32 [32] and uint8 [32]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (Memory(context, builder, signature.args[i], args[i]) for i in (0, 1))
        target.store_lanes(encode(source.load(), _Rule(builder, args[2])).cast(8))
        return context.get_dummy_value()

    return types.none(q, codes, rule), generate


@intrinsic  # type: ignore[untyped-decorator]
def quantize_at(typing: Any, x: Any, at: Any, count: Any, packed: Any, packed_at: Any, rule: Any) -> Any:
    """Quantise the ``count`` numbers, 32 or fewer, of ``x`` from ``at`` on to packed codes at ``packed_at``.

    Returns:
        The scale byte.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = Memory(context, builder, signature.args[0], args[0], args[1], args[2])
        target = Memory(context, builder, signature.args[3], args[3], args[4])
        numbers = _Rule(builder, args[5])
        elements, byte = round_to_elements(source.load(), numbers)
        codes = encode(elements, numbers)

        def store(bits: int) -> list[Lanes]:
            target.store_lanes(_pack(codes, bits))
            return []

        _each_width(numbers, store)
        return byte.cast(64).value

    return types.int64(x, types.int64, types.int64, packed, types.int64, rule), generate


@intrinsic  # type: ignore[untyped-decorator]
def dequantize_at(typing: Any, packed: Any, packed_at: Any, byte: Any, out: Any, at: Any, count: Any, rule: Any) -> Any:
    """The values of the packed codes at ``packed_at`` under a scale byte, ``count`` of them, to ``out`` at ``at``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = Memory(context, builder, signature.args[0], args[0], args[1])
        target = Memory(context, builder, signature.args[3], args[3], args[4], args[5])
        numbers = _Rule(builder, args[6])
        (codes,) = _each_width(numbers, lambda bits: [_unpack(source.load_lanes(4 * bits, 8), bits)])
        target.store(decode(codes, numbers), Lanes(builder, args[2]).cast(32))
        return context.get_dummy_value()

    return types.none(packed, types.int64, types.int64, out, types.int64, types.int64, rule), generate


@intrinsic  # type: ignore[untyped-decorator]
def fake_quantize_at(typing: Any, x: Any, out: Any, at: Any, count: Any, rule: Any) -> Any:
    """Quantise the ``count`` numbers, 32 or fewer, of ``x`` from ``at`` on and dequantise them to ``out``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (Memory(context, builder, signature.args[i], args[i], args[2], args[3]) for i in (0, 1))
        elements, byte = round_to_elements(source.load(), _Rule(builder, args[4]))
        target.store(elements, byte)
        return context.get_dummy_value()

    return types.none(x, out, types.int64, types.int64, rule), generate


def _scalar(code: Callable[[Lanes], Lanes], result: Any, argument: Any) -> Any:
    """A piece of code as a function of one number."""

    @intrinsic  # type: ignore[untyped-decorator]
    def function(typing: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            given = args[0] if argument == types.uint16 else builder.bitcast(args[0], ir.IntType(32))
            value = code(Lanes(builder, given).cast(32))
            if result == types.float32:
                return builder.bitcast(value.value, ir.FloatType())
            return value.cast(result.bitwidth).value

        return result(argument), generate

    return function


bf16_to_float = _scalar(lambda bits: bits << 16, types.float32, types.uint16)
"""The float32 of bfloat16 bits."""
fp16_to_float = _scalar(_from_fp16, types.float32, types.uint16)
"""The float32 of float16 bits."""
round_bf16 = _scalar(_to_bf16, types.uint16, types.float32)
"""The bits, uint16, of the nearest bfloat16, ties to even; every NaN is 0x7FC0."""
round_fp16 = _scalar(_to_fp16, types.uint16, types.float32)
"""The bits, uint16, of the nearest float16, ties to even; every NaN is 0x7E00."""
round_e4m3 = _scalar(_to_e4m3, types.float32, types.float32)
"""The nearest E4M3 number, ties to even, saturating at ±448; NaN stays NaN."""
float_bits = _scalar(lambda bits: bits, types.int32, types.float32)
"""The bits of a float32."""
magnitude_bits = _scalar(lambda bits: bits & _MAGNITUDE, types.int32, types.float32)
"""The bits of the absolute value."""
float_of = _scalar(lambda bits: bits, types.float32, types.int32)
"""The float32 of these bits."""
