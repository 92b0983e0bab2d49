"""Several adapters of one base in one model, each with its own head and label names, and swapped by name."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from hub_cards.pulling.loading import ADAPTER, shortened, undisturbed
from hub_cards.pulling.pull import Pulled, pull
from hub_cards.registry.sharing import (
    OF_THE_HEAD,
    below,
    check_apart,
    check_kind,
    check_name,
    check_same_base,
    configs,
    equal,
    whole_modules,
    wrappers,
)


@dataclass(frozen=True)
class Member:
    """What changes with the adapter beside its weights.

    Attributes:
        labels: names of the classes in the order of their numbers; empty if it is no classifier.
        processor: tokenizer or image processor; None if there is none.
        config: the values of `OF_THE_HEAD`.
        source: where it was pulled from; for a merge, what was merged.
    """

    labels: tuple[str, ...]
    processor: Any
    config: Mapping[str, Any]
    source: str

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of the head's outputs as the configuration has them, also where nobody has named them."""
        return tuple(name for _, name in sorted((self.config["id2label"] or {}).items()))


class AdapterSet:
    """Adapters of one base in one model; `use(name)` makes one of them, with its head and its labels, the active one.

    Attributes:
        model: the `PeftModel`, in eval mode and without gradients.
        members: what is known of each adapter, by its name.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
        >>> model = get_peft_model(BertForSequenceClassification(config), lora, adapter_name="news")
        >>> head = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
        >>> adapters = AdapterSet(model, {"news": Member(("bad", "good"), None, head, "jo/news")})
        >>> adapters.use("news")
        >>> adapters.names, adapters.labels, model.config.id2label[1]
        (('news',), ('bad', 'good'), 'good')
    """

    def __init__(self, model: PeftModel, members: Mapping[str, Member]):
        self.model = model
        self.members = dict(members)

    def __repr__(self) -> str:
        return f"AdapterSet({', '.join(self.names)}; active: {self.active})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were loaded or merged."""
        return tuple(self.members)

    @property
    def active(self) -> str:
        """The name of the active adapter."""
        return str(self.model.active_adapter)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the active adapter's classes in the order of their numbers."""
        return self.members[self.active].labels

    @property
    def processor(self) -> Any:
        """The active adapter's tokenizer or image processor; None if it has none."""
        return self.members[self.active].processor

    def use(self, name: str) -> None:
        """Make an adapter the active one: its weights, its head, and label names and problem type in the configuration.

        Args:
            name: one of `names`.

        Raises:
            ValueError: there is no such adapter.
        """
        self.check(name)
        self.model.set_adapter(name, inference_mode=True)
        base = below(self.model)
        for key, value in self.members[name].config.items():
            setattr(base.config, key, copy.copy(value))
        if "num_labels" in vars(base):  # a copy that many heads' losses read
            base.num_labels = base.config.num_labels

    def save_pretrained(self, folder: str | Path, name: str | None = None) -> None:
        """Write an adapter with its head, so that PEFT's `PeftModel.from_pretrained(base, folder)` loads it.

        `auto_mapping` of `adapter_config.json` names the model's class, and has `num_labels`, `id2label`, `label2id`
        and `problem_type`: the base has to be loaded with these. The processor is written too.

        Args:
            folder: made if it is missing.
            name: of the adapter; None: the active one.

        Raises:
            ValueError: there is no such adapter.
        """
        name = self.active if name is None else name
        self.check(name)
        folder, member = Path(folder), self.members[name]
        folder.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
        tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
        head = {
            "base_model_class": type(below(self.model)).__name__,
            "parent_library": "transformers",
            "num_labels": len(member.rows),
            "id2label": {str(number): label for number, label in enumerate(member.rows)},
            "label2id": {label: number for number, label in enumerate(member.rows)},
            "problem_type": member.config.get("problem_type"),
        }
        known = {key: value for key, value in head.items() if value is not None}
        config = replace(configs(self.model)[name], inference_mode=True)
        config.save_pretrained(str(folder), auto_mapping_dict=known)
        if member.processor is not None:
            member.processor.save_pretrained(folder)

    def check(self, name: str) -> None:
        """Raise if there is no adapter of this name.

        Raises:
            ValueError: there is none.
        """
        if name not in self.members:
            raise ValueError(f"there is no adapter `{name}`; expected one of: {', '.join(self.names)}.")


def load_adapters(
    repos: Mapping[str, str] | Sequence[str], *, base: str | Path | None = None, token: str | None = None
) -> AdapterSet:
    """Return several published adapters of one base in one model, the first one active.

    Each is pulled with all checks of `pull`, so its base is the one that it was trained on; then the bases are compared
    tensor by tensor, and all but the first are dropped. Heads may have different numbers of labels, and adapters
    different ranks and target modules. After `use(name)` the logits are bit for bit those of `pull` of that adapter.
    While it loads, memory holds two bases.

    Args:
        repos: repositories, `owner/name` or `owner/name@revision`, or run folders: by the name that each gets here, or
            a list, in which each gets the last part of its own name, dots replaced by underscores.
        base: a local folder or a repository with the base, instead of what was recorded.
        token: for private and gated repositories; what the machine is logged in with if None.

    Raises:
        ValueError: no adapters; two of one name; a name that PEFT cannot have; a repository without an adapter; the
            bases, the models' classes or the kinds of the adapters differ; a kind that changes the base's own weights,
            or that adds inputs instead of weights. Also all of `pull`.

    Example:
        >>> load_adapters(["acme/news", "jo/news"])
        Traceback (most recent call last):
        ValueError: two adapters are called `news`; give each a name: {"a": "acme/news", "b": "jo/news"}.
    """
    named = repositories(repos)
    members: dict[str, Member] = {}
    host: PeftModel | None = None
    first: Pulled | None = None
    for name, repo in named.items():
        pulled = _pull(repo, base, token)
        model = cast(PeftModel, pulled.model)
        check_kind(name, model)
        if first is None or host is None:
            first, host = pulled, model
        else:
            check_same_base(next(iter(named)), first, name, pulled)
        members[name] = _member(pulled)
        _move(model, host, name)
    assert host is not None
    adapters = AdapterSet(host.eval(), members)
    adapters.use(adapters.names[0])
    return adapters


def repositories(repos: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Return the repositories of adapters by the names that the adapters get.

    Raises:
        ValueError: there are none, two of one name, or a name that PEFT cannot have.

    Example:
        >>> repositories(["acme/news-v1.0", "jo/mail@main"])
        {'news-v1_0': 'acme/news-v1.0', 'mail': 'jo/mail@main'}
    """
    if isinstance(repos, str) or not repos:
        raise ValueError(f"repos is {repos!r}, expected a list of repositories, or a mapping of names to them.")
    if isinstance(repos, Mapping):
        named = {name: str(repo) for name, repo in repos.items()}
    else:
        named = {}
        for repo in map(str, repos):
            name = _split(repo)[0].rstrip("/").rpartition("/")[2].replace(".", "_")
            if name in named:
                raise ValueError(
                    f'two adapters are called `{name}`; give each a name: {{"a": "{named[name]}", "b": "{repo}"}}.'
                )
            named[name] = repo
    for name in named:
        check_name(name)
    return named


def _split(repo: str) -> tuple[str, str | None]:
    """Return repository and revision; a folder has none."""
    if Path(repo).is_dir():
        return repo, None
    name, _, revision = repo.partition("@")
    return name, revision or None


def _pull(repo: str, base: str | Path | None, token: str | None) -> Pulled:
    name, revision = _split(repo)
    pulled = pull(name, revision=revision, base=base, token=token)
    if not pulled.facts.is_adapter:
        raise ValueError(f"`{repo}` holds a whole model, expected an adapter; pull it alone.")
    return pulled


def _member(pulled: Pulled) -> Member:
    config = below(cast(PeftModel, pulled.model)).config
    values = {key: copy.copy(getattr(config, key, None)) for key in OF_THE_HEAD if hasattr(config, key)}
    source = f"{pulled.repo_id}@{pulled.revision}" if pulled.repo_id else "a local run"
    return Member(pulled.labels, pulled.processor, values, source)


def _move(source: PeftModel, host: PeftModel, name: str) -> None:
    """Move the one adapter of a pulled model, with its head, into a model, which may be the same, under a new name."""
    old = source.active_adapter
    if source is host and old == name:
        return
    check_name(name, host)
    state = get_peft_model_state_dict(source, adapter_name=old, save_embedding_layers=False)
    with undisturbed():
        host.add_adapter(name, copy.deepcopy(configs(source)[old]), low_cpu_mem_usage=True)
    check_apart(name, host)
    heads = whole_modules(source, old)
    for path, wrapper in wrappers(host).items():
        if name in wrapper.modules_to_save and path in heads:
            wrapper.modules_to_save[name] = heads[path]  # it may have another number of rows
    set_peft_model_state_dict(host, state, adapter_name=name, low_cpu_mem_usage=True)
    places = {parameter.data_ptr(): parameter for parameter in host.parameters()}
    for key, tensor in get_peft_model_state_dict(host, adapter_name=name, save_embedding_layers=False).items():
        if key in state and tensor.data_ptr() in places:
            places[tensor.data_ptr()].data = state[key]  # PEFT has cast it to the base's dtype
    moved = get_peft_model_state_dict(host, adapter_name=name, save_embedding_layers=False)
    strays = {key for key in state.keys() | moved.keys() if not equal(state.get(key), moved.get(key))}
    if strays:
        raise ValueError(f"PEFT cannot have the adapter `{name}` beside others: {shortened(strays)}. Pull it alone.")
    if source is host:
        host.set_adapter(name, inference_mode=True)
        host.delete_adapter(old)
