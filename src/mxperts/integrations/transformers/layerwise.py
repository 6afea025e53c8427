"""A Transformers model of which one decoder layer at a time is in memory.

Needs transformers >= 5.23, whose loader of single tensors it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging

from mxperts.checkpoint import ModelScheme
from mxperts.checkpoint.safetensors_file import TensorInfo
from mxperts.errors import BackendUnavailable, CheckpointError
from mxperts.integrations.transformers.config import MXConfig
from mxperts.integrations.transformers.experts import IMPLEMENTATION
from mxperts.integrations.transformers.prepacked import prepare_for_packed
from mxperts.integrations.transformers.quantizer import MXQuantizer, finish_loading

SINCE = "5.23"
"""Earlier versions of Transformers load single tensors in another way."""


class LayerwiseModel:
    """A causal language model without memory, into which single tensors are loaded.

    Args:
        path: folder of the checkpoint whose config.json says what the model is.
        dtype: of its parameters.
        device: where what is loaded goes.
        packed: for the quantised model: what its config says, and the headers of all its tensors.
        backend: what runs quantised modules.
        trust_remote_code: allow the checkpoint's own Python code to run.

    Attributes:
        model: the Transformers model, on the meta device where nothing is loaded.
        prefix: what parameters of decoder layer i begin with, up to the i.
        layers: the decoder layers.

    Raises:
        BackendUnavailable: too old a Transformers.
        CheckpointError: the model has no decoder layers that can be told.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        packed: tuple[ModelScheme, Mapping[str, TensorInfo]] | None = None,
        backend: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        if Version(transformers.__version__) < Version(SINCE):
            raise BackendUnavailable(
                f"calibration needs transformers >= {SINCE}, not {transformers.__version__}; upgrade, or quantise "
                "without a text, with --method rtn"
            )
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model.eval().requires_grad_(False)
        self.dtype, self.device, self.trust_remote_code = dtype, device, trust_remote_code
        self._names = dict(self.model.state_dict())
        self._quantizer: MXQuantizer | None = None
        conversions = get_model_conversion_mapping(self.model)
        if packed is not None:
            scheme, tensors = packed
            self._quantizer = MXQuantizer(MXConfig(scheme, backend), pre_quantized=True)
            self._quantizer.converters = prepare_for_packed(self.model, tensors, scheme, backend)
            self.model.set_experts_implementation(IMPLEMENTATION)
            conversions = self._quantizer.update_weight_conversions(conversions, self.model)
        self._conversions = conversions
        self.prefix, self.layers = _decoder_layers(self.model)
        self._fill_buffers()

    def target(self, tensor: str) -> str:
        """The parameter that a tensor of the checkpoint becomes, or becomes a part of."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        name: str = rename_source_key(tensor, renamings, converters, self.model.base_model_prefix, self._names)[0]
        if name not in self._names and tensor in self._names:
            return tensor
        return name

    def layer_of(self, tensor: str) -> int | None:
        """Which decoder layer a tensor of the checkpoint belongs to; None for what belongs to none."""
        number, dot, _ = self.target(tensor).removeprefix(self.prefix).partition(".")
        known = self.target(tensor).startswith(self.prefix) and dot and number.isdecimal()
        return int(number) if known and int(number) < len(self.layers) else None

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors by the checkpoint's names; on the CPU, parameters share their memory where nothing is converted.

        Raises:
            CheckpointError: a tensor has another shape than the model's parameter.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            ignore_mismatched_sizes=True,  # told below
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": self.device},
            hf_quantizer=self._quantizer,
            weight_mapping=self._conversions,
        )
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config)
        for name, found, expected in info.mismatched_keys:
            raise CheckpointError(f"{name} is {list(found)}; the model has {list(expected)} there")
        for name, message in info.conversion_errors.items():
            raise CheckpointError(f"{name} cannot be loaded: {message}")

    def load_layer(self, index: int, tensors: Mapping[str, Tensor], *, without: tuple[str, ...] = ()) -> nn.Module:
        """Load all of a decoder layer but the modules whose names begin with one of ``without``.

        Raises:
            CheckpointError: a parameter has no tensor, or one of another shape.
        """
        self.load(tensors)
        layer = self.layers[index]
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            whole = f"{self.prefix}{index}.{name}"
            if value.is_meta and not whole.startswith(without):
                raise CheckpointError(f"the checkpoint has no tensor for {whole}")
        if self._quantizer is not None:
            for module in layer.modules():
                finish_loading(module)
        return layer

    def drop_layer(self, index: int) -> None:
        """Free a decoder layer's memory for good; its attributes stay, for the model looks at them."""
        layer = self.layers[index]
        for held in (layer._modules, layer._parameters, layer._buffers):
            held.clear()

    def run(self, ids: Tensor, index: int, layer: Callable[..., Tensor]) -> Tensor:
        """What a decoder layer is called with and gives, in the model's own forward pass up to it.

        Masks, positions and whatever else layers are given come from the model's own code; the layers before are not
        run.

        Args:
            ids: int64 [B, S].
            index: of the layer. The number of layers stands for what comes after the last: that is run on what
                ``layer`` gives, until something stops it.
            layer: called with the hidden states that come out of the embedding, and all else that this layer is given.

        Returns:
            What ``layer`` gives; what comes after it in the model is not run.
        """
        for number, module in enumerate(self.layers):
            last = number == index - 1 == len(self.layers) - 1
            module.forward = layer if last else _Stop(layer) if number == index else _pass
        try:
            self.model(input_ids=ids.to(self.device), use_cache=False)
        except _Reached as reached:
            return reached.output
        finally:
            for module in self.layers:
                del module.forward
        raise CheckpointError(f"{type(self.model).__name__} does not run its decoder layer {index}")

    def _fill_buffers(self) -> None:
        """Buffers that no checkpoint has, such as the frequencies of rotary embeddings."""
        for module in self.model.modules():
            names = [n for n in module._buffers if n in module._non_persistent_buffers_set]
            for name in names:
                if module._buffers[name] is not None:
                    module._buffers[name] = torch.zeros_like(module._buffers[name], device="cpu")
            if names:
                self.model._init_weights(module)
                for name in names:
                    if module._buffers[name] is not None:
                        module._buffers[name] = module._buffers[name].to(self.device)


class _Reached(Exception):
    """The model's forward pass has come to where it is to stop."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class _Stop:
    """Stands for a decoder layer's forward, and ends the model's forward pass with what it gives."""

    def __init__(self, layer: Callable[..., Tensor]) -> None:
        self._layer = layer

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(self._layer(hidden_states, *args, **kwargs))


def _pass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and any(m is module for m in decoder.modules()):
            return f"{name}.", module
    raise CheckpointError(f"{type(model).__name__} has no list of {count} decoder layers")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
