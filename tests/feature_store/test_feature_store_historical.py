from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feature_store_builders import NOVEMBER, OCTOBER, WIDTH, vectors, write_embeddings, write_rfm
from hypothesis import given, settings
from hypothesis import strategies as st

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store import historical
from behavior_pipeline.feature_store.historical import historical_features
from behavior_pipeline.feature_store.publish import publish_view
from behavior_pipeline.feature_store.repository import open_store
from behavior_pipeline.storage import Storage

USERS = ["ada", "bob", "cem"]
TTL = timedelta(days=35)
MICROSECOND = timedelta(microseconds=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Two cutoffs; the older was filled in after the newer, so it was written last."""
    storage = Storage(tmp_path_factory.mktemp("historical"))
    for cutoff, seed in ((NOVEMBER, 2), (OCTOBER, 1)):
        users = USERS if cutoff == NOVEMBER else USERS[:2]
        write_embeddings(storage, cutoff, users, vectors(len(users), seed))
        write_rfm(storage, cutoff, list(reversed(users)))
        for view in ("user_embedding", "user_rfm"):
            publish_view(storage, view, cutoff)
    return storage


def ask(*rows: tuple[str, datetime]) -> pa.Table:
    users, moments = zip(*rows, strict=True)
    return pa.table({"user_id": list(users), "event_timestamp": pa.array(moments, TIMESTAMP)})


def test_two_cutoffs_give_the_values_valid_at_each(home: Storage):
    asked = ask(*[(user, cutoff) for cutoff in (NOVEMBER, OCTOBER) for user in USERS])
    found = historical_features(home, asked, "churn_model")
    assert found.num_rows == asked.num_rows
    assert found.select(asked.column_names).equals(asked)
    expected = [NOVEMBER] * 3 + [OCTOBER] * 2 + [None]
    assert found["user_embedding__cutoff_at"].to_pylist() == expected
    assert found["user_rfm__cutoff_at"].to_pylist() == expected
    assert found["user_rfm__frequency"].to_pylist() == [3, 2, 1, 2, 1, None]
    newer, older = vectors(3, seed=2), vectors(2, seed=1)
    served = [row.as_py() for row in found["user_embedding__embedding"]]
    assert served[5] is None
    assert (
        np.float32(served[:5]).view(np.uint32) == np.vstack([newer, older]).view(np.uint32)
    ).all()


@pytest.mark.parametrize(
    ("moment", "cutoff"),
    [
        (OCTOBER - MICROSECOND, None),
        (OCTOBER, OCTOBER),
        (NOVEMBER - MICROSECOND, OCTOBER),
        (NOVEMBER, NOVEMBER),
        (NOVEMBER + TTL, NOVEMBER),
        (NOVEMBER + TTL + MICROSECOND, None),
    ],
)
def test_a_value_is_valid_from_its_cutoff_until_it_expires(
    home: Storage, moment: datetime, cutoff: datetime | None
):
    found = historical_features(home, ask(("ada", moment)), ["user_rfm:frequency"])
    assert found["user_rfm__cutoff_at"].to_pylist() == [cutoff]
    assert (found["user_rfm__frequency"].to_pylist() == [None]) == (cutoff is None)


def test_repeated_rows_and_other_columns_are_kept_in_order(home: Storage):
    asked = ask(("bob", NOVEMBER), ("ada", OCTOBER), ("bob", NOVEMBER), ("nobody", NOVEMBER))
    asked = asked.append_column("cutoff", pa.array(["d", "c", "b", "a"]))
    found = historical_features(home, asked, ["user_rfm:frequency"])
    assert found["user_id"].to_pylist() == ["bob", "ada", "bob", "nobody"]
    assert found["cutoff"].to_pylist() == ["d", "c", "b", "a"]
    assert found["user_rfm__frequency"].to_pylist() == [2, 2, 2, None]


@settings(max_examples=8)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*USERS, "nobody"]),
            st.timedeltas(-timedelta(days=40), timedelta(days=80)).map(lambda gap: OCTOBER + gap),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_rows_in_are_rows_out_and_nothing_is_later(home: Storage, rows: list[tuple[str, datetime]]):
    asked = ask(*rows)
    found = historical_features(home, asked, ["user_rfm:frequency"])
    assert found.select(["user_id", "event_timestamp"]).equals(asked)
    for row in found.to_pylist():
        cutoffs = [OCTOBER, NOVEMBER] if row["user_id"] in USERS[:2] else [NOVEMBER]
        cutoffs = [] if row["user_id"] == "nobody" else cutoffs
        valid = [c for c in cutoffs if c <= row["event_timestamp"] <= c + TTL]
        assert row["user_rfm__cutoff_at"] == (max(valid) if valid else None)


def test_slices_join_to_the_same_rows(home: Storage, monkeypatch: pytest.MonkeyPatch):
    asked = ask(*[(user, cutoff) for cutoff in (NOVEMBER, OCTOBER) for user in USERS])
    whole = historical_features(home, asked, "churn_model")
    monkeypatch.setattr(historical, "JOIN_ROWS", 4)
    assert (
        historical_features(home, asked, "churn_model")
        .combine_chunks()
        .equals(whole.combine_chunks())
    )


def test_moments_without_a_zone_are_utc(home: Storage):
    asked = pa.table({"user_id": ["ada"], "event_timestamp": [NOVEMBER.replace(tzinfo=None)]})
    found = historical_features(home, asked, ["user_rfm:frequency"])
    assert found["user_rfm__cutoff_at"].to_pylist() == [NOVEMBER]


def test_plain_feast_gives_the_same_rows(home: Storage):
    asked = ask(("ada", OCTOBER), ("cem", NOVEMBER))
    store = open_store(home)
    plain = store.get_historical_features(
        entity_df=asked.to_pandas(), features=["user_rfm:monetary"], full_feature_names=True
    ).to_arrow()
    ours = historical_features(home, asked, ["user_rfm:monetary"]).drop_columns(
        "user_rfm__cutoff_at"
    )
    assert plain.sort_by("user_id").to_pylist() == ours.to_pylist()


@pytest.mark.parametrize(("is_by_writing", "frequency"), [(False, 2), (True, None)])
def test_a_filled_in_cutoff_is_found_unless_asked_what_had_been_written(
    home: Storage, is_by_writing: bool, frequency: int | None
):
    """The rows of October were written today, long after the moment asked for."""
    found = open_store(home).get_historical_features(
        entity_df=ask(("ada", OCTOBER)).to_pandas(),
        features=["user_rfm:frequency"],
        filter_by_created_timestamp=is_by_writing,
    )
    assert found.to_arrow()["frequency"].to_pylist() == [frequency]


@pytest.mark.parametrize(
    ("asked", "features", "message"),
    [
        (pa.table({"user_id": ["ada"]}), "churn_model", "lack the column 'event_timestamp'"),
        (ask(("ada", OCTOBER)).slice(0, 0), "churn_model", "no row to look up"),
        (ask(("ada", OCTOBER)), "shoe_model", "no feature service 'shoe_model'"),
        (ask(("ada", OCTOBER)), ["user_rfm:shoes"], "no feature 'user_rfm:shoes'"),
        (ask(("ada", OCTOBER)), "personalization", "'user_predictions' was never published"),
    ],
)
def test_mistakes_are_named(home: Storage, asked: pa.Table, features: str, message: str):
    with pytest.raises(PipelineError, match=message):
        historical_features(home, asked, features)


def test_a_null_moment_is_named(home: Storage):
    asked = pa.table({"user_id": ["ada"], "event_timestamp": pa.array([None], TIMESTAMP)})
    with pytest.raises(PipelineError, match="'event_timestamp' is null in 1 rows"):
        historical_features(home, asked, "churn_model")


def test_vectors_keep_their_width(home: Storage):
    found = historical_features(home, ask(("ada", OCTOBER)), ["user_embedding:embedding"])
    assert [len(row) for row in found["user_embedding__embedding"].to_pylist()] == [WIDTH]


def test_a_vector_comes_with_the_cutoff_and_the_checkpoint_it_belongs_to(home: Storage):
    found = historical_features(home, ask(("ada", OCTOBER)), ["user_embedding:embedding"])
    assert found.column_names[2:] == [
        "user_embedding__cutoff_at",
        "user_embedding__checkpoint_id",
        "user_embedding__embedding",
    ]
    assert found["user_embedding__checkpoint_id"].to_pylist() == ["checkpoint-a"]
