"""What an experiment has produced: one folder below an fsspec URL, with checkpoints and Parquet tables."""

from dwf_cluster.store.files import Labels, LockLost, StorageFailed, Store, check_url

__all__ = ["Labels", "LockLost", "StorageFailed", "Store", "check_url"]
