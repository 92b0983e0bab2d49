"""What the Hub's endpoints have in common: the call, the answer, and the Hub that they work on."""

import itertools
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

from tests import hub_xet
from tests.hub_store import File, HubError, Repo, Store

Content = bytes | str | Path
PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_folders = itertools.count()


@dataclass
class Request:
    """One call, as the endpoints see it and as `hub.requests` logs it."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes = b""
    user: str | None = None
    role: str | None = None
    status: int = 0

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass
class Answer:
    """What an endpoint returns: JSON unless `data` is given."""

    json: object = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    data: bytes | None = None


class Hub:
    """What the endpoints work on.

    Args:
        url: where it is served.
        xet: offer xet, through a content store in a local folder, instead of LFS uploads.
        part_size: bytes; larger LFS files are uploaded in parts of this size.
        page_size: entries of a listing before it goes on at a `Link`.
    """

    def __init__(self, url: str, *, xet: bool = False, part_size: int = 1 << 30, page_size: int = 1000):
        self.url, self.xet, self.part_size, self.page_size = url, xet, part_size, page_size
        self.lock = threading.RLock()
        self.store = Store()
        self.races: dict[str, dict[str, bytes]] = {}  # what lands just before the next commit to a repository
        self.parts: dict[str, dict[int, bytes]] = {}  # of multipart uploads that are not complete, by sha256
        self.received: list[bytes] = []  # bodies, what they hold in base64 or in xet, and the addresses asked for
        self.cas = Path(tempfile.gettempdir()) / f"hub-xet-{os.getpid()}-{next(_folders)}"

    def seed(
        self,
        repo_id: str,
        files: Mapping[str, Content],
        *,
        private: bool = False,
        gated: str | bool = False,
        repo_type: str = "model",
        user: str | None = None,
        revision: str = "main",
        message: str = "seeded",
    ) -> str:
        """Commits files over the repository, which is made if it is new. Returns the commit's sha."""
        with self.lock:
            author = user or repo_id.partition("/")[0]
            repo = self.store.repos.get((repo_type, repo_id)) or self.store.create(repo_type, repo_id, author, private)
            repo.gated = gated or repo.gated
            new = {path: self.store.keep(path, as_bytes(data)) for path, data in files.items()}
            ref = repo.ref_name(revision) or f"refs/heads/{revision}"
            before = repo.at(ref if ref in repo.refs else "main").files
            return self.store.commit(repo, ref, {**before, **new}, author, message).sha

    def race(self, repo_id: str, files: Mapping[str, Content]) -> None:
        """Just before the next commit to the repository is handled, another one with these files lands on main."""
        self.races[repo_id] = {path: as_bytes(data) for path, data in files.items()}

    def content(self, file: File) -> bytes:
        if file.sha256 not in self.store.blobs and file.xet:
            self.store.blobs[file.sha256] = hub_xet.read(self.cas, file.xet, file.size)
            self.received.append(self.store.blobs[file.sha256])
        return self.store.blobs[file.sha256]

    def signed_in(self, request: Request) -> str:
        """The user, if the call may change anything at all."""
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if request.role != "write":
            raise HubError(403, "This token may only read")
        return request.user

    def writable(self, request: Request, namespace: str) -> None:
        if not self.store.owns(namespace, self.signed_in(request)):
            raise HubError(403, f"You don't have the rights to write to {namespace}")

    def address(self, repo: Repo) -> str:
        return f"{self.url}/{PREFIX[repo.type]}{repo.id}"


def as_bytes(data: Content) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data.encode() if isinstance(data, str) else data
