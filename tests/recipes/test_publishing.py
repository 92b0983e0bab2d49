"""Every recipe, published and pulled in another process with a clean cache: the same logits, label names and metric."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from arguments import parse
from peft import PeftModel
from text_classification import Recipe, main
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast, TrainingArguments

from tests import tiny
from tests.hub_server import HubServer
from tests.launching import launch
from tests.recipes.test_text_classification import CONFIGS, ROOT, WORDS, options, rows, write

TEXTS = ["the red cat runs", "the green dog sleeps now", "a blue bird"]
PULL = """
import json, sys
from hub_cards import pull, verify
found = {}
for repo, data, snippet in json.loads(sys.argv[1]):
    pulled = pull(repo)
    batch = pulled.processor(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
    verification = verify(repo, data=data)
    printed = []
    exec(snippet, {"print": lambda *words: printed.append(" ".join(map(str, words)))})
    found[repo] = dict(logits=pulled.model(**batch).logits.tolist(), labels=pulled.labels, ok=verification.ok,
                       report=str(verification), printed=printed, base=pulled.base_revision)
print(json.dumps(found))
"""


@pytest.fixture
def base(hub: HubServer, tmp_path: Path) -> str:
    """The commit of a tiny base on the Hub."""
    folder = tmp_path / "base"
    folder.mkdir()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tiny.bert().save_pretrained(folder)
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return hub.seed("alice/base", {path.name: path for path in folder.iterdir()})


def logits(run: Path) -> list[list[float]]:
    """What the trained model says, loaded without this project."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    if (run / "adapter_config.json").exists():
        classes = {"num_labels": 3, "id2label": {0: "blue", 1: "green", 2: "red"}}
        model = AutoModelForSequenceClassification.from_pretrained(
            "alice/base", ignore_mismatched_sizes=True, **classes
        )
        model = PeftModel.from_pretrained(model, run)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(run)
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.tolist()  # type: ignore[no-any-return]


def elsewhere(hub: HubServer, home: Path, jobs: list[tuple[str, str, str]]) -> dict[str, Any]:
    command = [sys.executable, "-c", PULL, json.dumps(jobs), json.dumps(TEXTS)]
    environment = {**hub.environment(home, token=hub.token("alice")), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def published(strategy: str, base: str, folder: Path, **more: Any) -> tuple[str, Path]:
    """Run the recipe with --push_to_hub; return repository and run."""
    repo = f"alice/text-{strategy.replace('_', '-')}"
    folder.mkdir()
    config = next(path for path in CONFIGS if path.stem == strategy)
    pushed = {"push_to_hub": True, "hub_model_id": repo, "license": "apache-2.0", **more}
    arguments = options(Path("alice/base"), folder, learning_rate=1e-3, **pushed)
    main(*parse((Recipe, TrainingArguments), ["--config", str(config), *arguments]))
    return repo, folder / "run"


def check(hub: HubServer, strategies: list[str], base: str, tmp_path: Path) -> None:
    runs = {strategy: published(strategy, base, tmp_path / strategy) for strategy in strategies}
    expected = {repo: logits(run) for repo, run in runs.values()}
    data = str(write(tmp_path / "again.csv", rows(9)))
    jobs = []
    for repo, _ in runs.values():
        files = hub.files(repo)
        assert hub.repos[repo].private
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".py"))]
        card = files["README.md"].decode()
        snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
        assert repo in snippet
        jobs.append((repo, data, snippet))
    home = tmp_path / "elsewhere"
    home.mkdir()
    found = elsewhere(hub, home, jobs)
    for strategy, (repo, run) in runs.items():
        assert found[repo]["logits"] == expected[repo], strategy
        assert found[repo]["labels"] == ["blue", "green", "red"]
        assert found[repo]["ok"], found[repo]["report"]
        assert found[repo]["printed"][0] in ["blue", "green", "red"]
        if (run / "adapter_config.json").exists():
            config = json.loads(hub.files(repo)["adapter_config.json"])
            assert (config["base_model_name_or_path"], config["revision"]) == ("alice/base", base)
            assert found[repo]["base"] == base


def test_published_runs_are_pulled_as_they_were(hub: HubServer, base: str, tmp_path: Path) -> None:
    check(hub, ["head", "lora"], base, tmp_path)


@pytest.mark.slow
def test_every_strategy_is_pulled_as_it_was(hub: HubServer, base: str, tmp_path: Path) -> None:
    check(hub, sorted(path.stem for path in CONFIGS if path.parent.name == "text_classification"), base, tmp_path)


def test_a_merged_adapter_needs_no_peft(hub: HubServer, base: str, tmp_path: Path) -> None:
    repo, run = published("lora", base, tmp_path / "merged", merge_adapter=True)
    files = hub.files(repo)
    assert "adapter_config.json" not in files
    assert "base_model_relation: merge" in files["README.md"].decode()
    blocked = (
        "import sys; sys.modules['peft'] = None\n"
        "import json, torch; from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({repo!r})\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({repo!r})\n"
        f"print(json.dumps(model.eval()(**t({TEXTS!r}, padding=True, return_tensors='pt')).logits.tolist()))"
    )
    home = tmp_path / "elsewhere"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", blocked],
        env=hub.environment(home, token=hub.token("alice")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    merged = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(merged, torch.tensor(logits(run)), atol=1e-5)


def test_a_repository_without_an_owner_is_refused_before_training(tmp_path: Path) -> None:
    arguments = options(tmp_path, tmp_path, push_to_hub=True, hub_model_id="run")
    with pytest.raises(ValueError, match="`hub_model_id` is 'run'; --push_to_hub needs owner/name, before training"):
        main(*parse((Recipe, TrainingArguments), arguments))
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("fault", [False, True])
def test_two_ranks_publish_once_and_fail_together(hub: HubServer, base: str, tmp_path: Path, fault: bool) -> None:
    arguments = options(
        Path("alice/base"), tmp_path, push_to_hub=True, hub_model_id="alice/together", license="mit", strategy="lora"
    )
    if fault:
        hub.forbid_commits()
    log = tmp_path / "log"
    environment = hub.environment(tmp_path / "home", token=hub.token("alice"))
    status = launch("recipes/text_classification.py", *arguments, ranks=2, log=log, environment=environment)
    if fault:
        assert status != 0
        assert "the commit to `alice/together` failed" in log.read_text()
        assert "the first process failed, so this one stops too" in log.read_text()
        assert set(hub.files("alice/together")) <= {".gitattributes"}
        return
    assert status == 0, log.read_text()
    assert "adapter_model.safetensors" in hub.files("alice/together")
    assert len([call for call in hub.requests if call.method == "POST" and "/commit/" in call.path]) == 1
