"""Names inside the graphs on which several stages agree."""

__all__ = ["BATCH_DIMENSION", "WRAP_PREFIX"]

BATCH_DIMENSION = "batch"
"""The symbolic first dimension of every input and output."""
WRAP_PREFIX = "wrap/"
"""How the names of the nodes begin that the serving wrap adds; those of the network begin otherwise."""
