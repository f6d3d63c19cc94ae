"""Arrow columns as the bytes that Feast keeps online, without a Python float per value.

Feast keeps a feature as a serialised protobuf `Value`. Scalars repeat (a checkpoint, a cutoff, a
count): each distinct one is serialised by Feast itself, once in a batch. A vector's `Value` is a
header that depends on its width alone, followed by the vector's own little-endian bytes (packed
repeated floats: protobuf's encoding guide, "Packed Repeated Fields").
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from behavior_pipeline.feature_store.list_serialization import float_lists, string_lists

if TYPE_CHECKING:
    from feast import FeatureView
    from feast.types import FeastType


class OnlineFeature(NamedTuple):
    """One feature of a batch of users, as Feast keeps it online.

    Attributes:
        name: of the feature.
        values: serialised `Value` of each user.
        texts: what Feast's SQL stores keep beside it for searches by text; None for vectors, lists,
            times and nulls.
    """

    name: str
    values: list[bytes]
    texts: list[str | None]


def online_features(batch: pa.RecordBatch, view: FeatureView) -> list[OnlineFeature]:
    """Return the features of a view, in its order, from a batch with a column for each."""
    return [_feature(field.name, batch.column(field.name), field.dtype) for field in view.features]


def _feature(name: str, column: pa.Array, dtype: FeastType) -> OnlineFeature:
    """Return one feature, by its type in Arrow."""
    if pa.types.is_fixed_size_list(column.type):
        return _vectors(name, column)
    if pa.types.is_list(column.type):
        is_text = pa.types.is_string(column.type.value_type)
        values = string_lists(column) if is_text else float_lists(column)
        return OnlineFeature(name, values, [None] * len(values))
    return _scalars(name, column, dtype)


def entity_keys(users: pa.Array, join_key: str, version: int = 3) -> list[bytes]:
    """Return Feast's serialised entity keys of users.

    Args:
        users: ids, strings without a null.
        join_key: the entity's key, `user_id`.
        version: `entity_key_serialization_version` of the store.
    """
    start = _key_start(join_key, version)
    encoded = [user.encode() for user in users.to_pylist()]
    return [start + struct.pack("<I", len(user)) + user for user in encoded]


def _key_start(join_key: str, version: int) -> bytes:
    """Return what all keys begin with: Feast's key of the empty id, without its length."""
    from feast.infra.key_encoding_utils import serialize_entity_key  # noqa: PLC0415 - takes seconds
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey  # noqa: PLC0415 - as above
    from feast.protos.feast.types.Value_pb2 import Value  # noqa: PLC0415 - as above

    empty = EntityKey(join_keys=[join_key], entity_values=[Value(string_val="")])
    key: bytes = serialize_entity_key(empty, entity_key_serialization_version=version)
    return key[: -struct.calcsize("<I")]


def _vectors(name: str, column: pa.FixedSizeListArray) -> OnlineFeature:
    """Put the header before each vector's bytes, which are Arrow's.

    Raises:
        ValueError: if there is a vector that is not float32, or a null.
    """
    from feast.protos.feast.types.Value_pb2 import FloatList, Value  # noqa: PLC0415 - as above

    numbers = column.flatten()
    if numbers.type != pa.float32() or column.null_count or numbers.null_count:
        raise ValueError(f"{name} holds nulls or numbers that are not float32")
    width = column.type.list_size
    size = 4 * width
    example = Value(float_list_val=FloatList(val=[0.0] * width)).SerializeToString()
    header = example[: len(example) - size]
    content = memoryview(numbers.to_numpy().astype("<f4", copy=False)).cast("B")
    values = [header + content[at : at + size] for at in range(0, size * len(column), size)]
    return OnlineFeature(name, values, [None] * len(column))


def _scalars(name: str, column: pa.Array, dtype: FeastType) -> OnlineFeature:
    """Let Feast serialise each distinct value, and repeat what it made."""
    from feast.infra.online_stores.helpers import extract_text_and_num  # noqa: PLC0415 - as above
    from feast.type_map import python_values_to_proto_values  # noqa: PLC0415 - as above

    distinct, places = _distinct(column)
    value_type = dtype.to_value_type()
    null = pa.nulls(1, column.type)  # which Feast writes in more than one way, by its type
    known = [
        value
        for found in (distinct, null)
        for value in python_values_to_proto_values(found.to_numpy(zero_copy_only=False), value_type)
    ]
    values = [value.SerializeToString() for value in known]
    texts = [extract_text_and_num(value, compute_num=False)[0] for value in known]
    return OnlineFeature(name, [values[at] for at in places], [texts[at] for at in places])


def _distinct(column: pa.Array) -> tuple[pa.Array, list[int]]:
    """Return the distinct values, and each row's place among them; nulls come after the last.

    Numbers are told apart by their bits: 0.0 and -0.0 are equal, and are not the same.
    """
    as_bits = {pa.float32(): pa.int32(), pa.float64(): pa.int64()}
    bits = column.view(as_bits[column.type]) if column.type in as_bits else column
    coded = bits.dictionary_encode()
    distinct = coded.dictionary.view(column.type) if column.type in as_bits else coded.dictionary
    return distinct, pc.fill_null(coded.indices, len(distinct)).to_pylist()
