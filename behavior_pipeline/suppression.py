"""Who was erased and must never come back: a list of keyed hashes, no ids.

A hash is HMAC-SHA256 (RFC 2104) of the user's id under a random key of the home. Whoever has the
list alone cannot find out who is on it by hashing guesses.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import duckdb

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import Storage, read_json, write_json, writing_file

KEY_BYTES: Final = 32
_BLOCK_BYTES: Final = 64  # of SHA-256, to which HMAC pads its key
_INNER: Final = bytes([0x36] * _BLOCK_BYTES)
_OUTER: Final = bytes([0x5C] * _BLOCK_BYTES)


def _folder(storage: Storage) -> Path:
    return storage.home / "erasures"


def _list_file(storage: Storage) -> Path:
    return _folder(storage) / "suppressed.json"


def suppressed_hashes(storage: Storage) -> frozenset[str]:
    """Return the hashes of the erased users, in hexadecimal digits."""
    path = _list_file(storage)
    return frozenset(read_json(path)) if path.exists() else frozenset()


def suppress(storage: Storage, user_ids: Iterable[str]) -> list[str]:
    """Put users on the list, for ever; return their hashes in the order given."""
    key = _key(storage)
    hashes = [hash_of(key, user_id) for user_id in user_ids]
    write_json(_list_file(storage), sorted(suppressed_hashes(storage) | set(hashes)))
    return hashes


def hash_of(key: bytes, user_id: str) -> str:
    """Return the keyed hash of a user's id."""
    return hmac.digest(key, user_id.encode(), "sha256").hex()


def suppressed_condition(connection: duckdb.DuckDBPyConnection, storage: Storage) -> str:
    """Return SQL that says of a row whether its `user_id` is on the list; `false` without a list.

    The key and the list go into tables of the connection, not into the SQL.
    """
    hashes = suppressed_hashes(storage)
    if not hashes:
        return "false"
    key = _key(storage).ljust(_BLOCK_BYTES, b"\0")
    pads = [bytes(a ^ b for a, b in zip(key, pad, strict=True)) for pad in (_INNER, _OUTER)]
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE suppression_key (inner_pad BLOB, outer_pad BLOB)"
    )
    connection.execute("INSERT INTO suppression_key VALUES (?, ?)", pads)
    connection.execute("CREATE OR REPLACE TEMP TABLE suppressed (user_hash VARCHAR)")
    connection.execute("INSERT INTO suppressed SELECT unnest(?::VARCHAR[])", [sorted(hashes)])
    inner = "unhex(sha256((SELECT inner_pad FROM suppression_key) || encode(user_id)))"
    hashed = f"sha256((SELECT outer_pad FROM suppression_key) || {inner})"
    return f"(user_id IS NOT NULL AND {hashed} IN (SELECT user_hash FROM suppressed))"


def _key(storage: Storage) -> bytes:
    """Return the home's key, made when it is first needed.

    Raises:
        PipelineError: if there is a list but no key.
    """
    path = _folder(storage) / "key"
    if not path.exists():
        if _list_file(storage).exists():  # with another key nobody on the list is known any more
            raise PipelineError(
                f"The key of the erased users is gone: there is no {path}.",
                "Put it back from a backup: without it erased users would come back.",
            )
        with writing_file(path) as aside:
            aside.write_bytes(secrets.token_bytes(KEY_BYTES))
    return path.read_bytes()
