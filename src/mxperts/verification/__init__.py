"""Verification: whether operations give the golden bits here, and whether a checkpoint is in order."""
