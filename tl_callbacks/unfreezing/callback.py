"""The adapter: decides when groups open during a Trainer's training, on every rank at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks.callbacks import TransferCallback, announce
from tl_callbacks.discovery.order import watch_order
from tl_callbacks.dtensors import casts_what_trains, renew_precision, reshard, to_float32
from tl_callbacks.frozen.eval_mode import keep_in_eval, release
from tl_callbacks.frozen.state import openable, set_frozen
from tl_callbacks.groups import LayerGroups
from tl_callbacks.losses import GROUP as LOSS_GROUP
from tl_callbacks.unfreezing import checks, deciding, openings, rate_frozen
from tl_callbacks.unfreezing.adaptive import History, ProbeSchedule
from tl_callbacks.unfreezing.cautions import cautions
from tl_callbacks.unfreezing.gradients import GradientMeter
from tl_callbacks.unfreezing.plan import Phase, UnfreezePlan, by_tower, make_plan
from tl_callbacks.unfreezing.rates import Rate, SlantedTriangular, group_rates, replace_rates
from tl_callbacks.unfreezing.reducer import rebuild_reducer
from tl_callbacks.unfreezing.schedule import UnfreezeSchedule


class GradualUnfreezing(TransferCallback):
    """Opens layer groups from the head downwards while a Trainer trains, and keeps the others frozen.

    Frozen means: no gradient, no weight decay, and the group's modules in eval mode, so no dropout and no moving
    BatchNorm statistics in them. It protects the general lower layers from the large gradients of a fresh head, and
    steps are cheaper until the lower groups open. It is no accuracy method once the rates are right; see the method
    card.

    Call `attach(trainer)` before training: it is exact under DDP and when a run resumes, and it checks the set-up.
    After training every parameter requires a gradient again that did before.

    Args:
        groups: the layer groups, from `group_layers`.
        schedule: when they open: `every`, `at_steps`, `at_fractions`, `per_epoch` or `staged`. It counts levels, so
            parallel towers open side by side; a mapping of tower names (or other patterns of group names) to schedules
            opens each by its own. `schedule_from_probes` lets the run's evaluations decide.
        keep_frozen: names or anchored patterns of groups that never open; the schedule counts only the others.
        rates: "shared": all groups follow the Trainer's schedule, so a group that opens late starts at an already
            decayed rate; "own": each group goes through that schedule over its own time, with a warm-up from its
            opening; `slanted_triangular(...)`: ULMFiT's rule over its own time.

    Raises:
        ValueError: a pattern in `keep_frozen` matches no group, or the head is among them.

    Example:
        >>> from tl_callbacks import LayerGroup, every
        >>> groups = LayerGroups(tuple(LayerGroup(n, (n,), (9,)) for n in ("low", "high", "head")), "head")
        >>> print(GradualUnfreezing(groups, every(10)).plan(max_steps=40, steps_per_epoch=20))
        step  epoch  opens  open groups  parameters  rate factor
        0      0.00   head            1           9            1
        10     0.50   high            2          18            1
        20     1.00    low            3          27            1

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.3.
        https://arxiv.org/abs/1801.06146
    """

    def __init__(
        self,
        groups: LayerGroups,
        schedule: UnfreezeSchedule | ProbeSchedule | Mapping[str, UnfreezeSchedule],
        *,
        keep_frozen: Sequence[str] = (),
        rates: Literal["shared", "own"] | SlantedTriangular = "shared",
    ) -> None:
        if not isinstance(rates, SlantedTriangular) and rates not in ("shared", "own"):
            raise ValueError(f'`rates` is {rates!r}; expected "shared", "own" or slanted_triangular(...).')
        self.groups = groups
        self.schedule = schedule
        self.keep_frozen = groups.select(keep_frozen)
        self.rates = rates
        if all(group.name in self.keep_frozen for group in groups.levels[-1]):
            raise ValueError(
                f"`keep_frozen` holds `{groups.names[-1]}`, the top group, which is open from step 0 in every "
                "schedule. Leave it out."
            )
        by_tower(groups, schedule, [name for name in groups.names if name not in self.keep_frozen])
        self._plan: UnfreezePlan | None = None  # derived anew at each train begin from the arguments and the lengths
        self._applied: tuple[str, ...] | None = None
        self._recorded: Phase | None = None
        self._shared_rate: Rate | None = None  # the Trainer's own rule, where groups have rules of their own
        self._skipped: int | None = None
        self._meter: GradientMeter | None = None  # in a step whose gradients are measured
        self._stop_watching: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        kept = f", keep_frozen={self.keep_frozen}" if self.keep_frozen else ""
        return f"GradualUnfreezing({len(self.groups)} groups, {self.schedule!r}{kept}, rates={self.rates!r})"

    def plan(
        self, max_steps: int, steps_per_epoch: int | None = None, *, history: History = (), step: int = 0
    ) -> UnfreezePlan:
        """Return the table of openings, without a Trainer.

        Args:
            max_steps: optimizer steps of the training.
            steps_per_epoch: optimizer steps of an epoch: batches of an epoch over `gradient_accumulation_steps`,
                rounded up. Needed by `per_epoch`; otherwise only for the column of epochs.
            history: `log_history` so far, which decides under `schedule_from_probes`; empty: the latest openings.
            step: optimizer steps done.

        Raises:
            ValueError: the schedule counts epochs and `steps_per_epoch` is None.
        """
        return make_plan(
            self.groups, self.schedule, self.keep_frozen,
            max_steps=max_steps, steps_per_epoch=steps_per_epoch, history=history, step=step,
        )  # fmt: skip

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: groups of another model, a second GradualUnfreezing, an unsound scheduler."""
        return checks.findings(self, trainer)

    def cautions(self, trainer: Trainer) -> list[str]:
        """Return what to know before: groups that never open, an early stop before them, compilations, slow steps."""
        return cautions(self, trainer)

    def before_optimizer_load(self, model: nn.Module, state: TrainerState) -> None:
        """Set the freeze state that the recorded openings say, or the one of step 0; under DeepSpeed none yet."""
        if rate_frozen.applies(self.trainer):
            return  # it registers only what requires a gradient when it wraps the model
        if self.trainer is not None and casts_what_trains(self.trainer):
            to_float32(openable(model))
        self._apply(model, openings.opened(state) or self._open_at_start())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Derive the plan, show it, give the groups their rates and set the freeze state of the present step."""
        if self.trainer is None:
            self._begin_unattached(kwargs["model"], args)
        self._recorded = None
        self._plan = deciding.plan_now(self, args, state, kwargs["train_dataloader"])
        checks.history(self, self._plan, state)
        checks.effect(self, self._plan, state)
        announce(f"{self!r}\n{self._plan}{rate_frozen.note(self.trainer)}", state)
        self._set_rates(args, state, **kwargs)
        self._apply(kwargs["model"], self._plan.at(state.global_step).open)
        self._rebuild_reducer()  # a second train() finds one over what the first one left open

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open what is due, rebuild DDP's reducer, and record the opening if it is not recorded yet."""
        phase = self._decide(args, state, kwargs["train_dataloader"]).at(state.global_step)
        if phase.open != self._applied:
            self._apply(kwargs["model"], phase.open)
            self._reduce_anew(kwargs["model"])
        self._follow_skipped_steps(args, state, **kwargs)
        self._record(kwargs["model"], phase, state)
        rate_frozen.hold(self.trainer, phase, kwargs["optimizer"], kwargs["lr_scheduler"], step=state.global_step)
        self._measure(kwargs["model"], phase, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the relative gradient norms of a step that measures them, and freeze as before."""
        if self._meter is not None:
            assert self._applied is not None
            norms = deciding.relative_norms(self, self._meter, self._applied, kwargs["optimizer"])
            self._stop_measuring()
            if all(math.isfinite(norm) for norm in norms.values()):
                self.log(norms, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as the user had it: what could train before can train again."""
        self.restore(kwargs["model"])

    def restore(self, model: nn.Module) -> None:
        """Open everything this package froze and remove the hook. Safe to call twice."""
        self._stop_watching()
        self._stop_measuring()
        reshard(model)
        release(model)
        set_frozen(model, frozenset())
        self._applied = None

    def facts(self) -> Mapping[str, Any]:
        """Return the schedule, the rates and the plan of the present training."""
        return {
            "schedule": repr(self.schedule),
            "keep_frozen": list(self.keep_frozen),
            "rates": repr(self.rates) if isinstance(self.rates, SlantedTriangular) else self.rates,
            "plan": self._plan.facts() if self._plan else None,
            "frozen_by": rate_frozen.LABEL if rate_frozen.applies(self.trainer) else "requires_grad",
        }

    def _begin_unattached(self, model: nn.Module, args: TrainingArguments) -> None:
        checks.unattached(model, args)
        if not args.torch_compile:
            self._stop_watching = watch_order(model, self.groups)

    def _open_at_start(self) -> tuple[str, ...]:
        # Only a start at step 0 matters here, so any length serves.
        return self.plan(max_steps=10**9, steps_per_epoch=10**6).phases[0].open

    def opens_all_at_once(self) -> bool:
        """Return whether nothing is frozen at step 0."""
        return len(self._open_at_start()) + len(self.keep_frozen) == len(self.groups)

    def freezes_nothing(self) -> bool:
        """Return whether all groups are open from step 0 on."""
        return self.opens_all_at_once() and not self.keep_frozen

    def _apply(self, model: nn.Module, open_groups: Sequence[str]) -> None:
        frozen = [name for group in self.groups if group.name not in set(open_groups) for name in group.parameters]
        reshard(model)
        release(model)
        set_frozen(model, frozenset(frozen))
        keep_in_eval(model)
        self._applied = tuple(name for name in self.groups.names if name in set(open_groups))
        self.transitions += 1

    def _reduce_anew(self, model: nn.Module) -> None:
        self._rebuild_reducer()
        renew_precision(model)

    def _rebuild_reducer(self) -> None:
        if self.trainer is not None:
            wrapper = getattr(self.trainer.model_wrapped, "_orig_mod", self.trainer.model_wrapped)
            if isinstance(wrapper, DistributedDataParallel):
                rebuild_reducer(wrapper)

    def _decide(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> UnfreezePlan:
        assert self._plan is not None
        if deciding.anything_new(self, self._plan, state):
            self._plan = deciding.plan_now(self, args, state, dataloader)
            self._skipped = None  # the rates of a group begin at its opening
        return self._plan

    def _measure(self, model: nn.Module, phase: Phase, state: TrainerState) -> None:
        assert self._plan is not None
        if state.global_step in self._plan.measured:
            self._meter = deciding.meter(self, model, phase.open)

    def _stop_measuring(self) -> None:
        if self._meter is not None:
            self._meter.remove()
            self._meter = None

    def _record(self, model: nn.Module, phase: Phase, state: TrainerState) -> None:
        if phase is self._recorded:
            return
        self._recorded = phase
        openings.record(self, model, phase, state)

    def _set_rates(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        **kwargs: Any,
    ) -> None:
        assert self._plan is not None
        inner = getattr(optimizer, "optimizer", optimizer)
        per_group = self.rates != "shared" or any(phase.factor != 1 for phase in self._plan)
        flat = rate_frozen.applies(self.trainer)
        checks.optimizer(self, model, inner, lr_scheduler, per_group=per_group or flat, flat=flat)
        own = per_group and isinstance(lr_scheduler, LambdaLR)
        self._shared_rate = cast(LambdaLR, lr_scheduler).lr_lambdas[0] if own else None
        self._skipped = None
        self._follow_skipped_steps(args, state, optimizer=optimizer, lr_scheduler=lr_scheduler)

    def _follow_skipped_steps(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        optimizer: Optimizer,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        """Give the groups their rules, and again when the scheduler has stood still on a step that was skipped."""
        if self._shared_rate is None or state.global_step - lr_scheduler.last_epoch == self._skipped:
            return
        assert self._plan is not None
        self._skipped = state.global_step - lr_scheduler.last_epoch
        rules = group_rates(
            self._plan, self.rates, args, max_steps=state.max_steps, shared=self._shared_rate, skipped=self._skipped
        )
        rules.setdefault(LOSS_GROUP, rules[self._plan.phases[0].open[-1]])  # a loss's weights go with the top group
        replace_rates(getattr(optimizer, "optimizer", optimizer), lr_scheduler, rules)
