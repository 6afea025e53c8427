"""What a checkpoint's ``quantization_config`` says, in one vocabulary whoever wrote it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mxperts.formats import Scheme


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a quantisation config: modules whose name matches get this scheme.

    Attributes:
        pattern: an exact module name, a glob, or a regular expression behind ``re:``; ``"*"`` matches all.
        scheme: what they get; ``Scheme("none")`` leaves them unquantised.
    """

    pattern: str
    scheme: Scheme

    def matches(self, name: str) -> bool:
        """Whether this rule speaks of the module ``name``."""
        if self.pattern.startswith("re:"):
            return re.match(self.pattern[3:], name) is not None
        return self.pattern == name or fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True, kw_only=True)
class ModelScheme:
    """Which scheme every module of a checkpoint has.

    Attributes:
        layout: "quark", "compressed-tensors" or "gpt-oss": how tensors are named and stored.
        rules: the first that matches a module's name decides; a module that none matches is unquantised.
        config: the ``quantization_config`` this was read from, verbatim, for writing it back.
    """

    layout: str
    rules: Sequence[Rule]
    config: Mapping[str, Any]

    def scheme_of(self, *names: str) -> Scheme:
        """The scheme of a module that goes by any of ``names`` (a checkpoint and a model may spell one differently)."""
        for rule in self.rules:
            if any(rule.matches(name) for name in names):
                return rule.scheme
        return Scheme("none")
