"""Nights of a small shop from events to the feature store, for the tests of what is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sequence_builders import CUTOFF, START, EventRow, event
from sequence_checkpoints import Home, history

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.embeddings.changes import Changes, read_changes
from behavior_pipeline.embeddings.inference import EmbeddingsSummary, embed_sequences
from behavior_pipeline.feature_store.historical import historical_features
from behavior_pipeline.feature_store.ledger import served_before
from behavior_pipeline.feature_store.publish import PublishSummary, publish_view
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

VIEW = "user_embedding"
USERS = [f"u{number:02d}" for number in range(12)]
ROWS = [row for n, user in enumerate(USERS) for row in history(user, 2 * n + 1, 10 * n)]
COLD = event("cold", 5, "adjusted", "adjust")
"""Its type is no token: the user has a sequence without an event."""


def night_of(number: int) -> datetime:
    """The cutoff so many days after the first one."""
    return CUTOFF + timedelta(days=number)


def written_at(cutoff: datetime) -> datetime:
    """When the rows of a cutoff are made."""
    return cutoff.astimezone(UTC) + timedelta(hours=2)


@dataclass
class Shop:
    """A home whose events change from night to night."""

    home: Home
    max_drift: float = 0.05
    rows: list[EventRow] = field(default_factory=lambda: [*ROWS, COLD])

    @classmethod
    def build(cls, storage: Storage, settings: Settings, max_drift: float = 0.05) -> Shop:
        return cls(Home.build(storage, settings, [*ROWS, COLD]), max_drift)

    @property
    def storage(self) -> Storage:
        return self.home.storage

    def act(self, user: str, at: datetime) -> None:
        """Let a user do something at a moment."""
        hours = (at - START) / timedelta(hours=1)
        name = f"{user}-{len(self.rows)}-{hours:g}"
        self.rows.append(event(user, hours, name, item_id="i1", category="c1"))

    def remove(self, user: str) -> None:
        """Take all of a user's events away."""
        self.rows = [row for row in self.rows if row["user_id"] != user]

    def embed(self, cutoff: datetime, **options: Any) -> EmbeddingsSummary:
        """Tokenize and embed a night."""
        self.home.tokenize([row for row in self.rows if row["occurred_at"] < cutoff], cutoff)
        storage = self.storage
        given = {"served": served_before(storage, cutoff, self.max_drift), **options}
        return embed_sequences(
            storage.sequences(cutoff),
            self.home.checkpoint,
            storage.states(cutoff),
            storage.embeddings(cutoff),
            cutoff,
            written_at=written_at(cutoff),
            **given,
        )

    def publish(self, cutoff: datetime, *, is_full: bool = False) -> PublishSummary:
        """Publish a night that was embedded."""
        return publish_view(self.storage, VIEW, cutoff, is_full=is_full)

    def night(self, cutoff: datetime, *, is_full: bool = False) -> PublishSummary:
        """Embed and publish a night."""
        self.embed(cutoff)
        return self.publish(cutoff, is_full=is_full)

    def changes(self, cutoff: datetime) -> Changes:
        """What a night found changed."""
        found = read_changes(self.storage.changes(cutoff))
        assert found is not None
        return found

    def changed_users(self, cutoff: datetime) -> set[str]:
        """Users whom a night publishes anew."""
        return {user for f in self.changes(cutoff).files for user in _column(f, "user_id")}

    def fresh(self, cutoff: datetime) -> dict[str, dict[str, Any]]:
        """Every row of a night's embeddings, by user."""
        files = sorted(self.storage.embeddings(cutoff).glob("*.parquet"))
        rows = pa.concat_tables([pq.read_table(path) for path in files]).to_pylist()
        return {row["user_id"]: row for row in rows}

    def served(self) -> dict[str, dict[str, Any]]:
        """What Feast gives of everybody who ever was, by user; without those it does not know."""
        users = [*USERS, "cold", COLD_START_USER, *_new_users(self.rows)]
        names = ("embedding", "checkpoint_id", "num_events", "is_cold_start", "cutoff_at")
        found = (
            open_store(self.storage)
            .get_online_features(
                features=[f"{VIEW}:{name}" for name in names],
                entity_rows=[{"user_id": user} for user in users],
            )
            .to_dict()
        )
        rows = {u: {name: found[name][row] for name in names} for row, u in enumerate(users)}
        return {user: row for user, row in rows.items() if row["embedding"] is not None}

    def joined(self, users: Sequence[str], moment: datetime) -> dict[str, dict[str, Any]]:
        """What a training set finds of users at a moment."""
        asked = pa.table({"user_id": list(users), "event_timestamp": [moment] * len(users)})
        names = ("embedding", "cutoff_at")
        features = [f"{VIEW}:{name}" for name in names]
        rows = historical_features(self.storage, asked, features).to_pylist()
        return {row["user_id"]: {name: row[f"{VIEW}__{name}"] for name in names} for row in rows}


def drift(served: Sequence[float], fresh: Sequence[float]) -> float:
    """How far two vectors are apart, as a share of the first one's length."""
    one, other = np.array(served), np.array(fresh)
    moved = float(np.linalg.norm(other - one))
    return moved / float(np.linalg.norm(one)) if moved else 0.0


def online_facts(storage: Storage) -> dict[str, bytes]:
    """What lies in the feature store beside the databases."""
    folder: Path = storage.feature_store
    paths = [path for path in folder.rglob("*") if path.is_file() and ".db" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _column(path: Path, name: str) -> list[Any]:
    values: list[Any] = pq.read_table(path, columns=[name])[name].to_pylist()
    return values


def _new_users(rows: list[EventRow]) -> list[str]:
    known = {*USERS, "cold"}
    return sorted({row["user_id"] for row in rows} - known)
