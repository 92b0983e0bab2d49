"""Real runs of tiny models whose base is a repository of the test Hub, and the folder that a published run is."""

import atexit
import copy
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    autocast: bool = True  # adapters in float32 on a base in bfloat16, as PEFT makes them unless told otherwise


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    options = {"task_type": "SEQ_CLS", "r": 2, "init_lora_weights": "gaussian", **options}
    return peft.LoraConfig(target_modules=list(targets) or "all-linear", **options)


KINDS = {
    "bert-lora": Kind(tiny.bert, lora("query", "value")),
    "bert-lora-bf16": Kind(tiny.bert, lora("query"), dtype=torch.bfloat16),
    "bert-lora-all-bf16": Kind(tiny.bert, lora("query"), dtype=torch.bfloat16, autocast=False),
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
    """A finished run: its folder, that of its base, the class of its model, and what it says of some inputs."""

    kind: str
    folder: Path
    base: Path
    model_class: type[PreTrainedModel]
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor


@dataclass(frozen=True)
class OnHub:
    """A published run, its base, and their commits."""

    run: Run
    repo_id: str
    sha: str
    base: str
    base_sha: str


def save_base(kind: str, folder: Path, *, seed: int = 0, whole: bool = False, **options: Any) -> Path:
    """The folder of a pretrained model; without its head unless `whole`."""
    model = KINDS[kind].make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    part = model if whole else model.base_model
    part.to(KINDS[kind].dtype or torch.float32).save_pretrained(folder, **options)
    return folder


def train(kind: str, base: Path, folder: Path, *, adapter_name: str = "default") -> Run:
    """A short run from the folder of a base."""
    spec = KINDS[kind]
    torch.manual_seed(7)
    model = type(spec.make()).from_pretrained(
        base,
        ignore_mismatched_sizes=True,
        num_labels=3,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    model.accepts_loss_kwargs = False
    if "pad_token_id" in model.config.to_dict():
        model.config.pad_token_id = 0
    if spec.adapter is not None:
        model = peft.get_peft_model(
            model, copy.deepcopy(spec.adapter), adapter_name, autocast_adapter_dtype=spec.autocast
        )
    images = spec.inputs == "pixel_values"
    data = tiny.images(32) if images else tiny.texts(32)
    words = {} if images else {"processing_class": tokenizer()}
    trainer = Trainer(
        model, tiny.arguments(folder, max_steps=3, logging_steps=3),
        train_dataset=data, eval_dataset=data[:8], **words,
    )  # fmt: skip
    attach(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    inputs = {spec.inputs: torch.stack([torch.as_tensor(row[spec.inputs]) for row in data[:8]])}
    return Run(kind, folder, base, type(spec.make()), inputs, logits(trainer.model.eval(), inputs))


_FOLDERS = tempfile.mkdtemp(prefix="runs-")
atexit.register(shutil.rmtree, _FOLDERS, ignore_errors=True)


@functools.cache
def trained(kind: str) -> Run:
    """A run of a kind, made once in a session. Its folders are not to be changed."""
    base = save_base(kind, Path(_FOLDERS, kind, "base"))
    return train(kind, base, Path(_FOLDERS, kind, "run"))


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def published(run: Run, repo_id: str, base: str | None, base_sha: str | None) -> dict[str, bytes]:
    """The files of a run as `publish` puts them on the Hub; without a base, one that began from a local folder."""
    files = {name: data for name, data in contents(run.folder).items() if name not in NOT_PUBLISHED}
    recipe = json.loads((run.folder / "recipe.json").read_text())
    recipe["model"] |= {"name_or_path": base or "base", "local": base is None, "revision": base_sha}
    if "adapter_config.json" in files:
        settings = json.loads(files["adapter_config.json"])
        settings |= {"base_model_name_or_path": base, "revision": base_sha}
        files["adapter_config.json"] = json.dumps(settings).encode()
    return with_manifest(files, recipe, repo_id)


def with_manifest(files: Mapping[str, bytes], recipe: dict[str, Any], repo_id: str) -> dict[str, bytes]:
    """The files with a `recipe.json` that lists them, and a card."""
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    recipe["published"] = {"repo_id": repo_id, "merged": False, "licence": None, "files": listed}
    return {**files, "recipe.json": json.dumps(recipe).encode(), "README.md": b"---\nlicense: mit\n---\n# A card\n"}


def on_hub(hub: HubServer, kind: str, **options: Any) -> OnHub:
    """A run of a kind on the Hub, and its base."""
    run = trained(kind)
    base_sha = hub.seed("acme/base", contents(run.base), user="alice", **options)
    sha = hub.seed("acme/run", published(run, "acme/run", "acme/base", base_sha), user="alice", **options)
    return OnHub(run, "acme/run", sha, "acme/base", base_sha)
