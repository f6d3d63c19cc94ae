"""Defaults < pipeline.yaml < environment < arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from behavior_pipeline.errors import PipelineError
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
