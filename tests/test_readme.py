"""The README's examples do what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from behavior_pipeline.ingest.presets import parse_preset, preset_names
from behavior_pipeline.settings import load_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_example_preset_is_valid() -> None:
    (text,) = [block for block in blocks("yaml") if block.startswith("# shop.yaml")]
    preset = parse_preset(text, "README.md")
    assert preset.tasks.qualifying_event_types == ("order",)


def test_the_example_settings_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = [block for block in blocks("yaml") if block.startswith("# pipeline.yaml")]
    (tmp_path / "pipeline.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert (settings.source, settings.path) == ("shop.yaml", "/landing/{date}/*.parquet")


def test_the_number_of_mapped_sources_is_right() -> None:
    words = {6: "Six", 7: "Seven", 8: "Eight"}
    real = [name for name in preset_names() if name != "simulated"]
    assert f"{words[len(real)]} sources are mapped" in README


def test_commands_exist() -> None:
    named = set(re.findall(r"behavior-pipeline ([a-z-]+)", README))
    shown = subprocess.run(
        [sys.executable, "-m", "behavior_pipeline.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert named
    assert [name for name in named if not re.search(rf"\b{name}\b", shown)] == []
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in targets if f"\n{name}:" not in makefile] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
