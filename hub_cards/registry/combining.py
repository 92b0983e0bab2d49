"""Adapters of one base merged into one, the head by a policy that the caller states."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from hub_cards.pulling.loading import shortened
from hub_cards.registry.adapter_set import AdapterSet, Member, load_adapters, repositories
from hub_cards.registry.heads import Head, averaged, united
from hub_cards.registry.sharing import AVERAGE, UNION, below, check_name, configs, whole_modules, wrappers

_WITH_DENSITY = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
_SPECIAL = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication")


def merge_adapters(
    adapters: AdapterSet | Mapping[str, str] | Sequence[str],
    weights: Mapping[str, float] | Sequence[float] | None = None,
    *,
    head: str | None,
    name: str = "merged",
    combination_type: str = "cat",
    density: float | None = None,
    svd_rank: int | None = None,
    base: str | Path | None = None,
    token: str | None = None,
) -> AdapterSet:
    """Return the adapters with one more, their merge, which is active.

    With weights `w`, scales `s` = alpha / r (alpha / sqrt(r) for rsLoRA) and factors `A`, `B`, the weights of a layer
    become `W + sum_i w_i * s_i * B_i @ A_i`: task arithmetic. `combination_type="cat"` does exactly that; the rank of
    the merge is the sum of the ranks. Others are PEFT's: "svd" is the same cut to a rank, "linear" sums the factors
    and so has mixed terms `B_i @ A_j` too, "ties", "dare_ties", "dare_linear" and "magnitude_prune" leave out a part
    of the entries first (dare at random: set torch's seed).

    PEFT's own verb refuses adapters that bring a head. So heads are taken off while it works, and the merged one comes
    by the policy `head`, which has no default, because none is right for all:

    - the name of an adapter: its head and its labels are kept.
    - "average": the weighted mean, outputs matched by label name, which must be the same in all heads.
    - "union": the outputs of all label names; those that several have are the weighted mean.
    - None: no adapter brings a head.

    In a head's mean the weights are divided by their sum.

    Args:
        adapters: loaded ones, which get one more, or what `load_adapters` takes.
        weights: of the adapters, by name (then only these are merged) or in their order; any finite numbers, negative
            ones take an adapter's task away. None: 1 / their number.
        head: the policy.
        name: of the merge.
        combination_type: of PEFT's `add_weighted_adapter`.
        density: share of the entries that are kept, above 0 and at most 1; for ties, dare and magnitude_prune only.
        svd_rank: rank of the merge, for the types with svd; None: the largest.
        base: as for `load_adapters`.
        token: as for `load_adapters`.

    Raises:
        ValueError: an adapter is none of plain LoRA; the weights do not fit the adapters; the policy does not fit the
            heads; the name is taken; what PEFT refuses, such as different ranks for "linear". The adapters are then
            as they were.

    Example:
        >>> merge_adapters(["jo/news", "jo/mail"], head="best")
        Traceback (most recent call last):
        ValueError: head is `best`; expected "average", "union", None, or the name of an adapter: news, mail.

    References:
        Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv:2212.04089, section 2.
        Yadav et al., TIES-Merging: resolving interference when merging models, NeurIPS 2023, arXiv:2306.01708.
        Yu et al., Language models are super Mario (DARE), ICML 2024, arXiv:2311.03099.
        Hu et al., LoRA: low-rank adaptation of large language models, ICLR 2022, arXiv:2106.09685, section 4.1.
    """
    names = adapters.names if isinstance(adapters, AdapterSet) else tuple(repositories(adapters))
    shares = _weights(names, weights)
    if head not in (AVERAGE, UNION, None, *shares):
        raise ValueError(
            f'head is `{head}`; expected "{AVERAGE}", "{UNION}", None, or the name of an adapter: {", ".join(shares)}.'
        )
    if name in names:
        raise ValueError(f"there is an adapter `{name}` already; give the merge another name=.")
    loaded = adapters if isinstance(adapters, AdapterSet) else load_adapters(adapters, base=base, token=token)
    model = loaded.model
    check_name(name, model)
    for each in shares:
        _check_plain(model, each)
    modules, labels, like = _merged_head(loaded, shares, head)
    _add_weighted(model, shares, name, {"combination_type": combination_type, "density": density, "svd_rank": svd_rank})
    for path, module in modules.items():
        wrapper: Any = wrappers(model)[path]
        wrapper.update(name)
        wrapper.modules_to_save[name] = module.requires_grad_(False).eval()
    known = configs(model)
    known[name].modules_to_save = known[like].modules_to_save if modules else None
    told = " + ".join(f"{weight:g} * {each}" for each, weight in shares.items())
    loaded.members[name] = _member(loaded.members[like], labels, f"{combination_type} of {told}, head: {head}")
    loaded.use(name)
    return loaded


def _weights(names: Sequence[str], weights: Mapping[str, float] | Sequence[float] | None) -> dict[str, float]:
    if weights is None:
        weights = dict.fromkeys(names, 1 / len(names))
    elif not isinstance(weights, Mapping):
        if len(weights) != len(names):
            raise ValueError(f"there are {len(weights)} weights for the adapters {', '.join(names)}; give each one.")
        weights = dict(zip(names, weights, strict=True))
    unknown = [name for name in weights if name not in names]
    if unknown or not weights:
        what = f"names {shortened(unknown)}" if unknown else "is empty"
        raise ValueError(f"weights {what}; expected some of the adapters: {', '.join(names)}.")
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"the weights {dict(weights)} are not all finite; expected numbers.")
    return {name: float(weight) for name, weight in weights.items()}


def _check_plain(model: PeftModel, name: str) -> None:
    """Raise unless what an adapter does to each of its layers is to add `s * B @ A` to the weights."""
    config = configs(model)[name]
    kind = config.peft_type.value
    special = [key for key in _SPECIAL if getattr(config, key, None)]
    if kind == "LORA" and any(name in layer.lora_variant for layer in _layers(model, name).values()):
        special = special or ["a variant"]
    if kind != "LORA" or special:
        raise ValueError(
            f"the adapter `{name}` is of the kind {kind}{' with ' + ', '.join(special) if special else ''}, whose sum "
            "is not the sum of what it does; expected plain LORA. Use it by `use()`, or leave it out of the merge."
        )


def _merged_head(
    adapters: AdapterSet, shares: Mapping[str, float], policy: str | None
) -> tuple[dict[str, nn.Module], tuple[str, ...], str]:
    """Return the merged head's modules, the names of its outputs, and the adapter whose other settings it takes."""
    heads = [
        Head(
            name,
            whole_modules(adapters.model, name),
            adapters.members[name].rows,
            adapters.members[name].config.get("problem_type"),
            weight,
        )
        for name, weight in shares.items()
    ]
    first = heads[0]
    if policy == AVERAGE:
        return averaged(heads), first.labels, first.name
    if policy == UNION:
        return (*united(heads), first.name)
    if policy is None:
        bringing = [head.name for head in heads if head.modules]
        if bringing or any(head.labels != first.labels for head in heads):
            what = f"{', '.join(bringing)} bring one" if bringing else "the label names of the adapters differ"
            raise ValueError(
                f'head is None, for adapters without a head, but {what}; expected "{AVERAGE}", "{UNION}" or the name '
                "of the adapter whose head is to be kept."
            )
        return {}, first.labels, first.name
    kept = next(head for head in heads if head.name == policy)
    return {path: copy.deepcopy(module) for path, module in kept.modules.items()}, kept.labels, kept.name


def _add_weighted(model: PeftModel, shares: Mapping[str, float], name: str, options: Mapping[str, Any]) -> None:
    """Add the weighted merge of the adapters' layers to a model; it is left as it was if that fails.

    Raises:
        ValueError: PEFT refuses the type, or made layers of other ranks than it says, which could not be loaded again.
    """
    kind, density = options["combination_type"], options["density"]
    if (kind.removesuffix("_svd") in _WITH_DENSITY) != (density is not None) or not 0 < (density or 1) <= 1:
        raise ValueError(
            f"density is {density} for combination_type `{kind}`; expected a share above 0 and at most 1 for "
            f"{', '.join(_WITH_DENSITY)}, and None for all others."
        )
    tuner = cast(Any, model.base_model)
    try:
        with _bare(model, shares):
            tuner.add_weighted_adapter(list(shares), list(shares.values()), name, **options)
            rank = configs(model)[name].r
            ranks = {_rank(layer, name) for layer in _layers(model, name).values()}
            if ranks != {rank}:
                raise ValueError(
                    f"combination_type `{kind}` made layers of the ranks {sorted(ranks)}, not {rank} throughout, which "
                    'PEFT could not load again; use "cat", or svd with a smaller svd_rank=.'
                )
    except BaseException:
        if name in model.peft_config:
            tuner.delete_adapter(name)
        raise


@contextlib.contextmanager
def _bare(model: PeftModel, names: Mapping[str, float]) -> Iterator[None]:
    """Take the heads off, and let the configurations say what PEFT's verb needs to be exact.

    It refuses modules that several adapters bring whole. And it takes all but the ranks from the first configuration:
    layers that only another one has would be left out, and rsLoRA's scale would be applied once more.
    """
    before, found = dict(configs(model)), wrappers(model)
    for path, wrapper in found.items():
        model.set_submodule(path, wrapper.original_module)
    for name in names:
        configs(model)[name] = replace(
            before[name],
            target_modules=set(_layers(model, name)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=None,
            use_rslora=False,
        )
    try:
        yield
    finally:
        for path, wrapper in found.items():
            model.set_submodule(path, wrapper)
        configs(model).update({name: before[name] for name in names})


def _layers(model: PeftModel, name: str) -> dict[str, LoraLayer]:
    """Return the layers that an adapter changes, by their path in the base."""
    modules = below(model).named_modules()
    return {
        path: layer
        for path, layer in modules
        if isinstance(layer, LoraLayer) and (name in layer.lora_A or name in layer.lora_embedding_A)
    }


def _rank(layer: LoraLayer, name: str) -> int:
    factor: Any = layer.lora_A[name].weight if name in layer.lora_A else layer.lora_embedding_A[name]
    return int(factor.shape[0])


def _member(like: Member, labels: tuple[str, ...], source: str) -> Member:
    """Return what goes with a merge: settings of one of the adapters, and the names of the merged head's outputs."""
    if labels == like.rows:
        return replace(like, source=source)
    config = {
        **like.config,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    return replace(like, labels=labels, config=config, source=source)
