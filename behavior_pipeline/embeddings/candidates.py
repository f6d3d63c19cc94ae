"""Embedding everybody with a checkpoint that is not live yet, in the live one's space."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from behavior_pipeline.embeddings.alignment import Alignment, fit_alignment
from behavior_pipeline.embeddings.changes import Served
from behavior_pipeline.embeddings.inference import EmbeddingsSummary, embed_sequences
from behavior_pipeline.embeddings.states import newest_states
from behavior_pipeline.progress import Report, report_nothing
from behavior_pipeline.storage import Storage


def embed_candidate(
    lane: Storage,
    cutoffs: Sequence[datetime],
    aligned_at: datetime,
    live_id: str,
    *,
    written_at: datetime,
    threads: int | None = None,
    report: Report = report_nothing,
) -> tuple[Alignment, EmbeddingsSummary]:
    """Embed every cutoff with a candidate, aligned to the live checkpoint.

    The map is found at the cutoff where probes are trained, from the vectors of both checkpoints
    there: it knows of nothing that a probe is tested on. It is kept (`Storage.alignment`), and
    nightly embeddings go through it once the candidate is live. Finding it costs one pass of the
    transformer; the other cutoffs start from its states.

    Args:
        lane: the candidate's.
        cutoffs: at which there are sequences in the lane; the last one is summed up.
        aligned_at: one of them; the live checkpoint has been embedded there.
        live_id: the live checkpoint.
        written_at: recorded in every row.
        threads: as in `embed_sequences`.
        report: progress over the users of each cutoff.

    Returns:
        The map, and what was embedded at the last cutoff.
    """

    def embed(cutoff: datetime, alignment: Alignment | None) -> EmbeddingsSummary:
        states = lane.states(cutoff)
        return embed_sequences(
            lane.sequences(cutoff),
            lane.checkpoints / lane.lane,
            states,
            lane.embeddings(cutoff),
            cutoff,
            written_at=written_at,
            previous_states_folder=newest_states([states]),
            threads=threads,
            alignment=alignment,
            served=Served(),
            report=report,
        )

    embed(aligned_at, None)
    reference = Storage(lane.home).embeddings(aligned_at)
    alignment = fit_alignment(lane.embeddings(aligned_at), reference, live_id)
    alignment.save(lane.alignment(lane.lane))
    summaries = [embed(cutoff, alignment) for cutoff in cutoffs]
    return alignment, summaries[-1]


def states_to_start_from(storage: Storage, cutoff: datetime, checkpoint_id: str) -> Path | None:
    """Return the newest states of a checkpoint, whether made live or while it was a candidate."""
    lane = storage.of_candidate(checkpoint_id)
    return newest_states([lane.states(cutoff), storage.states(cutoff)], checkpoint_id)
