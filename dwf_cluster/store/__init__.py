"""What an experiment has produced: one folder below an fsspec URL, with checkpoints and Parquet tables."""

from dwf_cluster.store.files import StorageFailed, Store, check_url

__all__ = ["StorageFailed", "Store", "check_url"]
