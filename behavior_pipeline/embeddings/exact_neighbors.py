"""One user's nearest neighbours by comparing with everyone, straight from the embeddings."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behavior_pipeline.embeddings.neighbor_vectors import EmbeddingFolder
from behavior_pipeline.embeddings.states import Vectors


def exact_neighbors(
    folder: EmbeddingFolder, user_id: str, num: int
) -> list[tuple[str, float]] | None:
    """Return the users most like a user, the nearest first, ties by id, with their cosines.

    Reads the embeddings twice, a batch at a time.

    Returns:
        None if there is no such user; nothing for a user without neighbours.
    """
    own = _vector_of(folder, user_id)
    if own is None or not len(own):
        return None if own is None else []
    ids, scores = list[pa.Array](), list[Vectors]()
    for user_ids, vectors, has_neighbors in folder.batches():
        is_other = has_neighbors & pc.not_equal(user_ids, user_id).to_numpy(zero_copy_only=False)
        ids.append(user_ids.filter(pa.array(is_other)))
        scores.append(np.einsum("nd,d->n", vectors[is_other], own))
    table = pa.table({"user_id": pa.concat_arrays(ids), "score": np.concatenate(scores)})
    order = [("score", "descending"), ("user_id", "ascending")]
    nearest = table.take(pc.select_k_unstable(table, num, order)) if len(table) else table
    return [(row["user_id"], min(row["score"], 1.0)) for row in nearest.to_pylist()]


def _vector_of(folder: EmbeddingFolder, user_id: str) -> Vectors | None:
    """Return a user's vector (D,), of length 0 if it can have no neighbours; None for nobody."""
    for user_ids, vectors, has_neighbors in folder.batches():
        place = pc.index(user_ids, user_id).as_py()
        if place >= 0:
            own: Vectors = vectors[place] if has_neighbors[place] else vectors[place, :0]
            return own
    return None
