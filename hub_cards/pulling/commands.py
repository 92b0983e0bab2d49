"""The command line of pulling: `python -m hub_cards pull REPO`. What needs torch is imported when a command runs."""

import argparse
import importlib

from hub_cards.facts import RunFacts


def add_pull(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `pull`, whose `run` returns what is to be printed and raises RuntimeError where --verify fails.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_pull(parser.add_subparsers())
        >>> parser.parse_args(["pull", "acme/reviews", "--verify"]).repo
        'acme/reviews'
    """
    command = commands.add_parser("pull", help="fetch a published run with its base, and check it")
    command.add_argument("repo", help="owner/name, or the folder of a run")
    command.add_argument("--revision", help="branch, tag or commit; the default branch otherwise")
    command.add_argument("--base", help="folder or repository of the adapter's base, where it is not on the Hub")
    command.add_argument("--verify", action="store_true", help="do the card's evaluation again, and compare")
    command.add_argument("--data", help="file of the rows for --verify, where the data are not on the Hub")
    command.add_argument("--split", help="split for --verify; all splits of the card otherwise")
    command.set_defaults(run=_pull)


def _pull(options: argparse.Namespace) -> str:
    if options.data and not options.verify:
        raise ValueError(f"`--data` is `{options.data}`, but nothing is evaluated without --verify; add it.")
    pulled = importlib.import_module("hub_cards.pulling.pull").pull(
        options.repo, revision=options.revision, base=options.base
    )
    lines = [
        f"model      {type(pulled.model).__name__}, {sum(p.numel() for p in pulled.model.parameters())} parameters",
        f"revision   {pulled.revision or 'a local folder'}",
        f"base       {_base(pulled.facts, pulled.base_revision)}",
        f"processor  {type(pulled.processor).__name__ if pulled.processor is not None else 'none'}",
        f"labels     {', '.join(pulled.labels) or 'none'}",
    ]
    if not options.verify:
        return "\n".join(lines)
    found = importlib.import_module("hub_cards.pulling.verify").verify(pulled, data=options.data, split=options.split)
    if not found.ok:
        raise RuntimeError(f"the numbers on the card were not found again:\n{found}")
    return "\n".join([*lines, "", str(found)])


def _base(facts: RunFacts, revision: str | None) -> str:
    if not facts.is_adapter:
        return "none needed"
    checked = "every tensor as recorded" if facts.base.tensors else "no fingerprint recorded"
    return f"{facts.base.name or facts.base.folder} at {revision or 'a local folder'}, {checked}"
