"""Published adapters of small bases on the test Hub, trained by a real Trainer, and what each says of some inputs."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, Trainer

from hub_cards import read_facts, write_card
from tests import tiny
from tests.hub_server import HubServer
from tl_callbacks import attach

BASE = "acme/base"
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip
INPUTS = {"input_ids": torch.tensor([row["input_ids"] for row in tiny.texts(8, seed=3)])}
IMAGES = {"pixel_values": torch.stack([row["pixel_values"] for row in tiny.images(8, seed=3)])}


@dataclass(frozen=True)
class Published:
    """An adapter on the Hub: where, at which commit, and its logits when training had ended."""

    repo_id: str
    sha: str
    logits: torch.Tensor
    folder: Path


def roberta(**options: Any) -> PreTrainedModel:
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=20, num_labels=3, **options)
    return transformers.RobertaForSequenceClassification(config)


def vit() -> PreTrainedModel:
    config = transformers.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16,
                                    patch_size=4, num_channels=1)  # fmt: skip
    return transformers.ViTForImageClassification(config)


def llama() -> PreTrainedModel:
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=20, num_labels=3, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


MODELS = {"bert": tiny.bert, "roberta": roberta, "llama": llama, "vit": vit, "resnet": tiny.resnet}
TARGETS = {"llama": ["q_proj", "v_proj"], "vit": ["q_proj", "v_proj"], "resnet": ["convolution"]}
# Running statistics move in training, and are saved only with their layer.
WHOLE = {"vit": ["classifier"], "resnet": ["classifier", "normalization"]}


def inputs_for(kind: str) -> dict[str, torch.Tensor]:
    return IMAGES if kind in WHOLE else INPUTS


def seed_base(
    hub: HubServer, folder: Path, kind: str = "bert", repo_id: str = BASE, *, seed: int = 0, head: bool = False
) -> str:
    """Puts a base on the Hub: the weights below the head, or with it."""
    model = MODELS[kind]()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    (model if head else model.base_model).save_pretrained(folder)
    return hub.seed(repo_id, {path.name: path for path in folder.iterdir()}, user="alice")


def publish_adapter(
    hub: HubServer,
    folder: Path,
    repo_id: str,
    labels: tuple[str, ...],
    *,
    base: str | Path = BASE,
    kind: str = "bert",
    config: dict[str, Any] | None = None,
    problem_type: str = "single_label_classification",
    cls: type[PreTrainedModel] | None = None,
    adapter: peft.PeftConfig | None = None,
    seed: int = 1,
    recipe: dict[str, Any] | None = None,
    private: bool = False,
    user: str = "alice",
    card: bytes | None = b"# A card\n",
    gated: str | bool = False,
    **lora: Any,
) -> Published:
    """Trains an adapter with a head for two steps and puts it on the Hub. `card`: None for the one of the project."""
    names = dict(enumerate(labels))
    start = (cls or type(MODELS[kind]())).from_pretrained
    torch.manual_seed(seed)
    model = start(
        base, id2label=names, label2id={name: number for number, name in names.items()}, problem_type=problem_type,
        **(config or {}),
    )  # fmt: skip
    model.accepts_loss_kwargs = False
    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
    options |= {"target_modules": TARGETS.get(kind, ["query", "value"])}
    options |= {"modules_to_save": WHOLE[kind]} if kind in WHOLE else {"task_type": "SEQ_CLS"}
    options |= lora
    model = peft.get_peft_model(model, adapter or peft.LoraConfig(**options))
    rows = tiny.images(16) if kind in WHOLE else tiny.texts(16)
    for number, row in enumerate(rows):
        row["labels"] = _target(number, len(labels), problem_type, cls)
    trainer = Trainer(model, tiny.arguments(folder, max_steps=2, per_device_train_batch_size=2), train_dataset=rows)
    attach(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    path = folder / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(recipe or {})}))
    sha = hub.seed(repo_id, _files(folder, repo_id, card), user=user, private=private, gated=gated)
    return Published(repo_id, sha, logits(model, inputs_for(kind)), folder)


def logits(model: nn.Module, inputs: dict[str, torch.Tensor] = INPUTS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def _target(number: int, labels: int, problem: str, cls: type[PreTrainedModel] | None) -> Any:
    if problem == "regression":
        return float(number % 3)
    if problem == "multi_label_classification":
        return [float(number % 2)] * labels
    return [number % labels] * 8 if cls is transformers.BertForTokenClassification else number % labels


def _files(folder: Path, repo_id: str, card: bytes | None) -> dict[str, bytes]:
    """The files as `publish` puts them on the Hub, with a manifest in recipe.json."""
    names = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json")
    files = {name: (folder / name).read_bytes() for name in names}
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    recipe = json.loads((folder / "recipe.json").read_text())
    licence = {"identifier": "mit", "name": None, "link": None, "notes": []}
    recipe["published"] = {"repo_id": repo_id, "merged": False, "licence": licence, "files": listed}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    if card is None:
        write_card(read_facts(folder), folder)
        card = (folder / "README.md").read_bytes()
    return {**files, "recipe.json": json.dumps(recipe).encode(), "README.md": card}
