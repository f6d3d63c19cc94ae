"""What services read of users: written and removed in whichever online store Feast is set to.

Feast's own write path takes a Python object per value and a statement per feature. The writers here
leave the same bytes in the same places, made from Arrow, a batch of users at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Protocol

import pyarrow as pa

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store import online_postgres, online_redis, online_sqlite
from behavior_pipeline.progress import Report, report_nothing

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView


class OnlineStore(Protocol):
    """A kind of online store."""

    def write_online(
        self,
        store: FeatureStore,
        view: FeatureView,
        batches: Iterable[pa.RecordBatch],
        total: int,
        report: Report = report_nothing,
    ) -> int:
        """See `write_online`."""

    def delete_online(self, store: FeatureStore, view: FeatureView, user_ids: pa.Array) -> int:
        """See `delete_online`."""


_STORES: Final[dict[str, OnlineStore]] = {
    "sqlite": online_sqlite,
    "redis": online_redis,
    "postgres": online_postgres,
}


def write_online(
    store: FeatureStore,
    view: FeatureView,
    batches: Iterable[pa.RecordBatch],
    total: int,
    report: Report = report_nothing,
) -> int:
    """Write users to the online store: insert who is not there, replace who is.

    A kill leaves whole batches, and writing again completes them. Values are replaced whatever
    their age: the caller makes sure that none is newer.

    Args:
        store: opened Feast.
        view: the feature view, of the version meant; its table exists.
        batches: columns `user_id`, `observation_cutoff`, `written_at` and every feature; each user
            once.
        total: users expected, for the report.
        report: called with the users written so far.

    Returns:
        How many users were written.

    Raises:
        PipelineError: if the store is of a kind that cannot be written in bulk, or its server
            cannot be reached.
    """
    return _of(store).write_online(store, view, batches, total, report)


def delete_online(store: FeatureStore, view: FeatureView, user_ids: pa.Array) -> int:
    """Remove users' rows of one view, in one transaction where the store has them.

    Args:
        store: opened Feast.
        view: the feature view, of the version meant.
        user_ids: strings without a null; users who are not there are passed over.

    Returns:
        How many of the users were there.

    Raises:
        PipelineError: as `write_online`.
    """
    return _of(store).delete_online(store, view, user_ids)


def _of(store: FeatureStore) -> OnlineStore:
    """Return the functions for the configured store."""
    kind = store.config.online_store.type
    if kind not in _STORES:
        raise PipelineError(
            f"Users cannot be written to an online store of the kind '{kind}'.",
            f"Use one of {', '.join(_STORES)}.",
        )
    options = ("vector_enabled", "enable_openai_compatible_store")
    if any(getattr(store.config.online_store, option, False) for option in options):
        raise PipelineError(
            "Users cannot be written with Feast's columns for vector searches.",
            f"Leave {' and '.join(options)} out of the online store's options.",
        )
    return _STORES[kind]
