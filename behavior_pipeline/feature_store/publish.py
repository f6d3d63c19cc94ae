"""Publishing a cutoff of a view: first the history (offline), then what is served (online).

Publishing again changes nothing that can be observed, and a kill at any moment is mended by
publishing again. A cutoff older than what is served joins the history and goes no further.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Final

import pyarrow.parquet as pq

from behavior_pipeline.feature_store.exclusive import exclusive
from behavior_pipeline.feature_store.online import delete_online, write_online
from behavior_pipeline.feature_store.online_identity import is_same_store, remember_store
from behavior_pipeline.feature_store.partition import (
    check_rows,
    read_batches,
    source_files,
    write_partition,
)
from behavior_pipeline.feature_store.plan import CHANGES_VIEW, Plan, plan_publication, settle
from behavior_pipeline.feature_store.published import (
    PublishedCutoff,
    PublishedView,
    read_published,
    write_published,
)
from behavior_pipeline.feature_store.repository import offline_folder, open_store, view_of
from behavior_pipeline.feature_store.versions import read_versions, record_checkpoint
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.storage import Storage

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

ONLINE_BATCH_ROWS: Final = 8_192  # users in memory as Feast's bytes, and in one transaction
MIN_BATCH_ROWS: Final = 512
BATCHES: Final = 12  # of a small publication: one batch is prepared while another is written


@dataclass(frozen=True)
class PublishSummary:
    """What a publication did.

    Attributes:
        view: name of the feature view.
        num_rows: users in the partition: all of the cutoff's, or those that have changed.
        seconds: how long it took.
        cutoff: the observation cutoff published.
        is_served: the online store holds these values; False for a cutoff older than the served.
        is_partial: only what has changed since the publication before was written.
    """

    view: str
    num_rows: int
    seconds: float
    cutoff: datetime
    is_served: bool
    is_partial: bool = False


def publish_view(
    storage: Storage,
    view: str,
    cutoff: datetime,
    report: Report = report_nothing,
    version: int | None = None,
    *,
    is_full: bool = False,
) -> PublishSummary:
    """Publish the rows of a view at a cutoff to the offline and the online store.

    Of embeddings only what has changed is written, where that is enough: see `plan.py`.

    Args:
        storage: the home, or a candidate's lane of it.
        view: one of `partition.VIEWS`.
        cutoff: observation cutoff; its rows must have been made by the stages before.
        report: called with the users written online so far.
        version: under which it is published; default the live one.
        is_full: write every row even if only the changes would do.

    Raises:
        PipelineError: if there are no rows, or they may not be published together (see
            `partition.check_rows`), or the version holds another checkpoint's rows.
    """
    started = perf_counter()
    source_files(storage, view, cutoff)  # a mistake is told before Feast is opened
    number = version or read_versions(storage).live
    store = open_store(storage)
    with exclusive(storage):
        is_full = is_full or not is_same_store(storage, number)
        plan = plan_publication(storage, view, cutoff, number, is_full=is_full)
        facts = _check(storage, view, cutoff, plan)
        if facts.checkpoint_id is not None:
            record_checkpoint(storage, number, facts.checkpoint_id)
        defined = view_of(store, view, number)
        path = write_partition(defined, offline_folder(storage, view, number), cutoff, plan.files)
        state = _record_history(storage, view, cutoff, facts, number)
        is_served = state.online_cutoff == f"{cutoff:%Y-%m-%d}"
        if is_served:
            _serve(store, defined, path, report)
            if plan.vanished is not None and len(plan.vanished):
                delete_online(store, defined, plan.vanished)
            settle(storage, number, plan)
            if view == CHANGES_VIEW:
                remember_store(storage, number)
            write_published(storage, view, replace(state, is_online_complete=True), number)
    seconds = perf_counter() - started
    return PublishSummary(view, facts.num_rows, seconds, cutoff, is_served, plan.is_partial)


def _check(storage: Storage, view: str, cutoff: datetime, plan: Plan) -> PublishedCutoff:
    """Check the rows of a publication; a night may have changed nothing."""
    if plan.is_partial and not any(pq.read_metadata(path).num_rows for path in plan.files):
        return PublishedCutoff(0, plan.checkpoint_id, is_partial=True)
    facts = check_rows(storage, view, cutoff, plan.files)
    return replace(facts, is_partial=plan.is_partial)


def _record_history(
    storage: Storage, view: str, cutoff: datetime, facts: PublishedCutoff, version: int
) -> PublishedView:
    """Record the new partition, and the online cutoff before the first value is sent.

    Recording the intent first keeps an older cutoff out even if this run is killed half-way.
    """
    date = f"{cutoff:%Y-%m-%d}"
    before = read_published(storage, version).get(view, PublishedView())
    is_newest = before.online_cutoff is None or before.online_cutoff <= date
    state = PublishedView(
        cutoffs=before.cutoffs | {date: facts},
        online_cutoff=date if is_newest else before.online_cutoff,
        is_online_complete=before.is_online_complete and not is_newest,
    )
    write_published(storage, view, state, version)
    return state


def _serve(store: FeatureStore, view: FeatureView, path: Path, report: Report) -> None:
    """Write a partition to the online store, some users at a time, each batch in one transaction.

    A user's values are replaced whatever their age: the caller makes sure that none is newer.
    """
    total = pq.read_metadata(path).num_rows
    batch_rows = min(ONLINE_BATCH_ROWS, max(MIN_BATCH_ROWS, total // BATCHES))
    write_online(store, view, read_batches(path, batch_rows), total, report)
