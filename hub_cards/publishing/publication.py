"""What was published, or would be: files, card, and the differences to what is on the Hub."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from hub_cards.publishing.remote import CARD, Remote
from hub_cards.publishing.staging import Staged


@dataclass(frozen=True)
class Publication:
    """What was published, or what a dry run would publish. `str()` shows all of it.

    Args:
        repo_id: the repository.
        url: its address.
        commit: the commit on the Hub that holds it; None in a dry run.
        changed: whether anything differs from what was there.
        files: every file of the publication, and its size in bytes.
        left_out: files and folders of the run that are not published.
        added: files that were not there.
        modified: files that were there with other contents.
        deleted: files of an earlier publication that this one does not have.
        card: the text of the card.
        diff: of the card and of the list of files, against what was there.

    Example:
        >>> publication = Publication("org/name", "https://example.com/org/name", None, True, {"README.md": 2048})
        >>> print(str(publication).splitlines()[0])
        org/name: would be published (dry run)
    """

    repo_id: str
    url: str
    commit: str | None
    changed: bool
    files: Mapping[str, int]
    left_out: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    modified: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    card: str = field(default="", repr=False)
    diff: str = field(default="", repr=False)

    def __str__(self) -> str:
        if not self.changed:
            what = "nothing has changed"
        elif self.commit is None:
            what = "would be published (dry run)"
        else:
            what = f"published as {self.commit}"
        marks = {**dict.fromkeys(self.added, "+"), **dict.fromkeys(self.modified, "~")}
        rows = [f"  {marks.get(name, ' ')} {size:>15,}  {name}" for name, size in self.files.items()]
        rows += [f"  - {'':>15}  {name}" for name in self.deleted]
        parts = [f"{self.repo_id}: {what}", self.url, "", "files, in bytes:", *rows]
        if self.left_out:
            parts += ["", f"left out: {', '.join(self.left_out)}"]
        if self.commit is None:
            parts += ["", "card:", "", self.card]
        if self.diff:
            parts += ["", "changes:", "", self.diff]
        return "\n".join(parts)


def compared(repo_id: str, url: str, staged: Staged, there: Remote | None) -> Publication:
    """Return what publishing a staging folder would change of a repository, without a commit yet.

    Args:
        repo_id: the repository.
        url: its address.
        staged: the staging folder, complete.
        there: the repository as it was read; None: there is none.
    """
    files = staged.files
    before = there or Remote("", True)
    differing, stale = before.differing(files), before.stale(files)
    card = files[CARD].read_text(encoding="utf-8")
    old, new = sorted(before.hashes), sorted((set(before.hashes) | set(files)) - set(stale))
    diff = [
        *difflib.unified_diff(
            (before.card or "").splitlines(), card.splitlines(), f"a/{CARD}", f"b/{CARD}", lineterm=""
        ),
        *difflib.unified_diff(old, new, "a/files", "b/files", lineterm=""),
    ]
    return Publication(
        repo_id=repo_id,
        url=url,
        commit=None,
        changed=bool(differing or stale),
        files={name: path.stat().st_size for name, path in files.items()},
        left_out=staged.left_out,
        added=tuple(name for name in differing if name not in before.hashes),
        modified=tuple(name for name in differing if name in before.hashes),
        deleted=stale,
        card=card,
        diff="\n".join(diff),
    )
