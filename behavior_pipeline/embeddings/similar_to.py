"""Who is like one user: from what was found for everyone, from the index, or from everyone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from behavior_pipeline.embeddings.exact_neighbors import exact_neighbors
from behavior_pipeline.embeddings.neighbor_index import (
    ABOUT_FILE,
    IndexFacts,
    NeighborIndex,
    read_facts,
)
from behavior_pipeline.embeddings.neighbor_vectors import EmbeddingFolder
from behavior_pipeline.embeddings.similar_users import NEIGHBORS_FILE
from behavior_pipeline.encoder.live import LIVE, pointed_to
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import parse_cutoff

Similar = list[tuple[str, float]]


@dataclass(frozen=True)
class SimilarTo:
    """The users most like a user.

    Attributes:
        neighbors: ids and cosines, the nearest first, ties by id; none for a cold-start user.
        facts: what they were found in.
        is_exact: the user was compared with everyone.
    """

    neighbors: Similar
    facts: IndexFacts
    is_exact: bool


def similar_to(storage: Storage, user_id: str, num: int, *, is_exact: bool = False) -> SimilarTo:
    """Return the `num` users most like a user at the newest cutoff.

    Up to `num_similar_users` they were found already; for more the index is searched. If
    `is_exact`, the user is compared with everyone's embedding now.

    Raises:
        PipelineError: if no neighbours were found yet, or the user has no embedding.
    """
    folder, lane = newest_folder(storage)
    facts = read_facts(folder)
    if is_exact:
        embeddings = EmbeddingFolder.open(lane.embeddings(parse_cutoff(facts.cutoff)))
        found = exact_neighbors(embeddings, user_id, num)
    elif num <= facts.num_neighbors:
        found = _known(folder, user_id, num)
    else:
        found = NeighborIndex(folder).search(user_id, num)
    if found is None:
        raise PipelineError(
            f"The user '{user_id}' has no embedding at {facts.cutoff}.",
            "Name a user with an event before that day, as the events call it.",
        )
    return SimilarTo(found, facts, is_exact or facts.is_exact)


def newest_folder(storage: Storage) -> tuple[Path, Storage]:
    """Return where the live checkpoint's newest neighbours are, and in which lane.

    A checkpoint that went live since the last night left them in the lane that it came by.

    Raises:
        PipelineError: if there are none.
    """
    live = pointed_to(storage.checkpoints, LIVE)
    lanes = [storage.of_candidate(live), storage] if live else [storage]
    found = [
        (about.parent.name, about.parent, lane)
        for lane in lanes
        for about in lane.all_similar_users.glob(f"cutoff=*/{ABOUT_FILE}")
        if live in (None, read_facts(about.parent).checkpoint_id)
    ]
    if not found:
        raise PipelineError(
            f"No similar users were found yet in {storage.all_similar_users}.",
            "Run the pipeline for this source first: behavior-pipeline run.",
        )
    _, folder, lane = max(found, key=lambda one: one[0])
    return folder, lane


def _known(folder: Path, user_id: str, num: int) -> Similar | None:
    """Return what was found for everyone; None if there is no such user."""
    rows = pq.read_table(folder / NEIGHBORS_FILE, filters=[("user_id", "=", user_id)]).to_pylist()
    if not rows:
        return None
    return list(zip(rows[0]["similar_user_ids"], rows[0]["similarities"], strict=True))[:num]
