"""Where each view's history lies: one Parquet file per cutoff below an absolute folder.

Values that depend on a checkpoint have a folder per version. The version is the live one, which
`versions.json` names, unless BEHAVIOR_FEATURE_VERSION names another.

The event timestamp is the observation cutoff: the moment from which the values were valid. The
created timestamp is when a row was written; it only breaks ties, so that a cutoff filled in
afterwards is found at the moment it speaks of.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from feast import FileSource
from feast.data_format import ParquetFormat

LOCATION = "BEHAVIOR_FEATURE_STORE"
VERSION = "BEHAVIOR_FEATURE_VERSION"


def _location() -> Path:
    """Return the absolute folder of the feature store."""
    location = os.environ.get(LOCATION, "")
    if not Path(location).is_absolute():
        message = f"Set {LOCATION} to the absolute path of a home's feature_store folder."
        raise ValueError(message)
    return Path(location)


def _version() -> int:
    """Return the version that is defined: the one asked for, else the live one."""
    if asked := os.environ.get(VERSION):
        return int(asked)
    versions = _location() / "versions.json"
    return int(json.loads(versions.read_text())["live"]) if versions.exists() else 1


version = _version()


def _source(view: str, description: str, *, is_versioned: bool = True) -> FileSource:
    """Return the source of a view's history."""
    folder = _location() / "offline" / view
    return FileSource(
        name=f"{view}_files_v{version}" if is_versioned else f"{view}_files",
        path=str(folder / f"v{version}" if is_versioned else folder),
        file_format=ParquetFormat(),
        timestamp_field="observation_cutoff",
        created_timestamp_column="written_at",
        description=description,
        owner="behavior-pipeline",
    )


embedding_files = _source("user_embedding", "Embeddings of every published cutoff.")
rfm_files = _source(
    "user_rfm", "Recency, frequency and monetary value at every cutoff.", is_versioned=False
)
prediction_files = _source("user_predictions", "Calibrated scores at every cutoff.")
segment_files = _source("user_segment", "Segments at every cutoff.")
similar_users_files = _source("similar_users", "Every user's nearest neighbours at every cutoff.")
