"""Implementations of the operations in ``mxperts.ops``, one package each."""
