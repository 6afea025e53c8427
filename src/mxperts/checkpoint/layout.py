"""What a checkpoint's ``quantization_config`` says, in one vocabulary whoever wrote it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mxperts.formats import BlockFormat, Scheme


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """What a layout appends to a module's name to name its tensors.

    Attributes:
        codes: suffix of the packed codes.
        scales: suffix of the E8M0 scales.
        codes_of: suffix of the codes in formats that have another, by the format's name.
        scale_dtypes: dtype of the scales of formats whose scales are not U8, by the format's name.
        input_scale: suffix of the scale of a static fp8 activation; None where the layout has none.
        input_scale_shape: its shape.
        alternating: what becomes of an expert's ``gate_up_proj`` whose rows of gate and up alternate: the projections
            that are stored, and the rows of each.
        blocked: whether codes have a dimension of blocks before that of a block's bytes.
        stacked: whether all experts are in one tensor.
        bias: suffix of a bias that goes with codes.
    """

    codes: str
    scales: str
    codes_of: Mapping[str, str] = field(default_factory=dict)
    scale_dtypes: Mapping[str, str] = field(default_factory=dict)
    input_scale: str | None = None
    input_scale_shape: tuple[int, ...] = ()
    alternating: Mapping[str, slice] = field(default_factory=lambda: {"gate_up_proj": slice(None)})
    blocked: bool = False
    stacked: bool = False
    bias: str = ".bias"

    def codes_suffix(self, fmt: BlockFormat) -> str:
        """Suffix of the codes in one format."""
        return self.codes_of.get(fmt.name, self.codes)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a quantisation config: modules whose name matches get this scheme.

    Attributes:
        pattern: an exact module name, a glob, or a regular expression behind ``re:``; ``"*"`` matches all.
        scheme: what they get; ``Scheme("none")`` leaves them unquantised.
        block_rows: rows of a weight that share their scales: 1, except in Quark's ``per_block``.
    """

    pattern: str
    scheme: Scheme
    block_rows: int = 1

    @property
    def is_name(self) -> bool:
        """Whether the pattern matches itself only."""
        return not self.pattern.startswith("re:") and not any(c in self.pattern for c in "*?[")

    def matches(self, name: str) -> bool:
        """Whether this rule speaks of the module ``name``."""
        if self.pattern.startswith("re:"):
            return re.match(self.pattern[3:], name) is not None
        return self.pattern == name or fnmatch.fnmatchcase(name, self.pattern)


_UNQUANTISED = Rule(pattern="*", scheme=Scheme("none"))


@dataclass(frozen=True, kw_only=True)
class ModelScheme:
    """Which scheme every module of a checkpoint has.

    Attributes:
        layout: "quark", "compressed-tensors", "gpt-oss" or "mxperts": how tensors are named and stored.
        names: the layout's suffixes.
        rules: the first that matches a module's name decides; a module that none matches is unquantised.
        config: the ``quantization_config`` this was read from, verbatim, for writing it back.
        rotation: by what all quantised weights are rotated, and their inputs are to be; None for nothing.
    """

    layout: str
    names: TensorNames
    rules: Sequence[Rule]
    config: Mapping[str, Any]
    rotation: str | None = None

    def rule_of(self, *names: str) -> Rule:
        """The rule for a module that goes by any of ``names`` (a checkpoint and a model may spell one differently)."""
        first = min((self._by_name[name] for name in names if name in self._by_name), default=len(self.rules))
        for index, rule in self._patterns:
            if index > first:
                break
            if any(rule.matches(name) for name in names):
                return rule
        return self.rules[first] if first < len(self.rules) else _UNQUANTISED

    def scheme_of(self, *names: str) -> Scheme:
        """The scheme of a module that goes by any of ``names``."""
        return self.rule_of(*names).scheme

    @cached_property
    def _by_name(self) -> dict[str, int]:
        # configs list every excluded module of a large model by name: thousands, asked for every expert
        found: dict[str, int] = {}
        for index, rule in enumerate(self.rules):
            if rule.is_name:
                found.setdefault(rule.pattern, index)
        return found

    @cached_property
    def _patterns(self) -> list[tuple[int, Rule]]:
        return [(index, rule) for index, rule in enumerate(self.rules) if not rule.is_name]
