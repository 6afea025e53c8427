"""MX checkpoints: what their configs say, reading, writing and inspecting them."""

from mxperts.checkpoint.config import LAYOUTS, is_mx, parse
from mxperts.checkpoint.convert import Conversion, convert_checkpoint
from mxperts.checkpoint.inspect import Inspection, inspect_checkpoint
from mxperts.checkpoint.layout import ModelScheme, Rule, TensorNames
from mxperts.checkpoint.reader import Checkpoint
from mxperts.checkpoint.writer import CheckpointWriter

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointWriter",
    "Conversion",
    "Inspection",
    "ModelScheme",
    "Rule",
    "TensorNames",
    "convert_checkpoint",
    "inspect_checkpoint",
    "is_mx",
    "parse",
]
