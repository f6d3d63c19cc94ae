from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_builders import ROWS, csv_text, events, load, quarantine, said, shop, write_rows

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.files import find_files
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

KINDS = ("csv", "csv.gz", "jsonl", "jsonl.gz", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_cut_gives_the_same_events(
    kind: str, tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    load(write_rows(tmp_path / "plain" / "all.csv", ROWS), storage, settings)
    expected = said(events(storage))
    assert len(expected) == len(ROWS)
    file = write_rows(tmp_path / "one" / f"x.{kind}", ROWS)
    write_rows(tmp_path / "many" / "deep" / f"b.{kind}", ROWS[:2])
    write_rows(tmp_path / "many" / f"a.{kind}", ROWS[2:])
    (tmp_path / "many" / "_SUCCESS").touch()
    (tmp_path / "many" / ".hidden.csv").write_text("junk")
    for number, path in enumerate((file, tmp_path / "many", f"{tmp_path}/many/**/*.{kind}")):
        home = Storage(tmp_path / f"home{number}")
        load(path, home, settings)
        assert said(events(home)) == expected


def test_files_of_a_folder_may_have_unlike_columns(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    write_rows(tmp_path / "in" / "a.csv", ROWS[:3])
    swapped = [(row[4], row[3], row[2], row[1], row[0], None) for row in ROWS[3:]]
    columns = ("price", "sku", "at", "what", "who", "new")
    write_rows(tmp_path / "in" / "b.csv", swapped, columns)
    load(tmp_path / "in", storage, settings)
    whole = Storage(tmp_path / "whole")
    load(write_rows(tmp_path / "all.csv", ROWS), whole, settings)
    assert said(events(storage)) == said(events(whole))


def test_semicolons_byte_order_mark_and_carriage_returns(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    text = "who;what;at;sku;price\r\n1;view;2024-01-01;a;1\r\n1;buy;2024-01-02;a;2\r\n"
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(tmp_path / "a.csv", storage, settings).num_accepted == 2


def test_names_that_look_like_sql_or_globs_are_only_names(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    file = write_rows(tmp_path / "it's [1]*.csv", ROWS, ("who", "what", "at", "sku", "price"))
    columns = ("filename", "V0", 'a"; DROP', "source_file", "it's")
    write_rows(tmp_path / "odd" / "o.parquet", ROWS, columns)
    assert load(file, storage, settings).num_accepted == len(ROWS)
    names = {"user_id": "filename", "event_type": "V0", "item_id": "source_file"}
    preset = shop(**names, occurred_at="'a\"; DROP'", amount='"it\'s"')
    home = Storage(tmp_path / "home")
    assert load(tmp_path / "odd", home, settings, preset=preset).num_accepted == len(ROWS)


CSV_LINES = [
    ("2,view", "line has 2 values instead of 5"),
    ("2,view,2024-01-01,a,1,9", "line has 6 values instead of 5"),
    ('2,"view"er,2024-01-01,a,1', "line has a broken quote"),
    ('2,"view,2024-01-01,a,1', "line has a broken quote"),
    ("2,view,2024-01-01,a," + "9" * 2_000_000, "line is too long"),
]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_malformed_csv_lines_cost_no_other_row(
    ending: str, suffix: str, tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    good = '1,view,2024-01-01,"two\nlines",1'
    lines = ["who,what,at,sku,price"]
    for bad, _ in CSV_LINES:
        lines += [good, bad]
    lines += [good.replace("view", "buy"), ",view,2024-01-01,a,1", ""]
    data = ending.join(lines).encode()
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    summary = load(file, storage, settings)
    assert (summary.num_accepted, summary.num_quarantined) == (6, 6)
    rejected = quarantine(storage)
    assert [(row["row_number"], row["reason"]) for row in rejected] == [
        *[(2 * number + 2, reason) for number, (_, reason) in enumerate(CSV_LINES)],
        (12, "user_id is null or empty"),
    ]
    assert [json.loads(row["raw_row"]) for row in rejected[:5]] == [bad for bad, _ in CSV_LINES]
    assert {row["source_file"] for row in rejected} == {str(file)}


def test_bytes_that_are_not_utf_8_are_quarantined(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    text = csv_text(ROWS).encode() + b"9,view,2024-01-01,\xe9,1\n"
    (tmp_path / "a.csv").write_bytes(text)
    load(tmp_path / "a.csv", storage, settings)
    assert [row["reason"] for row in quarantine(storage)] == ["line is not UTF-8"]


def test_row_numbers_start_anew_in_each_file(tmp_path: Path, settings: Settings) -> None:
    bad = ("1", "view", "never", "a", "1")
    for kind in KINDS:
        home = Storage(tmp_path / kind / "home")
        for name in ("a", "b"):
            write_rows(tmp_path / kind / "in" / f"{name}.{kind}", [*ROWS, bad, ROWS[0]])
        load(tmp_path / kind / "in", home, settings)
        rows = quarantine(home)
        assert [row["row_number"] for row in rows] == [6, 6]
        assert [Path(row["source_file"]).name for row in rows] == [f"a.{kind}", f"b.{kind}"]
        assert json.loads(rows[0]["raw_row"])["at"] == "never"
        assert rows[0]["column_name"] == "at"


def test_malformed_json_lines_reach_quarantine_and_blank_lines_are_none(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    good = json.dumps({"who": 1, "what": "view", "at": "2024-01-01"})
    other = json.dumps({"who": 1, "what": "buy", "at": "2024-01-01", "sku": "a", "price": 2})
    text = f"{good}\n\n{{not json\n{other}\r\n[1]\na\x01b\n{other}\n".encode()
    text += b'{"who": "\xe9"}\n' + f"{good}\n{good}".encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    summary = load(tmp_path / "a.jsonl", storage, settings)
    assert (summary.num_accepted, summary.num_quarantined) == (5, 4)
    assert [(row["row_number"], row["reason"]) for row in quarantine(storage)] == [
        (3, "line is not a JSON object"),
        (5, "line is not a JSON object"),
        (6, "line holds a control character"),
        (8, "line is not UTF-8"),
    ]
    assert json.loads(quarantine(storage)[0]["raw_row"]) == "{not json"


def test_date_in_the_path_is_the_day(tmp_path: Path) -> None:
    for day in ("2024-01-01", "2024-01-02"):
        write_rows(tmp_path / day / "x.csv", ROWS)
    path = f"{tmp_path}/{{date}}/x.csv"
    assert find_files(path, date(2024, 1, 2)).files == (f"{tmp_path}/2024-01-02/x.csv",)
    assert len(find_files(path).files) == 2
    with pytest.raises(PipelineError, match="2024-01-03"):
        find_files(path, date(2024, 1, 3))


def _mixed(folder: Path) -> None:
    write_rows(folder / "a.csv", ROWS)
    write_rows(folder / "b.parquet", ROWS)


REFUSED = {
    "missing": (lambda _: None, "There is no file"),
    "folder without files": (lambda path: path.mkdir(), "holds no files"),
    "unsupported kind": (lambda path: (path.mkdir(), (path / "a.xlsx").touch()), "not of a supp"),
    "mixed": (_mixed, r"csv \(such as .*a\.csv\), parquet \(such as .*b\.parquet\)"),
    "empty csv": (lambda path: (path.mkdir(), (path / "a.csv").touch()), "is empty"),
    "csv header only": (lambda path: write_rows(path / "a.csv", []), "is empty"),
    "empty parquet": (lambda path: write_rows(path / "a.parquet", []), "is empty"),
    "corrupt parquet": (
        lambda path: (path.mkdir(), (path / "a.parquet").write_bytes(b"PAR1" * 9)),
        r"a\.parquet' cannot be read",
    ),
    "corrupt gzip": (
        lambda path: (path.mkdir(), (path / "a.csv.gz").write_bytes(b"not gzip")),
        r"a\.csv\.gz' cannot be read",
    ),
    "truncated gzip": (
        lambda path: (
            path.mkdir(),
            (path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9]),
        ),
        r"a\.jsonl\.gz' cannot be read",
    ),
    "twice the same column": (
        lambda path: (path.mkdir(), (path / "a.csv").write_text("a,b,a\n1,2,3\n")),
        "more than one column 'a'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named(
    case: str, tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    make, message = REFUSED[case]
    make(tmp_path / "in")
    with pytest.raises(PipelineError, match=message) as caught:
        load(tmp_path / "in", storage, settings)
    assert caught.value.way_out
    assert not storage.events.exists()


def test_a_parquet_file_that_breaks_in_the_middle_is_named(
    tmp_path: Path, storage: Storage, settings: Settings
) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({name: ["x"] * 1000 for name in ("who", "what", "at", "sku", "price")}), file
    )
    data = bytearray(file.read_bytes())
    data[4:60] = b"\xff" * 56
    file.write_bytes(data)
    with pytest.raises(PipelineError, match=r"a\.parquet' cannot be read"):
        load(file, storage, settings)
