"""The comparison as a table, as part of a document and as a picture; the command around them."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console
from session_builders import PRESET, compare, views, write_views
from typer.testing import CliRunner, Result

from behavior_pipeline import cli
from behavior_pipeline.cli import app
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.ingest.presets import load_preset
from behavior_pipeline.settings import Settings
from behavior_pipeline.studies.session_figures import SessionStudy
from behavior_pipeline.studies.session_report import (
    BEGIN,
    END,
    draw_picture,
    study_markdown,
    study_table,
    update_document,
)

ROWS = [*views("u", [0, 10, 50, 60], "aaaa"), *views("v", [0, 5], "cc")]
PAGE = Path(__file__).parents[2] / "docs" / "sessions.md"


@pytest.fixture
def study(tmp_path: Path, settings: Settings) -> SessionStudy:
    return compare(ROWS, tmp_path, settings, (30, 60))


def test_the_table_fits_a_terminal(study: SessionStudy):
    console = Console(width=80, record=True)
    console.print(study_table(study))
    shown = console.export_text()
    assert "…" not in shown
    assert re.search(r"30 +3 +0\.4444 +0\.5000 +0\.3333 +0\.6667 +0\.0000 +1 +0", shown)
    assert "6 rows read; left out: none." in shown


def test_the_best_row_is_bold_and_the_place_stays_private(study: SessionStudy):
    text = study_markdown(study, "/home/me/logs/views.parquet", date(2024, 2, 3))
    assert "| **60** | **2** | **1.0000** |" in text
    assert "| 30 | 3 | 0.4444 | 0.5000 | 0.3333 | 0.6667 | 0.0000 | 1 | 0 |" in text
    assert "Measured on 2024-02-03" in text
    assert "--path views.parquet" in text
    assert "/home/me" not in text


def test_prose_around_the_table_is_kept(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    for _ in range(2):
        update_document(page, "new")
        assert page.read_text() == f"# Before\n\n{BEGIN}\n\nnew\n\n{END}\n\nAfter.\n"


def test_a_missing_page_is_begun(tmp_path: Path):
    update_document(tmp_path / "new" / "page.md", "table")
    assert (tmp_path / "new" / "page.md").read_text() == f"{BEGIN}\n\ntable\n\n{END}\n"


@pytest.mark.parametrize("text", ["", "no markers", f"{END}\n{BEGIN}", BEGIN])
def test_a_page_without_markers_is_left_alone(tmp_path: Path, text: str):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(PipelineError, match="no place for the table"):
        update_document(page, "new")
    assert page.read_text() == text


def test_a_page_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(PipelineError, match="cannot be written"):
        update_document(tmp_path, "new")


def test_the_picture_is_a_picture(study: SessionStudy, tmp_path: Path):
    target = tmp_path / "pictures" / "agreement.png"
    draw_picture(study, target)
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def folder(tmp_path: Path, settings: Settings) -> Path:
    """A working folder with a preset, a log and no settings of the developer's."""
    assert settings
    (tmp_path / "portal.yaml").write_text(PRESET)
    write_views(tmp_path / "views.parquet", ROWS)
    return tmp_path


def run(*options: str, column: str = "visit") -> Result:
    given = ("--source", "portal.yaml", "--path", "views.parquet", "--session-column", column)
    return CliRunner().invoke(app, ["study", "sessions", *given, *options])


def test_the_command_measures_and_writes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    console = Console(record=True)
    monkeypatch.setattr(cli, "console", console)
    result = run("--gaps", "30,60", "--out", "page.md", "--picture", "page.png")
    assert result.exit_code == 0, result.output
    assert "Best by ARI: 60 minutes" in " ".join(console.export_text().split())
    assert "**1.0000**" in (folder / "page.md").read_text()
    assert (folder / "page.png").is_file()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("options", "column", "said"),
    [
        (("--gaps", "10,x"), "visit", "'x' in --gaps"),
        ((), "vist", "Did you mean 'visit'?"),
        (("--out", "portal.yaml"), "visit", "has no place for the table"),
        (("--path", "nowhere.parquet"), "visit", "nowhere.parquet"),
    ],
)
def test_mistakes_are_told_without_a_traceback(options: tuple[str, ...], column: str, said: str):
    result = run(*options, column=column)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_the_page_shows_the_gap_of_the_preset():
    (best,) = re.findall(r"^\| \*\*(\d+)\*\* \|", PAGE.read_text(), re.MULTILINE)
    assert int(best) * 60 == load_preset("globo_news").session_gap_seconds
