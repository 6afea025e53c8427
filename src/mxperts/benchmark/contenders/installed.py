"""Finding other software without importing it: imports of peers take seconds and change the process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path


def package_folder(package: str) -> Path | None:
    """Where an installed package lies; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def version_of(*distributions: str) -> str | None:
    """Name and version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
