"""What mxperts has put in the place of other programs' parts, in this process: one record a hook."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One part of another program that ours stands in for.

    Attributes:
        program: the program.
        replaced: what was there: the name of a class, a function, or an entry of a table.
        by: what is there instead.
        why: what could not be done otherwise.
    """

    program: str
    replaced: str
    by: str
    why: str


_active: list[Hook] = []


def record(hook: Hook) -> None:
    """Note that a hook is in place; once is enough."""
    if hook not in _active:
        _active.append(hook)


def active(program: str | None = None) -> tuple[Hook, ...]:
    """The hooks that are in place in this process, in the order in which they came; of one program, or of all."""
    return tuple(hook for hook in _active if program in (None, hook.program))
