"""Point-in-time joins: for each (user, moment) the values that were valid at that moment.

Valid means by event time: the newest row whose observation cutoff is not after the moment and not
older than the view's TTL. When a row was written does not matter, so a cutoff that was filled in
afterwards is found by moments it speaks of; unless it is asked for as published: then a row counts
only if it had been written by the moment, too.

Feast says which cutoff counts for each row asked for; the values are then fetched by user and
cutoff. Joining vectors in Feast's query would carry every night within the TTL for every row.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from behavior_pipeline.contracts import TIMESTAMP
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.feature_store.repository import (
    full_name,
    offline_folder,
    open_store,
    view_of,
)
from behavior_pipeline.sql import open_engine, parquet, quote_identifier
from behavior_pipeline.storage import Storage

if TYPE_CHECKING:
    from feast import FeatureStore

JOIN_ROWS: Final = 50_000  # rows asked for in one join: bounds its memory
ORIGIN: Final = ("cutoff_at", "checkpoint_id")  # what says where a value comes from
ROW_NUMBER: Final = "asked_row_number"
WRITTEN_AT: Final = "written_at"
FOREVER: Final = datetime(9999, 1, 1, tzinfo=UTC)
VERSION_IN_NAME: Final = re.compile(r"@v(\d+)")
JOIN_MEMORY: Final = "1GB"  # of the query that fetches values


def historical_features(
    storage: Storage,
    entities: pa.Table,
    service_or_features: str | Sequence[str],
    *,
    as_published: bool = False,
) -> pa.Table:
    """Return the features of users as they were known at given moments.

    Args:
        storage: the home.
        entities: columns `user_id` (string) and `event_timestamp` (timestamp; UTC if it names no
            zone); other columns are handed through.
        service_or_features: name of a feature service, or features as `view:feature`, of a certain
            version as `view@vN:feature`.
        as_published: use only rows that had been written by the moment asked for.

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
    join = PointInTimeJoin.open(storage, service_or_features, as_published=as_published)
    parts = [
        join.features_of(entities.slice(start, JOIN_ROWS)).select(join.columns)
        for start in range(0, entities.num_rows, JOIN_ROWS)
    ]
    features = pa.concat_tables(parts)
    assert features.num_rows == entities.num_rows, "a join must keep every row"  # noqa: S101 - ours
    for name in features.column_names:
        entities = entities.append_column(name, features.column(name))
    return entities


@dataclass(frozen=True)
class PointInTimeJoin:
    """A join that is ready for any number of rows.

    Attributes:
        storage: the home.
        store: opened Feast.
        references: what is asked for as `view:feature`, each view's origin included.
        as_published: use only rows that had been written by the moment asked for.
    """

    storage: Storage
    store: FeatureStore
    references: tuple[str, ...]
    as_published: bool

    @classmethod
    def open(
        cls, storage: Storage, service_or_features: str | Sequence[str], *, as_published: bool
    ) -> PointInTimeJoin:
        """Look at what is asked for.

        Raises:
            PipelineError: if a name is unknown, or a view was never published.
        """
        store = open_store(storage)
        references = _references(store, service_or_features)
        _check_published(storage, references)
        return cls(storage, store, tuple(references), as_published)

    @property
    def views(self) -> list[str]:
        """The views that are asked for, each of one version."""
        return [_plain(view) for view in _views(self.references)]

    @property
    def columns(self) -> list[str]:
        """Full names of what is asked for, `view__feature`."""
        return [full_name(*_plain(reference).split(":")) for reference in self.references]

    def features_of(self, asked: pa.Table) -> pa.Table:
        """Return `columns` for some rows in their order, and each view's `<view>__written_at`.

        Args:
            asked: `user_id` (string) and `event_timestamp` in the contract's types, without nulls.
        """
        cutoffs = self._cutoffs(asked)
        found: dict[str, pa.ChunkedArray] = {}
        for view in _views(self.references):
            known = cutoffs.column(full_name(_plain(view), "cutoff_at"))
            found |= self._values(view, asked, known)
        _check_no_leak(asked, found, self.views, as_published=self.as_published)
        written = [full_name(view, WRITTEN_AT) for view in self.views]
        return pa.table({name: found[name] for name in [*self.columns, *written]})

    def _cutoffs(self, asked: pa.Table) -> pa.Table:
        """Return each view's cutoff that counts for each row; Feast itself promises no order."""
        keys = asked.select(["user_id", "event_timestamp"])
        numbered = keys.append_column(ROW_NUMBER, pa.array(range(asked.num_rows), pa.int64()))
        with warnings.catch_warnings():
            # ibis calls what DuckDB deprecates: nothing that a user of the pipeline could act on.
            warnings.simplefilter("ignore", DeprecationWarning)
            joined = self.store.get_historical_features(
                entity_df=numbered.to_pandas(),
                features=[f"{view}:cutoff_at" for view in _views(self.references)],
                full_feature_names=True,
                filter_by_created_timestamp=self.as_published,
            ).to_arrow()
        joined = joined.sort_by(ROW_NUMBER)
        assert joined[ROW_NUMBER].equals(numbered[ROW_NUMBER]), "rows in, rows out"  # noqa: S101
        return joined

    def _values(
        self, view: str, asked: pa.Table, cutoffs: pa.ChunkedArray
    ) -> dict[str, pa.ChunkedArray]:
        """Return the columns of a view for rows whose cutoffs are known, null without one."""
        names = [
            name for of, _, name in (ref.partition(":") for ref in self.references) if of == view
        ]
        files = self._files(view, cutoffs)
        columns = list(dict.fromkeys([*names, WRITTEN_AT]))
        latest = pa.scalar(None if self.as_published else FOREVER, TIMESTAMP)
        wanted = pa.table(
            {
                ROW_NUMBER: pa.array(range(asked.num_rows), pa.int64()),
                "user_id": asked["user_id"],
                "cutoff_at": cutoffs.cast(TIMESTAMP),
                "written_by": pc.coalesce(latest, asked["event_timestamp"]),
            }
        )
        rows = _fetch(self.storage, files, wanted.filter(wanted["cutoff_at"].is_valid()), columns)
        places = pc.index_in(wanted[ROW_NUMBER], value_set=rows[ROW_NUMBER].combine_chunks())
        taken = rows.take(places)
        return {full_name(_plain(view), name): taken[name] for name in columns}

    def _files(self, view: str, cutoffs: pa.ChunkedArray) -> list[Path]:
        """Return the published files of some cutoffs; of any one, to know the types, for none."""
        version = _version(view)
        defined = (
            view_of(self.store, _plain(view), version)
            if version
            else self.store.get_feature_view(view)
        )
        source: Any = defined.batch_source
        files = sorted(Path(source.path).glob("cutoff=*/*.parquet"))
        days = {f"{day:%Y-%m-%d}" for day in pc.unique(cutoffs).to_pylist() if day is not None}
        found = [file for file in files if file.parent.name.partition("=")[2] in days]
        return found or files[-1:]


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
    unknown = [reference for reference in wanted if _plain(reference) not in known]
    if unknown or not wanted:
        name = unknown[0] if unknown else ""
        raise PipelineError(f"There is no feature '{name}'.", f"Use one of {', '.join(known)}.")
    _check_versions(store, _views(wanted))
    origins = [f"{view}:{name}" for view in _views(wanted) for name in ORIGIN]
    there = [origin for origin in origins if _plain(origin) in known]
    return list(dict.fromkeys([*there, *wanted]))


def _check_versions(store: FeatureStore, views: list[str]) -> None:
    """Refuse versions that are not there, and two of one view: their columns share a name."""
    for view in views:
        if (version := _version(view)) is not None:
            view_of(store, _plain(view), version)
    plain = [_plain(view) for view in views]
    twice = [view for view in plain if plain.count(view) > 1]
    if twice:
        raise PipelineError(
            f"Two versions of {twice[0]} were asked for.", "Ask for them one after the other."
        )


def _service_references(store: FeatureStore, name: str) -> list[str]:
    """Return the features of a service."""
    services = {service.name: service for service in store.list_feature_services()}
    if name not in services:
        raise PipelineError(
            f"There is no feature service '{name}'.", f"Use one of {', '.join(sorted(services))}."
        )
    return [
        f"{_pinned(projection.name, projection.version_tag)}:{field.name}"
        for projection in services[name].feature_view_projections
        for field in projection.features
    ]


def _pinned(view: str, version: int | None) -> str:
    """Return a view's name with its version, as Feast writes it."""
    return view if version is None else f"{view}@v{version}"


def _plain(name: str) -> str:
    """Return the name of a view or feature without the version."""
    return VERSION_IN_NAME.sub("", name)


def _version(view: str) -> int | None:
    """Return the version in a view's name."""
    found = VERSION_IN_NAME.search(view)
    return int(found.group(1)) if found else None


def _views(references: Sequence[str]) -> list[str]:
    """Return the views that features are of, each once, `user_embedding@v2` with its version."""
    return list(dict.fromkeys(reference.partition(":")[0] for reference in references))


def _check_published(storage: Storage, references: list[str]) -> None:
    """Refuse views without any history: Feast would only say that files are missing."""
    for view in _views(references):
        folder = offline_folder(storage, _plain(view), _version(view))
        if not any(folder.glob("cutoff=*/*.parquet")):
            raise PipelineError(
                f"The view '{_plain(view)}' was never published.", "Publish a cutoff of it first."
            )


def _fetch(
    storage: Storage, files: Sequence[Path], wanted: pa.Table, columns: Sequence[str]
) -> pa.Table:
    """Return columns of the published rows of users at cutoffs, in the types of the files.

    A row of `wanted` (row number, user, cutoff, written by when) without a published row is absent,
    each other is there once. Where two versions wrote the same cutoff, the newer writing counts.
    """
    names = ", ".join(f"published.{quote_identifier(name)}" for name in columns)
    with open_engine(JOIN_MEMORY, 1, storage.scratch / "feature_store") as engine:
        engine.register("wanted", wanted)
        found = engine.execute(
            f"select wanted.{ROW_NUMBER}, {names} from wanted join {parquet(files)} as published "
            "on published.user_id = wanted.user_id "
            "and published.observation_cutoff = wanted.cutoff_at "
            f"where published.{WRITTEN_AT} <= wanted.written_by "
            f"qualify row_number() over (partition by wanted.{ROW_NUMBER} "
            f"order by published.{WRITTEN_AT} desc, published.filename) = 1"
        ).to_arrow_table()
    schema = pq.read_schema(files[-1])
    fields = [schema.field(name) for name in columns]
    return found.cast(pa.schema([pa.field(ROW_NUMBER, pa.int64()), *fields]))


def _check_no_leak(
    asked: pa.Table, found: dict[str, pa.ChunkedArray], views: list[str], *, as_published: bool
) -> None:
    """Make sure that nothing comes from after its moment."""
    clocks = ["cutoff_at", WRITTEN_AT] if as_published else ["cutoff_at"]
    for name in [full_name(view, clock) for view in views for clock in clocks]:
        is_later = pc.greater(found[name], asked["event_timestamp"])
        assert not pc.any(is_later).as_py(), f"{name} is later than asked"  # noqa: S101 - ours
