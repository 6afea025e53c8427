"""What can take part in a benchmark: the baseline, mxperts' backends, and peers that are found if installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mxperts.benchmark.contenders.base import Contender
from mxperts.benchmark.contenders.dense import Dense
from mxperts.benchmark.contenders.dequantize_first import DequantizeFirst
from mxperts.benchmark.contenders.ggml import GgmlExperts
from mxperts.benchmark.contenders.grouped import DequantizeFirstGrouped, GroupedDense
from mxperts.benchmark.contenders.humming import Humming
from mxperts.benchmark.contenders.packed import Packed, default_backends
from mxperts.benchmark.contenders.triton_kernels import TritonKernels
from mxperts.benchmark.contenders.vllm_cpu import VllmCpu
from mxperts.errors import ArgumentError, MxpertsError
from mxperts.formats.naming import suggest

Make = Callable[[], Contender]

BASELINES: Mapping[str, Make] = {"cpu": DequantizeFirst, "cuda": DequantizeFirstGrouped}
"""The dequantise-first baseline, by kind of device."""
PEERS: Mapping[str, Make] = {peer.name: peer for peer in (Dense, GgmlExperts, VllmCpu)}
"""Other people's ways to run a layer on a processor, by name."""
CUDA_PEERS: Mapping[str, Make] = {
    "bf16": GroupedDense,
    "humming": Humming,
    "humming-fp8": partial(Humming, group=0),
    "humming-fp8-32": partial(Humming, group=32),
    "triton-kernels": TritonKernels,
}
"""Other people's ways to run a layer on a GPU, by name."""
INSTALLED = "installed"
"""What stands for every peer that is there."""

__all__ = ["CUDA_PEERS", "INSTALLED", "PEERS", "Contender", "DequantizeFirst", "choose", "default_backends"]


def choose(
    backends: Sequence[str] | None, peers: Sequence[str], *, baseline: bool = True, device: str = "cpu"
) -> list[Contender]:
    """The contenders of a benchmark, the baseline first.

    Args:
        backends: of mxperts; None takes those that are built for speed; ":canonical" after a name has it run on weights
            as they are stored.
        peers: names; "installed" takes every peer that is there, and a peer that is named must be there.
        baseline: whether to take the dequantise-first baseline.
        device: where they are to run.

    Raises:
        ArgumentError: unknown peer, or one that does not run on the device.
        BackendUnavailable: a backend that cannot run here.
        MxpertsError: a named peer is not installed.
    """
    kind = device.partition(":")[0]
    here, elsewhere = (CUDA_PEERS, PEERS) if kind == "cuda" else (PEERS, CUDA_PEERS)
    chosen: list[Contender] = [BASELINES[kind]()] if baseline else []
    named = default_backends(device) if backends is None else backends
    chosen += [Packed(name, device) for name in dict.fromkeys(named)]
    for name in dict.fromkeys(peers):
        if name == INSTALLED:
            chosen += [peer() for other, peer in here.items() if other not in peers]
            continue
        if name not in here:
            if name in elsewhere:
                raise ArgumentError(f"peer {name!r} does not run on {device!r}; there: {', '.join(here)}")
            raise ArgumentError(f"unknown peer {name!r}; {suggest(name, [INSTALLED, 'none', *here])}")
        if why_not := (peer := here[name]()).unavailable():
            raise MxpertsError(f"peer {name!r} cannot run here: {why_not}")
        chosen.append(peer)
    return chosen
