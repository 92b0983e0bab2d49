"""The command line: what each command prints, and its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_cards.__main__ import main
from tests.hub_cards import runs
from tests.hub_server import HubServer
from tests.recipes.test_publishing import base, published
from tests.recipes.test_text_classification import ROOT, rows, write

__all__ = ["base"]  # a fixture


def test_a_run_is_published_pulled_verified_and_listed(
    hub: HubServer, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = published("lora", base, tmp_path / "lora")
    capsys.readouterr()
    publishing = ["publish", str(run), "alice/again", "--license", "apache-2.0"]
    assert main([*publishing, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "would be published (dry run)" in printed
    assert "adapter_model.safetensors" in printed
    assert "training_args.bin" in printed  # among what is left out
    assert "alice/again" not in hub.repos
    assert main(publishing) == 0
    assert "published as" in capsys.readouterr().out
    assert main(publishing) == 0
    assert "nothing has changed" in capsys.readouterr().out

    assert main(["pull", "alice/again"]) == 0
    printed = capsys.readouterr().out
    assert f"base       alice/base at {base}, every tensor as recorded" in printed
    assert "labels     blue, green, red" in printed
    data = write(tmp_path / "validation.csv", rows(9))
    assert main(["pull", "alice/again", "--verify", "--data", str(data)]) == 0
    assert "accuracy" in capsys.readouterr().out

    assert main(["adapters", "alice/base"]) == 0
    table = capsys.readouterr().out
    assert "alice/again" in table
    assert "alice/text-lora" in table


def test_a_card_with_other_numbers_fails_verification(
    hub: HubServer, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = published("probe", base, tmp_path / "probe")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["results"]["validation"]["accuracy"] += 0.25
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert main(["publish", str(run), "alice/better", "--license", "apache-2.0"]) == 0
    data = write(tmp_path / "validation.csv", rows(9))
    assert main(["pull", "alice/better", "--verify", "--data", str(data)]) == 1
    assert "-2.5e-01 > 1e-06" in capsys.readouterr().err


def test_errors_are_one_message_and_exit_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m hub_cards: error: ")
    assert "holds no recipe.json" in error
    assert "Traceback" not in error


def test_the_module_runs(tmp_path: Path) -> None:
    runs.write(tmp_path)
    command = [sys.executable, "-m", "hub_cards", "card", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("README.md")
    assert (tmp_path / "README.md").is_file()
