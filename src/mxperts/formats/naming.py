"""Looking names up: how they are compared, and what to say when there is none."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from typing import TypeVar

from mxperts.errors import FormatError

_Choice = TypeVar("_Choice", bound=enum.Enum)


def normalize(name: str) -> str:
    """Lower case, with ``-``, blanks and dots as underscores: names compare equal however people type them."""
    return name.strip().lower().replace("-", "_").replace(" ", "_").replace(".", "_")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: near names if there are any, all of them otherwise."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"


def choose(kind: type[_Choice], value: str | _Choice, what: str) -> _Choice:
    """The member of an enum that ``value`` is or names.

    Raises:
        FormatError: no such member; the message lists near names.
    """
    if isinstance(value, kind):
        return value
    members = {str(m.value): m for m in kind}
    key = normalize(value) if isinstance(value, str) else ""
    if key not in members:
        raise FormatError(f"unknown {what} {value!r}; {suggest(key, members)}")
    return members[key]
