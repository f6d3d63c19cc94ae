"""Feast's own feature server on a home."""

from __future__ import annotations

from typing import Final

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.published import newest_cutoff
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.storage import Storage

REGISTRY_SECONDS: Final = 2  # until the server sees that another version was promoted


def serve_features(storage: Storage, host: str, port: int, num_workers: int = 1) -> None:
    """Serve a home's features over HTTP until the process is stopped.

    Args:
        storage: the home.
        host: address to listen on. The server asks nobody who he is, and lets whoever reaches it
            write as well as read.
        port: port to listen on.
        num_workers: processes that answer.

    Raises:
        PipelineError: if nothing was ever published.
    """
    if newest_cutoff(storage) is None:
        raise PipelineError(
            f"Nothing was published yet in {storage.feature_store}.",
            "Run the pipeline for this source first: behavior-pipeline run.",
        )
    open_store(storage).serve(
        host=host,
        port=port,
        workers=num_workers,
        max_requests=0,  # a worker that begins anew lets its callers wait for seconds
        registry_ttl_sec=REGISTRY_SECONDS,
    )
