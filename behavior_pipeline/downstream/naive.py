"""Predictors of the next action that learn nothing: a score beside them says what learning adds."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from behavior_pipeline import sql
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.layers import read_layers
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

NAIVE_PREDICTORS: Final = ("most_frequent", "most_recent")


def most_frequent(train_types: pa.Array, num_users: int) -> pa.Array:
    """Predict for everyone the most frequent next type of the training users; ties by name."""
    counts = Counter(train_types.to_pylist())
    name = min(counts, key=lambda value: (-counts[value], value))
    return pa.repeat(pa.scalar(name, pa.string()), num_users)


def most_recent(
    storage: Storage, settings: Settings, cutoff: datetime, user_ids: pa.Array
) -> pa.Array | None:
    """Predict each user's last event type before the cutoff again.

    Returns None where the sessionized events are not on disk. Events are read bucket by bucket.
    """
    try:
        layers = read_layers(storage.events_sessionized)
    except PipelineError:
        return None
    types = np.full(len(user_ids), None, dtype=object)
    with sql.open_engine(settings.memory_limit, settings.threads, storage.scratch) as engine:
        engine.register("wanted", pa.table({"user_id": user_ids}))
        for bucket in range(layers.num_buckets):
            query = f"""
                select user_id, max_by(event_type, (occurred_at, event_id)) as event_type
                from ({layers.relation(bucket)})
                where occurred_at < $cutoff and user_id in (select user_id from wanted)
                group by user_id
            """
            found = engine.execute(query, {"cutoff": cutoff}).to_arrow_table()
            places = pc.index_in(found["user_id"], value_set=user_ids).to_numpy()
            types[places] = found["event_type"].to_numpy()
    return pa.array(types, pa.string())


def is_correct(predicted: pa.Array, actual: pa.Array) -> NDArray[np.bool_]:
    """Return which predictions equal what happened; no prediction is a miss."""
    equal = pc.fill_null(pc.equal(predicted, actual), fill_value=False)
    result: NDArray[np.bool_] = equal.to_numpy(zero_copy_only=False)
    return result
