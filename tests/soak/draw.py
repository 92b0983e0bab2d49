"""What one run of the soak trains: everything drawn from a seed, and what its schedule must do, worked out here."""

import math
import random
from dataclasses import dataclass
from typing import Any

from tl_callbacks import UnfreezeSchedule, at_fractions, at_steps, every, per_epoch, staged

PLAIN = ("BERT", "RoBERTa", "DistilBERT", "ELECTRA", "ModernBERT", "GPT-2", "Llama", "Qwen3", "T5", "BART")
PLAIN += ("ViT", "Swin", "ConvNeXt", "ResNet", "EfficientNet", "Wav2Vec2", "Whisper", "CLIP")
ADAPTED = ("BERT", "DistilBERT", "GPT-2", "Llama", "T5", "ViT", "Whisper")
# Under DDP the Trainer does not look for idle parameters where activations are checkpointed: all are used in these.
CHECKPOINTED = ("BERT", "RoBERTa", "ELECTRA", "GPT-2", "Llama", "ViT")
BATCH = 2


@dataclass(frozen=True)
class Draw:
    """One run.

    Args:
        name: of the run.
        family: of `tests.families`.
        lora: whether adapters are trained.
        schedule: kind of schedule.
        numbers: what the schedule is made of.
        rates: of `GradualUnfreezing`.
        anchor: form of `WeightAnchoring`, None: none.
        strength: of the anchor.
        decay: ratio of neighbouring groups' rates.
        accumulation: micro-steps of a step.
        clipping: `max_grad_norm`.
        bf16: whether autocast is on.
        checkpointing: whether activations are checkpointed.
        ranks: number of processes.
        optim: name of the optimizer.
        scheduler: name of the schedule of rates.
        warmup: steps of warm-up.
        steps: of the training.
        epoch: steps of an epoch.
        missing: micro-steps that the last step of an epoch lacks.
        save: steps between checkpoints.
        interruption: "kill", "stop" or "error".
        at: steps done when it comes.
        order: in which ranks are killed.
        seed: of the training.
    """

    name: str
    family: str
    lora: bool
    schedule: str
    numbers: tuple[float, ...]
    rates: str
    anchor: str | None
    strength: float
    decay: float
    accumulation: int
    clipping: float
    bf16: bool
    checkpointing: bool
    ranks: int
    optim: str
    scheduler: str
    warmup: int
    steps: int
    epoch: int
    missing: int
    save: int
    interruption: str
    at: int
    order: tuple[int, ...]
    seed: int

    @property
    def rows(self) -> int:
        """Rows of the training set."""
        return BATCH * self.ranks * (self.accumulation * self.epoch - self.missing)

    @property
    def resumes_at(self) -> int:
        """The step of the last checkpoint before the interruption."""
        return self.at - self.at % self.save

    @property
    def arguments(self) -> dict[str, Any]:
        """Training arguments."""
        return {
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "max_grad_norm": self.clipping,
            "bf16": self.bf16,
            "activation_checkpointing": self.checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False} if self.checkpointing else None,
            "optim": self.optim,
            "learning_rate": 0.1 if self.optim == "sgd" else 5e-3,
            "lr_scheduler_type": self.scheduler,
            "warmup_steps": self.warmup,
            "max_steps": self.steps,
            "save_strategy": "steps",
            "save_steps": self.save,
            "logging_steps": 1,
            "seed": self.seed,
        }

    def unfreeze_schedule(self) -> UnfreezeSchedule:
        """The schedule as a user writes it."""
        match self.schedule:
            case "every":
                return every(int(self.numbers[0]))
            case "at_steps":
                return at_steps([int(number) for number in self.numbers])
            case "at_fractions":
                return at_fractions([number / 100 for number in self.numbers])
            case "per_epoch":
                return per_epoch(int(self.numbers[0]))
        second, third, factor = self.numbers
        return staged([(0, 1), (int(second), 2, factor), (int(third), "all", factor / 2)])

    def opening(self, level: int) -> int | None:
        """The step at which a level opens, counted from the head, which is 0; None: never. Uses none of our code."""
        if level == 0:
            return 0
        match self.schedule:
            case "every":
                step = level * int(self.numbers[0])
            case "at_steps" | "at_fractions" if level > len(self.numbers):
                return None
            case "at_steps":
                step = int(self.numbers[level - 1])
            case "at_fractions":
                step = -(-int(self.numbers[level - 1]) * self.steps // 100)
            case "per_epoch":
                step = math.ceil(level / self.numbers[0]) * self.epoch
            case _:
                step = int(self.numbers[min(level, 2) - 1])
        return step if step < self.steps else None


def draw(seed: int, number: int) -> Draw:
    """The run with a number."""
    rng = random.Random(f"{seed}/{number}")
    ranks = rng.choices([1, 2, 4], [5, 4, 1])[0]
    lora = rng.random() < 0.2
    family = rng.choice(ADAPTED if lora else PLAIN)
    steps = rng.randint(8, 12)
    accumulation = rng.randint(1, 4)
    save = rng.randint(1, 3)
    anchor = rng.choice([None, "decoupled", "penalty"])
    schedule = rng.choice(["every", "at_steps", "at_fractions", "per_epoch", "staged"])
    return Draw(
        name=f"{seed}/{number}",
        family=family,
        lora=lora,
        schedule=schedule,
        numbers=_numbers(schedule, steps, rng),
        rates=rng.choice(["shared", "own", "slanted_triangular"]),
        anchor=anchor,
        strength=rng.choice({None: [0.0], "decoupled": [0.01, 0.1], "penalty": [0.05, 0.5]}[anchor]),
        decay=rng.choice([1.0, 0.9, 0.5]),
        accumulation=accumulation,
        clipping=rng.choice([0.0, 0.05, 1.0]),
        bf16=ranks < 4 and rng.random() < 0.25,
        checkpointing=family in CHECKPOINTED and rng.random() < 0.5,
        ranks=ranks,
        # Adam turns the rounding of a gradient that is zero into whole steps; on 4 ranks the rounding may differ.
        optim="sgd" if ranks == 4 else rng.choice(["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"]),
        scheduler=rng.choice(["linear", "cosine", "constant"]),
        warmup=rng.choice([0, 0, 2]),
        steps=steps,
        epoch=rng.randint(2, 5),
        missing=rng.randrange(accumulation),
        save=save,
        interruption=rng.choice(["kill", "kill", "stop", "error"]),
        at=rng.randint(save, steps - 1),
        order=tuple(rng.sample(range(ranks), ranks)),
        seed=rng.randrange(1000),
    )


def _numbers(schedule: str, steps: int, rng: random.Random) -> tuple[float, ...]:
    match schedule:
        case "every" | "per_epoch":
            return (rng.randint(1, 3),)
        case "at_steps":
            return tuple(sorted(rng.choices(range(steps), k=rng.randint(1, 5))))
        case "at_fractions":
            return tuple(sorted(rng.choices(range(100), k=rng.randint(1, 5))))
    second, third = sorted(rng.sample(range(1, steps), 2))
    return (second, third, rng.choice([1.0, 0.5]))
