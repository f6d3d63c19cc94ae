"""A user's mistake gets one screen, exit code 2 and no traceback; nothing is written for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from behavior_pipeline.cli import app

ONE_SCREEN = 25  # lines

PRESET = """
name: mine
description: A shop of my own.
columns: {user_id: user, event_type: action, occurred_at: time, category: group}
tasks: {propensity_column: category, horizon_days: 5, lookback_days: 20}
"""
HEADER = "user,action,time,group\n"


def rows(days: int = 40, kinds: tuple[str, ...] = ("view", "buy")) -> list[str]:
    """Return a few users' events, one of each kind a day."""
    return [
        f"u{user},{kind},2026-01-01 {hour:02d}:00:00,g{user % 3}".replace(
            "2026-01-01", f"2026-{1 + day // 28:02d}-{1 + day % 28:02d}"
        )
        for day in range(days)
        for user in range(4)
        for hour, kind in enumerate(kinds)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sound preset and a sound file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEHAVIOR_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    (tmp_path / "mine.yaml").write_text(PRESET)
    write(tmp_path, rows())
    return tmp_path


def write(folder: Path, lines: list[str], header: str = HEADER) -> None:
    (folder / "events.csv").write_text(header + "".join(f"{line}\n" for line in lines))


def run(*options: str) -> Result:
    return CliRunner().invoke(
        app, ["run", "--source", "mine.yaml", "--path", "events.csv", *options]
    )


def a_missing_file(folder: Path) -> None:
    (folder / "events.csv").unlink()


def an_empty_file(folder: Path) -> None:
    (folder / "events.csv").write_text("")


def no_data_rows(folder: Path) -> None:
    write(folder, [])


def a_missing_column(folder: Path) -> None:
    write(folder, rows(), header="user,action,tiem,group\n")


def no_timestamp_that_parses(folder: Path) -> None:
    write(folder, ["u1,view,soon,g1", "u2,buy,later,g2"])


def a_single_event_type(folder: Path) -> None:
    write(folder, rows(kinds=("view",)))


def only_null_users(folder: Path) -> None:
    write(folder, [f",{line.split(',', 1)[1]}" for line in rows()])


def an_unknown_key(folder: Path) -> None:
    (folder / "mine.yaml").write_text(PRESET + "colour: red\n")


def no_yaml(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: [")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (a_missing_file, ["events.csv"]),
        (an_empty_file, ["events.csv"]),
        (no_data_rows, ["events.csv"]),
        (a_missing_column, ["events.csv", "time", "tiem"]),
        (no_timestamp_that_parses, ["events.csv", "time", "soon"]),
        (a_single_event_type, ["view"]),
        (only_null_users, ["events.csv", "user"]),
        (an_unknown_key, ["mine.yaml", "colour"]),
        (no_yaml, ["mine.yaml"]),
    ],
)
def test_a_spoilt_source_is_explained(
    folder: Path, spoil: Callable[[Path], None], words: list[str]
) -> None:
    spoil(folder)
    assert_explained(run(), words)
    assert not list((folder / "data").rglob("events*.parquet"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--horizon-days", "-3"], ["horizon", "-3"]),
        (["--lookback-days", "0"], ["lookback", "0"]),
        (["--cutoff", "2031-01-01"], ["2031-01-01", "outside the data", "2026-01-01"]),
        (["--cutoff", "2001-01-01"], ["2001-01-01", "outside the data"]),
        (["--cutoff", "tomorrow"], ["tomorrow", "YYYY-MM-DD"]),
        (["--source", "no_such_preset"], ["no_such_preset", "online_retail_ii"]),
        (["--encoder-preset", "huge"], ["encoder_preset"]),
    ],
)
def test_a_wrong_option_is_explained(folder: Path, options: list[str], words: list[str]) -> None:
    assert folder.is_dir()
    assert_explained(run(*options), words)


def test_looking_up_before_anything_is_published_is_explained(folder: Path) -> None:
    result = CliRunner().invoke(app, ["lookup", "u1", "--source", "mine.yaml"])
    assert_explained(result, ["published"])
    assert folder.is_dir()


def test_brackets_are_shown_as_they_are(folder: Path) -> None:
    assert_explained(run("--path", str(folder / "[bold][/x].csv")), ["[bold][/x].csv"])


def test_a_night_before_the_first_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVIOR_PARTITIONS_START", "2026-02-01")
    assert_explained(run("--cutoff", "2026-01-20"), ["2026-01-19", "partitions_start"])
    assert folder.is_dir()


def test_the_program_itself_ends_with_code_2_and_without_a_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "behavior_pipeline.cli", "run", "--source", "mine.yaml"]
    done = subprocess.run(
        [*command, "--path", str(folder / "nowhere.csv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nowhere.csv" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def assert_explained(result: Result, words: list[str]) -> None:
    output = result.output
    assert result.exit_code == 2, output
    assert "Traceback" not in output
    assert len(output.splitlines()) <= ONE_SCREEN
    joined = " ".join(output.split())
    assert [word for word in words if word not in joined] == []
