"""Printing results: a rich table on a terminal, Markdown into a pipe, or whatever ``--output`` names.

Results go to stdout; progress and remarks go to stderr through ``say``.
"""

from __future__ import annotations

import csv
import enum
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.box
import rich.table
from rich.console import Console


class Output(enum.StrEnum):
    """How results are printed."""

    JSON = "json"
    CSV = "csv"
    MD = "md"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        header: names of the columns, with units.
        rows: as many cells as columns each.
        left: the first columns, which are aligned to the left; the others are numbers.
        note: printed below.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""

    def markdown(self) -> str:
        """A Markdown table, columns padded to the same width so that it reads well as text too."""
        widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]
        widths = [max(width, 3) for width in widths]
        rules = ["-" * w if i < self.left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        lines = [self._line(self.header, widths), "| " + " | ".join(rules) + " |"]
        lines += [self._line(row, widths) for row in self.rows]
        return "\n".join(lines) + (f"\n\n{self.note}" if self.note else "") + "\n"

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = (
            c.ljust(w) if i < self.left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    def show(self, console: Console) -> None:
        """Print for a terminal."""
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < self.left else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table, markup=False)
        if self.note:
            console.print(self.note, style="dim", markup=False, highlight=False)


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records, which have the same keys, as CSV with a header; None is an empty field. Nothing, if there are none."""
    if not records:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_json(document: Mapping[str, Any]) -> str:
    """A document as indented JSON."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def show(
    table: Table, *, records: Sequence[Mapping[str, Any]], document: Mapping[str, Any], output: Output | None
) -> None:
    """Print a result to stdout.

    Args:
        table: for people.
        records: flat rows of raw numbers, for CSV.
        document: everything, for JSON.
        output: None means a rich table on a terminal and Markdown otherwise.
    """
    match output:
        case Output.JSON:
            sys.stdout.write(to_json(document))
        case Output.CSV:
            sys.stdout.write(to_csv(records))
        case None if sys.stdout.isatty():
            table.show(Console())
        case _:
            sys.stdout.write(table.markdown())


def say(message: str) -> None:
    """Tell a person something, on stderr."""
    print(message, file=sys.stderr, flush=True)
