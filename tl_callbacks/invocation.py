"""How a run was started: the command line without secrets, and the commit of the script."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MASK = "<MASKED>"
_TIMEOUT = 5.0  # seconds for one question to git
# `tokenizer` is no secret.
_SECRET_NAME = re.compile(r"token(?!i[sz])|key|secret|passw|credential", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{10,}|(?<=://)[^/@\s]+(?=@)")


def command() -> list[str] | None:
    """Return the command line that started this process, secrets masked; None in a notebook or a shell.

    `python script.py ...` or `python -m package.module ...`, whatever interpreter or launcher it was. The script is
    named from the working directory where it lies below it.

    Example:
        >>> isinstance(command(), list | None)
        True
    """
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__"), *masked(sys.argv[1:])]
    if getattr(main, "__file__", None) is None or not sys.argv or not os.path.isfile(sys.argv[0]):
        return None
    script, here = Path(os.path.abspath(sys.argv[0])), Path.cwd()
    if script.suffix != ".py":
        return [script.name, *masked(sys.argv[1:])]
    named = str(script.relative_to(here)) if script.is_relative_to(here) else sys.argv[0]
    return ["python", named, *masked(sys.argv[1:])]


def masked(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with `<MASKED>` for each secret.

    A secret is what an option gets whose name has token, key, secret, password or credential in it (`--hub_token x`,
    `--hub_token=x`, `hub_token=x`), what looks like a token of the Hub, and who logs in within an address.

    Example:
        >>> masked(["--hub_token", "hf_x", "--lr", "1", "--api-key=y", "https://me:z@example.org"])
        ['--hub_token', '<MASKED>', '--lr', '1', '--api-key=<MASKED>', 'https://<MASKED>@example.org']
    """
    found, secret = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        named = _SECRET_NAME.search(name) is not None
        if argument.startswith("-"):
            secret = named and not equals
        if equals and named and not secret:
            found.append(f"{_SECRET_VALUE.sub(MASK, name)}={MASK}")
        else:
            hidden = secret and not argument.startswith("-")
            found.append(MASK if hidden else _SECRET_VALUE.sub(MASK, argument))
    return found


def commit() -> dict[str, Any] | None:
    """Return the commit of the git repository that holds the script, and whether its files have changed since.

    None where there is no git, no repository or no script, where the repository does not hold the script, and for
    what is installed. Files that git does not know do not count as a change.

    Example:
        >>> isinstance(commit(), dict | None)
        True
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or {"site-packages", "dist-packages"} & set(Path(script).parts):
        return None
    script = os.path.abspath(script)
    sha = _git(script, "rev-parse", "--verify", "HEAD")
    if sha is None or _git(script, "ls-files", "--error-unmatch", "--", script) is None:
        return None
    changed = _git(script, "status", "--porcelain", "--untracked-files=no")
    return None if changed is None else {"sha": sha, "dirty": bool(changed)}


def _git(script: str, *arguments: str) -> str | None:
    """Return what git says of the folder of a script; None if there is none, or it takes too long or fails."""
    call = ["git", "--no-optional-locks", "-C", os.path.dirname(script), *arguments]
    # A git hook that runs a training has these set, for the hook's repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        said = subprocess.run(
            call, capture_output=True, text=True, timeout=_TIMEOUT, env=environment, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return said.stdout.strip() if said.returncode == 0 else None
