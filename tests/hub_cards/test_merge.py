"""Merging: one model that loads without PEFT and says what the adapter says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hub_cards.merge import merge_adapter
from tests.hub_cards import pullable
from tests.hub_server import HubServer

MERGES = [name for name in pullable.ADAPTERS if name not in ("bert-prompts",)]


def loaded(folder: Path, run: pullable.Run) -> torch.Tensor:
    cls = type(run.model.get_base_model())  # type: ignore[operator]
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return pullable.logits(model.eval(), run.inputs)


@pytest.mark.parametrize("kind", MERGES)
def test_the_merged_model_says_what_the_adapter_says(hub: HubServer, tmp_path: Path, kind: str) -> None:
    made = pullable.on_hub(hub, kind, tmp_path)
    merge_adapter(made.run.folder, tmp_path / "merged")
    found = loaded(tmp_path / "merged", made.run)
    tolerance = 1e-5 if pullable.KINDS[kind].dtype is None else 0.05
    assert found.dtype == (pullable.KINDS[kind].dtype or torch.float32)
    torch.testing.assert_close(found, made.run.logits, atol=tolerance, rtol=0)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.id2label == pullable.LABELS
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    with made.run.model.disable_adapter():  # type: ignore[operator]
        assert (pullable.logits(made.run.model, made.run.inputs) - made.run.logits).abs().max() > 100 * 1e-5, (
            "the control"
        )


@pytest.mark.slow
def test_it_loads_where_peft_is_not_installed(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-lora", tmp_path)
    merge_adapter(made.run.folder, tmp_path / "merged")
    torch.save({"inputs": made.run.inputs, "logits": made.run.logits}, tmp_path / "expected.pt")
    script = f"""
import sys, torch
import importlib.machinery as machinery
class WithoutPeft(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(machinery.PathFinder)] = WithoutPeft
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "merged")!r}).eval()
expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    found = model(**expected["inputs"]).logits
assert (found - expected["logits"]).abs().max() <= 1e-5
assert "peft" not in sys.modules
print(model.config.id2label[2], AutoTokenizer.from_pretrained({str(tmp_path / "merged")!r})("w1")["input_ids"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "good"


def test_a_local_base_is_found_again(tmp_path: Path) -> None:
    pullable.base_files("bert-lora", tmp_path / "base")
    run = pullable.train("bert-lora", tmp_path / "base", tmp_path / "run")
    merge_adapter(run.folder, tmp_path / "merged")
    torch.testing.assert_close(loaded(tmp_path / "merged", run), run.logits, atol=1e-5, rtol=0)
    pullable.base_files("bert-lora", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="is not the base that the adapter was trained on"):
        merge_adapter(run.folder, tmp_path / "wrong", base=tmp_path / "other")
    assert not (tmp_path / "wrong").exists()


def test_what_cannot_be_merged(hub: HubServer, tmp_path: Path) -> None:
    prompts = pullable.on_hub(hub, "bert-prompts", tmp_path / "prompts").run.folder
    with pytest.raises(ValueError, match="of the kind PROMPT_TUNING, which adds inputs or layers and cannot be merged"):
        merge_adapter(prompts, tmp_path / "merged")
    whole = pullable.train("bert-full", "acme/base", tmp_path / "full").folder
    with pytest.raises(ValueError, match="holds a whole model, no adapter"):
        merge_adapter(whole, tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="expected an empty folder"):
        merge_adapter(prompts, tmp_path / "merged")


@pytest.mark.parametrize("part", ["lora_A", "classifier"])
def test_weights_that_are_no_numbers_are_refused(hub: HubServer, tmp_path: Path, part: str) -> None:
    run = pullable.on_hub(hub, "bert-lora", tmp_path).run.folder
    weights = load_file(run / "adapter_model.safetensors")
    next(weight for name, weight in weights.items() if part in name).fill_(float("nan"))
    save_file(weights, run / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be merged|are not finite"):
        merge_adapter(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_no_path_of_this_machine_is_in_the_merged_model(hub: HubServer, tmp_path: Path) -> None:
    run = pullable.on_hub(hub, "bert-lora", tmp_path).run.folder
    merge_adapter(run, tmp_path / "merged")
    for path in (tmp_path / "merged").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
        json.loads(path.read_text())
