"""Runs every python block of the README and the method cards, on a tiny model, and checks what they must hold."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import tl_callbacks
from tests import tiny

ROOT = Path(__file__).parent.parent
CARDS = sorted((ROOT / "tl_callbacks").glob("*/README.md"))
PAGES = [ROOT / "README.md", *CARDS]
BLOCKS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
METHODS = [card for card in CARDS if card.parent.name not in ("frozen", "discovery", "reading")]


def names(folder: Path) -> dict[str, Any]:
    """What a reader of a card has already: a model, arguments, data and a batch."""
    data = tiny.texts(16)
    batch = {
        "input_ids": torch.tensor([row["input_ids"] for row in data[:4]]),
        "labels": torch.tensor([row["labels"] for row in data[:4]]),
    }
    return {
        "model": tiny.bert(), "args": tiny.arguments(folder, max_steps=12), "train": data, "dev": data[:8],
        "batch": batch, "Trainer": Trainer,
    }  # fmt: skip


def test_there_are_blocks_on_every_page() -> None:
    assert {page for page, _, _ in BLOCKS} == set(PAGES)
    assert len(BLOCKS) >= 8


@pytest.mark.parametrize(
    ("page", "number", "block"), BLOCKS, ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else None
)
def test_the_block_runs(
    page: Path, number: int, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(r"\w\(.*\)", block), "a block that calls nothing proves nothing"
    given = names(tmp_path / "run")
    if "hub_cards" in block:  # a reader has trained, and is logged in
        request.getfixturevalue("hub")
        given |= trained(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw bytes", DeprecationWarning)  # of a client
        exec(compile(block, f"{page.name}, block {number}", "exec"), given)


def trained(given: dict[str, Any]) -> dict[str, Any]:
    trainer = Trainer(given["model"], given["args"], train_dataset=given["train"])
    tl_callbacks.attach(trainer)
    trainer.train()
    return {"trainer": trainer}


def test_every_method_has_a_card_with_all_sections() -> None:
    assert {card.parent.name for card in METHODS} == {"layerwise", "unfreezing", "anchoring", "probing", "forgetting"}
    for card in METHODS:
        text = card.read_text()
        for section in (
            "**What it changes.**", "**When it helps.**", "**When it does not.**", "## In a Trainer",
            "## In a plain loop", "## Arguments that matter", "## What we measured",
            "## Distributed training and resume", "## References",
        ):  # fmt: skip
            assert section in text, f"{card} lacks {section}"


@pytest.mark.parametrize("name", tl_callbacks.__all__)
def test_every_public_name_is_in_the_readme_or_a_card(name: str) -> None:
    assert any(name in page.read_text() for page in PAGES), f"{name} is documented nowhere"


def test_links_to_files_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "hub_cards" / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used, "the README names its commands"
    assert used <= targets
