"""Merging: one model that loads without PEFT and says what the adapter says."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hub_cards.pulling.merge import merge_adapter
from tests.hub_cards import pullable
from tests.hub_server import HubServer

MERGES = [name for name in pullable.ADAPTERS if name != "bert-prompts"]


def loaded(folder: Path, run: pullable.Run, **labels: Any) -> torch.Tensor:
    model, report = run.model_class.from_pretrained(folder, output_loading_info=True, **labels)
    assert labels or not any(report.values())
    return pullable.logits(model.eval(), run.inputs)


@pytest.mark.parametrize("kind", MERGES)
def test_the_merged_model_says_what_the_adapter_says(tmp_path: Path, kind: str) -> None:
    run = pullable.trained(kind)
    merge_adapter(run.folder, tmp_path / "merged")
    found = loaded(tmp_path / "merged", run)
    tolerance = 1e-5 if pullable.KINDS[kind].dtype is None else 0.01
    assert found.dtype == (pullable.KINDS[kind].dtype or torch.float32)
    torch.testing.assert_close(found, run.logits, atol=tolerance, rtol=0, check_dtype=False)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").id2label == pullable.LABELS
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    for path in (tmp_path / "merged").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
        assert str(run.base) not in path.read_text(), path.name
    weights, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(run.base / "model.safetensors")
    same = [
        name
        for name, weight in before.items()
        if any(n.endswith(name) and torch.equal(w, weight) for n, w in weights.items())
    ]
    assert len(same) < len(before), "the control: only what is adapted has changed"


@pytest.mark.slow
def test_it_loads_where_peft_is_not_installed(tmp_path: Path) -> None:
    run = pullable.trained("bert-lora")
    merge_adapter(run.folder, tmp_path / "merged")
    save_file({"logits": run.logits, **run.inputs}, tmp_path / "expected.safetensors")
    script = """
import importlib.machinery as machinery, sys
class WithoutPeft(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(machinery.PathFinder)] = WithoutPeft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
expected = load_file(sys.argv[2])
with torch.no_grad():
    assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() <= 1e-5
try:
    import peft
except ImportError:
    print(model.config.id2label[2], AutoTokenizer.from_pretrained(sys.argv[1])("w1")["input_ids"])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "merged"), str(tmp_path / "expected.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "good [5]\n", done.stderr


def test_the_base_is_found_on_the_hub_and_checked(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    folder = tmp_path / "run"
    folder.mkdir()
    for name, data in hub.files(made.repo_id).items():
        (folder / name).write_bytes(data)
    merge_adapter(folder, tmp_path / "merged")
    torch.testing.assert_close(loaded(tmp_path / "merged", made.run), made.run.logits, atol=1e-5, rtol=0)
    other = pullable.save_base("bert-lora", tmp_path / "other", seed=1)
    later = hub.seed("acme/base", pullable.contents(other), user="alice")
    merge_adapter(folder, tmp_path / "again")
    for options in ({"base": other}, {"revision": later}, {"base": "acme/base", "revision": "main"}):
        with pytest.raises(ValueError, match=r"is not the base that the adapter was trained on"):
            merge_adapter(folder, tmp_path / "wrong", **options)
    assert not (tmp_path / "wrong").exists()


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    prompts = pullable.trained("bert-prompts").folder
    with pytest.raises(
        ValueError, match=r"of the kind PROMPT_TUNING, which adds inputs or layers and cannot be merged"
    ):
        merge_adapter(prompts, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"holds a whole model, no adapter"):
        merge_adapter(pullable.trained("bert-full").folder, tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"expected an empty folder"):
        merge_adapter(prompts, tmp_path / "merged")


@pytest.mark.parametrize(("part", "words"), [("lora_A", "cannot be merged"), ("classifier.weight", "are not finite")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, part: str, words: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(pullable.trained("bert-lora").folder, run)
    weights = load_file(run / "adapter_model.safetensors")
    next(weight for name, weight in weights.items() if part in name).fill_(float("nan"))
    save_file(weights, run / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=words):
        merge_adapter(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
