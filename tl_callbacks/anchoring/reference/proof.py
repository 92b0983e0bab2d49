"""What callbacks with a reference share: when it is taken, where it lives, and that a resumed run has the same."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks import events
from tl_callbacks.anchoring.operations.lora import LoraUpdate, agreed, lora_updates
from tl_callbacks.anchoring.reference.below import weights_below, with_updates
from tl_callbacks.anchoring.reference.reference import Reference, Source
from tl_callbacks.callbacks import TransferCallback
from tl_callbacks.checkpoints import loaded_checkpoint
from tl_callbacks.discovery import group_layers
from tl_callbacks.fingerprints import base_model
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import parameters_by_name


class WithReference(TransferCallback):
    """A callback with a reference: taken before anything is loaded or trained, and proven by a resumed run.

    Args:
        reference: None, "checkpoint", or tensors by parameter name.
        reference_dtype: of the copies; None: the parameters'.
        reference_device: of the copies; None: the parameters'.
        exclude: names or patterns of groups that have none; None: the head group, unless
                it is a language model's.
        groups: the layer groups; None: `group_layers(model)`.
    """

    _event: ClassVar[str]
    """The kind of the event that holds the reference's fingerprint."""

    def __init__(
        self,
        reference: Source,
        reference_dtype: torch.dtype | None,
        reference_device: str | torch.device | None,
        exclude: Sequence[str] | None,
        groups: LayerGroups | None,
    ) -> None:
        self.reference = reference
        self.reference_dtype = reference_dtype
        self.reference_device = reference_device
        self.exclude = exclude
        self.groups = groups
        self._taken: Reference | None = None
        self._zero: dict[str, Literal["up", "down"]] = {}  # the factor that was zero, by LoRA update
        self._model: Callable[[], nn.Module | None] = lambda: None

    def findings(self, trainer: Trainer) -> list[str]:
        """Return that a checkpoint's weights would be taken for the pretrained ones, if they would."""
        path = loaded_checkpoint(trainer.model)
        if isinstance(self.reference, Mapping) or path is None:
            return []
        text = (
            f"{type(self).__name__} would take the weights of `{path}` for the pretrained ones. Load the pretrained "
            "model and pass resume_from_checkpoint to train(), or give reference=pretrained.state_dict()."
        )
        return [text]

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the reference, before anything is loaded or trained."""
        self._take(kwargs["model"])

    def on_attach(self, trainer: Trainer) -> None:
        """Take the reference if the callback was added after the Trainer was made."""
        super().on_attach(trainer)
        assert trainer.model is not None
        self._take(trainer.model)

    def before_optimizer_load(self, model: nn.Module, state: TrainerState) -> None:
        """Take the reference anew where `model_init` made another model for a fresh training."""
        if state.global_step == 0:
            self._take(model)
        else:  # holds the checkpoint's weights by now; that the reference is the first run's is proven
            self._model = weakref.ref(model)

    def _take(self, model: nn.Module) -> None:
        """Take the reference; of a model in a second Trainer it stays the one from before it was trained."""
        if self._model() is model:
            return
        names, source = self._names(model), self.reference
        updates = lora_updates(model)
        if isinstance(source, Mapping):
            source, updates = with_updates(model, updates, source)
        below = weights_below(model, {update.name: update.zero for update in updates})
        updates = updates if self._of_updates else []
        # Whether what a rank has not read is zero, the first one knows.
        aside = {id(p) for update in updates if not update.up.is_meta for p in self._aside(update)}
        held = [name for name, parameter in parameters_by_name(model).items() if id(parameter) not in aside]
        names = [name for name in names if name in held]
        self._taken = Reference.take(
            model, names, source=source if names else None, dtype=self.reference_dtype, device=self.reference_device
        )
        self._zero = {update.name: update.zero for update in updates}
        self._taken.vouch({**{f"below {name}": tensor for name, tensor in below.items()}, **self._keep(model, names)})
        self._model = weakref.ref(model)

    def _names(self, model: nn.Module) -> list[str]:
        """Return the parameters of which a reference is needed, by normalised name."""
        raise NotImplementedError

    @property
    def _of_updates(self) -> bool:
        """Whether of a LoRA adapter that adds nothing at the start, the reference is the model below it."""
        return True

    def _aside(self, update: LoraUpdate) -> tuple[nn.Parameter, ...]:
        """Return the parameters of a LoRA update that need no reference."""
        return (update.staying,)

    def _keep(self, model: nn.Module, names: list[str]) -> Mapping[str, Tensor]:
        """Keep what else belongs to the reference, which has just been taken; return it by names of its own."""
        return {}

    def _settled(self, model: nn.Module) -> Reference:
        """Return the reference that all ranks share, as a training begins. Call it on all ranks.

        Raises:
            RuntimeError: none was taken, or that of another model.
        """
        if self._taken is not None and self._model() is not getattr(model, "_orig_mod", model):
            raise RuntimeError(
                f"{type(self).__name__} has the reference of another model than the one that is trained, as "
                "`model_init` makes a new one for each training. Call attach(trainer) before trainer.train(), and let "
                "layerwise_optimizer(args, groups) make the optimizer; or pass the model itself to the Trainer."
            )
        if self._taken is None:
            raise RuntimeError(
                f"{type(self).__name__} was added after the Trainer was made and has no reference. Pass it as "
                "Trainer(callbacks=[...]), or call attach(trainer) before trainer.train()."
            )
        self._taken.agree()
        self._zero = agreed(self._zero)
        return self._taken

    def _updates(self, model: nn.Module) -> list[LoraUpdate]:
        """Return what LoRA adds to the weights, where that was nothing when the reference was taken."""
        return lora_updates(model, self._zero)

    def _prove(self, state: TrainerState) -> None:
        """Record the reference's fingerprint in `log_history`, or check that a resumed run has the recorded one.

        Raises:
            RuntimeError: it has another.
        """
        assert self._taken is not None
        mine = {"reference": self._taken.fingerprint, "tensors": len(self._taken.tensors)}
        recorded = events.read(state.log_history, self._event)
        if not recorded:
            events.emit(state.log_history, self._event, step=state.global_step, **mine)
        elif recorded[0]["reference"] != mine["reference"]:
            raise RuntimeError(
                f"{type(self).__name__} has the reference {mine['reference']} ({mine['tensors']} tensors), and the run "
                f"that is resumed began with {recorded[0]['reference']} ({recorded[0]['tensors']} tensors); expected "
                "the same pretrained weights. Make the model as it was made at first (the same checkpoint, and the "
                "same seed if weights that are new have a reference), or give reference=pretrained.state_dict(). Other "
                "groups, by `exclude` or by patterns, are another reference too."
            )

    def _where(self) -> str:
        """Return where the reference lives, as the end of a sentence, unless it is copied as it is; or nothing."""
        elsewhere = self.reference == "checkpoint" or self.reference_dtype or self.reference_device
        held = self._taken is not None and self._taken.tensors
        return f"; {self._taken.summary()}" if elsewhere and held and self._taken is not None else ""

    def facts(self) -> dict[str, Any]:
        """Return what has no reference, and what the reference is."""
        return {
            "exclude": self.exclude and list(self.exclude),
            "reference": self._taken and self._taken.facts(),
        }

    def _layers(self, model: nn.Module) -> LayerGroups:
        """Return the layer groups."""
        return self.groups or group_layers(model)

    def _excluded(self, model: nn.Module, groups: LayerGroups) -> tuple[str, ...]:
        """Return the names of the groups without a reference."""
        if self.exclude is not None:
            return tuple(groups.select(self.exclude))
        return () if groups.head is None or _predicts_tokens(model, groups) else (groups.head,)


def _predicts_tokens(model: nn.Module, groups: LayerGroups) -> bool:
    """Return whether the head is a language model's, which is pretrained as the rest is."""
    find = getattr(base_model(model), "get_output_embeddings", None)
    outputs = find() if find is not None else None
    held = {id(parameter) for parameter in outputs.parameters()} if outputs is not None else set()
    parameters = parameters_by_name(model)
    return any(id(parameters.get(name)) in held for name in groups[groups.head or ""].parameters)
