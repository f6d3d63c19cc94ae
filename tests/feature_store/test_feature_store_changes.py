from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from change_builders import (
    USERS,
    VIEW,
    Shop,
    drift,
    night_of,
    online_facts,
)
from hypothesis import given
from hypothesis import settings as rounds
from hypothesis import strategies as st

from behavior_pipeline.contracts import COLD_START_USER
from behavior_pipeline.embeddings.changes import REFRESH_DAYS
from behavior_pipeline.erasure.erase import erase
from behavior_pipeline.feature_store import publish
from behavior_pipeline.feature_store.ledger import published_ledger, read_pointer
from behavior_pipeline.feature_store.lookup import lookup
from behavior_pipeline.feature_store.published import read_published
from behavior_pipeline.feature_store.verify import verify_published
from behavior_pipeline.ingest.presets import load_preset
from behavior_pipeline.pipeline import Pipeline
from behavior_pipeline.settings import Settings, load_settings
from behavior_pipeline.storage import Storage

EVERYBODY = {*USERS, "cold", COLD_START_USER}
ROUNDING = 1e-6


@pytest.fixture
def shop(storage: Storage, settings: Settings) -> Shop:
    return Shop.build(storage, settings)


def assert_served_is_near(shop: Shop, number: int) -> None:
    """Whoever is known is served, nobody else, nobody further from fresh than the bound."""
    cutoff = night_of(number)
    served, fresh = shop.served(), shop.fresh(cutoff)
    assert served.keys() == fresh.keys()
    for user, row in served.items():
        assert drift(row["embedding"], fresh[user]["embedding"]) <= shop.max_drift + ROUNDING
        assert cutoff - row["cutoff_at"] < timedelta(days=REFRESH_DAYS)
        for name in ("checkpoint_id", "num_events", "is_cold_start"):
            assert row[name] == fresh[user][name]
    joined = shop.joined(sorted(fresh), cutoff)
    for user, row in joined.items():
        assert row["cutoff_at"] == served[user]["cutoff_at"]
        assert row["embedding"] == served[user]["embedding"]
    verified = verify_published(shop.storage, cutoff)
    assert verified.is_equal
    assert verified.num_users == len(fresh)
    assert verified.max_drift <= shop.max_drift + ROUNDING


def test_the_first_night_publishes_everybody_the_next_one_who_changed(shop: Shop):
    first = shop.night(night_of(0))
    assert (first.is_partial, first.num_rows) == (False, len(EVERYBODY))
    shop.act("u03", night_of(1) - timedelta(hours=3))
    second = shop.night(night_of(1))
    assert second.is_partial
    assert 1 <= second.num_rows < len(EVERYBODY)
    assert "u03" in shop.changed_users(night_of(1))
    assert not {"cold", COLD_START_USER} & shop.changed_users(night_of(1))
    assert_served_is_near(shop, 1)
    cutoffs = read_published(shop.storage)[VIEW].cutoffs
    assert [cutoff.is_partial for _, cutoff in sorted(cutoffs.items())] == [False, True]


def test_another_online_store_gets_everybody(shop: Shop):
    shop.night(night_of(0))
    for path in shop.storage.feature_store.glob("online.db*"):
        path.rename(path.with_name(f"lost-{path.name}"))  # its place on the disk stays taken
    second = shop.night(night_of(1))
    assert (second.is_partial, second.num_rows) == (False, len(EVERYBODY))
    assert_served_is_near(shop, 1)


def test_a_night_without_a_change_publishes_nobody(shop: Shop):
    shop.max_drift = 0.9
    shop.night(night_of(0))
    quiet = shop.night(night_of(1))
    assert (quiet.is_partial, quiet.num_rows) == (True, 0)
    assert_served_is_near(shop, 1)


def test_a_late_event_publishes_its_user(shop: Shop):
    shop.max_drift = 0.9
    shop.night(night_of(0))
    shop.act("u05", night_of(0) - timedelta(days=9))
    shop.night(night_of(1))
    assert shop.changed_users(night_of(1)) == {"u05"}


def test_a_user_vanishes_and_returns(shop: Shop):
    shop.max_drift = 0.9
    shop.night(night_of(0))
    events = [row for row in shop.rows if row["user_id"] == "u04"]
    shop.remove("u04")
    shop.night(night_of(1))
    assert shop.changes(night_of(1)).vanished().to_pylist() == ["u04"]
    assert "u04" not in shop.served()
    assert_served_is_near(shop, 1)
    shop.rows += events
    shop.night(night_of(2))
    assert shop.changed_users(night_of(2)) == {"u04"}
    assert_served_is_near(shop, 2)


def test_rows_are_published_anew_before_joins_stop_finding_them(shop: Shop):
    shop.max_drift = 0.99
    shop.night(night_of(0))
    assert shop.night(night_of(REFRESH_DAYS - 1)).num_rows == 0
    assert shop.night(night_of(REFRESH_DAYS)).num_rows == len(EVERYBODY)
    assert_served_is_near(shop, REFRESH_DAYS)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [0.0, 0.02])
@rounds(max_examples=4)
@given(
    nights=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["act", "late", "vanish", "return"]),
                st.sampled_from([*USERS, "cold", "newcomer"]),
            ),
            max_size=3,
        ),
        min_size=2,
        max_size=4,
    )
)
def test_a_chain_of_nights_ends_in_the_store_of_a_full_publication(
    bound: float, nights: list[list[tuple[str, str]]]
):
    with TemporaryDirectory() as folder:
        shop = Shop.build(
            Storage(Path(folder) / "home"), load_settings(data_root=Path(folder)), bound
        )
        shop.night(night_of(0))
        gone = dict[str, list[dict]]()
        for number, steps in enumerate(nights, start=1):
            for step, user in steps:
                if step == "act":
                    shop.act(user, night_of(number) - timedelta(hours=5))
                elif step == "late":
                    shop.act(user, night_of(number) - timedelta(days=12))
                elif step == "vanish":
                    gone[user] = [row for row in shop.rows if row["user_id"] == user]
                    shop.remove(user)
                else:
                    shop.rows += gone.pop(user, [])
            assert shop.night(night_of(number)).is_partial
            assert_served_is_near(shop, number)
        chain = shop.served()
        last = shop.publish(night_of(len(nights)), is_full=True)
        assert not last.is_partial
        whole = shop.served()
        assert whole.keys() == chain.keys()
        if bound == 0:
            for user, row in whole.items():
                assert row | {"cutoff_at": None} == chain[user] | {"cutoff_at": None}
        assert_served_is_near(shop, len(nights))


def test_publishing_a_night_again_changes_nothing(shop: Shop):
    shop.night(night_of(0))
    shop.act("u03", night_of(1) - timedelta(hours=3))
    shop.night(night_of(1))
    facts, rows = online_facts(shop.storage), shop.served()
    assert shop.publish(night_of(1)).is_partial
    assert (online_facts(shop.storage), shop.served()) == (facts, rows)
    assert shop.night(night_of(1)).is_partial  # embedded again, too
    assert (online_facts(shop.storage), shop.served()) == (facts, rows)


def test_a_night_whose_events_changed_after_it_was_published_is_published_whole(shop: Shop):
    shop.night(night_of(0))
    shop.act("u03", night_of(1) - timedelta(hours=3))
    shop.night(night_of(1))
    shop.remove("u03")
    assert not shop.night(night_of(1)).is_partial
    assert_served_is_near(shop, 1)
    shop.act("u01", night_of(2) - timedelta(hours=3))
    assert shop.night(night_of(2)).is_partial
    assert_served_is_near(shop, 2)


@pytest.mark.parametrize(
    "step", ["write_partition", "_record_history", "_serve", "delete_online", "settle"]
)
def test_a_killed_publication_is_completed(shop: Shop, monkeypatch, step: str):
    shop.max_drift = 0.5
    shop.night(night_of(0))
    shop.act("u03", night_of(1) - timedelta(hours=3))
    shop.remove("u04")
    shop.embed(night_of(1))

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killing:
        killing.setattr(publish, step, dies)
        with pytest.raises(KeyboardInterrupt):
            shop.publish(night_of(1))
    assert shop.publish(night_of(1)).is_partial
    assert_served_is_near(shop, 1)
    assert read_pointer(shop.storage, 1).unsettled == ()


def test_after_a_publication_that_was_never_completed_the_next_one_is_whole(
    shop: Shop, monkeypatch
):
    shop.night(night_of(0))
    shop.act("newcomer", night_of(1) - timedelta(hours=3))
    shop.embed(night_of(1))
    with monkeypatch.context() as killing:
        killing.setattr(publish, "settle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shop.publish(night_of(1))
    assert "newcomer" in shop.served()
    shop.remove("newcomer")
    assert not shop.night(night_of(2)).is_partial
    assert "newcomer" not in shop.served()
    assert_served_is_near(shop, 2)
    assert shop.night(night_of(3)).is_partial


def test_a_cutoff_filled_in_between_makes_the_next_night_whole(shop: Shop):
    shop.night(night_of(0))
    shop.night(night_of(2))
    assert not shop.night(night_of(1)).is_served
    assert not shop.night(night_of(3)).is_partial
    assert_served_is_near(shop, 3)
    assert shop.night(night_of(4)).is_partial


def test_a_cutoff_filled_in_long_before_changes_nothing(shop: Shop):
    shop.night(night_of(1))
    assert not shop.night(night_of(0)).is_served
    assert shop.night(night_of(2)).is_partial
    assert_served_is_near(shop, 2)


def test_another_versions_history_makes_the_next_night_whole(shop: Shop):
    shop.night(night_of(0))
    shop.night(night_of(1))
    partition = shop.storage.feature_store / "offline" / VIEW / "v1" / "cutoff=2024-01-22"
    (partition / "features.parquet").rename(partition / "v2.parquet")
    assert not shop.night(night_of(2)).is_partial
    assert shop.night(night_of(3)).is_partial


def test_embeddings_without_changes_are_published_whole(shop: Shop):
    shop.night(night_of(0))
    shop.embed(night_of(1), served=None)
    assert not shop.publish(night_of(1)).is_partial
    assert published_ledger(shop.storage) is None
    assert verify_published(shop.storage, night_of(1)).is_equal
    assert not shop.night(night_of(2)).is_partial
    assert shop.night(night_of(3)).is_partial


def test_a_row_that_still_holds_is_not_stale(shop: Shop):
    shop.max_drift = 0.9
    shop.night(night_of(0))
    for number in (9, 18):
        shop.night(night_of(number))
    found = lookup(shop.storage, "u02")
    assert found["user_embedding__cutoff_at"] == night_of(0)
    assert found["user_embedding__is_stale"] is False


def test_an_erased_user_is_in_no_ledger_and_the_others_rows_hold(shop: Shop):
    shop.max_drift = 0.9
    shop.night(night_of(0))
    erase(Pipeline(load_settings(), load_preset("simulated"), shop.storage), ["u02"])
    assert "u02" not in shop.served()
    ledger = published_ledger(shop.storage)
    assert ledger is not None
    assert set(ledger.user_ids.to_pylist()) == EVERYBODY - {"u02"}
    shop.remove("u02")
    quiet = shop.night(night_of(1))
    assert (quiet.is_partial, quiet.num_rows) == (True, 0)
    assert shop.changes(night_of(1)).num_vanished == 0
    assert_served_is_near(shop, 1)


def test_verification_tells_a_row_that_is_not_the_ledgers(shop: Shop):
    shop.max_drift = 0.9
    shop.night(night_of(0))
    shop.night(night_of(1))
    file = next((shop.storage.feature_store / "offline" / VIEW / "v1").glob("*20*21/*"))
    table = pq.read_table(file)
    vectors = np.stack(table["embedding"].to_numpy())
    vectors[3, 2] += 1
    column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    index = table.schema.get_field_index("embedding")
    pq.write_table(table.set_column(index, "embedding", column), file)
    verified = verify_published(shop.storage, night_of(1))
    assert verified.mismatches == (table["user_id"][3].as_py(),)
