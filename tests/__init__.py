"""The tests, and what they share with benchmarks, which run without pytest."""

PATIENCE = 1200.0
"""Seconds that a test waits for an event before it fails: long enough that no test depends on a machine's speed."""
