"""Named ways of adapting a model: bundles of the methods, as Trainer keyword arguments."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from tl_callbacks import bundles
from tl_callbacks.callbacks import TransferCallback, as_json
from tl_callbacks.names import closest

STRATEGIES: dict[str, Callable[..., bundles.Built]] = {
    "scratch": bundles.scratch,
    "probe": bundles.probe,
    "head": bundles.head,
    "top_k": bundles.top_k,
    "gradual": bundles.gradual,
    "lp_ft": bundles.lp_ft,
    "full": bundles.full,
    "discriminative": bundles.discriminative,
    "anchored": bundles.anchored,
    "lora": bundles.lora,
}


class Strategy(TransferCallback):
    """What `adapt` did: the strategy's name and resolved options. Prints, and goes into `recipe.json`.

    Args:
        name: the strategy.
        options: all options with their values.
        summary: one sentence for people.

    Example:
        >>> print(Strategy("probe", {}, "trains the head on frozen features"))
        strategy probe: trains the head on frozen features
    """

    def __init__(self, name: str, options: Mapping[str, Any], summary: str) -> None:
        self.name = name
        self.options = dict(options)
        self.summary = summary

    def __repr__(self) -> str:
        return f"Strategy({self.name!r}, {self.options!r})"

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"strategy {self.name}: {self.summary}" + (f" ({options})" if options else "")

    def facts(self) -> Mapping[str, Any]:
        """Return the name and the options."""
        return {"name": self.name, "options": {key: as_json(value) for key, value in self.options.items()}}


def adapt(model: nn.Module, args: TrainingArguments, strategy: str, **options: Any) -> dict[str, Any]:
    """Return Trainer keyword arguments, the model among them, for a named way of adapting it.

    `trainer = Trainer(args=args, train_dataset=train, **adapt(model, args, "gradual")); attach(trainer)`

    - `scratch`: the same architecture from random weights, as a control.
    - `probe`: the head alone, on frozen features (linear probe, feature extraction).
    - `head`: as `probe`, after the head was initialised anew.
    - `top_k` (`k=2`): the head and the top k groups below it.
    - `gradual` (`schedule`, `decay=0.9`, `head_factor=1.0`, `rates="own"`, `keep_frozen=()`): gradual unfreezing with
      discriminative rates; without a schedule the groups open evenly over the first half of training.
    - `lp_ft` (`probe_fraction=0.3`, `factor=0.1`): linear probing, then everything at a smaller rate.
    - `full`: everything at one rate.
    - `discriminative` (`decay=0.9`, `head_factor=1.0`, `factors=None`): everything, each group at its own rate.
    - `anchored` (`strength=0.01`, `form="decoupled"`, `exclude=None`): everything, pulled toward the reference.
    - `lora` (`r=8`, `lora_alpha=16`, `lora_dropout=0.0`, `target_modules="all-linear"`): adapters on a frozen base.

    Args:
        model: the pretrained model with its task head, as it was loaded; `scratch` and `lora` return another.
        args: the Trainer's arguments; `args.seed` seeds what is initialised anew.
        strategy: one of the names above.
        options: the options named above. `schedule` may be a schedule or, as a configuration file has it, a mapping
            of its function to its arguments, such as `{"at_fractions": [0.2, 0.5]}`; `rates` likewise.

    Returns:
        `model`, `callbacks` and `optimizer_cls_and_kwargs`. The first callback is a `Strategy`, which prints what was
        done; add your own callbacks behind.

    Raises:
        ValueError: the strategy or an option is unknown, or does not fit the model.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> keywords = adapt(BertForSequenceClassification(config), args, "top_k", k=1)
        >>> print(keywords["callbacks"][0])
        strategy top_k: trains head, encoder.layer.1; the rest stays frozen (k=1)
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"unknown strategy `{strategy}`. Closest names: {closest(strategy, STRATEGIES)}. "
            f"Known: {', '.join(STRATEGIES)}."
        )
    build = STRATEGIES[strategy]
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in known:
            raise ValueError(
                f"strategy `{strategy}` has no option `{option}`. Closest names: {closest(option, known) or 'none'}. "
                f"Options: {', '.join(known) or 'none'}."
            )
    keywords, summary = build(model, args, **options)
    applied = Strategy(strategy, {**known, **options}, summary)
    return {**keywords, "callbacks": [applied, *keywords["callbacks"]]}
