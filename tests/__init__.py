"""The tests, and what is common to them and to benchmarks that need no pytest."""

PATIENCE = 1200.0
"""Seconds after which what a test waits for will not come: no test depends on the speed of a machine."""
