"""Fixtures of the encoder's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from encoder_builders import Folders, random_rows, write_folders


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(tmp_path, random_rows(60))
