"""The command line: `python -m hub_cards card | publish | pull | adapters`."""

import argparse
import re
import sys
from collections.abc import Sequence

from hub_cards.card import write_card
from hub_cards.facts import read_facts
from hub_cards.publishing.publish import publish
from hub_cards.pulling.commands import add_pull
from hub_cards.registry import listing

_ORDERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # control characters, directions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, or 1 after an error, which is told in one message.

    Args:
        arguments: of the command line; None: this process's own.

    Example:
        >>> main(["card", "no/such/run"])
        1
    """
    parser = argparse.ArgumentParser(prog="python -m hub_cards", description="Model cards, and publishing, from a run.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_card(commands)
    _add_publish(commands)
    add_pull(commands)
    _add_adapters(commands)
    options = parser.parse_args(arguments)
    try:
        print(_shown(options.run(options)))  # noqa: T201
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(_shown(f"{parser.prog}: error: {error}"), file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _shown(value: object) -> str:
    """Return a text without what a terminal would obey: label names and names of files can be somebody else's."""
    return _ORDERS.sub("\ufffd", str(value))


def _add_card(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("card", help="write README.md and its pictures into a run's folder")
    command.add_argument("run_dir", help="the run's output_dir")
    command.set_defaults(run=lambda options: write_card(read_facts(options.run_dir), options.run_dir))


def _add_publish(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("publish", help="publish a finished run on the Hub")
    command.add_argument("run_dir", help="the run's output_dir")
    command.add_argument("repo_id", help="owner/name")
    command.add_argument("--public", action="store_true", help="publish for everybody; private otherwise")
    command.add_argument(
        "--dry_run", action="store_true", help="send nothing; show the files, the card and the changes"
    )
    command.add_argument("--license", help="the Hub's identifier of the licence that you give")
    command.add_argument("--base_model", help="the base's id on the Hub, where it was loaded from a folder")
    command.add_argument("--base_revision", help="the base's commit, where the run did not record it")
    command.add_argument("--merge", action="store_true", help="publish the adapter merged into its base")
    command.add_argument("--require_positive_transfer", action="store_true", help="refuse a run whose transfer is not")
    command.add_argument("--min_retention", type=float, help="refuse a run that kept less of what its base could do")
    command.add_argument(
        "--allow", nargs="+", default=[], metavar="TEXT", help="strings that the scan finds and may be public"
    )
    command.add_argument("--commit_message", help="the commit's title")
    command.set_defaults(run=_publish)


def _publish(options: argparse.Namespace) -> object:
    return publish(
        options.run_dir,
        options.repo_id,
        private=not options.public,
        dry_run=options.dry_run,
        license=options.license,
        base_model=options.base_model,
        base_revision=options.base_revision,
        merge=options.merge,
        require_positive_transfer=options.require_positive_transfer,
        min_retention=options.min_retention,
        allow=tuple(options.allow),
        commit_message=options.commit_message,
    )


def _add_adapters(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("adapters", help="list and compare the adapters of a base")
    listing.configure(command)
    command.set_defaults(run=listing.run)


if __name__ == "__main__":
    sys.exit(main())
