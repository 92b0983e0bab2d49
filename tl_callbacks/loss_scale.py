"""Heads whose gradient the Trainer multiplies by the accumulation steps and by the number of processes.

The Trainer counts the items (`labels` that are not -100) of all micro-batches and processes of a step and hands the
count, `num_items_in_batch`, to every model whose `forward` takes `**kwargs`. A head that divides the sum of its loss by
the count gives the mean over the step. The Trainer takes it for granted that every such head does: it neither divides
by the accumulation steps nor undoes the average over processes. But many heads let the count fall and return the mean
of the micro-batch (https://github.com/huggingface/transformers/issues/47688).

`ignores_item_count` reads the source of `forward` and of what it hands the count to, with labels: no pass, no data, no
random numbers. `loss_scale_caution` says what the Trainer will do with it.
"""

import ast
import enum
import functools
import inspect
import math
import textwrap
from collections.abc import Callable
from typing import Any

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import Trainer
from transformers.loss.loss_utils import ForSequenceClassificationLoss

COUNT = "num_items_in_batch"
LABELS = "labels"
# What a dictionary stands in while it is copied, in whole or in part.
_PASSED_THROUGH = (ast.Dict, ast.DictComp, ast.BinOp, ast.comprehension, ast.Attribute, ast.Subscript)


class _Verdict(enum.IntEnum):
    """What becomes of the count, the weightiest last."""

    IGNORED = 0
    UNKNOWN = 1
    USED = 2


def ignores_item_count(model: nn.Module) -> bool | None:
    """Return whether a model's loss lets the Trainer's `num_items_in_batch` fall; None if that cannot be told.

    False where any part of the loss uses the count. A head that chooses its loss by `config.problem_type` is judged by
    what stands there now: None with more than one label is taken for a single-label problem, as labels of whole
    numbers make it.

    Args:
        model: the model that is given to the Trainer; of a PEFT model the base model is read.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
        >>> sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> ignores_item_count(BertForSequenceClassification(BertConfig(**sizes)))
        True
        >>> ignores_item_count(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2)))
        False
        >>> ignores_item_count(nn.Linear(2, 2)) is None  # no labels, no loss
        True
    """
    base = _base(model)
    parameters = inspect.signature(base.forward).parameters
    if LABELS not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    verdict = _followed(base.forward, frozenset())
    return None if verdict is _Verdict.UNKNOWN else verdict is _Verdict.IGNORED


def loss_scale_caution(trainer: Trainer) -> str | None:
    """Return what the Trainer will do to the gradient of a head that ignores the item count; None if nothing.

    Silent where the loss is not the head's (`compute_loss_func`, label smoothing, a Trainer with a `compute_loss` of
    its own), where `model.accepts_loss_kwargs = True` says that the model is meant to be treated so, and where the
    source of the head cannot be read.

    Args:
        trainer: a Trainer, before `train()`.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, gradient_accumulation_steps=4)
        >>> loss_scale_caution(Trainer(model, args))[:73]
        'the Trainer will multiply the gradients of BertForSequenceClassification '
        >>> model.accepts_loss_kwargs = False
        >>> loss_scale_caution(Trainer(model, args)) is None
        True
    """
    assert trainer.model is not None
    model = _base(trainer.accelerator.unwrap_model(trainer.model))
    if not trainer.model_accepts_loss_kwargs or getattr(model, "accepts_loss_kwargs", False):
        return None
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return None
    if getattr(trainer.compute_loss, "__func__", None) is not Trainer.compute_loss or not _is_counted(model):
        return None
    factors = _factors(trainer)
    factor = math.prod(factors.values())
    if factor == 1 or ignores_item_count(model) is not True:
        return None
    # Below adapters the Trainer reads the attribute of the base model, not that of the wrapper.
    where = "model.get_base_model()" if isinstance(trainer.model, PeftModel) else "model"
    where = "model.base_model.model" if isinstance(trainer.model, PeftMixedModel) else where
    product = " x ".join(f"{what}={number}" for what, number in factors.items() if number > 1)
    return (
        f"the Trainer will multiply the gradients of {type(model).__name__} and the loss it logs by {factor} "
        f"({product}): it takes the loss to be divided by `{COUNT}`, but this head ignores that count and "
        f"returns the mean of its micro-batch. Expected: the mean over the step. Set `{where}.accepts_loss_kwargs = "
        "False` before the Trainer is made, or `trainer.model_accepts_loss_kwargs = False` after; to keep it so, set "
        f"`{where}.accepts_loss_kwargs = True`."
    )


def _base(model: nn.Module) -> nn.Module:
    """Return the model whose signature the Trainer looks at."""
    if isinstance(model, PeftMixedModel):
        return model.base_model.model  # type: ignore[no-any-return]
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_counted(model: nn.Module) -> bool:
    """Return whether the Trainer can count a model's labels: one tensor, not the lists of boxes of a detector."""
    labels = inspect.signature(model.forward).parameters.get(LABELS)
    return labels is not None and "dict" not in str(labels.annotation)


def _factors(trainer: Trainer) -> dict[str, int]:
    """Return what the Trainer multiplies the mean of a micro-batch by, by name."""
    args = trainer.args
    # False, new in transformers 5.23, makes the Trainer divide by the accumulation steps all the same.
    divides = getattr(trainer, "loss_is_scaled_for_ga", None) is False
    factors = {"gradient_accumulation_steps": 1 if divides else args.gradient_accumulation_steps}
    if args.average_tokens_across_devices:
        # Ranks of tensor parallelism see the same rows; the Trainer leaves them out.
        tensor_parallel = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
        processes = trainer.accelerator.num_processes // tensor_parallel
        factors["processes"] = args.n_gpu if args.n_gpu > 1 else processes
    return factors


def _followed(function: Any, above: frozenset[Any]) -> _Verdict:
    """Return what becomes of the count in a function, method or module that is called with it and with labels."""
    if isinstance(function, nn.Module):
        function = function.forward
    function = inspect.unwrap(function, stop=inspect.ismethod)  # accelerate's hooks wrap the bound method
    if not inspect.isroutine(function):
        function = type(function).__call__.__get__(function)
    owner = getattr(function, "__self__", None)
    function = inspect.unwrap(getattr(function, "__func__", function))
    key = (function, id(owner))
    if key in above:
        return _Verdict.IGNORED  # the call further up decides
    tree = _tree(function)
    return _Reading(function, owner, tree, above | {key}).verdict() if tree else _Verdict.UNKNOWN


@functools.cache
def _tree(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Return the source of a function as a tree; None where there is none, as of what is written in C."""
    try:
        first = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return first if isinstance(first, ast.FunctionDef) else None


class _Reading:
    """Follows the count through one function.

    The count travels under its name or in `**kwargs`. In `**kwargs` it matters where they are handed on together with
    labels, or to something called a loss: without labels, the callee returns features.

    Args:
        function: the function, not bound.
        owner: what it is bound to, or None.
        tree: its source.
        above: the functions that are being read, each with the id of its owner.
    """

    def __init__(self, function: Callable[..., Any], owner: Any, tree: ast.FunctionDef, above: frozenset[Any]) -> None:
        self.function, self.owner, self.above = function, owner, above
        self.nodes = [node for statement in tree.body for node in ast.walk(statement)]
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        arguments = tree.args
        self.names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        self.carriers = {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
        self.labels_in_carriers = not any(map(_is_label, self.names))
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.assigned.setdefault(node.targets[0].id, []).append(node.value)
        while (
            grown := {name for name, values in self.assigned.items() if any(map(self._is_copy, values))} - self.carriers
        ):
            self.carriers |= grown

    def verdict(self) -> _Verdict:
        """Return what becomes of the count."""
        if COUNT in self.names:
            mentioned = any(isinstance(node, ast.Name) and node.id == COUNT for node in self.nodes)
            return _Verdict.USED if mentioned else _Verdict.IGNORED
        by_name = any(isinstance(node, ast.Constant) and node.value == COUNT for node in self.nodes)
        found = [_Verdict.UNKNOWN] if by_name else []
        found += [self._of_mention(node) for node in self.nodes if self._is_carrier(node)]
        calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        if self.labels_in_carriers and not any(map(self._is_loss, calls)):
            found.append(_Verdict.UNKNOWN)  # nothing here is seen to make a loss
        return max(found, default=_Verdict.IGNORED)

    def _is_carrier(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.carriers and isinstance(node.ctx, ast.Load)

    def _copies(self) -> set[str]:
        return {name for name, values in self.assigned.items() if any(map(self._is_copy, values))}

    def _is_copy(self, value: ast.expr) -> bool:
        """Return whether an expression is a dictionary made of a carrier."""
        return isinstance(value, ast.Dict | ast.DictComp | ast.BinOp) and any(map(self._is_carrier, ast.walk(value)))

    def _of_mention(self, node: ast.AST) -> _Verdict:
        """Return what becomes of the count where its carrier is mentioned; UNKNOWN where that is no plain use."""
        parent = self.parents.get(node)
        match parent, self.parents.get(parent) if parent else None:
            # Of another key: the count's name is looked for in the whole function.
            case (ast.Compare() | ast.Subscript(slice=ast.Constant()) | ast.Attribute(attr="update"), _):
                return _Verdict.IGNORED
            case (ast.Attribute(), ast.Call(func=func, args=[ast.Constant(), *_])) if func is parent:
                return _Verdict.IGNORED
        while isinstance(parent, _PASSED_THROUGH) or (isinstance(parent, ast.Call) and parent.func is node):
            node, parent = parent, self.parents.get(parent)
        match parent:
            case ast.keyword(arg=None) | ast.Starred():
                call = self.parents.get(parent)
                return self._of_call(call) if isinstance(call, ast.Call) else _Verdict.UNKNOWN
            case ast.Assign(targets=[ast.Name()]) if self._is_copy(parent.value):
                return _Verdict.IGNORED  # the copy is a carrier
        return _Verdict.UNKNOWN

    def _of_call(self, call: ast.Call) -> _Verdict:
        if not self._is_loss(call):
            return _Verdict.IGNORED
        callee = self._resolved(call.func)
        if callee is ForSequenceClassificationLoss and not _single_label(getattr(self.owner, "config", None)):
            return _Verdict.IGNORED
        return _Verdict.UNKNOWN if callee is None or isinstance(callee, type) else _followed(callee, self.above)

    def _is_loss(self, call: ast.Call) -> bool:
        """Return whether a call is given labels, or is of something called a loss."""
        if "loss" in ast.unparse(call.func).lower() or any(_is_label(k.arg or "") for k in call.keywords):
            return True
        given = [node for value in (*call.args, *(k.value for k in call.keywords)) for node in ast.walk(value)]
        names = {node.id for node in given if isinstance(node, ast.Name)}
        return any(map(_is_label, names)) or (self.labels_in_carriers and bool(names & self.carriers))

    def _resolved(self, node: ast.expr) -> Any:
        """Return what an expression stands for: a part of the model or a global; None where that is not known."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name(id=name) if self.owner is not None and [name] == self.names[:1]:
                return self.owner
            case ast.Name(id=name) if name in self.assigned:
                (value, *others) = self.assigned[name]
                itself = any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(value))
                return None if others or itself else self._resolved(value)
            case ast.Name(id=name):
                return self.function.__globals__.get(name)
            case ast.Attribute(value=value, attr=attribute):
                return _attribute(self._resolved(value), attribute)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, attribute]):
                return _attribute(self._resolved(value), self._resolved(attribute))
            case ast.Call(func=ast.Name(id="super"), args=[]):
                cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
                return super(cells["__class__"].cell_contents, self.owner) if "__class__" in cells else None
        return None


def _attribute(owner: Any, name: Any) -> Any:
    try:
        return getattr(owner, name)
    except Exception:  # whatever a property raises: the source does not tell
        return None


def _is_label(name: str) -> bool:
    return "label" in name or "target" in name


def _single_label(config: Any) -> bool:
    """Return whether transformers' loss of classifiers takes cross entropy, the only one that uses the count."""
    kind = getattr(config, "problem_type", None)
    return kind == "single_label_classification" or (kind is None and getattr(config, "num_labels", None) != 1)
