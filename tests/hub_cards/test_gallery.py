"""The gallery: real runs of every row of the demo, whose cards are what the templates make of the facts today."""

import re
from pathlib import Path

import pytest
from rows import SETTINGS

from hub_cards import read_facts, render
from hub_cards.pictures import pictures
from hub_cards.scanning.scan import check
from tests.hub_cards.gallery import FACTS, GALLERY

FOLDERS = sorted(path for path in GALLERY.iterdir() if path.is_dir())


def test_there_is_a_run_of_every_row_of_the_demo() -> None:
    assert [folder.name for folder in FOLDERS] == sorted(f"compare-{row}" for row in SETTINGS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_is_made_again_byte_for_byte(folder: Path) -> None:
    facts = read_facts(folder)
    card = (folder / "README.md").read_bytes()
    assert render(facts).encode() == card
    assert facts.finished
    assert facts.comparison is not None
    assert facts.cost is not None
    assert facts.commit is not None
    shown = set(re.findall(r"\]\(figures/([^)]+)\)", card.decode()))
    assert shown == {file.name for file in (folder / "figures").iterdir()} == set(pictures(facts))
    check({path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()})
    assert {path.name for path in folder.iterdir()} == {*FACTS, "README.md", "figures"}


def test_the_cards_say_what_was_done() -> None:
    cards = {folder.name.removeprefix("compare-"): (folder / "README.md").read_text() for folder in FOLDERS}
    assert "decoupled, strength 0.01" in cards["anchored"]
    assert "random weights" in cards["scratch"]
    assert "PeftModel.from_pretrained" in cards["lora"]
    assert cards["gradual"].count("| `encoder.layer.5` |") > 1
    for card in cards.values():
        assert "base_model" not in card.split("---\n")[1]  # the base was a folder
        assert "Transfer: " in card
