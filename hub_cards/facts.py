"""The facts of a run: `recipe.json` and `trainer_state.json`, checked, as one frozen value without any local path."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from hub_cards import history
from hub_cards.history import Phase, Series
from hub_cards.licences import Licence
from hub_cards.paths import is_repo_id, last_part, without_paths
from hub_cards.tasks import task_of

SCHEMA_VERSION = 1
RECIPE, STATE = "recipe.json", "trainer_state.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Base:
    """What training started from. All None or empty: random weights, or not recorded."""

    name: str | None = None  # Hub id
    folder: str | None = None  # last part of a local folder's path
    revision: str | None = None
    digest: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None
    verified: bool | None = None  # the checkpoint on the Hub holds these tensors; None: not compared


@dataclass(frozen=True)
class Group:
    """A layer group: its name, parameters that may train, and their dtype."""

    name: str
    num_parameters: int
    dtype: str


@dataclass(frozen=True)
class Split:
    """Rows of a split, the fingerprint of their content, and the split's name in the data set."""

    rows: int | None
    fingerprint: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Data:
    """What was trained and evaluated on. `name` is a Hub id unless `local`."""

    name: str | None
    local: bool
    config: str | None
    revision: str | None
    labels: tuple[str, ...]
    columns: Mapping[str, str]
    splits: Mapping[str, Split]
    license: str | None


@dataclass(frozen=True)
class Result:
    """One metric on one split."""

    split: str
    metric: str
    value: float


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run. None and empty mean "not measured" or "not recorded", never zero.

    Example:
        >>> facts = RunFacts(global_step=10, max_steps=10, model_class="BertForSequenceClassification")
        >>> facts.is_adapter, facts.results
        (False, ())
    """

    global_step: int
    max_steps: int
    model_class: str
    schema_version: int = SCHEMA_VERSION
    finished: bool = True
    base_class: str | None = None
    base: Base = Base()
    dtype: str | None = None
    num_parameters: int | None = None
    trainable_parameters: int | None = None
    num_labels: int | None = None
    id2label: Mapping[str, str] = field(default_factory=dict)
    problem_type: str | None = None
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # PEFT configurations
    weights: Mapping[str, int] = field(default_factory=dict)  # file to bytes
    task: str | None = None  # pipeline tag
    language: tuple[str, ...] = ()  # ISO 639 codes
    data: Data | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()  # bottom (input) to top (head)
    head: str | None = None
    head_parameters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # on the groups
    phases: tuple[Phase, ...] = ()
    rates: Mapping[str, Series] = field(default_factory=dict)  # group to (step, learning rate)
    curves: Mapping[str, Series] = field(default_factory=dict)  # loss, eval_loss, ... to (step, value)
    measures: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)  # method, what to (step, value)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    comparison: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None
    training_arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    commit: Mapping[str, Any] | None = None
    repo_id: str | None = None  # where it is published
    licence: Licence | None = None
    merged: bool = False  # the adapters have been merged into the base

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are adapters, which need the base."""
        return bool(self.adapters) and not self.merged


def read_facts(run_dir: str | Path) -> RunFacts:
    """Return the facts of a run from the files in its folder. No network, no model in memory.

    Reads `recipe.json`, which `tl_callbacks.attach` has written, and `trainer_state.json`, which `trainer.save_state()`
    writes; of the weights only the size. Absolute paths are cut to their last part.

    Args:
        run_dir: the run's `output_dir`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is no JSON, or does not fit the schema; the place in it is named.

    Example:
        >>> read_facts("hub_cards/gallery/compare-lora").adapters["default"]["peft_type"]
        'LORA'
    """
    folder = Path(run_dir)
    recipe, state = _load(folder, RECIPE), _load(folder, STATE)
    model, training, log = recipe["model"], recipe["training"], state["log_history"]
    published = recipe.get("published", {})
    groups = recipe["groups"] or {"groups": [], "head": None, "notes": []}
    names = tuple(group["name"] for group in groups["groups"])
    return RunFacts(
        schema_version=recipe["schema_version"],
        finished=recipe["status"] == "finished",
        global_step=state["global_step"],
        max_steps=state["max_steps"],
        model_class=model["class"],
        base_class=model.get("base_class"),
        base=_base(model, published.get("base_verified")),
        dtype=model.get("dtype"),
        num_parameters=model["num_parameters"],
        trainable_parameters=model["trainable_parameters"],
        num_labels=model.get("num_labels"),
        id2label=model.get("id2label") or {},
        problem_type=model.get("problem_type"),
        adapters=without_paths(model["adapters"] or {}),
        weights={name: (folder / name).stat().st_size for name in _weights(folder)},
        task=recipe.get("task") or task_of(model.get("base_class") or model["class"]),
        language=_languages(recipe.get("language")),
        data=_data(recipe),
        preprocessing=without_paths(recipe.get("preprocessing", {})),
        groups=tuple(Group(g["name"], sum(g["sizes"]), g["dtype"]) for g in groups["groups"]),
        head=groups["head"],
        head_parameters=tuple(n for g in groups["groups"] if g["name"] == groups["head"] for n in g["parameters"]),
        notes=tuple(groups["notes"]),
        phases=history.phases(log, names, model["trainable_parameters"], state["global_step"]),
        rates=history.rates(log, names),
        curves=history.curves(log),
        measures=history.measures(log),
        methods=without_paths(recipe["methods"]),
        results=_results(recipe, log),
        comparison=without_paths(recipe.get("comparison")),
        cost=training.get("cost"),
        training_arguments=without_paths(recipe["training_arguments"]),
        versions=recipe["versions"],
        command=tuple(without_paths(recipe.get("command") or [])),
        commit=recipe.get("commit"),
        repo_id=published.get("repo_id"),
        licence=_licence(published.get("licence")),
        merged=published.get("merged", False),
    )


def _load(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        remedy = {
            RECIPE: "call tl_callbacks.attach(trainer) before trainer.train()",
            STATE: "call trainer.save_state() after trainer.train()",
        }
        raise FileNotFoundError(f"`{folder}` holds no {name}; expected the output_dir of a run: {remedy[name]}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{name} in `{folder}` is no JSON ({error}); restore it, or train again.") from None
    version = found.get("schema_version", SCHEMA_VERSION) if isinstance(found, dict) else SCHEMA_VERSION
    if name == RECIPE and isinstance(version, int) and version > SCHEMA_VERSION:
        raise ValueError(
            f"{name} in `{folder}` has schema_version {version}, expected {SCHEMA_VERSION}; upgrade tl-callbacks."
        )
    misfit = best_match(_validator(name).iter_errors(found))
    if misfit is not None:
        place = ".".join(str(part) for part in misfit.absolute_path) or "its top level"
        raise ValueError(
            f"{name} in `{folder}` does not fit the schema at `{place}`: {misfit.message[:300]}. The file was changed "
            "by hand or cut short; restore it, or train again."
        )
    assert isinstance(found, dict)
    return found


@cache
def _validator(name: str) -> Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "run.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema if name == RECIPE else {**schema["$defs"]["trainer_state"]})


def _base(model: Mapping[str, Any], verified: bool | None) -> Base:
    name, print_ = model["name_or_path"], model.get("fingerprint") or {}
    if name is None:
        return Base()
    local = model.get("local", not is_repo_id(name))
    return Base(
        name=None if local else name,
        folder=last_part(name) if local else None,
        revision=model["revision"],
        license=model.get("license"),
        digest=print_.get("digest"),
        tensors=print_.get("tensors", {}),
        verified=verified,
    )


def _languages(found: str | list[str] | None) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found or ())


def _licence(found: Mapping[str, Any] | None) -> Licence | None:
    return Licence(**{**found, "notes": tuple(found["notes"])}) if found else None


def _weights(folder: Path) -> list[str]:
    return [name for name in WEIGHTS if (folder / name).is_file()] or sorted(
        path.name for path in folder.glob("model-*-of-*.safetensors")
    )


def _data(recipe: Mapping[str, Any]) -> Data | None:
    """Return what a recipe added of the data, or what the Trainer's own data sets say."""
    data, seen = recipe.get("data") or {}, recipe.get("datasets") or {}
    if not data and not seen:
        return None
    name = data.get("name")
    local = data.get("local", True)  # never a Hub id by guessing
    splits = data.get("splits") or seen
    return Data(
        name=last_part(name) if name and local else name,
        local=local,
        config=data.get("config"),
        revision=data.get("revision"),
        labels=tuple(data.get("labels", ())),
        columns=data.get("columns", {}),
        splits={
            name: Split(split.get("rows"), split.get("fingerprint"), split.get("split"))
            for name, split in splits.items()
        },
        license=data.get("license"),
    )


def _results(recipe: Mapping[str, Any], log: list[dict[str, Any]]) -> tuple[Result, ...]:
    """Return the recipe's results, or those of the last evaluation in the log."""
    splits = recipe.get("results") or history.last_evaluation(log)
    return tuple(
        Result(split, history.metric_name(key), float(value))
        for split, metrics in splits.items()
        for key, value in metrics.items()
        if not history.is_bookkeeping(key)
    )
