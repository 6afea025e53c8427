"""The small mixture-of-experts language model that comes with mxperts, and the texts to try it on.

It is a Qwen3-MoE model trained on Shakespeare; ``training.json`` in its folder says how. It is there to have something
real to quantise, evaluate and run within seconds, not to write well.
"""

from __future__ import annotations

from pathlib import Path

from mxperts.errors import MxpertsError

_FOLDER = Path(__file__).parent / "shakespeare"


def shipped() -> Path:
    """Folder of the model: an unquantised bf16 checkpoint with its tokenizer.

    Raises:
        MxpertsError: this installation does not have it.
    """
    _existing("model.safetensors")
    return _FOLDER


def is_shipped(path: str | Path) -> bool:
    """Whether ``path`` is the model's folder."""
    return Path(path).resolve() == _FOLDER.resolve()


def heldout() -> Path:
    """Text that the model was not trained on, for evaluation.

    Raises:
        MxpertsError: this installation does not have it.
    """
    return _existing("heldout.txt")


def calibration() -> Path:
    """Text that the model was trained on, for calibration.

    Raises:
        MxpertsError: this installation does not have it.
    """
    return _existing("calibration.txt")


def _existing(name: str) -> Path:
    file = _FOLDER / name
    if not file.is_file():
        raise MxpertsError(
            f"the model that comes with mxperts is incomplete: {file} is missing; reinstall mxperts, or name a model"
        )
    return file
