"""What a published candidate must pass: Feast gives back what was made, and nobody is missing."""

from __future__ import annotations

from datetime import datetime

from behavior_pipeline.downstream.gates import READ_BACK, ROWS_COMPLETE, Outcome
from behavior_pipeline.feature_store.published import PublishedView, read_published
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.feature_store.versions import VERSIONED, read_versions
from behavior_pipeline.sequences.reading import count_users
from behavior_pipeline.storage import Storage


def publication_gates(
    live: Storage, lane: Storage, cutoff: datetime, version: int
) -> dict[str, Outcome]:
    """Read the candidate back through Feast and count its rows.

    Args:
        live: the home.
        lane: the candidate's lane.
        cutoff: that it was published at.
        version: its number.

    Raises:
        PipelineError: if it was not published.
    """
    verified = verify_published(lane, cutoff, version=version)
    note = f"{verified.num_equal:,} of {verified.num_users:,} users read back bit for bit"
    figures = {"num_users": verified.num_users, "mismatches": list(verified.mismatches)}
    is_equal = verified.is_equal and verified.num_users > 0
    return {
        READ_BACK: Outcome(passed=is_equal, note=note, figures=figures),
        ROWS_COMPLETE: _complete(live, lane, cutoff, version),
    }


def _complete(live: Storage, lane: Storage, cutoff: datetime, version: int) -> Outcome:
    """Hold back a version with fewer rows than users, or than the live version at the cutoff."""
    date = f"{cutoff:%Y-%m-%d}"
    own = read_published(lane, version)
    before = read_published(live, read_versions(live).live)
    counts = {view: _rows(own, view, date) for view in VERSIONED}
    expected = count_users(lane.sequences(cutoff)) + 1  # and the prior
    faults = [
        f"{view} has {counts[view]:,} rows, the live version {_rows(before, view, date):,}"
        for view in VERSIONED
        if counts[view] < _rows(before, view, date)
    ]
    if counts["user_embedding"] != expected:
        faults.append(f"{counts['user_embedding']:,} embeddings of {expected:,}")
    return Outcome(
        passed=not faults, note="; ".join(faults) or "every row is there", figures=counts
    )


def _rows(published: dict[str, PublishedView], view: str, date: str) -> int:
    """Return how many rows of a view a cutoff has; 0 if it was not published."""
    cutoff = published.get(view, PublishedView()).cutoffs.get(date)
    return cutoff.num_rows if cutoff else 0
