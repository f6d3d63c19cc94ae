"""Asset checks; blocking wherever a leak or a hole would pass on to what comes after."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pyarrow.compute as pc
import pyarrow.dataset as ds

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.defs.partitions import nights
from behavior_pipeline.defs.resources import Night, PipelineResource
from behavior_pipeline.embeddings.statistics import EmbeddingStatistics, summarise_embeddings
from behavior_pipeline.encoder.live import checkpoint_folder
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.storage import read_json
from behavior_pipeline.windows import parse_timestamp
