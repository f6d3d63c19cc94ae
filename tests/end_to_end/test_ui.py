"""A person materializes one night from Dagster's page, in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions as ec
from selenium.webdriver.support.ui import WebDriverWait

from behavior_pipeline.storage import read_json

from .conftest import START_SECONDS, FinishedRun, serving

pytestmark = [pytest.mark.browser, pytest.mark.slow]

RUN_SECONDS = 300
QUIET_CHROMIUM = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1200",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in (*QUIET_CHROMIUM, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(argument)
    # Named outright: selenium would otherwise look for one to download.
    service = webdriver.ChromeService(executable_path=_program("chromedriver"))
    options.binary_location = _program("chromium")
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(finished: FinishedRun, tmp_path: Path) -> Iterator[str]:
    with serving(finished.installation, tmp_path / "ui.log") as address:
        yield address


def test_one_night_is_materialized_from_the_page(
    page: str, browser: webdriver.Chrome, finished: FinishedRun
) -> None:
    comparison = finished.report_folder / "comparison.json"
    before = read_json(comparison)
    comparison.unlink()
    browser.get(f"{page}/locations/behavior_pipeline/jobs/nightly")
    _click(browser, "//button[contains(., 'Materialize all')]")
    _click(browser, "//button[contains(., 'Show all partitions')]")
    _type(browser, "input[placeholder*='2005-01-01']", "2026-03-30")
    _click(browser, "//button[contains(., 'Launch 1 run')]")
    _click(browser, "//*[self::a or self::button][normalize-space()='View']")
    WebDriverWait(browser, RUN_SECONDS).until(
        ec.presence_of_element_located((By.XPATH, "//*[normalize-space()='Success']"))
    )
    assert read_json(comparison) == before


def test_the_report_opens_without_an_error(
    browser: webdriver.Chrome, finished: FinishedRun
) -> None:
    browser.get((finished.report_folder / "report.html").as_uri())
    assert "simulated" in browser.title.lower() + browser.page_source.lower()
    pictures = browser.execute_script(
        "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
    )
    assert all(pictures)
    overflow = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def _click(browser: webdriver.Chrome, path: str) -> None:
    WebDriverWait(browser, START_SECONDS).until(
        ec.element_to_be_clickable((By.XPATH, path))
    ).click()


def _type(browser: webdriver.Chrome, selector: str, text: str) -> None:
    """Replace what stands in a field."""
    wait = WebDriverWait(browser, START_SECONDS)
    field = wait.until(ec.element_to_be_clickable((By.CSS_SELECTOR, selector)))
    field.click()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text, Keys.TAB)


def _program(name: str) -> str:
    """Return the path of an installed program."""
    found = shutil.which(name)
    assert found is not None, f"{name} is not installed"
    return found
