"""A kill at any moment leaves the old state or the new one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from behavior_pipeline.storage import (
    Storage,
    read_json,
    remove_leftovers,
    write_json,
    writing_file,
    writing_folder,
)


def test_a_written_file_is_private_and_in_place(tmp_path: Path) -> None:
    target = tmp_path / "home" / "answer.json"
    write_json(target, {"b": 1, "a": 2})
    assert read_json(target) == {"a": 2, "b": 1}
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert stat.S_IMODE(target.parent.stat().st_mode) == 0o700
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), writing_file(target) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_swapped_whole(tmp_path: Path) -> None:
    target = tmp_path / "marts"
    for name in ("first", "second"):
        with writing_folder(target) as aside:
            (aside / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "marts"
    with writing_folder(target) as aside:
        (aside / "old").touch()
    with pytest.raises(RuntimeError), writing_folder(target) as aside:
        (aside / "half").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]


KILLED = """
import os, signal, sys
from pathlib import Path
from behavior_pipeline.storage import writing_folder
with writing_folder(Path(sys.argv[1])) as aside:
    (aside / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    target = tmp_path / "home" / "states"
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    living = tmp_path / "home" / f".mart.{os.getppid()}-0a1b2c3d.aside"
    living.touch()
    assert not target.exists()
    assert remove_leftovers(tmp_path / "home") == 1
    assert list(target.parent.iterdir()) == [living]


def test_every_place_lies_inside_the_home(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    places = [
        getattr(storage, name)
        for name, value in vars(Storage).items()
        if isinstance(value, property)
    ]
    assert places
    assert all(place.is_relative_to(tmp_path) for place in places)
    assert len(set(places)) == len(places)
