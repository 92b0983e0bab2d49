"""Real runs of tiny models whose base is a repository of the test Hub, and the folder that a published run is."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from tests import tiny
from tests.hub_server import HubServer
from tl_callbacks import attach

LABELS = {0: "bad", 1: "fair", 2: "good"}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(46)))
NOT_PUBLISHED = ("recipe.json", "README.md", "training_args.bin")


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)


def distilbert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config)


def roberta() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20, num_labels=3,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


@dataclass(frozen=True)
class Kind:
    """A model, what adapts it (None: nothing, all of it trains), and what it looks at."""

    make: Callable[[], PreTrainedModel]
    adapter: peft.PeftConfig | None = None
    inputs: str = "input_ids"
    dtype: torch.dtype | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    options = {"task_type": "SEQ_CLS", "r": 2, "init_lora_weights": "gaussian", **options}
    return peft.LoraConfig(target_modules=list(targets) or "all-linear", **options)


KINDS = {
    "bert-lora": Kind(tiny.bert, lora("query", "value")),
    "bert-lora-bf16": Kind(tiny.bert, lora("query"), dtype=torch.bfloat16),
    "bert-lora-biases": Kind(tiny.bert, lora("query", bias="all")),
    "bert-dora": Kind(tiny.bert, lora("query", use_dora=True)),
    "bert-ia3": Kind(
        tiny.bert, peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[])
    ),
    "bert-vera": Kind(tiny.bert, peft.VeraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)),
    "bert-prompts": Kind(tiny.bert, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
    "bert-two-heads": Kind(tiny.bert, lora("query", modules_to_save=["pooler", "classifier"])),
    "distilbert-two-heads": Kind(distilbert, lora("q_lin", modules_to_save=["pre_classifier", "classifier"])),
    "roberta-lora": Kind(roberta, lora("query", "key")),
    "llama-lora": Kind(llama, lora("q_proj")),
    "resnet-lora": Kind(
        tiny.resnet,
        lora("convolution", task_type=None, modules_to_save=["classifier", "normalization"]),
        inputs="pixel_values",
    ),
    "bert-full": Kind(tiny.bert),
    "bert-full-bf16": Kind(tiny.bert, dtype=torch.bfloat16),
    "resnet-full": Kind(tiny.resnet, inputs="pixel_values"),
}
ADAPTERS = [name for name, kind in KINDS.items() if kind.adapter]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its model in eval mode and what that says of some inputs."""

    folder: Path
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor


def base_files(kind: str, folder: Path, *, seed: int = 0, head: bool = False, **save: Any) -> dict[str, Path]:
    """The files of a pretrained model without a head, or with one of five classes, saved by transformers."""
    model = KINDS[kind].make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator)) if name else None
    part = model if head else model.base_model
    if KINDS[kind].dtype:
        part = part.to(KINDS[kind].dtype)
    part.save_pretrained(folder, **save)
    return {path.name: path for path in folder.iterdir()}


def train(kind: str, base: str | Path, folder: Path, *, revision: str | None = None, steps: int = 3) -> Run:
    """A short run from a base, on the Hub or local."""
    spec = KINDS[kind]
    torch.manual_seed(7)
    model = type(spec.make()).from_pretrained(
        str(base),
        revision=revision or "main",
        num_labels=3,
        id2label=LABELS,
        label2id={n: i for i, n in LABELS.items()},
    )
    model.accepts_loss_kwargs = False
    if spec.inputs == "input_ids" and model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    if spec.adapter is not None:
        model = peft.get_peft_model(model, copy.deepcopy(spec.adapter))
    images = spec.inputs == "pixel_values"
    data = tiny.images(32) if images else tiny.texts(32)
    words = {} if images else {"processing_class": tokenizer()}
    trainer = Trainer(
        model, tiny.arguments(folder, max_steps=steps, logging_steps=1, use_cpu=True),
        train_dataset=data, eval_dataset=data[:8], **words,
    )  # fmt: skip
    attach(trainer, base_revision=revision)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    inputs = {spec.inputs: torch.stack([torch.as_tensor(row[spec.inputs]) for row in data[:8]])}
    trained = trainer.model.eval()
    return Run(folder, trained, inputs, logits(trained, inputs))


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}).logits


def published(run: Path, repo_id: str, **changes: Any) -> dict[str, bytes]:
    """The files of a run as `publish` puts them on the Hub, with a manifest."""
    files = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in NOT_PUBLISHED
    }
    recipe = json.loads((run / "recipe.json").read_text())
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    recipe["published"] = {"repo_id": repo_id, "merged": False, "licence": None, "files": listed, **changes}
    return {**files, "recipe.json": json.dumps(recipe).encode(), "README.md": b"---\nlicense: mit\n---\n# A card\n"}


@dataclass(frozen=True)
class OnHub:
    """A published run, its base, and their commits."""

    run: Run
    repo_id: str
    sha: str
    base: str
    base_sha: str


def on_hub(hub: HubServer, kind: str, tmp_path: Path, **base: Any) -> OnHub:
    """A base on the Hub, a run from it, and the run on the Hub."""
    base_sha = hub.seed("acme/base", base_files(kind, tmp_path / "base", **base), user="alice")
    run = train(kind, "acme/base", tmp_path / "run", revision=base_sha)
    sha = hub.seed("acme/run", published(run.folder, "acme/run"), user="alice")
    return OnHub(run, "acme/run", sha, "acme/base", base_sha)
