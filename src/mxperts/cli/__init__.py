"""The ``mxperts`` command: each file here is one command, which parses its arguments, calls the library and prints."""

from mxperts.cli.app import app, main

__all__ = ["app", "main"]
