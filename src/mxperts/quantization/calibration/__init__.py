"""Quantising with a text: running the model over it layer by layer, and fitting every weight to its inputs."""

from mxperts.quantization.calibration.text import Calibration

__all__ = ["Calibration"]
