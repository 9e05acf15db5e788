"""What an experiment has produced: one folder below an fsspec URL, with checkpoints and Parquet tables."""

from dwf_cluster.store.files import LockLost, StorageFailed, Store, check_url

__all__ = ["LockLost", "StorageFailed", "Store", "check_url"]
