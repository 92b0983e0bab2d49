"""A run's model from its files: classes of transformers only, the base checked against its fingerprint, the adapter."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft import __version__ as peft_version
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from hub_cards.facts import RunFacts
from hub_cards.fingerprints import bytes_hash, read_header
from hub_cards.pulling.refusals import Snapshot

ADAPTER = "adapter_model.safetensors"


def tensor_hash(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits that change with any bit of a tensor, its dtype and its shape.

    See `hub_cards.fingerprints.bytes_hash`; this one takes a tensor of any device.

    Example:
        >>> tensor_hash(torch.zeros(2, 3)) == bytes_hash("float32", (2, 3), [bytes(24)])
        True
    """
    # NumPy knows no bfloat16 and no float8, so the values are read as bytes.
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes_hash(str(tensor.dtype).removeprefix("torch."), tensor.shape, [values.data])


def load_full(facts: RunFacts, run: Snapshot) -> PreTrainedModel:
    """Return the model of a run that holds all weights, or of a merged adapter.

    Raises:
        ValueError: transformers has no such class, or the weights are not exactly those of the class.
    """
    model, report = _from_pretrained(model_class(facts), run.folder, None, facts.dtype)
    wrong = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys") if report[kind]}
    if wrong or report["mismatched_keys"]:
        found = "; ".join(f"{kind.replace('_', ' ')}: {shortened(names)}" for kind, names in wrong.items())
        raise ValueError(
            f"the weights of {run} are not those of a {type(model).__name__}: "
            f"{found or shortened(str(key[0]) for key in report['mismatched_keys'])}; publish the run again."
        )
    return model


def load_base(facts: RunFacts, run: Snapshot, base: Snapshot, *, pinned: bool) -> PreTrainedModel:
    """Return the base of an adapter with the run's labels, after its fingerprint was checked.

    The check leaves out what the adapter brings itself, such as the head.

    Args:
        facts: of the run.
        run: the folder with the adapter.
        base: the folder with the base.
        pinned: the base is the recorded repository at the recorded commit: it is taken where no fingerprint was
            recorded, because a commit cannot change.

    Raises:
        ValueError: the weights are not those that the adapter was trained on, or it cannot be told; or BatchNorm's
            statistics, which move in training though frozen, are not in the adapter.
    """
    cls = model_class(facts)
    assert cls.config_class is not None
    config = cls.config_class.from_pretrained(base.folder, local_files_only=True)
    _set_labels(config, facts)
    model, report = _from_pretrained(cls, base.folder, config, facts.dtype)
    state = {name: tensor for key, value in model.state_dict().items() for name, tensor in _parts(key, value)}
    brought = replaced(read_header(adapter_folder(facts, run) / ADAPTER), state)
    random = {str(name) for name in report["missing_keys"]} | {str(key[0]) for key in report["mismatched_keys"]}
    if lost := _statistics(model) - brought:
        raise ValueError(
            f"{shortened(lost)} moved in training, as running statistics do, and the adapter does not bring them: the "
            "trained model cannot be made again. Train with their modules in the adapter's `modules_to_save`."
        )
    if facts.base.tensors:
        _check_fingerprint(facts, base, state, brought, random)
    elif not pinned:
        raise ValueError(
            f"the run recorded no fingerprint of its base, so whether {base} is the right one cannot be told; expected "
            f"{f'`{facts.base.name}` at the recorded commit' if facts.base.name else 'one'}. Train again, or use PEFT."
        )
    elif random - brought:
        raise ValueError(
            f"{shortened(random - brought)} is neither in {base} nor in the adapter: it was random in training and is "
            "lost. Train again with it in `modules_to_save`."
        )
    return model


def load_adapter(model: PreTrainedModel, facts: RunFacts, run: Snapshot) -> PeftModel:
    """Return the base with the run's adapter, bit for bit as it is in the file.

    Raises:
        ValueError: the file and the adapter's configuration do not have the same tensors.
    """
    folder, name = adapter_folder(facts, run), adapter_name(facts)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except KeyError as error:  # PEFT's own word for it
        raise ValueError(
            f"adapter_config.json of {run} has the peft_type {error}, which PEFT {peft_version} does not know. The "
            f"run used PEFT {facts.versions.get('peft', '(unknown)')}; install that one."
        ) from None
    with undisturbed():
        adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config, torch_device="cpu")
    stored = load_file(folder / ADAPTER)
    found = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    strays = (found.keys() - stored.keys()) | (stored.keys() - found.keys() - adapted.state_dict().keys())
    if strays:
        raise ValueError(
            f"{ADAPTER} of {run} does not fit its adapter_config.json: {shortened(strays)} is in one of the two only; "
            "publish the run again."
        )
    _keep_dtypes(adapted, {key: (found[key], stored[key]) for key in found})
    return adapted


def model_class(facts: RunFacts) -> type[PreTrainedModel]:
    """Return the class of transformers that a run's model has below its adapters.

    Raises:
        ValueError: the run names no class, or transformers has no such model class.
    """
    name = facts.base_class or (None if facts.is_adapter else facts.model_class)
    found = getattr(transformers, name, None) if name else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class):
        raise ValueError(
            f"the run's model is a `{name}`, which transformers {transformers.__version__} does not have as a model; "
            f"expected a class of its own. The run used transformers {facts.versions.get('transformers', '(unknown)')}."
        )
    return found


def adapter_name(facts: RunFacts) -> str:
    """Return the name of a run's one adapter.

    Raises:
        ValueError: there are several, or its name is a path.
    """
    if len(facts.adapters) != 1:
        raise ValueError(
            f"the run has {len(facts.adapters)} adapters ({', '.join(facts.adapters)}), expected one: which are "
            "active is not recorded. Load them with PEFT's `load_adapter`."
        )
    name = next(iter(facts.adapters))
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"the run's adapter is called `{name}`; expected a name that a folder beside it can have.")
    return name


def adapter_folder(facts: RunFacts, run: Snapshot) -> Path:
    """Return where PEFT saves the adapter: in the folder itself, or under the adapter's name if it is no default."""
    name = adapter_name(facts)
    folder = run.folder if name == "default" else run.folder / name
    for part in (ADAPTER, "adapter_config.json"):
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{run} has no `{part}`; call trainer.save_model(), which saves safetensors.")
    return folder


def replaced(keys: Iterable[str], state: Mapping[str, Any]) -> set[str]:
    """Return the tensors of the base that an adapter file brings whole: modules_to_save, biases, embeddings.

    Example:
        >>> keys = ["base_model.model.classifier.weight", "base_model.model.q.lora_A.weight"]
        >>> replaced(keys, {"classifier.weight": 0, "q.weight": 0})
        {'classifier.weight'}
    """
    names = set()
    for key in keys:
        parts = [part for part in key.split(".") if part not in ("base_layer", "original_module")]
        names |= {".".join(parts), ".".join(parts[1:]), ".".join(parts[2:])}
    return names & state.keys()


def shortened(names: Iterable[str]) -> str:
    """Return names as text, at most five of them.

    Example:
        >>> shortened("abcdefg")
        '`a`, `b`, `c`, `d`, `e` and 2 more'
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(f"`{name}`" for name in ordered[:5]) + more


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the random state, and the screen free of progress bars and of reports on heads that the adapter brings.

    Example:
        >>> with undisturbed():
        ...     logging.get_verbosity() == logging.ERROR
        True
    """
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if bar:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _statistics(model: nn.Module) -> set[str]:
    """Return the names of the means that normalisation layers keep up with in training, whatever is frozen."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, _NormBase))
    return {f"{name}.running_mean" for name, module in layers if module.running_mean is not None}


def _parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return the plain tensors that a weight is made of: itself, or those of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        return [part for key in inner for part in _parts(f"{name}.{key}", getattr(tensor, key))]
    return [(name, tensor)] if tensor.layout == torch.strided and not tensor.is_quantized else []


def _check_fingerprint(
    facts: RunFacts, base: Snapshot, state: Mapping[str, Tensor], brought: set[str], random: set[str]
) -> None:
    expected = {name: value for name, value in facts.base.tensors.items() if name not in brought}
    there = [name for name in expected if name in state]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(there, pool.map(lambda name: tensor_hash(state[name]), there), strict=True))
    differing = {name for name, value in expected.items() if hashes.get(name) != value}
    if differing and differing <= random:
        raise ValueError(
            f"{shortened(differing)} is neither in {base} nor in the adapter: it was random in training and is lost. "
            "Train again with it in the adapter's `modules_to_save`."
        )
    if differing:
        raise ValueError(
            f"{base} is not the base that the adapter was trained on: {len(differing)} of {len(expected)} tensors "
            f"differ ({shortened(differing)}). Expected the fingerprint {(facts.base.digest or '')[:16]} in "
            f"{facts.dtype}; give the right one as base=."
        )


def _from_pretrained(
    cls: type[PreTrainedModel], folder: Path, config: PretrainedConfig | None, dtype: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a model of a folder and what did not fit; heads of another size are left random, as in training."""
    load: Any = cls.from_pretrained  # its return type does not know `output_loading_info`
    with undisturbed():
        model, report = load(
            folder,
            config=config,
            dtype=_dtype(dtype) if dtype else "auto",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return model, report


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(
            f"the run's weights are of the dtype `{name}`; expected float32, bfloat16, float16 or float64. Train again."
        )
    return found


def _set_labels(config: PretrainedConfig, facts: RunFacts) -> None:
    if facts.num_labels is not None:
        config.num_labels = facts.num_labels
    if facts.id2label:
        config.id2label = {int(number): name for number, name in facts.id2label.items()}
        config.label2id = {name: number for number, name in config.id2label.items()}
    if facts.problem_type is not None:
        config.problem_type = facts.problem_type  # type: ignore[assignment]


def _keep_dtypes(model: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give weights that were saved in another dtype than the base's, such as a float32 head, that dtype."""
    places = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    for found, stored in pairs.values():
        if found.dtype != stored.dtype and found.data_ptr() in places:
            places[found.data_ptr()].data = stored.to(found.device)
