from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
from feature_store_builders import NOVEMBER, WIDTH, vectors, write_embeddings, write_rfm

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.storage import Storage

USERS = ["ada", "böhm 🙂", "it's"]


@pytest.mark.parametrize("row", range(3))
def test_a_known_user_has_its_own_features(storage: Storage, row: int):
    values = vectors(3, seed=0)
    write_embeddings(storage, NOVEMBER, USERS, values)
    publish_view(storage, "user_embedding", NOVEMBER)
    found = lookup(storage, USERS[row])
    assert found["user_id"] == USERS[row]
    assert found["is_cold_start"] is False
    assert found["user_embedding__cutoff_at"] == NOVEMBER
    assert found["user_embedding__is_stale"] is False
    assert (np.float32(found["user_embedding__embedding"]) == values[row]).all()
    assert found["user_rfm__frequency"] is None
    assert found["user_rfm__is_stale"] is None


def test_an_unknown_user_gets_the_cold_start_row(storage: Storage):
    write_embeddings(storage, NOVEMBER, USERS, vectors(3, seed=0))
    write_rfm(storage, NOVEMBER, USERS)
    for view in ("user_embedding", "user_rfm"):
        publish_view(storage, view, NOVEMBER)
    found = lookup(storage, "nobody")
    assert found["user_id"] == "nobody"
    assert found["is_cold_start"] is True
    assert found["user_embedding__embedding"] == [0.0] * WIDTH
    assert found["user_embedding__num_events"] == 0
    assert found["user_embedding__last_event_at"] is None
    assert found["user_rfm__frequency"] is None


def test_a_user_without_any_embedding_published_counts_as_cold(storage: Storage):
    write_rfm(storage, NOVEMBER, USERS)
    publish_view(storage, "user_rfm", NOVEMBER)
    found = lookup(storage, "ada")
    assert (found["user_rfm__frequency"], found["is_cold_start"]) == (1, True)
    assert found["user_embedding__embedding"] is None


@pytest.mark.parametrize(("days", "is_stale"), [(7, False), (8, True)])
def test_a_value_far_behind_the_newest_cutoff_is_stale(storage: Storage, days: int, is_stale: bool):
    newest = NOVEMBER + timedelta(days=days)
    for cutoff, users in ((NOVEMBER, USERS), (newest, USERS[1:])):
        write_rfm(storage, cutoff, users)
        publish_view(storage, "user_rfm", cutoff)
    left = lookup(storage, "ada")
    assert (left["user_rfm__cutoff_at"], left["user_rfm__is_stale"]) == (NOVEMBER, is_stale)
    assert lookup(storage, "it's")["user_rfm__is_stale"] is False


def test_looking_up_before_publishing_is_the_users_mistake(storage: Storage):
    with pytest.raises(PipelineError, match="Nothing was published yet"):
        lookup(storage, "ada")
    assert not storage.home.exists()
