"""Verification: whether operations give the golden bits here, and whether a checkpoint is in order."""

from mxperts.verification.checkpoint import Finding, Severity, Verification, verify_checkpoint
from mxperts.verification.exact import Check, Place, places, verify

__all__ = ["Check", "Finding", "Place", "Severity", "Verification", "places", "verify", "verify_checkpoint"]
