"""``bench_ep``: one layer over processes, by our exchange and by that of Transformers, beside one process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mxperts.benchmark.inputs import Inputs, Weights, make_inputs, make_layers
from mxperts.benchmark.parallel.group import Group
from mxperts.benchmark.parallel.row import EPRow, Measured
from mxperts.benchmark.problem import Problem, Shape
from mxperts.benchmark.row import Status
from mxperts.benchmark.timing import percentile
from mxperts.distributed import Exchange, Wire, traffic
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme
from mxperts.ops.dispatch import Problem as Call
from mxperts.ops.dispatch import resolve
from mxperts.ops.experts import fused_experts
from mxperts.ops.prepare import PreparedExperts, prepare

ROUTINGS = 4
OURS, STOCK = "mxperts", "transformers"
Layer = Callable[[int], Tensor]
"""The layer on call ``i``: [T, H]."""


def bench_ep(
    shapes: Sequence[Shape],
    schemes: Sequence[Scheme],
    tokens: Sequence[int],
    group: Group,
    *,
    seed: int = 0,
    time_budget: float = 2.0,
    progress: Callable[[str], None] = lambda message: None,
) -> Iterator[list[EPRow]]:
    """Time layers of every shape in every scheme with every number of tokens in each process.

    Args:
        shapes, schemes, tokens: what to combine.
        group: the processes, all of which call this.
        seed: of weights; of hidden states and routings, with the process' number.
        time_budget: seconds for each of what is timed.
        progress: told what is being done.

    Yields:
        The rows of each combination: our exchange, then Transformers'.

    Raises:
        ArgumentError: a problem that cannot be; or experts that cannot be spread evenly.
    """
    problems = [
        [Problem(shape=s, scheme=f, tokens=t, seed=seed + group.rank, device=group.device) for t in tokens]
        for s, f in product(shapes, schemes)
    ]
    for shape in shapes:
        if shape.experts % group.size:
            raise ArgumentError(
                f"{shape.name}: {shape.experts} experts cannot be spread evenly over {group.size} processes"
            )
    for of_scheme in problems:
        layers = _Layers(of_scheme[0], group, seed)
        for problem in of_scheme:
            progress(f"{problem}, {group.size} process{'es' * (group.size > 1)}")
            yield layers.bench(make_inputs(problem, layers=(), routings=ROUTINGS), time_budget)


class _Layers:
    """The weights of one layer, prepared: all experts, as one process has them, and this process' share."""

    def __init__(self, problem: Problem, group: Group, seed: int) -> None:
        whole = make_layers(
            Problem(shape=problem.shape, scheme=problem.scheme, tokens=1, seed=seed, device=group.device), 1
        )
        each = problem.shape.experts // group.size
        share = slice(group.rank * each, (group.rank + 1) * each)
        self.group, self.each = group, each
        self.whole = _prepared(problem, whole[0])
        self.share = _prepared(problem, Weights(gate_up=whole[0].gate_up[share], down=whole[0].down[share]))
        call = Call(
            op="fused_experts",
            device=torch.device(group.device),
            dtype=problem.dtype,
            weight=problem.scheme.weight,
            activation=problem.scheme.activation,
        )
        self.backend = resolve("auto", call).backend

    @torch.no_grad()
    def bench(self, inputs: Inputs, time_budget: float) -> list[EPRow]:
        """The rows of one problem."""
        one = self.one_process(inputs)
        seconds = self.group.seconds(one, time_budget)
        rows = [self.row(inputs, OURS, self.ours, one, seconds, time_budget)]
        note = why_not_stock()
        if note is None:
            rows.append(self.row(inputs, STOCK, self.stock, one, seconds, time_budget))
        else:
            rows.append(self._row(inputs, STOCK, Status.SKIPPED, note, None))
        return rows

    def row(
        self,
        inputs: Inputs,
        name: str,
        layer_of: Callable[[Inputs, bool], Layer],
        one: Layer,
        one_seconds: list[float],
        time_budget: float,
    ) -> EPRow:
        """Check and time one exchange."""
        layer = layer_of(inputs, True)
        with _batch_invariant(self.group):
            equal = self.group.all(all(torch.equal(layer(i), one(i)) for i in range(ROUTINGS)))
        traffic.reset()
        for i in range(ROUTINGS):
            self.ours(inputs, False)(i)
        t = traffic
        sent = self.group.total([t.inputs, t.outputs, t.counts, t.stock_inputs, t.stock_outputs])
        inside, out, counts, stock_in, stock_out = (n // ROUTINGS for n in sent)
        seconds = self.group.seconds(layer, time_budget)
        bare = self.group.seconds(layer_of(inputs, False), time_budget)
        median, alone = percentile(seconds, 0.5), percentile(one_seconds, 0.5)
        measured = Measured(
            median_ms=median * 1e3,
            p20_ms=percentile(seconds, 0.2) * 1e3,
            p80_ms=percentile(seconds, 0.8) * 1e3,
            samples=len(seconds),
            exchange_ms=percentile(bare, 0.5) * 1e3,
            one_ms=alone * 1e3,
            efficiency=alone / median,
            bytes_in=inside if name == OURS else stock_in,
            bytes_out=out if name == OURS else stock_out,
            bytes_counts=counts,
            stock_bytes_in=stock_in,
            stock_bytes_out=stock_out,
            bit_equal=equal,
        )
        return self._row(inputs, name, Status.OK, "", measured)

    def _row(self, inputs: Inputs, name: str, status: Status, note: str, measured: Measured | None) -> EPRow:
        return EPRow(
            problem=inputs.problem,
            processes=self.group.size,
            transport=self.group.backend,
            threads=torch.get_num_threads(),
            exchange=name,
            status=status,
            note=note,
            measured=measured,
        )

    def one_process(self, inputs: Inputs) -> Layer:
        """The layer without processes, on this one's own tokens."""

        def run(i: int) -> Tensor:
            call = inputs.call(i)
            return self._experts(inputs, self.whole, call.hidden_states, call.top_k_index, call.top_k_weights)

        return run

    def ours(self, inputs: Inputs, works: bool) -> Layer:
        """The layer by ``Exchange``; where it does not work, its experts' rows are whatever memory holds."""
        problem, scales = inputs.problem, inputs.input_scales
        wire = Wire(
            hidden=problem.shape.hidden,
            dtype=problem.dtype,
            activation=problem.scheme.activation,
            input_scale=None if scales is None else scales[0],
        )
        group = self.group.mesh.get_group("ep")
        exchange = Exchange(group=group, experts=self.each, wire=wire, sums=self.backend.sums)

        def experts(rows: Tensor, expert: Tensor) -> Tensor:
            if not works:
                return torch.empty(rows.shape, dtype=exchange.sums, device=rows.device)
            ones = torch.ones(len(rows), 1, device=rows.device)
            return self._experts(inputs, self.share, rows, expert.unsqueeze(1), ones, exchange.sums)

        def run(i: int) -> Tensor:
            call = inputs.call(i)
            x, ids, weights = call.hidden_states, call.top_k_index, call.top_k_weights
            return exchange(x, ids, weights, experts, self.backend.load("sum_slots"))

        return run

    def stock(self, inputs: Inputs, works: bool) -> Layer:
        """The layer by Transformers' own exchange, with our experts; its rows are bf16 both ways."""
        from transformers.distributed.expert_parallel import AllToAllEP

        def experts(rows: Tensor, expert: Tensor, weights: Tensor) -> Tensor:
            return self._experts(inputs, self.share, rows, expert, weights) if works else rows

        mesh = self.group.mesh
        module = SimpleNamespace(forward=experts, num_experts=self.each)
        exchange = AllToAllEP(module, mesh["ep"], mesh["tp"])

        def run(i: int) -> Tensor:
            call = inputs.call(i)
            y: Tensor = exchange(call.hidden_states, call.top_k_index, call.top_k_weights)
            return y.to(call.hidden_states.dtype)

        return run

    def _experts(
        self,
        inputs: Inputs,
        experts: PreparedExperts,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        problem = inputs.problem
        return fused_experts(
            x,
            experts,
            None,
            ids,
            weights,
            activation=problem.activation,
            activation_format=problem.scheme.activation,
            input_scales=inputs.input_scales,
            out_dtype=out_dtype,
        )


def why_not_stock() -> str | None:
    """Why Transformers' exchange cannot take part."""
    try:
        import transformers.distributed.expert_parallel  # noqa: F401
    except ImportError:
        return "needs transformers >= 5.23"
    return None


def _prepared(problem: Problem, weights: Weights) -> PreparedExperts:
    return prepare(
        weights.gate_up, weights.down, activation_format=problem.scheme.activation, dtype=problem.dtype, backend="auto"
    )


def _batch_invariant(group: Group) -> AbstractContextManager[Any]:
    """On a GPU the digits of a sum depend on how many tokens there are, unless that is asked for."""
    if group.kind != "cuda":
        return nullcontext()
    from mxperts.backend.gpu.paths import batch_invariant

    return batch_invariant()
