"""Erasing users: suppressed first, then removed from every place, a receipt last.

What is to be done stands in `erasures/pending.json` until it is done: an erasure that was killed is
completed by running it again, or by the next run of the pipeline, whatever that is.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.erasure.databases import (
    erase_from_analytics,
    erase_from_online,
    erase_from_warehouse,
)
from behavior_pipeline.erasure.documents import (
    erase_from_quarantine,
    recount_loads,
    recount_published,
    recount_sequences,
)
from behavior_pipeline.erasure.rewriting import (
    NEIGHBOURS,
    by_event,
    by_user,
    find_affected,
    rewrite,
)
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.holding import holding
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.sql import parquet
from behavior_pipeline.storage import Storage, read_json, working_alone, write_json
from behavior_pipeline.suppression import suppress

NOT_COVERED: Final = (
    "weights of checkpoints trained before: no ids, but learnt from these users; train anew",
    "raw files outside the home, from which the source is loaded: rows in them are passed over",
    "backups, and copies that others made",
)
_STEPS: Final = 6


@dataclass(frozen=True)
class Receipt:
    """What an erasure did.

    Attributes:
        erasure_id: its name.
        started_at: in UTC.
        finished_at: in UTC.
        user_hashes: keyed hashes of the users, see `suppression.py`.
        counts: rows that went, by place.
        not_covered: what it does not reach.
        checkpoints: those that learnt from these users, by their `trained_through`.
    """

    erasure_id: str
    started_at: str
    finished_at: str
    user_hashes: list[str]
    counts: dict[str, int]
    not_covered: list[str]
    checkpoints: dict[str, str]


def erase(storage: Storage, user_ids: Sequence[str], report: Report = report_nothing) -> Receipt:
    """Remove users from everything below a home, and keep them out for ever.

    Any number of users takes one pass over the files; files without them are only looked at. Users
    of whom nothing is there are suppressed all the same.

    Args:
        storage: the home.
        user_ids: as in the canonical events.
        report: progress over the steps.

    Raises:
        PipelineError: if there is no id, an empty or a reserved one, or another run is at work.
    """
    wanted = sorted(set(user_ids))
    if not wanted or "" in wanted or COLD_START_USER in wanted:
        raise PipelineError(
            f"'{wanted[0] if wanted else ''}' is no user that can be erased.",
            "Name users by their ids in the events, one or more.",
        )
    with holding(storage):
        complete_pending(storage, report)
        _write_pending(storage, _plan(wanted))
        return _complete(storage, report)


def complete_pending(storage: Storage, report: Report = report_nothing) -> Receipt | None:
    """Complete an erasure that was killed, if there is one; the caller holds the home."""
    return _complete(storage, report) if _pending_file(storage).exists() else None


def _pending_file(storage: Storage) -> Path:
    return storage.home / "erasures" / "pending.json"


def _plan(user_ids: list[str]) -> dict[str, Any]:
    """Return what an erasure is to do; the one place where the ids stand until it is done."""
    started = datetime.now(UTC)
    return {
        "erasure_id": f"{started:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        "started_at": started.isoformat(),
        "user_ids": user_ids,
        "counts": {},
    }


def _write_pending(storage: Storage, plan: dict[str, Any]) -> None:
    write_json(_pending_file(storage), plan)


def _complete(storage: Storage, report: Report) -> Receipt:
    """Do what is pending, from the beginning: what is done already is found to be done."""
    plan = read_json(_pending_file(storage))
    users = pa.array(plan["user_ids"], pa.string())
    report(0, _STEPS, "suppressing")
    hashes = suppress(storage, plan["user_ids"])
    with working_alone(storage):
        _erase_files(storage, users, plan, report)
        report(4, _STEPS, "databases")
        _count(storage, plan, "warehouse files", erase_from_warehouse(storage))
        _count(storage, plan, "analytics rows", erase_from_analytics(storage, users))
    report(5, _STEPS, "online store")
    _count(storage, plan, "online rows", erase_from_online(storage, users))
    receipt = Receipt(
        plan["erasure_id"],
        plan["started_at"],
        datetime.now(UTC).isoformat(),
        hashes,
        plan["counts"],
        list(NOT_COVERED),
        _checkpoints(storage),
    )
    write_json(storage.home / "erasures" / f"{receipt.erasure_id}.json", vars(receipt))
    _pending_file(storage).unlink()
    report(_STEPS, _STEPS, "erased")
    return receipt


def _erase_files(storage: Storage, users: pa.Array, plan: dict[str, Any], report: Report) -> None:
    """Rewrite every Parquet file that names the users, and count anew what is recorded of them."""
    _count(storage, plan, "quarantined rows", erase_from_quarantine(storage, _texts(users)))
    report(1, _STEPS, "ids of events")
    _count(storage, plan, "event ids", _erase_event_ids(storage, users))
    report(2, _STEPS, "files")
    erased = by_user(users)
    columns = ("user_id", NEIGHBOURS)
    affected = list(find_affected(_parquet_files(storage.home), columns, erased))
    counts: dict[str, int] = {}
    for one in affected:
        place = _place(storage, one.paths[0])
        counts[place] = counts.get(place, 0) + one.num_rows
    for place, count in counts.items():
        _count(storage, plan, place, count)
    for number, one in enumerate(affected):
        rewrite(one, erased)
        report(2, _STEPS, f"file {number + 1:,} of {len(affected):,}")
    report(3, _STEPS, "records")
    recount_loads(storage)
    recount_sequences(storage)
    recount_published(storage)


def _erase_event_ids(storage: Storage, users: pa.Array) -> int:
    """Remove the users' events from lists that hold ids of events alone, while they are known."""
    events = sorted(storage.events.rglob("events*.parquet"))
    lists = [path for path in storage.events.rglob("*.parquet") if path not in set(events)]
    if not events or not lists:
        return 0
    with duckdb.connect() as connection:
        connection.register("erased", pa.table({"user_id": users}))
        found = connection.execute(
            f"SELECT DISTINCT event_id FROM {parquet(events)} SEMI JOIN erased USING (user_id)"
        ).to_arrow_table()
    erased = by_event(found["event_id"].combine_chunks())
    removed = 0
    for one in list(find_affected(lists, ("event_id",), erased)):
        rewrite(one, erased)
        removed += one.num_rows
    return removed


def _parquet_files(home: Path) -> list[Path]:
    """Return every finished Parquet file below a home, in order."""
    found = sorted(home.rglob("*.parquet"))
    return [path for path in found if not any(part.endswith(".aside") for part in path.parts)]


def _place(storage: Storage, path: Path) -> str:
    """Return the place that a file is counted under: the first folder of the home."""
    return f"{path.relative_to(storage.home).parts[0]} rows"


def _count(storage: Storage, plan: dict[str, Any], place: str, count: int) -> None:
    """Keep what went from a place before anything else goes: a second try finds less."""
    plan["counts"][place] = max(count, plan["counts"].get(place, 0))
    _write_pending(storage, plan)


def _texts(users: pa.Array) -> frozenset[str]:
    return frozenset(users.to_pylist())


def _checkpoints(storage: Storage) -> dict[str, str]:
    """Return the checkpoints on disk and through when each was trained."""
    found = sorted(storage.checkpoints.glob("*/training.json"))
    return {path.parent.name: str(read_json(path)["trained_through"]) for path in found}
