"""The results of an experiment: one folder below an fsspec URL, with checkpoints and Parquet tables."""

from dwf_cluster.store.files import LockLost, RowLabels, Store
from dwf_cluster.store.retry import StorageFailed
from dwf_cluster.store.url import check_url

__all__ = ["LockLost", "RowLabels", "StorageFailed", "Store", "check_url"]
