"""Storage URLs: with secrets, of kinds whose files cannot be replaced, and not printable ones are refused."""

from __future__ import annotations

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store


@pytest.mark.parametrize("kind", ["abfs", "abfss"])
def test_azures_usual_urls_are_accepted(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda kind: MemoryFileSystem)
    url = f"{kind}://container@account.dfs.core.windows.net/runs"
    assert Store(url, "experiment").path("file") == f"{url}/experiment/file"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key@bucket/runs", "s3://bucket/runs"),
        ("abfs://container:secret@account.dfs.core.windows.net/runs", "abfs://account.dfs.core.windows.net/runs"),
        ("abfs://secret@container@account/runs", "abfs://account/runs"),
        ("s3://key:secret@bucket/runs", "s3://bucket/runs"),
        ("s3://bucket/runs?AWSAccessKeyId=secret", "s3://bucket/runs"),
        ("s3://bucket/runs#secret", "s3://bucket/runs"),
        ("https://host/runs;token=secret", "https://host/runs"),
        ("simplecache::s3://key:secret@bucket/runs", "s3://bucket/runs"),
    ],
)
def test_a_url_with_secrets_is_refused_without_repeating_them(url: str, shown: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Store(url, "experiment")
    assert str(refused.value).startswith(f"--storage: '{shown}' with a password, a key or options cannot be used")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("zip://runs.zip", "zip has no files that can be replaced"),
        ("data://runs", "data has no files that can be replaced"),
        ("unknown://bucket/runs", "Protocol not known: unknown"),
        ("s3://bucket/a\x1bb", "allowed are printable characters in UTF-8"),
    ],
)
def test_an_unusable_kind_or_character_is_refused(url: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        Store(url, "experiment")
