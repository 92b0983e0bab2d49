"""`python -m hub_cards pull`, and pulling in a process of its own with a clean cache."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hub_cards.__main__ import main
from hub_cards.pulling.commands import add_pull
from hub_cards.pulling.pull import pull
from tests.hub_cards import pullable
from tests.hub_cards.test_verify import by_hand, published, rows
from tests.hub_server import HubServer


def run(*arguments: str) -> str:
    parser = argparse.ArgumentParser()
    add_pull(parser.add_subparsers())
    options = parser.parse_args(["pull", *arguments])
    return str(options.run(options))


def test_the_command_says_what_was_pulled(hub: HubServer, tmp_path: Path) -> None:
    data = rows()
    published(hub, "bert-lora", data)
    made = pull("acme/run")
    said = run("acme/run")
    assert said.splitlines()[1:] == [
        f"revision   {made.revision}",
        f"base       acme/base at {made.base_revision}, every tensor as recorded",
        f"processor  {type(made.processor).__name__}",
        "labels     bad, fair, good",
    ]
    data.to_parquet(tmp_path / "rows.parquet")
    table = run("acme/run", "--verify", "--data", str(tmp_path / "rows.parquet")).splitlines()[-3:]
    assert [line.split()[1] for line in table] == ["accuracy", "f1", "loss"]
    with pytest.raises(ValueError, match=r"but nothing is evaluated without --verify; add it"):
        run("acme/run", "--data", "x.csv")
    recipe = json.loads(hub.files("acme/run")["recipe.json"])
    recipe["results"]["validation"]["eval_accuracy"] = 1.0
    assert by_hand(made, data, 8)["accuracy"] < 1
    hub.seed("acme/run", {"recipe.json": json.dumps(recipe)}, user="alice")
    with pytest.raises(RuntimeError, match=r"(?s)were not found again:.*accuracy .* > 1e-06"):
        run("acme/run", "--verify", "--data", str(tmp_path / "rows.parquet"))
    assert "base       none needed" in run(str(pullable.trained("bert-full").folder))


@pytest.mark.slow
def test_a_fresh_process_with_a_clean_cache(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "distilbert-two-heads", private=True)
    save_file({"logits": made.run.logits, **made.run.inputs}, tmp_path / "expected.safetensors")
    script = """
import sys, torch
from safetensors.torch import load_file
from hub_cards.pulling.pull import pull
expected = load_file(sys.argv[1])
with torch.no_grad():
    found = pull("acme/run").model(expected["input_ids"]).logits
print(torch.equal(found, expected["logits"]))
"""
    home = tmp_path / "another-home"

    def pulled(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "expected.safetensors")],
            env=hub.environment(home, hub.token("alice")) | environment,
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    assert load_file(tmp_path / "expected.safetensors")["logits"].equal(made.run.logits)
    done = pulled()
    assert done.stdout == "True\n", done.stderr
    assert "LOAD REPORT" not in done.stderr
    assert "Loading weights" not in done.stderr
    done = pulled(HF_ENDPOINT="http://127.0.0.1:1", HF_HUB_OFFLINE="0")
    assert done.stdout == "True\n", done.stderr


def test_a_terminal_obeys_no_label(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    pullable.on_hub(hub, "bert-lora")
    recipe = json.loads(hub.files("acme/run")["recipe.json"])
    recipe["model"]["id2label"]["0"] = "\x1b[2J\u202e🙂\u200d\xa0bad"
    hub.seed("acme/run", {"recipe.json": json.dumps(recipe)}, user="alice")
    assert main(["pull", "acme/run"]) == 0
    assert "labels     \ufffd[2J\ufffd🙂\u200d\xa0bad, fair, good" in capsys.readouterr().out
