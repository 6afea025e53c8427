"""What can take part in a benchmark: the baseline, mxperts' backends, and peers that are found if installed."""

from __future__ import annotations

from collections.abc import Sequence

from mxperts.benchmark.contenders.base import Contender
from mxperts.benchmark.contenders.dense import Dense
from mxperts.benchmark.contenders.dequantize_first import DequantizeFirst
from mxperts.benchmark.contenders.ggml import GgmlExperts
from mxperts.benchmark.contenders.packed import Packed, default_backends
from mxperts.benchmark.contenders.vllm_cpu import VllmCpu
from mxperts.errors import ArgumentError, MxpertsError
from mxperts.formats.naming import suggest

PEERS: dict[str, type[Contender]] = {peer.name: peer for peer in (Dense, GgmlExperts, VllmCpu)}
"""Other people's ways to run a layer, by name."""
INSTALLED = "installed"
"""What stands for every peer that is there."""

__all__ = ["INSTALLED", "PEERS", "Contender", "DequantizeFirst", "choose", "default_backends"]


def choose(backends: Sequence[str] | None, peers: Sequence[str], *, baseline: bool = True) -> list[Contender]:
    """The contenders of a benchmark, the baseline first.

    Args:
        backends: of mxperts; None takes those that are built for speed.
        peers: names; "installed" takes every peer that is there, and a peer that is named must be there.
        baseline: whether to take the dequantise-first baseline.

    Raises:
        ArgumentError: unknown peer.
        BackendUnavailable: a backend that cannot run here.
        MxpertsError: a named peer is not installed.
    """
    chosen: list[Contender] = [DequantizeFirst()] if baseline else []
    chosen += [Packed(name) for name in dict.fromkeys(default_backends() if backends is None else backends)]
    for name in dict.fromkeys(peers):
        if name == INSTALLED:
            chosen += [peer() for other, peer in PEERS.items() if other not in peers]
            continue
        if name not in PEERS:
            raise ArgumentError(f"unknown peer {name!r}; {suggest(name, [INSTALLED, 'none', *PEERS])}")
        if why_not := (peer := PEERS[name]()).unavailable():
            raise MxpertsError(f"peer {name!r} cannot run here: {why_not}")
        chosen.append(peer)
    return chosen
