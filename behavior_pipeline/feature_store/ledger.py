"""What services read of each user's embedding, version by version: `ledgers/v<N>/`.

`published.json` there points to the ledger of the last complete publication. It moves once all is
written, online and offline; until then the ledger of a publication under way stands in `unsettled`,
so that a publication that was killed is known, and the next one removes what it may have left.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from behavior_pipeline.embeddings.changes import Served
from behavior_pipeline.embeddings.ledger import Ledger
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.storage import Storage, read_json, write_json, writing_file

POINTER_FILE: Final = "published.json"


@dataclass(frozen=True)
class Pointer:
    """What is known of the store.

    Attributes:
        ledger_id: of the last complete publication; None if its ledger is not known.
        cutoff: of that publication, `YYYY-MM-DD`.
        base_id: the ledger that it was measured against; None if it was a full one.
        oldest: cutoff of the oldest row that still holds.
        unsettled: ledgers of other publications whose users may be in the store.
    """

    ledger_id: str | None = None
    cutoff: str | None = None
    base_id: str | None = None
    oldest: str | None = None
    unsettled: tuple[str, ...] = ()

    def named(self) -> set[str]:
        """Return the ledgers that it speaks of."""
        return {name for name in (self.ledger_id, self.base_id, *self.unsettled) if name}

    def disconnected(self) -> Pointer:
        """Return the one after which the next publication is a full one."""
        users = [name for name in (self.ledger_id, *self.unsettled) if name]
        return Pointer(unsettled=tuple(dict.fromkeys(users)))


def ledgers_folder(storage: Storage, version: int) -> Path:
    """Return where the ledgers of a version lie."""
    return storage.ledgers / f"v{version}"


def ledger_file(storage: Storage, version: int, ledger_id: str) -> Path:
    """Return where a ledger is kept."""
    return ledgers_folder(storage, version) / f"{ledger_id}.parquet"


def read_pointer(storage: Storage, version: int) -> Pointer:
    """Return what is known of a version's store; nothing before its first publication."""
    path = ledgers_folder(storage, version) / POINTER_FILE
    if not path.exists():
        return Pointer()
    content: dict[str, Any] = read_json(path)
    return Pointer(**content | {"unsettled": tuple(content["unsettled"])})


def write_pointer(storage: Storage, version: int, pointer: Pointer) -> None:
    """Replace it, and remove the ledgers that nothing speaks of any more."""
    folder = ledgers_folder(storage, version)
    write_json(folder / POINTER_FILE, asdict(pointer))
    for path in folder.glob("*.parquet"):
        if path.stem not in pointer.named():
            path.unlink()


def load_ledgers(storage: Storage, version: int, ids: tuple[str | None, ...]) -> list[Ledger]:
    """Return those ledgers that are kept."""
    found = [Ledger.load(ledger_file(storage, version, name)) for name in ids if name]
    return [ledger for ledger in found if ledger is not None]


def published_ledger(storage: Storage, version: int | None = None) -> Ledger | None:
    """Return the ledger of the last complete publication; None if it is not known."""
    number = version or read_versions(storage).live
    ledgers = load_ledgers(storage, number, (read_pointer(storage, number).ledger_id,))
    return ledgers[0] if ledgers else None


def served_before(
    storage: Storage, cutoff: datetime, max_drift: float, version: int | None = None
) -> Served:
    """Return what a night's rows are to be measured against.

    That is the last publication before the night's cutoff. If the night itself is published
    already, what it was measured against: doing it again then comes to the same.
    """
    number = version or read_versions(storage).live
    pointer = read_pointer(storage, number)
    date = f"{cutoff:%Y-%m-%d}"
    if pointer.cutoff is None or pointer.cutoff > date:
        return Served(None, max_drift)
    name = pointer.ledger_id if pointer.cutoff < date else pointer.base_id
    ledgers = load_ledgers(storage, number, (name,))
    return Served(ledgers[0] if ledgers else None, max_drift)


def keep_file(storage: Storage, version: int, ledger_id: str, source: Path) -> None:
    """Keep a copy of a night's ledger."""
    with writing_file(ledger_file(storage, version, ledger_id)) as aside:
        shutil.copyfile(source, aside)


def begin(storage: Storage, version: int, ledger_id: str | None) -> None:
    """Note that a publication is under way; without a ledger, that nothing is known after it."""
    pointer = read_pointer(storage, version)
    if ledger_id is None:
        after = pointer.disconnected()
    elif ledger_id in pointer.unsettled:
        return
    else:
        after = replace(pointer, unsettled=(*pointer.unsettled, ledger_id))
    if after != pointer:
        write_pointer(storage, version, after)
