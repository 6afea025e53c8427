"""What a user of vLLM can tell mxperts: ``additional_config={"mxperts": {…}}``."""

from __future__ import annotations

from vllm.config import get_current_vllm_config

from mxperts.errors import ArgumentError

SECTION = "mxperts"
OPTIONS = ("backend",)
"""What the section may hold."""


def configured_backend() -> str:
    """The backend that vLLM's ``additional_config`` names for mxperts, by default "auto".

    Raises:
        ArgumentError: it holds something else.
    """
    additional = get_current_vllm_config().additional_config
    options = additional.get(SECTION, {}) if isinstance(additional, dict) else {}
    unknown = [o for o in options if o not in OPTIONS] if isinstance(options, dict) else [options]
    if unknown:
        raise ArgumentError(
            f"additional_config[{SECTION!r}] must be a dict with {', '.join(OPTIONS)}; found {unknown[0]!r}"
        )
    return str(options.get("backend", "auto"))
