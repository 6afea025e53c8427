"""Quantising a checkpoint layer by layer, each fitted to what the layers before it give when they are quantised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mxperts.checkpoint import CheckpointWriter
from mxperts.checkpoint.config import parse
from mxperts.checkpoint.rewrite import Job, carried, check_space, state, write_jobs
from mxperts.checkpoint.safetensors_file import DTYPES, TensorInfo, replacing
from mxperts.errors import CheckpointError
from mxperts.formats import BlockFormat
from mxperts.integrations.transformers.layerwise import LayerwiseModel
from mxperts.quantization.calibration.layer import Texts, forward, owners, quantize_layer, quantize_linears
from mxperts.quantization.calibration.projections import Projections, Readers
from mxperts.quantization.calibration.sites import Site
from mxperts.quantization.calibration.smoothing import smooth_expert, smooth_layer
from mxperts.quantization.calibration.source import SourceModel
from mxperts.quantization.calibration.states import HiddenStates
from mxperts.quantization.leaves import WEIGHT, Leaf
from mxperts.quantization.plan import Plan
from mxperts.tensor import MXTensor

FOLDER = "calibration"
"""In ``<dst>.partial``, what only an interrupted run needs."""
_NOTES = "notes.json"


def shard_names(layers: int) -> list[str]:
    """A file for every decoder layer, and a last one for the rest."""
    return [f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors" for i in range(layers + 1)]


@dataclass(kw_only=True)
class Results:
    """Weights that are quantised and not yet written.

    Attributes:
        weights: by layer.
        few: linear layers that too few inputs came to.
    """

    weights: dict[str, MXTensor] = field(default_factory=dict)
    few: list[str] = field(default_factory=list)

    def add(self, module: str, weight: MXTensor, short: bool) -> None:
        """Keep a weight, and whether too few inputs came to it."""
        self.weights[module] = weight.to("cpu")
        if short:
            self.few.append(module)

    def take(self, leaf: Leaf, fmt: BlockFormat, projections: Projections) -> tuple[Tensor, Tensor]:
        """Codes and scales of a weight as they are stored; one that was not reached is quantised without inputs."""
        if leaf.module not in self.weights:
            for module, (weight, short) in projections.quantize([Readers(leaves=[leaf], feed=None)]).items():
                self.add(module, weight, short)
        t = self.weights.pop(leaf.module)
        return t.packed[..., : fmt.stored_size(t.k)], t.scales


class Pipeline:
    """One run, or what is left of an interrupted one.

    Args:
        dst: folder to write.
        config: the result's config.json.
        plan: what is written; its files are those of ``shard_names``.
        settings: what determines every byte of the result.
        source: the unquantised model.
        ids: the text, int64 [windows, context].
        step: windows that run at a time.
        projections: how to quantise.
        results: where ``plan`` takes weights from.
        smooth: whether to fold channel scales into norms and ``up`` projections first.
        progress: called with bytes of the source done and in total.
    """

    def __init__(
        self,
        dst: Path,
        config: Mapping[str, Any],
        *,
        plan: Plan,
        settings: Mapping[str, Any],
        source: SourceModel,
        ids: Tensor,
        step: int,
        projections: Projections,
        results: Results,
        smooth: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.model, self.config, self.plan = source, source.model, config, plan
        self.ids, self.step, self.projections, self.results = ids, step, projections, results
        self.smooth = smooth
        self.progress = progress or (lambda done, total: None)
        self.writer = CheckpointWriter(dst, {"source": state(source.checkpoint)} | dict(settings))
        self.resumed = len(self.writer.finished)
        check_space(self.writer, plan.shards)
        self.scratch = self.writer.partial / FOLDER
        hidden = self.model.model.config.get_text_config().hidden_size
        self.states = HiddenStates(self.scratch, "states", (*ids.shape, hidden), self.model.dtype)
        self.weights = {
            leaf.module: leaf.source.nbytes * leaf.shape[0] * leaf.shape[1] // leaf.source.values
            for group in source.leaves.values()
            for leaf in group
            if leaf.part == WEIGHT
        }
        self.total = sum(job.nbytes for jobs in plan.shards.values() for job in jobs)
        self.done = 0

    @torch.no_grad()
    def run(self) -> list[str]:
        """Do what is left.

        Returns:
            The linear layers that too few inputs came to.
        """
        files = shard_names(len(self.model.layers))
        self.progress(self.done, self.total)
        packed = self._packed()
        self.source.load_rest()
        for index, file in enumerate(files[:-1]):
            if file not in self.writer.finished:
                self._enter(index, files, packed)
                self._quantize(index, file)
            self._count(file)
        if files[-1] not in self.writer.finished:
            self._quantize_head(files, packed)
            write_jobs(self.writer, files[-1], self.plan.shards[files[-1]])
        self._count(files[-1])
        few = self._note()
        del packed
        shutil.rmtree(self.scratch)
        self.writer.finish(self.config, carried(self.source.checkpoint.path))
        return few

    def _enter(self, index: int, files: Sequence[str], packed: LayerwiseModel) -> None:
        """Bring the text to a layer, through the quantised layer before it."""
        if self.states.has(index):
            return
        if index == 0:
            texts = Texts(ids=self.ids, states=self.ids, step=self.step)
            with self.states.writing(0) as entering:
                for ids, _, part in texts.batches():
                    entering[part] = self.model.run(ids, 0, lambda embedded, *args, **kwargs: embedded).cpu()
            return
        if not self.states.has(index - 1):
            raise CheckpointError(
                f"{self.writer.partial} has lost what enters layer {index - 1}; delete the folder and run again"
            )
        texts = Texts(ids=self.ids, states=self.states.entering(index - 1), step=self.step)
        layer = packed.load_layer(index - 1, self._written(files[index - 1]))
        with self.states.writing(index) as entering:
            for ids, states, part in texts.batches():
                entering[part] = forward(self.model, index - 1, ids, states, layer).cpu()
        packed.drop_layer(index - 1)

    def _quantize(self, index: int, file: str) -> None:
        """Quantise a layer and write its file."""
        before = self.done
        self.source.load_layer(index, self.projections)
        texts = Texts(ids=self.ids, states=self.states.entering(index), step=self.step)
        smooth = None
        if self.smooth:
            smooth_layer(self.source, index, texts, self.projections)
            smooth = partial(smooth_expert, source=self.source, projections=self.projections)
        leaves = self.source.leaves[index]
        quantize_layer(self.model, index, leaves, texts, self.projections, self.scratch, smooth, self._add)
        self._note()
        self.done = before
        write_jobs(self.writer, file, self.plan.shards[file])
        self.source.drop_layer(index)

    def _quantize_head(self, files: Sequence[str], packed: LayerwiseModel) -> None:
        """Quantise the output layer, which reads what the last layer gives, if it is to be quantised."""
        head, owned = self.model.model.get_output_embeddings(), None
        for name, leaves in owners(self.model, self.source.leaves[None], self.projections).items():
            if self.model.model.get_submodule(name) is head:
                owned = {name: leaves}
        if owned is not None:
            count, before = len(self.model.layers), self.done
            self._enter(count, files, packed)
            texts = Texts(ids=self.ids, states=self.states.entering(count), step=self.step)
            site = Site(modules=tuple(owned), is_experts=False)
            quantize_linears(self.model, count, texts, site, owned, self.projections, self._add)
            self.done = before

    def _add(self, module: str, weight: MXTensor, short: bool) -> None:
        self.results.add(module, weight, short)
        self.done += self.weights[module]
        self.progress(self.done, self.total)

    def _count(self, file: str) -> None:
        self.done += sum(job.nbytes for job in self.plan.shards[file])
        self.progress(self.done, self.total)

    def _packed(self) -> LayerwiseModel:
        """The quantised model, of which no tensor is there yet."""
        scheme = parse(self.config)
        assert scheme is not None
        headers = {info.name: info for file in self.plan.shards for info in self._headers(file)}
        return LayerwiseModel(
            self.source.checkpoint.path,
            dtype=self.model.dtype,
            device=self.model.device,
            packed=(scheme, headers),
            backend=self.projections.backend,
            trust_remote_code=self.model.trust_remote_code,
        )

    def _headers(self, file: str) -> list[TensorInfo]:
        dtypes = {dtype: name for name, dtype in DTYPES.items()}
        jobs: Sequence[Job] = self.plan.shards[file]
        return [
            TensorInfo(name=e.name, dtype=dtypes[e.dtype], shape=e.shape, file=self.writer.partial / file)
            for job in jobs
            for e in job.outputs
        ]

    def _written(self, file: str) -> dict[str, Tensor]:
        handle: Any = safe_open(self.writer.partial / file, framework="pt")
        return {info.name: handle.get_tensor(info.name) for info in self._headers(file)}

    def _note(self) -> list[str]:
        """Keep, or read back, the names of layers that too few inputs came to."""
        file = self.scratch / _NOTES
        noted = json.loads(file.read_bytes()) if file.exists() else []
        few = list(dict.fromkeys([*noted, *self.results.few]))
        with replacing(file) as f:
            f.write(json.dumps(few).encode())
        return few
