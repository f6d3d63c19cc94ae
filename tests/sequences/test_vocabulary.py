from __future__ import annotations

import json
from datetime import timedelta

import polars as pl
import pytest
from sequence_builders import CUTOFF, START, event, events_frame, write_events_sessionized

from behavior_pipeline.contracts import NUM_SPECIAL_IDS, TOKEN_FIELDS
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.sequences.vocabulary import (
    MAX_AMOUNT_BUCKETS,
    Vocabulary,
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
)
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage


def build(
    storage: Storage, settings: Settings, rows: list[dict], *, ignored: tuple[str, ...] = ()
) -> Vocabulary:
    write_events_sessionized(storage, events_frame(rows))
    return build_vocabulary(storage, settings, ignored, CUTOFF)


def test_values_are_ordered_by_count_and_then_by_value(storage: Storage, settings: Settings):
    items = ["b", "b", "a", "a", "z", "z", "z", "rare", None]
    rows = [event(f"u{k}", k, str(k), item_id=item) for k, item in enumerate(items)]
    vocabulary = build(storage, settings, rows)
    assert vocabulary.values["item"] == ("z", "a", "b")  # "rare" has fewer than 2 events
    assert vocabulary.counts["item"] == (3, 2, 2)
    assert vocabulary.values["category"] == ()
    assert {name: vocabulary.size(name) for name in TOKEN_FIELDS} == {
        "action": 5, "item": 7, "category": 4, "location": 4, "amount": 4, "hour": 172,
    }  # fmt: skip


def test_event_types_need_one_event_only_and_ignored_ones_do_not_count(
    storage: Storage, settings: Settings
):
    rows = [
        event("u", 0, "1", "view"),
        event("u", 1, "2", "buy"),
        event("u", 2, "3", "buy"),
        event("u", 3, "4", "adjust", item_id="i"),
        event("u", 3, "5", "adjust", item_id="i", amount=1.0),
    ]
    vocabulary = build(storage, settings, rows, ignored=("adjust", "absent"))
    assert vocabulary.values["action"] == ("buy", "view")
    assert vocabulary.values["item"] == ()
    assert vocabulary.amount_edges is None


def test_a_field_keeps_at_most_max_vocabulary_values(storage: Storage, settings: Settings):
    rows = [event("u", k, str(k), item_id=f"i{k // 2:02d}") for k in range(20)]
    small = settings.model_copy(update={"max_vocabulary": 3})
    assert build(storage, small, rows).values["item"] == ("i00", "i01", "i02")


def test_amount_edges_are_quantiles_with_their_sign(storage: Storage, settings: Settings):
    amounts = [float(k) for k in range(-50, 50)]
    rows = [event("u", k, str(k), amount=amount) for k, amount in enumerate(amounts)]
    edges = build(storage, settings, rows).amount_edges
    assert edges is not None
    assert len(edges) == MAX_AMOUNT_BUCKETS - 1
    # The k/32 quantile of 100 amounts is the ceil(100 k / 32)-th smallest.
    assert edges == tuple(amounts[-(-100 * k // 32) - 1] for k in range(1, 32))


def test_a_frequent_amount_has_a_bucket_to_itself(storage: Storage, settings: Settings):
    amounts = [-3.0] * 10 + [0.0, -0.0] * 20 + [7.0] * 10 + [float("nan")]
    rows = [event("u", k, str(k), amount=amount) for k, amount in enumerate(amounts)]
    edges = build(storage, settings, rows).amount_edges
    assert edges == (-3.0, 0.0)
    assert str(edges) == "(-3.0, 0.0)"  # never -0.0, which would change the id


def test_equal_content_has_equal_id_and_any_difference_another(
    storage: Storage, settings: Settings
):
    rows = [event("u", k, str(k), item_id="i", amount=float(k)) for k in range(4)]
    vocabulary = build(storage, settings, rows)
    assert len(vocabulary.vocabulary_id) == 16
    assert vocabulary.vocabulary_id == build(storage, settings, rows[::-1]).vocabulary_id
    later = build_vocabulary(storage, settings, (), CUTOFF + timedelta(days=1))
    assert later.values == vocabulary.values
    assert later.vocabulary_id != vocabulary.vocabulary_id
    more = build(storage, settings, [*rows, event("u", 5, "5", "buy")])
    assert more.vocabulary_id != vocabulary.vocabulary_id


def test_a_saved_vocabulary_is_read_back_and_changes_are_noticed(
    storage: Storage, settings: Settings
):
    rows = [event("u", k, str(k), item_id="ü", amount=k / 3) for k in range(4)]
    vocabulary = build(storage, settings, rows, ignored=("adjust",))
    save_vocabulary(vocabulary, storage.vocabulary)
    assert load_vocabulary(storage.vocabulary) == vocabulary
    content = json.loads((storage.vocabulary / "vocabulary.json").read_text())
    assert content["vocabulary_id"] == vocabulary.vocabulary_id
    assert content["trained_through"] == "2024-01-21T00:00:00+00:00"
    assert content["fields"]["item"] == {"size": NUM_SPECIAL_IDS + 1}
    assert list(content["fields"]) == sorted(TOKEN_FIELDS)
    tokens = pl.read_parquet(storage.vocabulary / "tokens.parquet")
    assert tokens.rows() == [("action", 4, "view", 4), ("item", 4, "ü", 4)]

    content["amount_edges"][0] += 1
    (storage.vocabulary / "vocabulary.json").write_text(json.dumps(content))
    with pytest.raises(PipelineError, match="changed after it was saved"):
        load_vocabulary(storage.vocabulary)


def test_mistakes_are_named(storage: Storage, settings: Settings):
    with pytest.raises(PipelineError, match="no vocabulary in"):
        load_vocabulary(storage.vocabulary)
    with pytest.raises(PipelineError, match="no sessionized events"):
        build_vocabulary(storage, settings, (), CUTOFF)
    write_events_sessionized(storage, events_frame([event("u", 0, "1")]))
    with pytest.raises(PipelineError, match="No event before 2024-01-01"):
        build_vocabulary(storage, settings, (), START)
