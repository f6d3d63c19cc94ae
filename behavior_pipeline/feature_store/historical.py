"""Point-in-time joins: for each (user, moment) the values that were valid at that moment.

Valid means by event time: the newest row whose observation cutoff is not after the moment and not
older than the view's TTL. When a row was written does not matter, so a cutoff that was filled in
afterwards is found by moments it speaks of.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.compute as pc

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.repository import full_name, offline_folder, open_store
from behavior_pipeline.storage import Storage

if TYPE_CHECKING:
    from feast import FeatureStore

JOIN_ROWS: Final = 50_000  # rows asked for in one join: bounds its memory
ORIGIN: Final = ("cutoff_at", "checkpoint_id")  # what says where a value comes from
ROW_NUMBER: Final = "asked_row_number"


def historical_features(
    storage: Storage, entities: pa.Table, service_or_features: str | Sequence[str]
) -> pa.Table:
    """Return the features of users as they were known at given moments.

    Args:
        storage: the home.
        entities: columns `user_id` (string) and `event_timestamp` (timestamp; UTC if it names no
            zone); other columns are handed through.
        service_or_features: name of a feature service, or features as `view:feature`.

    Returns:
        One row per row of `entities`, in their order, duplicates kept: their columns, then
        `<view>__<feature>` of each feature asked for. `<view>__cutoff_at` is always there and says
        which cutoff the values come from; it is never after `event_timestamp`. So is
        `<view>__checkpoint_id` where the view has one: vectors compare within a checkpoint only.
        A user or moment without a valid row has nulls.

    Raises:
        PipelineError: if a column or value is missing, a name is unknown, or a view was never
            published.
    """
    entities = _typed(entities)
    store = open_store(storage)
    references = _references(store, service_or_features)
    _check_published(storage, references)
    parts = [
        _join(store, entities.slice(start, JOIN_ROWS), references)
        for start in range(0, entities.num_rows, JOIN_ROWS)
    ]
    features = pa.concat_tables(parts)
    assert features.num_rows == entities.num_rows, "a join must keep every row"  # noqa: S101 - ours
    for name in features.column_names:
        entities = entities.append_column(name, features.column(name))
    return entities


def _typed(entities: pa.Table) -> pa.Table:
    """Return the rows asked for with the key and the moment in the contract's types."""
    for name, type_ in (("user_id", pa.string()), ("event_timestamp", TIMESTAMP)):
        if name not in entities.column_names:
            raise PipelineError(f"The rows asked for lack the column '{name}'.")
        column = entities.column(name)
        if column.null_count:
            raise PipelineError(f"'{name}' is null in {column.null_count:,} rows asked for.")
        index = entities.column_names.index(name)
        entities = entities.set_column(index, name, column.cast(type_))
    if entities.num_rows == 0:
        raise PipelineError("There is no row to look up.")
    return entities


def _references(store: FeatureStore, wanted: str | Sequence[str]) -> list[str]:
    """Return what to ask Feast for, as `view:feature`, with each view's origin."""
    known = [
        f"{view.name}:{field.name}"
        for view in store.list_feature_views()
        for field in view.features
    ]
    if isinstance(wanted, str):
        wanted = _service_references(store, wanted)
    unknown = [reference for reference in wanted if reference not in known]
    if unknown or not wanted:
        name = unknown[0] if unknown else ""
        raise PipelineError(f"There is no feature '{name}'.", f"Use one of {', '.join(known)}.")
    origins = [f"{view}:{name}" for view in _views(wanted) for name in ORIGIN]
    return list(dict.fromkeys([*(origin for origin in origins if origin in known), *wanted]))


def _service_references(store: FeatureStore, name: str) -> list[str]:
    """Return the features of a service."""
    services = {service.name: service for service in store.list_feature_services()}
    if name not in services:
        raise PipelineError(
            f"There is no feature service '{name}'.", f"Use one of {', '.join(sorted(services))}."
        )
    return [
        f"{projection.name}:{field.name}"
        for projection in services[name].feature_view_projections
        for field in projection.features
    ]


def _views(references: Sequence[str]) -> list[str]:
    """Return the views that features are of, each once."""
    return list(dict.fromkeys(reference.partition(":")[0] for reference in references))


def _check_published(storage: Storage, references: list[str]) -> None:
    """Refuse views without any history: Feast would only say that files are missing."""
    for view in _views(references):
        if not any(offline_folder(storage, view).glob("cutoff=*/*.parquet")):
            raise PipelineError(
                f"The view '{view}' was never published.", "Publish a cutoff of it first."
            )


def _join(store: FeatureStore, asked: pa.Table, references: list[str]) -> pa.Table:
    """Return the features of some rows in their order; Feast itself promises no order."""
    keys = asked.select(["user_id", "event_timestamp"])
    numbered = keys.append_column(ROW_NUMBER, pa.array(range(asked.num_rows), pa.int64()))
    with warnings.catch_warnings():
        # ibis calls what DuckDB deprecates: nothing that a user of the pipeline could act on.
        warnings.simplefilter("ignore", DeprecationWarning)
        joined = store.get_historical_features(
            entity_df=numbered.to_pandas(), features=references, full_feature_names=True
        ).to_arrow()
    joined = joined.sort_by(ROW_NUMBER)
    _check_join(asked, numbered, joined, references)
    return joined.select([full_name(*reference.split(":")) for reference in references])


def _check_join(
    asked: pa.Table, numbered: pa.Table, joined: pa.Table, references: list[str]
) -> None:
    """Make sure that every row came back once, and nothing that was not known at its moment."""
    assert joined[ROW_NUMBER].equals(numbered[ROW_NUMBER]), "rows in, rows out"  # noqa: S101 - ours
    for view in _views(references):
        is_later = pc.greater(joined[full_name(view, "cutoff_at")], asked["event_timestamp"])
        assert not pc.any(is_later).as_py(), f"{view} is later than asked"  # noqa: S101 - ours
