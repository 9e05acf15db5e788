"""Algorithms 1, 2 and 3 of the paper, on one epoch loop."""
