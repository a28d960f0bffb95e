"""By how many rows the work of a matrix is split; without numpy, for plans."""

GRAIN = 16
"""Rows that work is split by: whole batches of whole streams."""
