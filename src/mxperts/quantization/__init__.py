"""From an unquantised checkpoint to an MX checkpoint."""

from mxperts.quantization.checkpoint import DEFAULT_EXCLUDE, Summary, quantize_checkpoint

__all__ = ["DEFAULT_EXCLUDE", "Summary", "quantize_checkpoint"]
