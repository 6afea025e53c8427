"""Reading a JSON config so that every complaint names the field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mxperts.errors import CheckpointError


@dataclass(frozen=True)
class Fields:
    """One JSON object and where in the config it stands.

    Attributes:
        path: the way to it, such as ``quantization_config.global_quant_config.weight``.
        values: its fields; a missing one counts as null.
    """

    path: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, path: str, value: object) -> Fields:
        """``value`` as an object.

        Raises:
            CheckpointError: it is something else.
        """
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{path} must be an object, not {value!r}")
        return cls(path, value)

    def get(self, key: str) -> Any:
        """A field as it is, None if it is missing."""
        return self.values.get(key)

    def child(self, key: str) -> Fields | None:
        """A field that is an object or null."""
        value = self.get(key)
        return None if value is None else Fields.of(f"{self.path}.{key}", value)

    def children(self, key: str) -> Iterator[tuple[str, Fields]]:
        """Name and value of every member of a field that is an object of objects, or null."""
        group = self.child(key)
        for name, value in group.values.items() if group else ():
            yield name, Fields.of(f"{self.path}.{key}.{name}", value)

    def strings(self, key: str) -> list[str]:
        """A field that is a list of strings, or null."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise CheckpointError(f"{self.path}.{key} must be a list of strings, not {value!r}")
        return value

    def patterns(self, key: str) -> list[str]:
        """As ``strings``, where ``re:`` introduces a regular expression."""
        found = self.strings(key)
        for pattern in found:
            check_pattern(f"{self.path}.{key}", pattern)
        return found

    def expect(self, key: str, *allowed: object) -> Any:
        """A field that must have one of these values.

        Raises:
            CheckpointError: it has another.
        """
        value = self.get(key)
        if not any(value == a and type(value) is type(a) for a in allowed):
            known = " or ".join("null" if a is None else repr(a) for a in allowed)
            raise CheckpointError(
                f"{self.path}.{key} is {'null' if value is None else repr(value)}; mxperts supports {known}"
            )
        return value

    def expect_unset(self, key: str, what: str) -> None:
        """A field that must be null, empty or missing.

        Raises:
            CheckpointError: it asks for ``what``.
        """
        value = self.get(key)
        if value not in (None, [], {}):
            raise CheckpointError(f"{self.path}.{key} asks for {what}, which mxperts does not support: {value!r}")


def check_pattern(path: str, pattern: str) -> None:
    """Check a module name, glob, or regular expression behind ``re:``.

    Raises:
        CheckpointError: the regular expression is none.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise CheckpointError(f"{path} has {pattern!r}, which is no regular expression: {error}") from None
