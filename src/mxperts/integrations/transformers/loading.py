"""``load`` and ``install``: MX checkpoints in Transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto, register_quantization_config, register_quantizer

from mxperts.checkpoint import LAYOUTS, Checkpoint, ModelScheme, Rule, is_mx, quark, rotated
from mxperts.checkpoint.rotated import QUANT_METHOD
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import Scheme
from mxperts.integrations import hooks
from mxperts.integrations.transformers.config import MXConfig
from mxperts.integrations.transformers.parameters import check_complete
from mxperts.integrations.transformers.quantizer import MXQuantizer, expert_parallel, has_expert_parallel
from mxperts.ops.dispatch import explain
from mxperts.ops.quantize import FLOAT_DTYPES
from mxperts.quantization.checkpoint import excluded_patterns
from mxperts.rotation import check_rotation

register_quantization_config(QUANT_METHOD)(MXConfig)
register_quantizer(QUANT_METHOD)(MXQuantizer)
TAKEN_OVER = tuple(method for method in LAYOUTS if method != QUANT_METHOD)
"""The ``quant_method`` of other software that ``install`` takes over."""

if has_expert_parallel():
    expert_parallel()  # registers our implementation

CONFIG_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Arguments of ``from_pretrained`` that say where a checkpoint is, and so where its config is."""

NOT_TAKEN = {
    "config": "the checkpoint's own is used",
    "experts_implementation": "mxperts runs quantised experts, Transformers' default all others",
    "quantization_config": "name a scheme instead",
    "torch_dtype": "it is called dtype here",
}
"""Arguments of ``from_pretrained`` that ``load`` has no use for, and what to do."""


def load(
    path_or_id: str | Path,
    *,
    scheme: Scheme | str | None = None,
    exclude: Iterable[str] | None = None,
    rotation: str | None = None,
    backend: str = "auto",
    dtype: torch.dtype | str = "auto",
    **kwargs: Any,
) -> nn.Module:
    """Load a causal language model with its MX weights packed, or quantise one while it loads.

    Args:
        path_or_id: a folder, or a model's id on the Hugging Face hub.
        scheme: quantise an unquantised checkpoint to this, such as "w_mxfp4_a_mxfp6_e2m3"; needs transformers >= 5.23.
        exclude: with ``scheme``, modules to leave alone: names, globs, or ``re:`` and a regular expression. By default
            all but the projections of experts and MLPs, as in ``quantize_checkpoint``.
        rotation: with ``scheme``, what to rotate weights by before they are quantised, and inputs: "hadamard32".
        backend: what runs the quantised modules: "auto" or a backend's name.
        dtype: of everything that is not quantised, and of hidden states; "auto" takes the checkpoint's.
        **kwargs: for Transformers' ``from_pretrained``. With ``distributed_config``, a ``DistributedConfig`` whose
            ``ep_size`` is the number of processes, each has its share of the experts: see docs/expert_parallel.md.

    Returns:
        A Transformers model. Every quantised weight stays packed, and inputs are quantised as the checkpoint or the
        scheme says. Experts are brought to the layout that their backend wants, if it has one of its own, and take no
        memory in any other; whatever looks at a parameter sees what was stored, and ``save_pretrained`` writes the same
        bytes back.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or its config says something that is not supported.
        ArgumentError: ``scheme`` for a checkpoint that is quantised already, ``exclude`` or ``rotation`` without
            ``scheme``, a pattern that matches nothing, rows that cannot be rotated, an argument of ``from_pretrained``
            that this function decides itself, or a model that cannot be spread as ``distributed_config`` asks.
        BackendUnavailable: the backend cannot run here; or too old a Transformers for quantising while loading, or for
            ``distributed_config``.
    """
    if scheme is None and exclude is not None:
        raise ArgumentError("exclude is of use only with scheme: a quantised checkpoint says itself what is quantised")
    if scheme is None and rotation is not None:
        raise ArgumentError("rotation is of use only with scheme: a quantised checkpoint says itself what is rotated")
    check_rotation(rotation)
    for name, advice in NOT_TAKEN.items():
        if name in kwargs:
            raise ArgumentError(f"mx.load takes no {name}: {advice}")
    if isinstance(dtype, torch.dtype) and dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"dtype must be float32, bfloat16, float16 or 'auto', not {dtype}")
    explain("quantize", backend=backend)  # an unknown or unavailable backend is refused before anything is read
    _check_folder(path_or_id, kwargs.get("subfolder", ""))
    config = AutoConfig.from_pretrained(path_or_id, **{k: kwargs[k] for k in CONFIG_OPTIONS if k in kwargs})
    found = getattr(config, "quantization_config", None)
    if scheme is not None:
        if found is not None:
            raise ArgumentError(
                f"{path_or_id} is quantised already (quant_method {found.get('quant_method')!r}); leave scheme out"
            )
        kwargs["quantization_config"] = MXConfig(on_the_fly(Scheme(scheme), exclude, rotation), backend)
    elif found is not None and is_mx(found):
        config.quantization_config = MXConfig.wrap(found, backend)
    elif found is not None and found.get("quant_method") not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise CheckpointError(f"{path_or_id}: unknown quant_method {found.get('quant_method')!r} in its config")
    if kwargs.get("distributed_config") is not None:
        trust = {k: kwargs[k] for k in ("trust_remote_code",) if k in kwargs}
        kwargs["distributed_config"] = expert_parallel().complete(kwargs["distributed_config"], config, **trust)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path_or_id, config=config, dtype=dtype, **kwargs)
    check_complete(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded  # type: ignore[no-any-return]


def _check_folder(path_or_id: str | Path, subfolder: str) -> None:
    """A local checkpoint is checked by its headers first: what Transformers says of a damaged one helps nobody."""
    folder = Path(path_or_id) / subfolder
    if folder.is_dir():
        Checkpoint.open(folder)
    elif isinstance(path_or_id, Path) or str(path_or_id).startswith(("/", ".", "~")) or folder.exists():
        raise CheckpointError(f"{folder} is no folder; name a checkpoint's folder, or a model's id on the hub")


def on_the_fly(scheme: Scheme, exclude: Iterable[str] | None, rotation: str | None = None) -> ModelScheme:
    """Quantise everything but what ``exclude`` names, as a checkpoint in AMD Quark's layout, or our own, would say."""
    excluded = [Rule(pattern=p, scheme=Scheme("none")) for p in excluded_patterns(exclude)]
    rules = [*excluded, Rule(pattern="*", scheme=scheme)]
    if rotation is not None:
        return rotated.parse(rotated.write(rules, rotation=rotation))
    return ModelScheme(layout=quark.NAME, names=quark.NAMES, rules=rules, config=quark.write(rules))


def install() -> None:
    """Have Transformers' own ``from_pretrained`` load MX checkpoints through mxperts.

    Checkpoints of AMD Quark, compressed-tensors and gpt-oss whose weights are in MX formats are taken over; all others,
    such as integer formats of the same software, are left to Transformers. Calling it again changes nothing.
    """
    for method, hook in zip(TAKEN_OVER, hooks_of_install(), strict=True):
        stock = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        if not issubclass(stock, _TakenOver):
            # Transformers compares these classes by name, so ours keeps that of the one it stands in for.
            ours = type(stock.__name__, (_TakenOver, stock), {"stock": stock})
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = ours
        hooks.record(hook)


def hooks_of_install() -> list[hooks.Hook]:
    """What ``install`` replaces."""
    return [
        hooks.Hook(
            program="transformers",
            replaced=f"AUTO_QUANTIZATION_CONFIG_MAPPING[{method!r}]",
            by=f"{MXConfig.__module__}.{MXConfig.__name__} for configs in MX formats",
            why="Transformers cannot load them, or unpacks them, or leaves activations unquantised",
        )
        for method in TAKEN_OVER
    ]


class _TakenOver:
    """Mixed into Transformers' own class for a ``quant_method``: MX configs become ours."""

    stock: type

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        return (MXConfig if is_mx(config_dict) else cls.stock).from_dict(config_dict, **kwargs)  # type: ignore[attr-defined]
