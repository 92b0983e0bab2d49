"""The form of Mixout: when the weights of a step are mixed with the reference, and when they are themselves again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerState

from tl_callbacks.anchoring.forms.form import Form, Opening, passed_by
from tl_callbacks.anchoring.operations.mixout import mix_, mixed_gradient, mixout_mask
from tl_callbacks.sharding import sharding


class Mixout(Form):
    """Each step's forward and backward passes see some weights replaced by the reference's, with the right mean.

    Every element is the reference's with the probability `strength`, else farther from it by 1 / (1 - strength), so
    that the mean over draws is the weight itself. The masks depend on `args.seed`, the step and the parameter's name
    alone.

    The weights are mixed in place before the first training forward of a step and put back, bit for bit, when its
    gradients are complete; an evaluation in between sees the weights themselves. All micro-batches of a step, and all
    ranks, see the same mix. Memory: the anchored parameters once more, and a byte for each element.

    Example:
        >>> Mixout()
        Mixout()

    References:
        Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
        ICLR 2020. https://arxiv.org/abs/1909.11299
    """

    name = "mixout"
    below_one = True
    unit = "the probability with which an element is the reference's for a step"

    def __init__(self) -> None:
        super().__init__()
        self._step: int | None = None
        self._masks: list[Tensor | None] = []
        self._own: list[Tensor | None] = []
        self._mixed = False
        self._due = False

    def __repr__(self) -> str:
        return "Mixout()"

    def findings(self, trainer: Trainer) -> list[str]:
        """Return that FSDP2 has no place for the gradient's mask."""
        if sharding(trainer) != "fsdp2":
            return []
        why = "it writes the gradients of a shard past the autograd engine, where no mask can enter before they add up"
        return [f'form="mixout" does not support FSDP 2: {why}. Train with DDP, or take form="decoupled".']

    def hooks(self, opening: Opening) -> list[RemovableHandle]:
        """Mix before the first training forward of a step, and put the weights back before they are updated."""
        self._masks = [None] * len(opening.anchored)
        self._own = [None] * len(opening.anchored)
        return [
            opening.model.register_forward_pre_hook(self._choose),
            opening.optimizer.register_step_pre_hook(lambda *_: self.end_gradients()),
        ]

    def begin_step(self, optimizer: Any, state: TrainerState) -> None:
        """Note that a step begins; its mix enters at the first forward, when all that is due is open."""
        self._end()
        self._step, self._due = state.global_step, self.opened

    def end_gradients(self) -> None:
        """Put the weights back; until the next step begins nothing is mixed.

        Raises:
            RuntimeError: nothing was, as the loss passed the model's own forward by.
        """
        due = self._due
        self._end()
        if due:
            raise passed_by(self)

    def close(self) -> None:
        """Put the weights back and remove the hooks. Safe to call twice."""
        self._end()
        super().close()
        self._masks, self._own = [], []

    def _end(self) -> None:
        self._put_back()
        self._masks = [None] * len(self._masks)
        self._step, self._due = None, False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _choose(self, root: nn.Module, inputs: Any) -> None:
        if root.training and self._step is not None:
            self._mix()
        else:
            self._put_back()

    @torch.no_grad()
    def _mix(self) -> None:
        if self._mixed:
            return
        assert self._step is not None
        self._mixed, self._due = True, False
        for number, (parameter, reference, probability, _, name) in enumerate(self.opening.anchored):
            if not parameter.requires_grad:
                continue
            if (mask := self._masks[number]) is None:
                mask = mixout_mask(parameter, probability, seed=self.opening.seed, step=self._step, name=name)
                self._masks[number] = mask
            if (own := self._own[number]) is None:  # trains for the first time
                self._handles.append(self._watch(number))
            self._own[number] = parameter.detach().clone() if own is None else own.copy_(parameter)
            mix_(parameter, reference, mask, probability)

    @torch.no_grad()
    def _put_back(self) -> None:
        if not self._mixed:
            return
        self._mixed = False
        for one, own, mask in zip(self.opening.anchored, self._own, self._masks, strict=True):
            if own is not None and mask is not None:
                one.parameter.copy_(own)

    def _watch(self, number: int) -> RemovableHandle:
        """Turn what each backward gives a mixed parameter into its own gradient, before it is added up or reduced."""
        parameter, _, probability, *_ = self.opening.anchored[number]

        def masked(gradient: Tensor) -> Tensor | None:
            mask = self._masks[number]
            return None if mask is None else mixed_gradient(gradient, mask, probability)

        handle: RemovableHandle = parameter.register_hook(masked)  # type: ignore[no-untyped-call]
        return handle
