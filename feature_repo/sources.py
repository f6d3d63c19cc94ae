"""Where each view's history lies: one Parquet file per cutoff below an absolute folder.

The event timestamp is the observation cutoff: the moment from which the values were valid. The
created timestamp is when a row was written; it only breaks ties, so that a cutoff filled in
afterwards is found at the moment it speaks of.
"""

from __future__ import annotations

import os
from pathlib import Path

from feast import FileSource
from feast.data_format import ParquetFormat

LOCATION = "BEHAVIOR_FEATURE_STORE"


def _offline_folder() -> Path:
    """Return the absolute folder of the published history."""
    location = os.environ.get(LOCATION, "")
    if not Path(location).is_absolute():
        message = f"Set {LOCATION} to the absolute path of a home's feature_store folder."
        raise ValueError(message)
    return Path(location) / "offline"


def _source(view: str, description: str) -> FileSource:
    """Return the source of a view's history."""
    return FileSource(
        name=f"{view}_files",
        path=str(_offline_folder() / view),
        file_format=ParquetFormat(),
        timestamp_field="observation_cutoff",
        created_timestamp_column="written_at",
        description=description,
        owner="behavior-pipeline",
    )


embedding_files = _source("user_embedding", "Embeddings of every published cutoff.")
rfm_files = _source("user_rfm", "Recency, frequency and monetary value at every cutoff.")
prediction_files = _source("user_predictions", "Calibrated scores at every cutoff.")
segment_files = _source("user_segment", "Segments at every cutoff.")
