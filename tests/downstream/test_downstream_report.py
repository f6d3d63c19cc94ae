from __future__ import annotations

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from downstream_builders import (
    CHECKPOINT,
    TEST,
    WINDOWS,
    WRITTEN_AT,
    preset,
    write_home,
)

from behavior_pipeline.downstream import plots
from behavior_pipeline.downstream.comparison import compare
from behavior_pipeline.downstream.report import DARK, WrittenReport, write_report
from behavior_pipeline.downstream.segmentation import segment
from behavior_pipeline.downstream.wording import number, signed
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage, write_json

SETTINGS = Settings(threads=2, num_segments=3, bootstrap_samples=10)
HISTORY = [
    {"step": 50.0, "train_total": 9.125, "validation_total": 9.25, "train_silence": 1.0},
    {"step": 100.0, "train_total": 7.125, "validation_total": 7.375, "train_silence": 0.5},
]


class Page(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("downstream") / "home")
    write_home(storage, num_users=120)
    compare(storage, SETTINGS, preset(is_simulated=True), WINDOWS)
    segment(storage, SETTINGS, WINDOWS, WRITTEN_AT)
    write_json(storage.checkpoints / CHECKPOINT / "training.json", {"history": HISTORY})
    return storage


@pytest.fixture(scope="module")
def written(home: Storage) -> WrittenReport:
    return write_report(home, SETTINGS, preset(is_simulated=True), WINDOWS)


@pytest.fixture(scope="module")
def text(written: WrittenReport) -> str:
    return written.page.read_text()


def test_every_number_of_the_comparison_is_on_the_page(home: Storage, text: str) -> None:
    comparison = json.loads((home.reports(TEST) / "comparison.json").read_text())
    shown = "\n".join(Page(text).texts)
    for row in comparison["results"] + comparison["naive"]:
        for key in ("value", "ci_low", "ci_high"):
            assert number(row[key]) in shown
    for row in comparison["lifts"]:
        for key in ("value", "ci_low", "ci_high"):
            assert signed(row[key]) in shown
    for profile in json.loads((home.segments(TEST) / "profiles.json").read_text()):
        assert profile["name"] in shown
    assert comparison["left_out"][0]["reason"] in shown


def test_nothing_reaches_for_the_network(text: str) -> None:
    assert "http" not in text
    for tag, attributes in Page(text).tags:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in text.replace("url(#", "")


def test_ids_are_unique_and_every_reference_is_answered(text: str) -> None:
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [a[key] for _, a in page.tags for key in ("aria-labelledby",) if key in a]
    wanted += [(a["href"] or "").removeprefix("#") for a in page.all("use")]
    assert wanted
    assert set(wanted) <= set(ids)


def test_page_is_readable_without_seeing_it(text: str) -> None:
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3"}]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all("scope" in attributes for attributes in page.all("th"))
    pictures = [a for tag, a in page.tags if a.get("role") == "img"]
    assert len(pictures) == len(page.all("svg"))
    assert all(len(picture["aria-label"] or "") > 40 for picture in pictures)
    assert all(svg.get("aria-hidden") == "true" for svg in page.all("svg"))


def test_simulated_events_are_called_so_first(text: str, home: Storage) -> None:
    assert text.index("These events are simulated") < text.index("<h1>")
    comparison = json.loads((home.reports(TEST) / "comparison.json").read_text())
    assert comparison["is_simulated"]


def test_training_and_calibration_are_shown(text: str) -> None:
    assert "Train from 9.125 to 7.125. Validation from 9.250 to 7.375." in text
    assert "Brier score is" in text


def test_writing_again_gives_the_same_bytes(home: Storage, written: WrittenReport) -> None:
    before = written.page.read_bytes(), written.lift_picture.read_bytes()
    again = write_report(home, SETTINGS, preset(is_simulated=True), WINDOWS)
    assert (again.page.read_bytes(), again.lift_picture.read_bytes()) == before
    assert before[1].startswith(b"\x89PNG")


def test_names_from_the_data_cannot_become_markup(home: Storage, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    comparison = json.loads((home.reports(TEST) / "comparison.json").read_text())
    for row in comparison["results"] + comparison["lifts"]:
        if row["target"] == "books":
            row["target"] = "<script>alert(1)</script>"
    write_json(storage.reports(TEST) / "comparison.json", comparison)
    page = write_report(storage, SETTINGS, preset(), WINDOWS).page.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "holds no training curves" in page


def test_a_page_of_nothing_measured_says_so(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "home")
    write_home(storage, num_users=6)
    compare(storage, SETTINGS, preset(), WINDOWS)
    page = write_report(storage, SETTINGS, preset(), WINDOWS).page.read_text()
    assert "Nothing could be measured on these events." in page
    assert "only 0 positive of 6 train users" in page


def test_without_a_comparison_there_is_no_report(storage: Storage) -> None:
    with pytest.raises(PipelineError, match="comparison"):
        write_report(storage, SETTINGS, preset(), WINDOWS)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.1, by its definition of relative luminance."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [plots.LIGHT, DARK], ids=["light", "dark"])
def test_colors_stand_out(theme: dict[str, str]) -> None:
    assert set(theme) == set(plots.LIGHT)
    assert contrast(theme["ink"], theme["surface"]) > 7
    assert contrast(theme["muted"], theme["surface"]) > 4.5
    for name in set(theme) - {"ink", "muted", "line", "surface"}:
        assert contrast(theme[name], theme["surface"]) > 3
