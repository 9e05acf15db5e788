"""Which storage URLs are accepted: without secrets, and of a kind whose files can be replaced."""

from __future__ import annotations

import re
import unicodedata

from dwf_cluster.settings import InvalidInput

_AZURE = ("abfs", "abfss", "az")
"""Kinds whose usual URL is `abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX`."""


def check_url(url: str) -> None:
    """Refuse a storage URL that contains secrets, or whose kind is unknown to fsspec or cannot replace files.

    Raises:
        InvalidInput: the message leaves out what might be a secret.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in url):  # Cs: bytes that are not UTF-8
        raise InvalidInput(f"--storage: {url!r} cannot be used: allowed are printable characters in UTF-8")
    kind, separator, rest = url.partition("://")
    if not separator:
        return
    host = rest.partition("/")[0]
    user, at, _ = host.rpartition("@")
    is_container = kind in _AZURE and bool(user) and ":" not in user and "@" not in user
    if (at and not is_container) or re.search("[?#;]", rest) or "::" in url:
        shown = f"{kind.rpartition('::')[2]}://{re.split('[?#;]', rest.rpartition('@')[2])[0]}"
        raise InvalidInput(
            f"--storage: {shown!r} with a password, a key or options cannot be used: allowed is KIND://BUCKET/PREFIX; "
            "keys and endpoint come from the environment, the profile or the machine"
        )
    import fsspec
    from fsspec.archive import AbstractArchiveFileSystem

    try:
        file_system = fsspec.get_filesystem_class(kind)
    except (ValueError, ImportError) as error:
        raise InvalidInput(f"--storage: {url!r} cannot be used: {error}") from None
    if issubclass(file_system, AbstractArchiveFileSystem) or kind == "data":
        raise InvalidInput(f"--storage: {url!r} cannot be used: {kind} has no files that can be replaced")
