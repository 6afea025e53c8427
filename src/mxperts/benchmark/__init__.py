"""How fast layers and models run, next to the machine's limits, the dequantise-first baseline and other software."""

from mxperts.benchmark.contenders import PEERS, Contender, choose
from mxperts.benchmark.layer import bench_layer
from mxperts.benchmark.problem import SHAPES, Problem, Shape, parse_shape
from mxperts.benchmark.row import LayerRow, Measurement, Status
from mxperts.benchmark.timing import Plan

__all__ = [
    "PEERS",
    "SHAPES",
    "Contender",
    "LayerRow",
    "Measurement",
    "Plan",
    "Problem",
    "Shape",
    "Status",
    "bench_layer",
    "choose",
    "parse_shape",
]
