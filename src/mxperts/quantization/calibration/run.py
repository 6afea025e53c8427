"""From what was asked for to a ``Pipeline``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxperts.checkpoint import Checkpoint, CheckpointWriter, Rule
from mxperts.checkpoint.config import layout_of, text_config
from mxperts.checkpoint.rewrite import state
from mxperts.checkpoint.rules import check_expressible
from mxperts.checkpoint.safetensors_file import TensorInfo
from mxperts.formats import BlockFormat, Scheme
from mxperts.quantization.calibration.pipeline import FOLDER, Pipeline, Results, shard_names
from mxperts.quantization.calibration.projections import Projections
from mxperts.quantization.calibration.sensitivity import CANDIDATES, Sensitivity, check_bits
from mxperts.quantization.calibration.source import SourceModel
from mxperts.quantization.calibration.text import Calibration, fingerprint, windows
from mxperts.quantization.choice import Methods
from mxperts.quantization.leaves import WEIGHT, Leaf, leaves
from mxperts.quantization.plan import Numbers, Plan, Source, make_plan, packed_shapes


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
        self._source = SourceModel(checkpoint, self._found, calibration)
        self._ids = windows(calibration, checkpoint.path, self._source.model.model.config)
        self._results = Results()
        self._step = max(1, calibration.batch // self._ids.shape[1])
        self._projections = Projections(
            methods=methods,
            schemes={},
            numbers=numbers,
            values=self._source.edits.leaf,
            device=self._source.model.device,
            backend=calibration.backend,
            memory=calibration.memory,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What of the text determines every byte of the result."""
        return {"calibration text": fingerprint(self._ids)}

    def plan(
        self,
        scheme: Scheme,
        exclude: Sequence[str],
        layer_schemes: Mapping[str, Scheme],
        chosen: Mapping[str, Scheme] | None = None,
    ) -> Plan:
        """What will be written: see ``make_plan``."""
        files = shard_names(len(self._source.model.layers))

        def file(info: TensorInfo) -> str:
            layer = self._source.model.layer_of(info.name)
            return files[-1 if layer is None else layer]

        def quantize(leaf: Leaf, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
            return self._results.take(leaf, fmt, self._projections)

        edits = self._source.edits
        plan = make_plan(
            self._checkpoint,
            scheme,
            exclude=exclude,
            layer_schemes=layer_schemes,
            numbers=self._numbers,
            format=self._format,
            source=Source(file=file, tensor=edits.tensor, leaf=edits.leaf, quantize=quantize),
            chosen=chosen,
        )
        self._projections.schemes.update(plan.schemes)
        return plan

    def allocate(
        self,
        dst: Path,
        scheme: Scheme,
        bits: float,
        settings: Mapping[str, Any],
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Scheme]:
        """Measure in which formats the layers that ``plan`` gave this scheme lose least: see ``Sensitivity``.

        Args:
            dst: the folder to be; what is measured is kept in ``<dst>.partial``.
            scheme: of the layers to choose for.
            bits: a weight on average, scales included.
            settings: as for ``write``.
            progress: called with weights measured and in total.

        Returns:
            The scheme of each of these.
        """
        schemes = self._projections.schemes
        free = [
            leaf
            for index, leaves in self._source.leaves.items()
            if index is not None
            for leaf in leaves
            if leaf.part == WEIGHT and schemes[leaf.module] == scheme
        ]
        check_bits(bits, scheme, free)
        model_type = text_config(self._checkpoint.config).get("model_type")
        for fmt in CANDIDATES:
            candidate = Scheme.of(fmt, scheme.activation)
            check_expressible(self._format, [Rule(pattern=leaf.module, scheme=candidate) for leaf in free], model_type)
            for leaf in free:
                packed_shapes(leaf, fmt, self._numbers.rotation)
        writer = CheckpointWriter(dst, {"source": state(self._checkpoint)} | dict(settings))
        sizes = {leaf.module: leaf.shape[0] * leaf.shape[1] for leaf in free}
        done = 0

        def advance(module: str | None = None) -> None:
            nonlocal done
            done += 0 if module is None else sizes[module]
            if progress is not None:
                progress(done, sum(sizes.values()))

        advance()
        with torch.no_grad():
            sensitivity = Sensitivity(
                self._source,
                self._ids,
                self._step,
                self._projections,
                free=frozenset(sizes),
                scratch=writer.partial / FOLDER,
                advance=advance,
            )
            chosen = sensitivity.allocate(bits)
        self._source.renew()
        return chosen

    def write(
        self,
        dst: Path,
        config: Mapping[str, Any],
        plan: Plan,
        settings: Mapping[str, Any],
        smooth: bool,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[int, list[str]]:
        """Do it: see ``Pipeline``.

        Returns:
            How many files an earlier run had finished, and the linear layers that too few inputs came to.
        """
        pipeline = Pipeline(
            dst,
            config,
            plan=plan,
            settings=settings,
            source=self._source,
            ids=self._ids,
            step=self._step,
            projections=self._projections,
            results=self._results,
            smooth=smooth,
            progress=progress,
        )
        few = pipeline.run()
        return pipeline.resumed, few
