"""From what was asked for to a ``Pipeline``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.config import layout_of
from mxperts.checkpoint.safetensors_file import DTYPES, TensorInfo
from mxperts.formats import BlockFormat, Scheme
from mxperts.integrations.transformers.layerwise import LayerwiseModel
from mxperts.quantization.calibration.pipeline import Pipeline, Results, shard_names
from mxperts.quantization.calibration.projections import Projections
from mxperts.quantization.calibration.text import Calibration, fingerprint, windows
from mxperts.quantization.choice import Methods
from mxperts.quantization.edits import EditedCheckpoint
from mxperts.quantization.leaves import WEIGHT, Leaf, leaves
from mxperts.quantization.plan import Numbers, Plan, Source, make_plan


class CalibratedRun:
    """What is to be done with a checkpoint and a text.

    Args:
        checkpoint: the source.
        calibration: the text.
        methods: how codes and scales are chosen.
        numbers: where scales start from.
        format: the layout to write.

    Raises:
        ArgumentError: the text is missing, too short or cannot be read.
        BackendUnavailable: too old a Transformers.
    """

    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, methods: Methods, numbers: Numbers, format: str
    ) -> None:
        self._checkpoint, self._calibration, self._numbers, self._format = checkpoint, calibration, numbers, format
        self._found = leaves(checkpoint, layout_of(format).NAMES)
        self._model = LayerwiseModel(
            checkpoint.path,
            dtype=_dtype(self._found),
            device=torch.device(calibration.device),
            trust_remote_code=calibration.trust_remote_code,
        )
        self._ids = windows(calibration, checkpoint.path, self._model.model.config)
        self._edits = EditedCheckpoint(checkpoint, self._found)
        self._results = Results()
        self._projections = Projections(
            methods=methods,
            schemes={},
            numbers=numbers,
            values=self._edits.leaf,
            device=self._model.device,
            backend=calibration.backend,
            memory=calibration.memory,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What of the text determines every byte of the result."""
        return {"calibration text": fingerprint(self._ids)}

    def plan(self, scheme: Scheme, exclude: Sequence[str], layer_schemes: Mapping[str, Scheme]) -> Plan:
        """What will be written: see ``make_plan``."""
        files = shard_names(len(self._model.layers))

        def file(info: TensorInfo) -> str:
            layer = self._model.layer_of(info.name)
            return files[-1 if layer is None else layer]

        def quantize(leaf: Leaf, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
            return self._results.take(leaf, fmt, self._projections)

        plan = make_plan(
            self._checkpoint,
            scheme,
            exclude=exclude,
            layer_schemes=layer_schemes,
            numbers=self._numbers,
            format=self._format,
            source=Source(file=file, tensor=self._edits.tensor, leaf=self._edits.leaf, quantize=quantize),
        )
        self._projections.schemes.update(plan.schemes)
        return plan

    def write(
        self,
        dst: Path,
        config: Mapping[str, Any],
        plan: Plan,
        settings: Mapping[str, Any],
        progress: Callable[[int, int], None] | None,
    ) -> tuple[int, list[str]]:
        """Do it: see ``Pipeline``.

        Returns:
            How many files an earlier run had finished, and the linear layers that too few inputs came to.
        """
        pipeline = Pipeline(
            self._checkpoint,
            dst,
            config,
            plan=plan,
            settings=settings,
            model=self._model,
            ids=self._ids,
            step=max(1, self._calibration.batch // self._ids.shape[1]),
            edits=self._edits,
            found=self._found,
            projections=self._projections,
            results=self._results,
            progress=progress,
        )
        few = pipeline.run()
        return pipeline.resumed, few


def _dtype(found: Mapping[str, Sequence[Leaf]]) -> torch.dtype:
    """That of most linear layers."""
    sizes: dict[torch.dtype, int] = {}
    for group in found.values():
        for leaf in group:
            if leaf.part == WEIGHT:
                dtype = DTYPES[leaf.source.dtype]
                sizes[dtype] = sizes.get(dtype, 0) + leaf.shape[0] * leaf.shape[1]
    return max(sizes, key=lambda dtype: sizes[dtype])
