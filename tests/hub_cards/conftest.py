"""Finished runs to publish, each test with a copy of its own."""

from pathlib import Path

import pytest

from tests.hub_cards import trained
from tests.hub_cards.trained import Run


@pytest.fixture
def full(tmp_path: Path) -> Run:
    return trained.train("full").copy(tmp_path / "run")


@pytest.fixture
def lora(tmp_path: Path) -> Run:
    return trained.train("lora").copy(tmp_path / "run")
