"""A published run as a model that works: base at its commit, adapter and head, processor and label names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel

from hub_cards.facts import RECIPE, RunFacts, read_facts
from hub_cards.paths import is_repo_id
from hub_cards.pulling.loading import load_adapter, load_base, load_full, shortened
from hub_cards.pulling.refusals import Snapshot, read_json, refuse_strays
from hub_cards.pulling.snapshots import fetch_base, fetch_run, local_snapshot, resolve


@dataclass(frozen=True)
class Pulled:
    """A model that was pulled, ready to use, and what is known of it.

    Attributes:
        model: in eval mode.
        processor: the tokenizer, image processor, feature extractor or the processor of several; None if there is none.
        facts: of the run.
        labels: the names of the classes in the order of their numbers; empty if it is no classifier.
        repo_id: where it came from; None for a local folder.
        revision: its commit.
        base_revision: the base's commit; None for a model without adapters or a local base.

    Example:
        >>> facts = RunFacts(global_step=1, max_steps=1, model_class="Linear")
        >>> Pulled(nn.Linear(2, 2), None, facts, labels=("bad", "good")).labels[1]
        'good'
    """

    model: nn.Module
    processor: Any
    facts: RunFacts
    labels: tuple[str, ...] = ()
    repo_id: str | None = None
    revision: str | None = None
    base_revision: str | None = None


def pull(
    repo_id: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Pulled:
    """Return the model of a run that `publish` has put on the Hub, with its processor and label names.

    The files are those that the run lists, at one commit, and are checked against their size and SHA-256. An adapter's
    base is loaded at the commit that was trained on and checked, tensor by tensor, against the fingerprint that the run
    recorded: another base of the same shape is refused. Only safetensors and only classes of transformers are read;
    pickles and code of a repository are refused. What is in the cache needs no network.

    Args:
        repo_id: the repository, or the `output_dir` of a run on this machine.
        revision: branch, tag or commit of the repository; the default branch if None.
        base: a local folder or a repository with the base of an adapter: needed where training began from a local
            folder, otherwise instead of what was recorded. The fingerprint decides on it all the same.
        token: for private and gated repositories; what the machine is logged in with if None.
        dtype: of the weights; the one in training if None.
        device: where the model is put; the CPU if None.

    Raises:
        ValueError: the repository was not published by `hub_cards`, holds pickles or code, or needs another base.
        PermissionError: the repository or its base is private or gated, and the token has no access.
        FileNotFoundError: a file is not in the cache and the Hub cannot be reached; the file is named.
        OSError: a file is cut short or changed, or a download failed; nothing of it is kept, and a second call helps.

    Example:
        >>> import json, tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> run, sizes = tempfile.mkdtemp(), {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8}
        >>> config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, id2label={0: "bad", 1: "good"})
        >>> BertForSequenceClassification(config).save_pretrained(run)
        >>> model = {"class": "BertForSequenceClassification", "name_or_path": None, "revision": None, "adapters": None,
        ...          "num_parameters": 9, "trainable_parameters": 9, "id2label": {"0": "bad", "1": "good"}}
        >>> recipe = {"schema_version": 1, "status": "finished", "model": model, "groups": None, "methods": {},
        ...           "training_arguments": {}, "versions": {}, "training": {"global_step": 1, "max_steps": 1}}
        >>> _ = Path(run, "recipe.json").write_text(json.dumps(recipe))
        >>> state = {"global_step": 1, "max_steps": 1, "log_history": []}
        >>> _ = Path(run, "trainer_state.json").write_text(json.dumps(state))
        >>> pulled = pull(run)
        >>> pulled.model(torch.tensor([[1, 2, 3]])).logits.shape, pulled.labels
        (torch.Size([1, 2]), ('bad', 'good'))
    """
    run = find_run(repo_id, revision, token)
    facts = read_facts(run.folder)
    refuse_strays(run, adapter=facts.is_adapter)
    labels = class_names(facts)
    model: nn.Module
    loaded: PreTrainedModel
    if facts.is_adapter:
        start, pinned = find_base(facts, run, base, token)
        loaded = load_base(facts, run, start, pinned=pinned)
        model, base_revision = load_adapter(loaded, facts, run), start.revision
    elif base is not None:
        raise ValueError(f"`base` is `{base}`, but {run} holds a whole model, which needs none; leave base= out.")
    else:
        loaded = load_full(facts, run)
        model, base_revision = loaded, None
    processor = load_processor(run, loaded.config)
    model = nn.Module.to(model, device=device, dtype=dtype).eval()
    return Pulled(model, processor, facts, labels, run.repo_id, run.revision, base_revision)


def find_run(repo_id: str | Path, revision: str | None, token: str | None) -> Snapshot:
    """Return the files of a published run, or of a run on this machine.

    Raises:
        FileNotFoundError: it is neither a folder nor can it be a repository.
        ValueError: a revision of a local folder. Also all of `fetch_run`.
    """
    if Path(repo_id).is_dir():
        if revision is not None:
            raise ValueError(f"`{repo_id}` is a local folder and has no revision `{revision}`; leave revision= out.")
        return local_snapshot(Path(repo_id))
    if not is_repo_id(str(repo_id)):
        raise FileNotFoundError(f"`{repo_id}` is no folder here, and cannot be a repository; expected `owner/name`.")
    return fetch_run(str(repo_id), revision, token)


def find_base(
    facts: RunFacts,
    run: Snapshot,
    base: str | Path | None,
    token: str | None,
    revision: str | None = None,
) -> tuple[Snapshot, bool]:
    """Return the files of an adapter's base, and whether they are the recorded repository at the recorded commit.

    Args:
        facts: of the run.
        run: its folder; a run on this machine may name its base by a local path, a published one never.
        base: what `pull` was given.
        token: as for `pull`.
        revision: of the base; the recorded one if None.

    Raises:
        ValueError: the base was a local folder, or random weights, and `base` is None. Also all of `fetch_base`.
    """
    if base is None and run.repo_id is None:
        base = _local_base(run.folder)
    name = str(base) if base is not None else facts.base.name
    if name is None:
        was = f"a local folder (`{facts.base.folder}`)" if facts.base.folder else "not recorded"
        digest = f"the fingerprint {facts.base.digest[:16]}" if facts.base.digest else "no recorded fingerprint"
        raise ValueError(
            f"the base of the adapter {run} was {was}, so it is not on the Hub; pass base= with a local folder or a "
            f"repository that has the same weights. They have {digest}."
        )
    if base is not None and Path(name).is_dir():  # a folder that happens to be named like the recorded base is none
        return local_snapshot(Path(name)), False
    if not is_repo_id(name):
        raise FileNotFoundError(f"base `{name}` is no folder here, and cannot be a repository; expected `owner/name`.")
    recorded = facts.base.revision if name == facts.base.name else None
    sha = resolve(name, revision or recorded, token)
    return fetch_base(name, sha, token), sha == recorded


def load_processor(run: Snapshot, config: Any) -> Any:
    """Return the processor whose files a folder has; None if there are none.

    Args:
        run: the folder.
        config: of the model; it takes over the padding token if it has none, which decoders that classify need for
            more than one text at a time.
    """
    loaders: dict[str, Any] = {
        "processor_config.json": AutoProcessor,
        "tokenizer_config.json": AutoTokenizer,
        "preprocessor_config.json": AutoImageProcessor,
    }
    name = next((name for name in loaders if (run.folder / name).is_file()), None)
    if name is None:
        return None
    loader = loaders[name]
    if loader is AutoImageProcessor and "feature_extractor_type" in read_json(run.folder / name):
        loader = AutoFeatureExtractor
    options = {"config": config} if loader is AutoTokenizer else {}
    processor = loader.from_pretrained(run.folder, local_files_only=True, trust_remote_code=False, **options)
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = getattr(processor, "pad_token_id", None)
    return processor


def class_names(facts: RunFacts) -> tuple[str, ...]:
    """Return the names of a run's classes in the order of their numbers; empty if it is no classifier.

    Raises:
        ValueError: the numbers are not 0, 1, 2 and so on: a name would be that of another output.

    Example:
        >>> class_names(RunFacts(1, 1, "A", id2label={"1": "good", "0": "bad"}))
        ('bad', 'good')
    """
    wanted = [str(number) for number in range(len(facts.id2label))]
    if strays := facts.id2label.keys() - set(wanted):
        raise ValueError(
            f"the run names the classes {shortened(strays)}; expected the numbers 0 to {len(wanted) - 1}, each with "
            "its name. Mend id2label in recipe.json and in the configuration, and publish again."
        )
    return tuple(facts.id2label[number] for number in wanted)


def _local_base(folder: Path) -> str | None:
    """Return the local folder that a run on this machine started from, if it is still there."""
    name = read_json(folder / RECIPE)["model"]["name_or_path"]
    return name if name and Path(name).is_dir() else None
