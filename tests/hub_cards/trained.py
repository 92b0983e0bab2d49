"""Real runs of tiny models from a base in a folder, trained once, and copied for each test."""

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from hub_cards import Publication, publish
from tests import tiny
from tests.hub_server import HubServer
from tl_callbacks import add_to_recipe, attach

LABELS = {0: "bad", 1: "fair", 2: "good"}
BASE, RUN = "acme/base", "alice/run"
CARD = "---\nlicense: apache-2.0\n---\n# base\n"
INPUTS = {"input_ids": torch.tensor([row["input_ids"] for row in tiny.texts(8)])}


@dataclass(frozen=True)
class Run:
    """A finished run's folder, the folder of its base, and what its model says of `INPUTS`."""

    folder: Path
    base: Path
    logits: torch.Tensor

    def copy(self, target: Path, *, curves: bool = False) -> "Run":
        """A copy that can be changed; without curves its card has no pictures, which take most of the time."""
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        if not curves:
            change(target / "trainer_state.json", log_history=[])
        return Run(target, self.base, self.logits)

    def on_hub(self, *, revision: str | None = None) -> "Run":
        """The run as if its base had been loaded by its name on the Hub."""
        change(self.folder / "recipe.json", name_or_path=BASE, local=False, revision=revision, within="model")
        if (config := self.folder / "adapter_config.json").is_file():
            change(config, base_model_name_or_path=BASE)
        return self


@functools.cache
def _session() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *(f"w{n}" for n in range(48))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)


@functools.cache
def base(*, pooler: bool = True, seed: int = 5) -> Path:
    """A pretrained model without a head."""
    folder = _session() / f"base-{pooler}-{seed}"
    encoder = tiny.bert(layers=1, seed=seed).bert
    if not pooler:
        bare = BertModel(encoder.config, add_pooling_layer=False)
        bare.load_state_dict({k: v for k, v in encoder.state_dict().items() if "pooler" not in k})
        encoder = bare
    encoder.save_pretrained(folder)
    return folder


@functools.cache
def train(kind: str) -> Run:
    """A run of three steps: `full`, `lora`, or `lora without pooler`, whose base lacks one."""
    pretrained = base(pooler="without pooler" not in kind)
    torch.manual_seed(7)
    model: Any = BertForSequenceClassification.from_pretrained(
        pretrained, num_labels=3, id2label=LABELS, label2id={name: number for number, name in LABELS.items()}
    )
    model.accepts_loss_kwargs = False
    if "lora" in kind:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    folder = _session() / kind.replace(" ", "-")
    trainer = tiny.trainer(
        model, tiny.arguments(folder, max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=3),
        processing_class=tokenizer(),
    )  # fmt: skip
    attach(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    data = {"name": "news", "local": True, "labels": list(LABELS.values()), "splits": {"train": {"rows": 64}}}
    add_to_recipe(folder, task="text-classification", data=data)
    return Run(folder, pretrained, logits(trainer.model))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def seed_base(hub: HubServer, run: Run, *, card: str = CARD, **changed: bytes) -> str:
    """The base's repository on the Hub; returns its commit."""
    files = {path.name: path.read_bytes() for path in run.base.iterdir()} | {"README.md": card.encode()}
    return hub.seed(BASE, files | changed, user="alice")


def change(file: Path, *, within: str | None = None, **values: Any) -> None:
    """Replace values in a JSON file."""
    found = json.loads(file.read_text())
    (found[within] if within else found).update(values)
    file.write_text(json.dumps(found, indent=2))


def go(run: Run, **options: Any) -> Publication:
    return publish(run.folder, RUN, **{"license": "mit", **options})


def writes(hub: HubServer, start: int = 0) -> list[str]:
    """The calls that could have changed something."""
    return [f"{call.method} {call.path}" for call in hub.requests[start:] if call.method not in ("GET", "HEAD")]
