"""Experts spread over processes: what travels between them, and how it is counted."""

from mxperts.distributed.exchange import Exchange
from mxperts.distributed.traffic import Traffic, traffic
from mxperts.distributed.wire import Wire

__all__ = ["Exchange", "Traffic", "Wire", "traffic"]
