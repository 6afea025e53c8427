"""Where layers are timed: what a benchmark of layers asks of a processor or an accelerator."""

from __future__ import annotations

from mxperts.benchmark.device.base import Device, Limit, Timed
from mxperts.benchmark.device.host import Host
from mxperts.benchmark.problem import check_device

__all__ = ["Device", "Host", "Limit", "Timed", "device_of"]


def device_of(name: str) -> Device:
    """The device of this name, such as "cpu" or "cuda".

    Raises:
        ArgumentError: it is not there, or benchmarks do not run on it.
    """
    check_device(name)
    if name == "cpu":
        return Host()
    from mxperts.benchmark.device.cuda import Cuda  # nothing of CUDA is wanted on other machines

    return Cuda(name)
