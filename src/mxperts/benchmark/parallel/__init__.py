"""How a layer scales over processes: times, bytes on the wire, and whether the bits are those of one process."""

from mxperts.benchmark.parallel.group import Group
from mxperts.benchmark.parallel.row import LEFT, EPRow, ep_table
from mxperts.benchmark.parallel.run import OURS, bench_ep

__all__ = ["LEFT", "OURS", "EPRow", "Group", "bench_ep", "ep_table"]
