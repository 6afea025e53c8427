"""``python -m mxperts``: the command, as ``torchrun … -m mxperts`` starts it."""

from mxperts.cli import main

main()
