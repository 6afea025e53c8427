"""quantize_checkpoint: from a folder of bf16 safetensors to a folder of an MX checkpoint, file by file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mxperts.checkpoint import Checkpoint, quark, rotated
from mxperts.checkpoint.config import layout_of
from mxperts.checkpoint.fields import check_pattern
from mxperts.checkpoint.rewrite import rewrite, sizes
from mxperts.checkpoint.rules import rules_of
from mxperts.checkpoint.writer import check_absent
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import MXFP4, BlockFormat, Role, ScaleRule, Scheme, recipe
from mxperts.quantization.calibration import Calibration
from mxperts.quantization.choice import RTN, Methods
from mxperts.quantization.methods.problem import Method
from mxperts.quantization.plan import Numbers, Source, make_plan
from mxperts.rotation import check_rotation

if TYPE_CHECKING:
    from mxperts.quantization.calibration.run import CalibratedRun

DEFAULT_EXCLUDE = (
    r"re:(?!.*\.((gate|up|down|gate_up)_proj|w[123]|fc[12])$)",
    "*vision*",
    "*visual*",
    "*audio*",
)
"""All but the projections of MLPs and experts: attention, lm_head; and other towers than the language model's."""

ALWAYS_EXCLUDED = ("*embed*", "*.wte", "*.gate", "*router*", "*shared_expert_gate")
"""Embeddings, which are no linear layers, and routers, whose few values decide which experts run."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a quantisation did, or would do.

    Attributes:
        dst: the folder written; None after a dry run.
        scheme: of all that is not excluded.
        modules: linear layers quantised.
        excluded: linear layers, routers and embeddings left as they are.
        bytes_before: of tensors in the source, by kind: experts, linears, other.
        bytes_after: of tensors in the result, by kind.
        resumed: files that an earlier, interrupted run had finished.
        few_inputs: linear layers that had too few inputs in the calibration text to be fitted to them.
    """

    dst: Path | None
    scheme: Scheme
    modules: int
    excluded: Sequence[str]
    bytes_before: Mapping[str, int]
    bytes_after: Mapping[str, int]
    resumed: int
    few_inputs: Sequence[str] = ()


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: Scheme | str,
    *,
    format: str = quark.NAME,
    exclude: str | Sequence[str] | None = None,
    layer_schemes: Mapping[str, Scheme | str] | None = None,
    preset: str | None = None,
    scale_rule: ScaleRule | str | None = None,
    input_scales: Mapping[str, float] | None = None,
    method: str | Method = RTN,
    layer_methods: Mapping[str, str | Method] | None = None,
    smooth: bool = False,
    bits: float | None = None,
    calibration: Calibration | None = None,
    rotation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    dry_run: bool = False,
) -> Summary:
    """Quantise the weights of a checkpoint.

    Without calibration this takes none of its model's code, and has one tensor in memory at a time. With calibration
    the model runs over a text, with one decoder layer in memory at a time, and of its experts a few; every weight is
    fitted to the inputs that it will have in the quantised model. See docs/quantization.md.

    Experts that are stored in one tensor are split, but not for the gpt-oss layout. Tensors that are not quantised,
    tokenizer and other small files are copied. ``<dst>.partial`` holds the work until all is there; an interrupted run
    goes on from it.

    Args:
        src: folder of an unquantised checkpoint in safetensors.
        dst: folder to write; must not exist.
        scheme: what the linear layers get, such as ``w_mxfp4_a_mxfp4``.
        format: the layout: "quark", "compressed-tensors" or "gpt-oss".
        exclude: layers that stay as they are: names, globs or ``re:``. Default: all but the projections of MLPs and
            experts. Embeddings and routers are never quantised.
        layer_schemes: other schemes for some layers, by name, glob or ``re:``; the first match counts.
        preset, scale_rule: see ``mxperts.quantize``.
        input_scales: the scales of static fp8 activations by layer.
        method: how codes and scales are chosen: one of ``mxperts.quantization.methods.METHODS``, or a function.
        layer_methods: other methods for some layers, by name, glob or ``re:``; the first match counts.
        smooth: fold scales of channels into norms and ``up`` projections, so that what is quantised is more even; every
            one of them is a power of two, by which the unquantised model computes the same bits.
        bits: choose among MXFP4, MXFP6 (E2M3) and MXFP8 (E4M3) weights in every part of the model that has ``scheme``,
            so that there are at most so many bits a weight, scales included, and the measured error is least.
        calibration: the text to fit weights to. Default: none, or where a method needs one, ``Calibration()``, the text
            of the model that comes with mxperts.
        rotation: "hadamard32" rotates every weight that is quantised before it is, and has inputs rotated at run time.
            The result is in a layout of our own, which only mxperts reads: see docs/rotation.md.
        progress: called with bytes of the source done and in total.
        dry_run: only plan, read and write no tensor.

    Returns:
        What was done, or would be.

    Raises:
        CheckpointError: ``src`` is damaged or already quantised, ``dst`` exists, ``<dst>.partial`` was begun with other
            settings, or the disk is too small.
        ArgumentError: the method is unknown or needs a text; the text is missing, too short or cannot be read; nothing
            would be quantised, a pattern of ``layer_schemes`` or ``layer_methods`` matches nothing, ``bits`` cannot be
            had or ``smooth`` not done, static fp8 activations have no scales, there is no such layout, it cannot hold
            one of the layers, or one cannot be rotated.
        FormatError: unknown scheme, preset or scale rule.
    """
    scheme = Scheme(scheme)
    dst = Path(dst)
    recipe(scheme.weight or MXFP4, Role.WEIGHT, preset=preset, scale_rule=scale_rule)  # complains about unknown names
    check_absent(dst)
    format = _layout_name(format, rotation)
    checkpoint = Checkpoint.open(src)
    _check_unquantized(checkpoint)
    rule = scale_rule.value if isinstance(scale_rule, ScaleRule) else scale_rule
    numbers = Numbers(preset=preset, scale_rule=rule, input_scales=dict(input_scales or {}), rotation=rotation)
    methods = Methods(default=method, layers=dict(layer_methods or {}))
    if bits is not None and dry_run:
        raise ArgumentError("what bits chooses is known when all is measured, which a dry run does not do")
    if calibration is None and (methods.need_text or smooth or bits is not None):
        calibration = Calibration()
    run = None if calibration is None else _calibrated(checkpoint, calibration, methods, numbers, format)
    excluded, schemes = excluded_patterns(exclude), {p: Scheme(s) for p, s in (layer_schemes or {}).items()}
    if run is not None:
        plan = run.plan(scheme, excluded, schemes)
    else:
        source = Source.of(checkpoint, numbers, methods)
        plan = make_plan(
            checkpoint, scheme, exclude=excluded, layer_schemes=schemes, numbers=numbers, format=format, source=source
        )
    methods.check_layers(plan.schemes)
    settings = {
        "format": format,
        "scheme": str(scheme),
        "exclude or layer_schemes": [
            [rule.pattern, str(rule.scheme)] for rule in rules_of(plan.schemes, default=scheme)[:-1]
        ],
        "preset": numbers.preset,
        "scale_rule": numbers.scale_rule,
        "input_scales": dict(numbers.input_scales),
        "rotation": rotation,
        **methods.settings,
    }
    if run is not None:
        settings |= run.settings | {"bits": bits, "smooth": smooth}
        if bits is not None:
            chosen = run.allocate(dst, scheme, bits, settings, progress)
            plan = run.plan(scheme, excluded, schemes, chosen)
    rules = rules_of(plan.schemes, default=scheme)
    resumed, few, (before, after) = 0, list[str](), sizes(plan.shards)
    if not dry_run:
        options = {} if rotation is None else {"rotation": rotation}
        quantization = layout_of(format).write(rules, _scale_rule(numbers), **options)
        config = dict(checkpoint.config) | {"quantization_config": quantization}
        if run is not None:
            resumed, few = run.write(dst, config, plan, settings, smooth, progress)
        else:
            resumed = rewrite(checkpoint, dst, config, plan.shards, settings, progress)
    return Summary(
        dst=None if dry_run else dst,
        scheme=scheme,
        modules=plan.modules,
        excluded=[rule.pattern for rule in rules if rule.scheme == Scheme("none")],
        bytes_before=before,
        bytes_after=after,
        resumed=resumed,
        few_inputs=few,
    )


def _layout_name(format: str, rotation: str | None) -> str:
    """The layout to write: the one that is asked for, but our own for what is rotated.

    Raises:
        ArgumentError: the one cannot be had with the other.
    """
    if layout_of(format) is rotated:
        raise ArgumentError(f"the layout {format!r} is that of rotated weights: name a rotation instead")
    check_rotation(rotation)
    if rotation is None:
        return format
    if format != quark.NAME:
        raise ArgumentError(f"the {format} layout has no words for rotated weights; leave format out with a rotation")
    return rotated.NAME


def excluded_patterns(exclude: str | Iterable[str] | None) -> list[str]:
    """Everything that is not quantised: what is never, and the user's patterns, one or several, or the default.

    Raises:
        CheckpointError: one of them is no regular expression although it begins with ``re:``.
    """
    if exclude is None:
        exclude = DEFAULT_EXCLUDE
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in patterns:
        check_pattern("exclude", pattern)
    return [*ALWAYS_EXCLUDED, *patterns]


def _calibrated(
    checkpoint: Checkpoint, calibration: Calibration, methods: Methods, numbers: Numbers, format: str
) -> CalibratedRun:
    # it takes Transformers, which takes seconds to import, and whose part of mxperts imports this file
    from mxperts.quantization.calibration.run import CalibratedRun

    return CalibratedRun(checkpoint, calibration, methods, numbers, format)


def _check_unquantized(checkpoint: Checkpoint) -> None:
    found = checkpoint.config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise CheckpointError(
            f"{checkpoint.path} is already quantised (quant_method {method!r}); quantise the checkpoint it came from"
        )


def _scale_rule(numbers: Numbers) -> Callable[[BlockFormat], ScaleRule]:
    """By which rule weights in a format are scaled."""
    return lambda fmt: recipe(fmt, Role.WEIGHT, preset=numbers.preset, scale_rule=numbers.scale_rule).scale_rule
