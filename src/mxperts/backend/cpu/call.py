"""One call of the experts as kernels get it: numbers and addresses, written to one array.

Kernels take its address alone. Python hands over an integer in a fraction of the time that arrays take, and each thread
reads what it needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, register_model

from mxperts.backend.cpu.activation import ActivationRule
from mxperts.backend.cpu.jit import jit
from mxperts.backend.cpu.rule import BlockRule

BF16, FP16, FP32 = range(3)
"""``kind``: dtypes of hidden states."""
NONE, BLOCKS, STATIC, DYNAMIC = range(4)
"""``qdq``: what the inputs of both projections are quantised to: nothing, an MX format, fp8."""


class Given(NamedTuple):
    """Addresses of what a call is given, 0 for what is not there, and the stride of its rows.

    Attributes:
        hidden_at, hidden_stride: hidden states and the bytes from one token to the next.
        ids_at, routing_at: int64 ids and float32 weights, both [T, k].
        map_at: int64 expert map.
        tiles1_at, tiles2_at: weights of both projections.
        careful_experts_at: uint8 [E], 1 for experts whose numbers need the careful path.
        bias1_at, bias2_at: float32 biases.
        scale1_at, scale2_at: float32 static scales.
        out_at: the result [T, H], contiguous.
    """

    hidden_at: int
    hidden_stride: int
    ids_at: int
    routing_at: int
    map_at: int
    tiles1_at: int
    tiles2_at: int
    careful_experts_at: int
    bias1_at: int
    bias2_at: int
    scale1_at: int
    scale2_at: int
    out_at: int


class Placed(NamedTuple):
    """Addresses in the workspace.

    Attributes:
        careful_at: uint8 [T * k], pairs to be computed on the careful path.
        y_at: float32 [T * k, H in whole strips], results of the second projection.
        order_at, start_at: int64: pairs sorted by expert; where each expert's begin, [E + 1].
        active_at: int64 [E]: experts that have pairs.
        counters_at: int64: see ``routing``.
        pieces1_at, pieces2_at: int64: boundaries of the pieces of work of either projection.
        x1_at, table1_at: packed rows of the first input, addresses of all in the order of experts.
        x2_at, table2_at: of the second.
        a_at: float32 [pairs, I in whole blocks], activations that cannot be packed before their row is there.
        scratch_at: memory of each thread.
    """

    careful_at: int
    y_at: int
    order_at: int
    start_at: int
    active_at: int
    counters_at: int
    pieces1_at: int
    pieces2_at: int
    table1_at: int
    table2_at: int
    x1_at: int
    x2_at: int
    a_at: int
    scratch_at: int


class Settings(NamedTuple):
    """What is the same for many calls: sizes, choices, and the addresses of compiled functions.

    Attributes:
        kind, out_kind: dtypes of hidden states and of the result; see above.
        linear: 1 for a single projection, the second, of the first input.
        qdq: see above.
        rotated: 1 if the inputs of both projections are rotated before that.
        planes: rows that one row of an input becomes: see ``pack``.
        marks: 1 to mark pairs whose numbers need the careful path.
        careful_only: 1 to compute only the pairs that are marked.
        threads: how many run.
        tokens, k: T; experts a token.
        width: values of one token.
        map_size: of the expert map; 0 if there is none.
        on_input: 1 if the input is multiplied by the router weight.
        per_pair: 1 if the first input has a row for each pair, because its static scale depends on the expert, instead
            of one for each token.
        experts, hidden, intermediate, gated, interleaved: as in ``ExpertsLayout``.
        blocks1, strips1, blocks2, strips2: of either projection: blocks of a row, strips of an expert.
        scale1_step, scale2_step: 1 if there is a static scale for each expert.
        amax: bits of the float32 from which on inputs need the careful path.
        x1_bytes, x2_bytes: of a packed row.
        scratch_bytes: of a thread's memory.
        values_bytes, tile_bytes, block_bytes: memory for ``multiply``; of a tile; of a packed block.
        the others: functions of ``strip``, ``pack``, ``rows`` and ``layer``.
    """

    kind: int
    out_kind: int
    linear: int
    qdq: int
    rotated: int
    planes: int
    marks: int
    careful_only: int
    threads: int
    tokens: int
    k: int
    width: int
    map_size: int
    on_input: int
    per_pair: int
    experts: int
    hidden: int
    intermediate: int
    gated: int
    interleaved: int
    blocks1: int
    strips1: int
    blocks2: int
    strips2: int
    scale1_step: int
    scale2_step: int
    amax: int
    x1_bytes: int
    x2_bytes: int
    scratch_bytes: int
    values_bytes: int
    tile_bytes: int
    block_bytes: int
    multiply: int
    pack_block: int
    pack_token: int
    pack_pair: int
    finish: int
    pack_activations: int
    pack_inputs: int
    gate_up: int
    pack_kept: int
    down: int
    sum_tokens: int


_GIVEN, _PLACED = len(Given._fields), len(Placed._fields)
_NAMES = (*Given._fields, *Placed._fields, *Settings._fields)
_CALL_BYTES = 8 * len(_NAMES)
_RULE_FIELDS = len(BlockRule._fields)
_NO_RULE = (0,) * _RULE_FIELDS


def template(placed: Placed, settings: Settings, rule: BlockRule | None, activation: ActivationRule) -> Any:
    """The record of a call whose workspace begins at 0 and that is given nothing yet."""
    integers = [*(0,) * _GIVEN, *placed, *settings, *(rule or _NO_RULE), activation.function]
    constants = activation[1:]
    data = np.empty(len(integers) + len(constants), np.int64)
    data[: len(integers)] = integers
    data[len(integers) :].view(np.float64)[:] = constants
    return data


def record(template: Any, given: Given, start: int) -> Any:
    """The array whose address kernels take: a template with what is given and a workspace at ``start``."""
    data = template.copy()
    data[:_GIVEN] = given
    data[_GIVEN : _GIVEN + _PLACED] += start
    return data


def continued(data: Any, first: Any) -> Any:
    """The record of a careful call: the same as a template's, with the marks and results of the first one."""
    data[_GIVEN : _GIVEN + 2] = first[_GIVEN : _GIVEN + 2]
    return data


Call = Any
"""In kernels: what ``call_at`` gives."""


class _Fields(types.Type):  # type: ignore[misc]
    """The type of an address with names for the 64-bit numbers there; reading a name is one load, and nothing else."""

    def __init__(self, name: str, names: tuple[str, ...], numbers: tuple[Any, ...]) -> None:
        super().__init__(f"mxperts.{name}")
        self.names, self.numbers = names, numbers


@register_model(_Fields)
class _FieldsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, ir.IntType(64))


@infer_getattr
class _FieldsAttribute(AttributeTemplate):  # type: ignore[misc]
    key = _Fields

    def generic_resolve(self, type_: Any, name: str) -> Any:
        return type_.numbers[type_.names.index(name)] if name in type_.names else None


@lower_getattr_generic(_Fields)  # type: ignore[untyped-decorator]
def _read(context: Any, b: Any, type_: Any, address: Any, name: str) -> Any:
    i = type_.names.index(name)
    place = b.add(address, ir.IntType(64)(8 * i))
    return b.load(b.inttoptr(place, context.get_value_type(type_.numbers[i]).as_pointer()))


def _fields_at(type_: Any, offset: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def at(typing: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
            return b.add(values[0], ir.IntType(64)(offset))

        return type_(types.int64), codegen

    return at


call_at = _fields_at(_Fields("call", _NAMES, (types.int64,) * len(_NAMES)), 0)
"""The call of a record: ``call_at(address).tokens``."""
_FUNCTION_TYPES = (types.int64, *[types.float64] * (len(ActivationRule._fields) - 1))
activation_at = _fields_at(
    _Fields("activation", ActivationRule._fields, _FUNCTION_TYPES), _CALL_BYTES + 8 * _RULE_FIELDS
)
"""The activation function of a record."""


@jit
def rule_at(address: int) -> int:
    """The address of what inputs are quantised to, which stands for a ``BlockRule``."""
    return address + _CALL_BYTES
