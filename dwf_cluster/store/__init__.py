"""What an experiment has produced: one folder below an fsspec URL, with checkpoints and Parquet tables."""

from dwf_cluster.store.files import Store

__all__ = ["Store"]
