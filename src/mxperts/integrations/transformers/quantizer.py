"""The quantiser that Transformers calls while it loads a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.reader import CONFIG
from mxperts.errors import ArgumentError, BackendUnavailable
from mxperts.integrations.transformers.config import MXConfig
from mxperts.integrations.transformers.experts import (
    IMPLEMENTATION,
    Apart,
    Stacked,
    finish_experts,
    mx_experts,
    needs_preparing,
    prepare_weights,
)
from mxperts.integrations.transformers.linear import StoredLinear
from mxperts.integrations.transformers.on_the_fly import (
    QuantizeOnLoad,
    Target,
    prepare_for_quantization,
    saving_conversions,
)
from mxperts.integrations.transformers.parameters import check_complete, keep_bytes
from mxperts.integrations.transformers.prepacked import prepare_for_packed
from mxperts.integrations.transformers.unpacked import Unpacked, unpack

ON_THE_FLY_SINCE = "5.23"
"""Earlier versions of Transformers cast a weight to its parameter's uint8 before they let a quantiser see it."""


EXPERT_PARALLEL_SINCE = "5.23"
"""See ``has_expert_parallel``."""


class MXQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives modules packed parameters before loading, and says which stored tensors they are made of."""

    requires_calibration = False
    # Suffixes of parameters that are sharded as the one they belong to is.
    serialized_names = {"": ["", "_packed", "_blocks", "_scale", "_scales"]}  # noqa: RUF012 - the base class's form

    def __init__(self, quantization_config: MXConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.converters: list[WeightConverter] = []
        self.to_quantize: dict[str, Target] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.has_only_part = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what this version of Transformers cannot do.

        Raises:
            BackendUnavailable: on-the-fly quantisation with a version that would do it wrong.
        """
        if not self.pre_quantized and Version(transformers.__version__) < Version(ON_THE_FLY_SINCE):
            raise BackendUnavailable(
                f"quantising while loading needs transformers >= {ON_THE_FLY_SINCE}, not {transformers.__version__}, "
                "which casts weights to uint8 first. Upgrade, or quantise the checkpoint with `mxperts quantize`"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config: MXConfig = self.quantization_config
        if self.pre_quantized:
            tensors = Checkpoint.open(_folder(model, checkpoint_files or [])).tensors
            self.converters = prepare_for_packed(model, tensors, config.scheme, config.backend)
        else:
            self.converters, self.to_quantize = prepare_for_quantization(model, config.scheme, config.backend)
        if getattr(model.config, "distributed_config", None) is not None:
            expert_parallel().check(model)
        model.set_experts_implementation(IMPLEMENTATION)
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: Any | None = None
    ) -> list[WeightTransform]:
        """Our conversions before the model's own; Transformers takes the first that matches a tensor's name."""
        return [*self.converters, *weight_conversions] if self.pre_quantized else weight_conversions

    def get_new_dtype(self, converter: object, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Numbers are cast to the model's dtype, codes and scales stay the bytes they are."""
        if hasattr(param, "get_dtype"):
            return dtype if param.get_dtype() in ("F64", "F32", "F16", "BF16") else None
        return dtype if param.is_floating_point() and param.element_size() > 1 else None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be quantised while it is loaded."""
        return param_name in self.to_quantize

    def get_quantize_ops(self) -> ConversionOps:
        """The conversion that quantises one parameter."""
        return QuantizeOnLoad(self.to_quantize)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, parameter in model.named_parameters():
            # Transformers < 5.23 does not cast a tensor that it renames.
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
        check_complete(model)
        if all(parameter.is_meta for parameter in model.parameters()):
            return model  # loaded for its names and shapes, with device_map="meta"; there are no numbers to finish
        if getattr(model.config, "distributed_config", None) is not None:
            self.has_only_part = expert_parallel().keep_local(model)
        for module in model.modules():
            finish_loading(module)
        _prepare_experts(model)
        if not self.pre_quantized:
            model._weight_conversions = saving_conversions(model._weight_conversions, self.converters)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``save_pretrained`` works; it writes the tensors as they were read.

        Raises:
            ArgumentError: this process has only some of the experts.
        """
        if self.has_only_part:
            raise ArgumentError("each process has only some of the experts; load the model in one process to save it")
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the packed weights can be trained."""
        return False


def has_expert_parallel() -> bool:
    """Whether this version of Transformers spreads experts in a way that implementations can be registered for."""
    return Version(transformers.__version__) >= Version(EXPERT_PARALLEL_SINCE)


def expert_parallel() -> ModuleType:
    """Our part of Transformers' expert parallelism.

    Raises:
        BackendUnavailable: this version of Transformers has another, or none.
    """
    if not has_expert_parallel():
        raise BackendUnavailable(
            f"a model on several processes needs transformers >= {EXPERT_PARALLEL_SINCE}, not "
            f"{transformers.__version__}. Upgrade, or leave distributed_config out and load it in one process"
        )
    from mxperts.integrations.transformers import expert_parallel

    return expert_parallel


def _folder(model: Any, files: Sequence[str]) -> Path:
    """Where the checkpoint is; its index may not say otherwise."""
    named = Path(model.config.name_or_path)
    return named if (named / CONFIG).is_file() or not files else Path(files[0]).parent


def finish_loading(module: Any) -> None:
    """What can be done only when a module's parameters are there."""
    if isinstance(getattr(module, "mxperts", None), Stacked | Apart):
        keep_bytes(module)
        finish_experts(module)
    elif isinstance(module, StoredLinear):
        keep_bytes(module)
        module.finish()
    elif isinstance(getattr(module, "mxperts_weight", None), Unpacked):
        unpack(module)


def _prepare_experts(model: Any) -> None:
    """Bring experts to the layout of the backend that will run them; of one layer at a time there are two copies."""
    modules = [module for _, module in mx_experts(model) if needs_preparing(module, model.dtype)]
    if modules:
        for module in logging.tqdm(modules, desc="Preparing experts"):
            prepare_weights(module, model.dtype)
