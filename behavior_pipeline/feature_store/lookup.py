"""Everything that the online store knows of one user."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.published import (
    PublishedView,
    newest_cutoff,
    read_published,
)
from behavior_pipeline.feature_store.repository import full_name, open_store
from behavior_pipeline.feature_store.versions import read_versions
from behavior_pipeline.storage import Storage
from behavior_pipeline.windows import parse_cutoff

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

PROFILE_SERVICE: Final = "user_profile"
EMBEDDING_VIEW: Final = "user_embedding"
VERSION_IN_NAME: Final = re.compile(r"@v\d+__")  # a service reads one version of each view


def lookup(storage: Storage, user_id: str) -> dict[str, Any]:
    """Return all online features of a user under Feast's full names, `user_rfm__frequency`.

    Beside them stand `user_id` as asked, `is_cold_start`, and for each view `<view>__is_stale`:
    its value lies more days behind the newest published cutoff than the view's tag allows, or the
    view itself was last published longer before it than its other tag allows. A view
    that has no row of the user is None throughout. A user without a published embedding gets the
    embedding of the reserved cold-start user and `is_cold_start` True.

    Raises:
        PipelineError: if nothing was ever published.
    """
    newest = newest_cutoff(storage)
    if newest is None:
        raise PipelineError(
            f"Nothing was published yet in {storage.feature_store}.",
            "Run the pipeline for this source first: behavior-pipeline run.",
        )
    store = open_store(storage)
    service = f"{PROFILE_SERVICE}_v{read_versions(storage).live}"
    user, prior = _read(store, service, [user_id, COLD_START_USER])
    if user[full_name(EMBEDDING_VIEW, "cutoff_at")] is None:
        user |= _of_view(prior, EMBEDDING_VIEW)
    states = read_published(storage)
    flags = {
        full_name(view.name, "is_stale"): _is_stale(
            view, user, newest, _behind(view, states, newest)
        )
        for view in store.list_feature_views()
    }
    is_cold_start = user[full_name(EMBEDDING_VIEW, "is_cold_start")] is not False
    return {"user_id": user_id, "is_cold_start": is_cold_start} | dict(
        sorted((user | flags).items())
    )


def _read(store: FeatureStore, service: str, user_ids: list[str]) -> list[dict[str, Any]]:
    """Return the online features of users, one dictionary each."""
    response = store.get_online_features(
        features=store.get_feature_service(service),
        entity_rows=[{"user_id": user_id} for user_id in user_ids],
        full_feature_names=True,
    ).to_dict()
    names = {name: VERSION_IN_NAME.sub("__", name) for name in response if name != "user_id"}
    return [
        {plain: response[name][row] for name, plain in names.items()}
        for row in range(len(user_ids))
    ]


def _of_view(features: dict[str, Any], view: str) -> dict[str, Any]:
    """Return the features of one view."""
    prefix = full_name(view, "")
    return {name: value for name, value in features.items() if name.startswith(prefix)}


def _behind(view: FeatureView, states: dict[str, PublishedView], newest: datetime) -> timedelta:
    """Return how long before the newest published cutoff a view was last published."""
    last = states.get(view.name, PublishedView()).online_cutoff
    return newest - parse_cutoff(last) if last else timedelta(0)


def _is_stale(
    view: FeatureView, user: dict[str, Any], newest: datetime, behind: timedelta
) -> bool | None:
    """Say whether a view's values lie too far behind; None where there are none.

    A night that leaves an embedding as it is has looked at it: such a row may be older than the
    view's last publication (see `embeddings/changes.py`), which has an age of its own.
    """
    cutoff_at: datetime | None = user[full_name(view.name, "cutoff_at")]
    if cutoff_at is None:
        return None
    is_old = newest - cutoff_at > timedelta(days=int(view.tags["stale_after_days"]))
    return is_old or behind > timedelta(days=int(view.tags["late_after_days"]))
