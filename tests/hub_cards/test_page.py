"""The blocks of hub_cards/README.md, one after the other, against the Hub for tests."""

import re
from pathlib import Path

import pytest
import torch
from arguments import parse
from text_classification import Recipe, main
from transformers import TrainingArguments

import hub_cards
from tests.hub_server import HubServer
from tests.recipes.test_publishing import base
from tests.recipes.test_text_classification import CONFIGS, options, rows, write

__all__ = ["base"]  # a fixture
PAGE = (Path(hub_cards.__file__).parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def train(strategy: str, folder: Path, **more: object) -> None:
    folder.mkdir()
    config = next(path for path in CONFIGS if path.stem == strategy)
    values = {"learning_rate": 1e-2, "output_dir": folder, **more}
    main(*parse((Recipe, TrainingArguments), ["--config", str(config), *options(Path("jo/base"), folder, **values)]))


def test_the_page_runs_from_top_to_bottom(
    hub: HubServer, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.add_user("jo"))
    hub.seed("jo/base", {name: content for name, content in hub.files("alice/base").items()}, user="jo")
    monkeypatch.chdir(tmp_path)
    train("gradual", tmp_path / "run")
    for name in ("mails-lora", "news-lora"):
        train("lora", tmp_path / name, seed=len(name))
        hub_cards.publish(name, f"jo/{name}", license="apache-2.0")
    write(tmp_path / "validation.csv", rows(9))
    names: dict[str, object] = {}
    assert len(BLOCKS) == 4
    printed = []
    for block in BLOCKS:
        capsys.readouterr()
        exec(compile(block, "hub_cards/README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    card, publishing, pulling, adapters = printed
    assert "## What was trained when" in card
    assert "would be published (dry run)" in publishing
    assert "Mails in other languages than English." in hub.files("jo/mails")["README.md"].decode()
    assert hub.repos["jo/mails"].private
    assert "('blue', 'green', 'red')" in pulling
    assert "accuracy" in pulling
    assert "jo/mails-lora" in adapters
    merged = names["merged"]
    assert isinstance(merged, hub_cards.AdapterSet)
    assert torch.is_tensor(next(merged.model.parameters()))


@pytest.mark.parametrize("name", hub_cards.__all__)
def test_every_public_name_is_on_the_page_or_in_the_readme(name: str) -> None:
    assert name in PAGE + (Path(hub_cards.__file__).parent.parent / "README.md").read_text()
