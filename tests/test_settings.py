"""Defaults < pipeline.yaml < environment < arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from behavior_pipeline.errors import PipelineError
from behavior_pipeline.pipeline import open_pipeline
from behavior_pipeline.settings import load_settings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BEHAVIOR_SEED", raising=False)


def test_each_source_of_settings_wins_over_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().seed == 0
    (tmp_path / "pipeline.yaml").write_text("seed: 1\n")
    assert load_settings().seed == 1
    monkeypatch.setenv("BEHAVIOR_SEED", "2")
    assert load_settings().seed == 2
    assert load_settings(seed=3).seed == 3
    assert load_settings(seed=None).seed == 2


@pytest.mark.parametrize("content", ["seeed: 1\n", "seed: many\n", "seed: [\n"])
def test_a_wrong_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "pipeline.yaml").write_text(content)
    with pytest.raises(PipelineError, match=r"seeed|seed|pipeline\.yaml"):
        load_settings()


@pytest.mark.parametrize("content", [b"- seed\n", b"seed\n", b"\xff\xe9\n"])
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pipeline.yaml").write_bytes(content)
    with pytest.raises(PipelineError, match=r"pipeline\.yaml"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [("partitions_start", "soon"), ("memory_limit", "lots"), ("memory_limit", "3"), ("threads", 0)],
)
def test_a_value_that_would_fail_later_is_refused(name: str, value: object) -> None:
    with pytest.raises(PipelineError, match=f"'{name}'"):
        load_settings(**{name: value})


@pytest.mark.parametrize("size", ["3GB", "1.5 GiB", "500mb"])
def test_sizes_are_written_as_duckdb_reads_them(size: str) -> None:
    assert load_settings(memory_limit=size).memory_limit == size


def test_a_data_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match="cannot be made"):
        open_pipeline(data_root=tmp_path / "file")
