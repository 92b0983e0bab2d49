"""What a run must have shown before it is published."""

from pathlib import Path

from hub_cards.facts import RunFacts
from hub_cards.paths import is_repo_id
from hub_cards.summary import no_numbers


def check_gates(
    run: Path,
    repo_id: str,
    facts: RunFacts,
    *,
    merge: bool,
    require_positive_transfer: bool,
    min_retention: float | None,
) -> None:
    """Check what needs neither files nor network: the name, that the run is finished, and what it measured.

    Args:
        run: the run's folder, for messages.
        repo_id: `owner/name`.
        facts: of the run.
        merge: whether its adapter is to be merged.
        require_positive_transfer: whether its comparison has to say that transfer was positive.
        min_retention: the least retention; None: what the run asked for, if it did.

    Raises:
        ValueError: one of them does not hold.
    """
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ValueError(f"the repository is {repo_id!r}; expected `owner/name` of letters, digits, `-`, `_` and `.`.")
    if not facts.finished:
        raise ValueError(
            f"the run in `{run}` stopped at step {facts.global_step} of {facts.max_steps}; expected a finished one. "
            "Resume it (trainer.train(resume_from_checkpoint=True)), save the model, and publish again."
        )
    if merge and not facts.is_adapter:
        raise ValueError(f"merge was asked for, and the run in `{run}` has no adapter to merge. Leave merge out.")
    if require_positive_transfer:
        outcome = ((facts.comparison or {}).get("transfer") or {}).get("outcome")
        if outcome != "positive":
            raise ValueError(
                f"transfer is {outcome or 'not measured'}, and only positive transfer was to be published. "
                + ("Choose another run" if outcome else "Run the comparison with its baselines")
                + ", or leave require_positive_transfer out."
            )
    _check_retention(facts, min_retention)


def _check_retention(facts: RunFacts, asked: float | None) -> None:
    if asked is not None and not 0 < asked <= 1:
        raise ValueError(f"`min_retention` is {asked}; expected a share above 0 and up to 1, such as 0.98.")
    monitor = facts.methods.get("ForgettingMonitor", {})
    own, found = monitor.get("min_retention"), monitor.get("retention")
    least = max((bound for bound in (asked, own) if bound is not None), default=None)
    if least is None:
        return
    if broken := no_numbers(monitor):
        raise ValueError(
            f"`{broken[0]}` was measured and is no number, and a retention of at least {least:g} was asked for. A "
            "weight is NaN or infinite: publish a checkpoint from before that, or another run."
        )
    if found is not None and found >= least:
        return
    if found is None:
        raise ValueError(
            f"retention was not measured, and at least {least:g} was asked for. Train with a ForgettingMonitor, or "
            "leave min_retention out."
        )
    whose = "the run itself asked for" if least == own else "was asked for"
    measures = {name: one["retention"] for name, one in monitor["measures"].items() if one["retention"] is not None}
    worst = min(measures, key=measures.__getitem__, default="")
    raise ValueError(
        f"retention is {found:.4g}" + (f" (`{worst}`)" if worst else "") + f", and at least {least:g} {whose}. Anchor "
        "the weights more strongly (WeightAnchoring), train less, or choose another run."
    )
