"""What processes send one another, counted where it is sent."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(kw_only=True)
class Traffic:
    """Bytes that this process has sent to others; what stays in it is not counted.

    Attributes:
        exchanges: layers that were run.
        counts: how many rows there are for each expert.
        inputs: rows of hidden states, one a pair of token and expert.
        outputs: the experts' rows, back to where the tokens are.
        gathered: results, to processes that hold the same batch.
        stock_inputs, stock_outputs: of the same rows, what an exchange in the dtype of hidden states sends.
    """

    exchanges: int = 0
    counts: int = 0
    inputs: int = 0
    outputs: int = 0
    gathered: int = 0
    stock_inputs: int = 0
    stock_outputs: int = 0

    def reset(self) -> None:
        """Count from zero."""
        for field in fields(self):
            setattr(self, field.name, 0)

    def record(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


traffic = Traffic()
"""Of this process since it began, or since ``traffic.reset()``."""
