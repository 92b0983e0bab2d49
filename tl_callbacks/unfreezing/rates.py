"""The rule of the rates under unfreezing: each group's factor on its peak rate, as a function of the step."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, cast

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from tl_callbacks.unfreezing.plan import UnfreezePlan

Rate = Callable[[int], float]

# A group that opens late starts with empty Adam state, whose first steps are of full size; without a warm-up of the
# user's it gets this share of its own remaining steps.
LATE_WARMUP = 0.1


@dataclass(frozen=True)
class SlantedTriangular:
    """The slanted triangular rate of ULMFiT: a short linear rise, then a long linear fall; see `slanted_triangular`.

    Args:
        cut_frac: fraction of the steps that rise, in (0, 1).
        ratio: highest rate over lowest, above 1.

    Example:
        >>> [round(SlantedTriangular()(step, 100), 3) for step in (0, 10, 100)]
        [0.031, 1.0, 0.031]
    """

    cut_frac: float = 0.1
    ratio: float = 32.0

    def __post_init__(self) -> None:
        if not 0 < self.cut_frac < 1:
            raise ValueError(f"`cut_frac` is {self.cut_frac}; expected the fraction of steps that rise, in (0, 1).")
        if self.ratio <= 1:
            raise ValueError(f"`ratio` is {self.ratio}; expected highest over lowest rate, above 1 (ULMFiT: 32).")

    def __call__(self, step: int, num_steps: int) -> float:
        """Return the factor on the peak rate after `step` of `num_steps` optimizer steps, in [1 / ratio, 1]."""
        cut = max(1, int(num_steps * self.cut_frac))
        share = step / cut if step < cut else 1 - (step - cut) / max(1, num_steps - cut)
        return (1 + max(0.0, share) * (self.ratio - 1)) / self.ratio


def slanted_triangular(cut_frac: float = 0.1, ratio: float = 32.0) -> SlantedTriangular:
    """Return ULMFiT's slanted triangular rates for `GradualUnfreezing(rates=...)`, per group from its own opening.

    With t steps of T since the group opened and cut = T * cut_frac, p = t / cut while rising and
    p = 1 - (t - cut) / (T - cut) while falling; the factor is (1 + p * (ratio - 1)) / ratio. The paper writes the
    fall as 1 - (t - cut) / (cut * (1 / cut_frac - 1)), which is the same where cut is whole.

    Args:
        cut_frac: fraction of the steps that rise, in (0, 1).
        ratio: highest rate over lowest, above 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> slanted_triangular(cut_frac=0.2)
        SlantedTriangular(cut_frac=0.2, ratio=32.0)

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, equation 3.
        https://arxiv.org/abs/1801.06146
    """
    return SlantedTriangular(cut_frac, ratio)


def scheduler_rule(args: TrainingArguments, num_steps: int, *, late: bool) -> Rate:
    """Return the factor that the Trainer's scheduler gives after a number of steps, for a training of `num_steps`.

    Args:
        args: the Trainer's arguments, which name the scheduler and its warm-up.
        num_steps: optimizer steps from the group's opening to the end of training.
        late: whether the group opens after step 0 and so needs a warm-up even where `args` has none.
    """
    warmup = min(args.get_warmup_steps(num_steps) or (ceil(LATE_WARMUP * num_steps) if late else 0), num_steps)
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    kwargs = dict(cast(dict[str, Any], args.lr_scheduler_kwargs or {}))
    if "num_decay_steps" in kwargs:  # of warmup_stable_decay, in steps: no longer than the group's own time
        kwargs["num_decay_steps"] = min(kwargs["num_decay_steps"], num_steps - warmup)
    scheduler: Any = get_scheduler(
        "constant_with_warmup" if late and kind == "constant" else kind,
        optimizer=SGD([nn.Parameter()], lr=args.learning_rate),
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=kwargs or None,
    )
    rule: Rate = scheduler.lr_lambdas[0]
    return rule


def group_rates(
    plan: UnfreezePlan,
    rates: Literal["shared", "own"] | SlantedTriangular,
    args: TrainingArguments,
    *,
    max_steps: int,
    shared: Rate,
    skipped: int = 0,
) -> dict[str, Rate]:
    """Return, for each group that opens, its factor on its peak rate as a function of the scheduler's step.

    Args:
        plan: the phases.
        rates: "shared": the Trainer's own schedule; "own": the same kind of schedule over each group's own time, with a
            warm-up from its opening; a rule: that rule over each group's own time.
        args: the Trainer's arguments.
        max_steps: optimizer steps of the training.
        shared: the Trainer's own factor.
        skipped: optimizer steps by which the scheduler is behind, because a gradient scaler skipped them: the Trainer
            counts them and openings do not wait.
    """
    factors = {phase.step: phase.factor for phase in plan}

    def with_factor(rule: Rate) -> Rate:
        if all(factor == 1 for factor in factors.values()):
            return rule
        return lambda step: rule(step) * plan.at(step + skipped).factor

    def from_opening(opening: int) -> Rate:
        length = max_steps - opening
        if isinstance(rates, SlantedTriangular):
            return lambda step: rates(max(0, step + skipped - opening), length)
        rule = scheduler_rule(args, length, late=opening > 0)
        return lambda step: rule(max(0, step + skipped - opening))

    result: dict[str, Rate] = {}
    for group in plan.phases[-1].open:
        opening = plan.opening_step(group)
        assert opening is not None
        unchanged = rates == "shared" or (rates == "own" and opening == 0)
        result[group] = with_factor(shared if unchanged else from_opening(opening))
    return result


def replace_rates(optimizer: Optimizer, scheduler: LambdaLR, rules: dict[str, Rate]) -> None:
    """Make a LambdaLR follow one rule per layer group from its present step on. Idempotent.

    The rules are plain functions, which LambdaLR leaves out of its state: a checkpoint holds the step only, and a
    resumed run derives the rules again.

    Args:
        optimizer: the inner optimizer, whose groups carry `layer_group`.
        scheduler: the Trainer's scheduler.
        rules: layer group to factor by optimizer step; other groups keep their rule.
    """
    for place, group in enumerate(optimizer.param_groups):
        rule = rules.get(group["layer_group"])
        if rule is not None and rule is not scheduler.lr_lambdas[place]:
            scheduler.lr_lambdas[place] = rule
            group["lr"] = scheduler.base_lrs[place] * rule(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
