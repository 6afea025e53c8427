"""What ``mxperts eval`` is to compare, and what is checked of it before the long work starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mxperts.cli.options import SHIPPED, context_limit, load_model, load_tokenizer, read_config, resolve_model
from mxperts.cli.output import say
from mxperts.cli.progress import EVERY
from mxperts.errors import ArgumentError
from mxperts.evaluation import BaseFile, LayerErrors, Report, Windows, layer_errors, model_digest
from mxperts.evaluation.comparable import check_same_tokens, check_same_vocabulary
from mxperts.evaluation.page import check_writable
from mxperts.evaluation.schemes import parse


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model to evaluate.

    Attributes:
        name: in the table.
        path: its folder or hub id.
        scheme: to which it is quantised on the fly.
    """

    name: str
    path: str
    scheme: str | None = None

    def load(self, options: dict[str, Any]) -> Any:
        """The model."""
        return load_model(self.path, scheme=self.scheme, **options)


def wanted(base: str | None, models_: Sequence[str], schemes: str | None) -> list[Row]:
    """What is to be evaluated, the base first."""
    chosen = parse(schemes) if schemes is not None else ()
    paths = [resolve_model(m) for m in (models_ if base is None else [base, *models_]) or [SHIPPED]]
    if chosen and base is None and len(paths) > 1:
        raise typer.BadParameter(f"takes one model, not {len(paths)}, or --base", param_hint="--schemes")
    names = [path_name(path) for path in paths]
    clear = len(set(names)) == len(set(paths))  # else two folders have the same name
    rows = [Row(name=name if clear else path, path=path) for name, path in zip(names, paths, strict=True)]
    return [*rows, *(Row(name=scheme.name, path=paths[0], scheme=scheme.name) for scheme in chosen)]


def windows(
    file: Path,
    rows: Sequence[Row],
    *,
    context: int,
    stride: int | None,
    max_tokens: int,
    trust_remote_code: bool,
) -> Windows:
    """The text as tokens, after checking that they mean the same to all models."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{file} is not a text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    first = rows[0]
    tokenizer = load_tokenizer(first.path, trust_remote_code=trust_remote_code)
    config = read_config(first.path, trust_remote_code=trust_remote_code)
    for path, name in {row.path: row.name for row in rows if row.path != first.path}.items():
        names = {"base_name": first.name, "name": name}
        check_same_vocabulary(config, read_config(path, trust_remote_code=trust_remote_code), **names)
        if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
            say(f"{name} has no tokenizer; it is taken to have that of {first.name}")
            continue
        check_same_tokens(tokenizer, load_tokenizer(path, trust_remote_code=trust_remote_code), text, **names)
    limit = context_limit(first.path, trust_remote_code=trust_remote_code)
    return Windows.of_text(text, tokenizer, context=min(context, limit), stride=stride, max_tokens=max_tokens or None)


def base_file(file: Path, base: Row, top_k: int | None, options: dict[str, Any]) -> BaseFile:
    """The file of the base's answers, and what it must be of."""
    if not file.exists():
        check_writable(file)
    config = read_config(base.path, trust_remote_code=options["trust_remote_code"])
    dtype = str(config.dtype or "auto").removeprefix("torch.") if options["dtype"] == "auto" else options["dtype"]
    return BaseFile(path=file, model=model_digest(base.path), dtype=dtype, top_k=top_k)


def layers(
    rows: Sequence[Row], report: Report, windows: Windows, batch_size: int, options: dict[str, Any]
) -> list[LayerErrors]:
    """The errors by layer of all models but the first, in the order of the report."""
    base, places = rows[0].load(options), [e.name for e in report.rows]
    found = []
    for i, row in enumerate(rows[1:], start=1):
        progress = LayerProgress(f"[{i}/{len(rows) - 1}] {row.name}")
        found.append(
            layer_errors(base, row.load(options), windows, name=row.name, batch_size=batch_size, progress=progress)
        )
    return sorted(found, key=lambda errors: places.index(errors.name))


def path_name(path: str) -> str:
    """What the report calls a model: a folder's own name, or the hub id."""
    return Path(path).resolve().name if Path(path).exists() else path


class LayerProgress:
    """Says on stderr how far the layers of one model are, now and then, and when they are done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start = self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total:
            say(f"{self.name}: layers, {now - self.start:.1f} s")
        elif now - self.said >= EVERY:
            self.said = now
            left = (now - self.start) * (total - done) / done
            say(f"{self.name}: layers, {done} of {total} windows, about {left:.0f} s left")
