"""Arrow lists of any length as the bytes of Feast's `Value`, put together rather than built.

A message in protobuf is a tag, a length as a varint and its content (protobuf's encoding guide,
"Length-Delimited Records"): tags come from Feast's own messages, contents from Arrow.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def string_lists(column: pa.ListArray) -> list[bytes]:
    """Return the serialised `Value` of each list of strings; nothing for a null.

    Raises:
        ValueError: if there is a null in a list.
    """
    from feast.protos.feast.types.Value_pb2 import StringList, Value  # noqa: PLC0415 - takes seconds

    tag = Value(string_list_val=StringList()).SerializeToString()[:-1]
    item_tag = StringList(val=[""]).SerializeToString()[:-1]
    coded = _items(column).dictionary_encode()
    distinct = [item_tag + _sized(text.encode()) for text in coded.dictionary.to_pylist()]
    items = [distinct[place] for place in coded.indices.to_pylist()]
    return [
        b"" if bounds is None else tag + _sized(b"".join(items[slice(*bounds)]))
        for bounds in _bounds(column)
    ]


def float_lists(column: pa.ListArray) -> list[bytes]:
    """Return the serialised `Value` of each list of float32; nothing for a null.

    Raises:
        ValueError: if there is a null in a list, or a number that is not float32.
    """
    from feast.protos.feast.types.Value_pb2 import FloatList, Value  # noqa: PLC0415 - as above

    if column.type.value_type != pa.float32():
        raise ValueError(f"the lists hold {column.type.value_type}, not float32")
    tag = Value(float_list_val=FloatList()).SerializeToString()[:-1]
    item_tag = FloatList(val=[0.0]).SerializeToString()[:1]
    content = memoryview(_items(column).to_numpy().astype("<f4", copy=False)).cast("B")
    numbers = [
        None if bounds is None else bytes(content[4 * bounds[0] : 4 * bounds[1]])
        for bounds in _bounds(column)
    ]
    return [_floats(tag, item_tag, found) for found in numbers]


def _floats(tag: bytes, item_tag: bytes, numbers: bytes | None) -> bytes:
    """Return the `Value` of a list's bytes: packed, or without content if there is none."""
    if numbers is None:
        return b""
    return tag + _sized(item_tag + _sized(numbers) if numbers else b"")


def _items(column: pa.ListArray) -> Any:
    """Return all items of all lists, one after another."""
    items = column.flatten()
    if items.null_count:
        raise ValueError("a list holds a null")
    return items


def _bounds(column: pa.ListArray) -> list[tuple[int, int] | None]:
    """Return where each list's items begin and end, None for a null."""
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    ends = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    is_there = column.is_valid().to_pylist()
    return [
        bounds if valid else None for bounds, valid in zip(pairwise(ends), is_there, strict=True)
    ]


def _sized(content: bytes) -> bytes:
    """Return content after its length as a varint: seven bits a byte, the lowest first."""
    size, start = len(content), bytearray()
    while size > 0x7F:  # noqa: PLR2004 - seven bits
        start.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*start, size]) + content
