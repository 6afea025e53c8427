"""Opening a checkpoint folder: everything is checked by its headers before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mxperts.checkpoint.config import parse
from mxperts.checkpoint.layout import ModelScheme
from mxperts.checkpoint.safetensors_file import TensorInfo, read_header
from mxperts.checkpoint.stored import Complain, MXModule, mx_modules, refuse, stored_tensor
from mxperts.errors import CheckpointError
from mxperts.tensor import MXTensor

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with config.json and safetensors files, checked and lazily read; ``Checkpoint.open`` makes one.

    Attributes:
        path: the folder.
        config: its config.json.
        scheme: which scheme every module has; None if this is no MX checkpoint.
        tensors: the headers of all tensors by name, file by file, in the order of their data.
        mx: the quantised modules by name.
    """

    path: Path
    config: Mapping[str, Any]
    scheme: ModelScheme | None
    tensors: Mapping[str, TensorInfo]
    mx: Mapping[str, MXModule]
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, complain: Complain = refuse) -> Checkpoint:
        """Read and check config, index and the headers of all files; no data.

        Args:
            path: the folder.
            complain: told what is wrong with single tensors, which are then left out of ``mx``.

        Raises:
            CheckpointError: something is missing, damaged, contradictory or unsupported, single tensors included if
                ``complain`` is left out; the message says where.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is no folder; a checkpoint is a folder with {CONFIG} and safetensors files")
        config = _read_json(path / CONFIG)
        scheme = parse(config)
        tensors = _tensors(path)
        mx = {} if scheme is None else mx_modules(tensors, scheme, config, complain)
        return cls(path=path, config=config, scheme=scheme, tensors=tensors, mx=mx)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.tensors)

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape, bytes and file of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self.tensors[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped from its file: nothing is copied, and pages are read when they are used.

        Raises:
            CheckpointError: there is no such tensor.
        """
        file = self.info(name).file
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._handles[file].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Let go of the mapped files; a tensor that is still in use keeps its own."""
        self._handles.clear()

    def mx_tensor(self, module: str) -> MXTensor:
        """The weight of a quantised module, mapped from its file.

        Copied are only codes whose last block is not full, which are padded, and scales that several rows share.

        Raises:
            CheckpointError: there is no such quantised module.
        """
        if module not in self.mx:
            raise CheckpointError(f"{self.path} has no quantised module {module}")
        m = self.mx[module]
        codes, scales = self.tensor(m.codes.name), self.tensor(m.scales.name)
        return stored_tensor(codes, scales, m.format, m.k, block_rows=m.block_rows)

    def mx_tensors(self) -> Iterator[tuple[str, MXTensor]]:
        """Name and weight of every quantised module, one after the other."""
        for module in self.mx:
            yield module, self.mx_tensor(module)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.exists():
            pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
            also = f"; {', '.join(pickles)} may hold pickled code and are not read" if pickles else ""
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{also}")
        return read_header(single)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    files = sorted(set(weight_map.values()))
    for file in files:
        _check_shard_name(index, file)
    if single.exists() and files != [SINGLE]:
        raise CheckpointError(f"{folder} has {SINGLE}, but {INDEX} names {', '.join(files)}; remove one of them")
    headers = {}
    for file in files:
        if not (folder / file).exists():
            raise CheckpointError(f"{index} names {file}, which is missing from {folder}")
        headers[file] = read_header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{index} says that {name} is in {file}, but it is not")
    # a tensor in a shard but not in the index does not belong to the checkpoint
    return {name: info for file in files for name, info in headers[file].items() if weight_map.get(name) == file}


def _check_shard_name(index: Path, file: str) -> None:
    plain = file == PurePosixPath(file).name == PureWindowsPath(file).name and file not in ("", ".", "..")
    if not plain or not file.endswith(".safetensors"):
        raise CheckpointError(f"{index} names the file {file!r}; expected the name of a .safetensors file beside it")
