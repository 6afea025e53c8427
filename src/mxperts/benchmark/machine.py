"""What the system tells about its memory and caches."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

DEFAULT_CACHE = 32 << 20
"""Taken for the last-level cache where the system does not tell."""


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; ``DEFAULT_CACHE`` where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith(("K", "M")) and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << (10 if text.endswith("K") else 20))
    return max(sizes, default=DEFAULT_CACHE)


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def peak_memory() -> int | None:
    """Most bytes of memory that this process has held at once; None where the system does not tell."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM:")


def reset_peak_memory() -> None:
    """Let ``peak_memory`` begin anew, where the system can; elsewhere it goes on."""
    with suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5")


def _kilobytes(file: Path, name: str) -> int | None:
    """A line of a file under /proc, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None  # not Linux
    found = [line.split()[1] for line in lines if line.startswith(name)]
    return int(found[0]) * 1024 if found else None
