"""What must hold of every run; each function returns what does not, in words."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch

from tests.soak.draw import Draw
from tests.test_resume import differing, timeless

Record = dict[str, Any]
TOLERANCE = 1e-6  # of tensors' norms, where sums depend on the order of buckets: on more than two ranks
SMALLEST = 1e-6  # the largest entry of a gradient, and the size of a step, that must move something


def check(run: Draw, records: dict[str, list[Record]]) -> list[str]:
    """All that is wrong with a run. `records`: "straight", "interrupted" (unless it was killed), "resumed"; by rank."""
    found: list[str] = []
    for part, ranks in records.items():
        found += [f"{part}: {text}" for text in ranks_apart(ranks)]
        for rank, record in enumerate(ranks):
            texts = [*frozen_moved(run, record), *not_opened(run, record), *left_behind(record, records)]
            found += [f"{part}, rank {rank}: {text}" for text in texts]
    for rank, (straight, resumed) in enumerate(zip(records["straight"], records["resumed"], strict=True)):
        found += [f"resumed, rank {rank}: {text}" for text in unequal(run, straight, resumed)]
    return found


def ranks_apart(ranks: list[Record]) -> Iterator[str]:
    """Parameters that differ between ranks, at the begin or after a step, and events.

    Buffers may: before each forward DDP gives all ranks the first one's, and each goes on from its own batch.
    """
    for first, second in itertools.pairwise(ranks):
        if recorded(first) != recorded(second):
            yield "ranks recorded different events"
        for step, (ours, theirs) in enumerate(zip(first["hashes"], second["hashes"], strict=True)):
            groups = [name for name in ours if ours[name] != theirs[name]]
            if groups:
                yield f"ranks differ after step {first['began'] + step} in {groups}"
                return


def recorded(record: Record) -> list[dict[str, Any]]:
    """The events of a training."""
    return [entry for entry in record["log_history"] if "tl/event" in entry]


def openings(run: Draw, record: Record) -> dict[str, int | None]:
    """The step at which each group must open."""
    return {name: run.opening(depth) for depth, level in enumerate(record["levels"]) for name in level}


def frozen_moved(run: Draw, record: Record) -> Iterator[str]:
    """Weights, buffers or gradients of groups before their opening."""
    opens = openings(run, record)
    began = record["began"]
    for name, opening in opens.items():
        until = run.steps if opening is None else opening
        values = [step[name] for step in record["hashes"][: max(1, until - began + 1)]]
        if len(set(values)) > 1:
            yield f"weights of `{name}` moved before step {opening}"
        for step, facts in enumerate(record["steps"][: max(0, until - began)], began):
            if facts[name]["trainable"] or facts[name]["gradients"]:
                yield f"`{name}` required a gradient or had one in step {step}, before {opening}"
                break
    for names in record["buffers"][0]:
        until = min(run.steps if opens[name] is None else int(opens[name] or 0) for name in names)
        values = [step[names] for step in record["buffers"][: max(1, until - began + 1)]]
        if len(set(values)) > 1:
            yield f"buffers of {names} moved before step {until}"


def not_opened(run: Draw, record: Record) -> Iterator[str]:
    """Groups that were not trainable, or did not move by a rate and a gradient, from their opening on."""
    moved = 0
    for name, opening in openings(run, record).items():
        for place, step in enumerate(record["steps"]):
            facts = step[name]
            if opening is None or record["began"] + place < opening:
                continue
            if facts["trainable"] < facts["parameters"]:
                yield f"`{name}` was not trainable in step {record['began'] + place}, after {opening}"
                break
            if must_move(run, facts):
                moved += 1
                if record["hashes"][place][name] == record["hashes"][place + 1][name]:
                    yield f"`{name}` did not move in step {record['began'] + place}, after {opening}"
                    break
    if not moved and record["steps"]:
        yield "no group had a rate and a gradient in any step"


def must_move(run: Draw, facts: dict[str, float]) -> bool:
    """Whether a step must change a group's bytes. The steps of all but SGD are as large as the rate."""
    size = facts["rate"] * (facts["largest"] if run.optim == "sgd" else 1.0)
    return facts["largest"] > SMALLEST and size > SMALLEST


def left_behind(record: Record, records: dict[str, list[Record]]) -> Iterator[str]:
    """Hooks and freeze states that the training left."""
    spared = set(records["straight"][0]["plain leftovers"])
    if hooks := [hook for hook in record["hooks"] if hook not in spared]:
        yield f"hooks were left behind: {hooks}"
    if record["hooks gone"]:
        yield f"hooks of the user's are gone: {record['hooks gone']}"
    after, before = record["trainable"]
    if after != before:
        yield f"requires_grad was not restored: {sorted(set(after) ^ set(before))[:5]}"


def unequal(run: Draw, straight: Record, resumed: Record) -> Iterator[str]:
    """What a resumed training has otherwise than a straight one."""
    if resumed["began"] != run.resumes_at:
        yield f"resumed from step {resumed['began']}, not from {run.resumes_at}"
        return
    if run.ranks <= 2:
        if straight["hashes"][run.resumes_at :] != resumed["hashes"]:
            yield "weights after a step differ from the straight run's"
        for part in ("weights", "optimizer"):
            if paths := differing(straight[part], resumed[part], part):
                yield f"differs from the straight run: {paths[:5]} ({len(paths)} in all)"
        if timeless(straight["log_history"]) != timeless(resumed["log_history"]):
            yield "log_history differs from the straight run's"
        return
    for name, tensor in straight["weights"].items():
        distance = float((tensor.double() - resumed["weights"][name].double()).norm())
        if distance > TOLERANCE * max(float(tensor.double().norm()), 1.0):
            yield f"`{name}` is {distance:.2g} from the straight run"
    if exact(straight["log_history"]) != exact(resumed["log_history"]):
        yield "events, rates or steps in log_history differ from the straight run's"


def exact(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is logged without what is measured from losses, gradients and weights."""
    return [
        {key: value for key, value in entry.items() if not re.search(r"loss|grad_norm|^tl/anchor/", key)}
        for entry in timeless(log_history)
    ]


def tally(run: Draw, record: Record) -> dict[str, int]:
    """How many groups the training opened, and of how many it was checked that a step moved them."""
    opened = [name for name, opening in openings(run, record).items() if opening is not None]
    held = [name for name in opened if any(must_move(run, step[name]) for step in record["steps"])]
    return {"groups": len(record["hashes"][0]), "opened": len(opened), "moved": len(held)}


def moves(record: Record) -> bool:
    """Whether anything moved at all."""
    return any(not torch.equal(record["start"][name], tensor) for name, tensor in record["weights"].items())
