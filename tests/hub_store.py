"""What a Hub keeps: users, repositories with their commits and refs, and blobs. No HTTP here."""

import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

LFS_OVER = 10_000_000  # bytes: the Hub keeps larger files in LFS whatever they are called
_LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot"
    " *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst"
    " *tfevents*"
)
LFS_PATTERNS = tuple(_LFS_PATTERNS.split())
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class HubError(Exception):
    """An answer that is no success: a status, the Hub's error code and a message."""

    def __init__(self, status: int, message: str, code: str | None = None, body: Mapping[str, object] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, {"error": message, **(body or {})}


@dataclass(frozen=True)
class File:
    """One file of a commit. `oid` is git's name of it: of the blob itself, or of the LFS pointer to it."""

    sha256: str
    size: int
    lfs: bool
    oid: str
    xet: str | None = None

    @property
    def pointer(self) -> dict[str, int]:
        return {"size": self.size, "pointerSize": len(lfs_pointer(self.sha256, self.size))}

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One state of a repository, complete: `files` holds every path."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Discussion:
    """A discussion; with a `ref` and a `base` commit it is a pull request."""

    num: int
    title: str
    author: str
    date: str
    ref: str | None = None
    base: str | None = None
    status: str = "open"
    merged: str | None = None
    events: list[dict[str, object]] = field(default_factory=list)


@dataclass
class Repo:
    """A repository: commits by sha, and refs by their full git names."""

    id: str
    type: str
    created: str
    private: bool = False
    gated: str | bool = False
    allowed: set[str] = field(default_factory=set)  # who has been granted access to a gated repository
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def pulls(self) -> list[Discussion]:
        return [discussion for discussion in self.discussions if discussion.ref]

    def ref_name(self, revision: str) -> str | None:
        """The full name of the branch, tag or pull request called `revision`."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit that `revision` names: a branch, a tag, refs/pr/1 or a sha (seven digits or more)."""
        if name := self.ref_name(revision):
            return self.commits[self.refs[name]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to `revision`, newest first."""
        commits = [self.at(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits


def is_lfs(path: str, size: int) -> bool:
    name = path.rpartition("/")[2]
    return size > LFS_OVER or (size > 0 and any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS))


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass
class Token:
    """An access token: whose it is, what it may do, and whether its time is over."""

    user: str
    role: str = "write"
    expired: bool = False


class Store:
    """Users, tokens, repositories and blobs, in memory. Its clock moves a second per event, so runs repeat."""

    def __init__(self) -> None:
        self.users: dict[str, list[str]] = {}  # name -> the organisations the user belongs to
        self.tokens: dict[str, Token] = {}
        self.repos: dict[tuple[str, str], Repo] = {}  # by (type, id)
        self.blobs: dict[str, bytes] = {}  # by sha256
        self.xet: dict[str, tuple[str, int]] = {}  # sha256 -> (xet hash, size) of what lies in the content store
        self._ticks = itertools.count()

    def now(self) -> str:
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(self._ticks))
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    # -- who may do what ----------------------------------------------------------------------------------------------

    def add_user(self, name: str, orgs: Iterable[str] = (), role: str = "write") -> str:
        """A new token of the user, who is made if new and joins `orgs`. The same calls give the same tokens."""
        self.users.setdefault(name, []).extend(org for org in orgs if org not in self.users.get(name, []))
        token = "hf_" + hashlib.sha256(f"{name} {len(self.tokens)}".encode()).hexdigest()[:34]
        self.tokens[token] = Token(name, role)
        return token

    def may_read(self, repo: Repo, user: str | None) -> bool:
        return not repo.private or self.owns(repo.namespace, user)

    def owns(self, namespace: str, user: str | None) -> bool:
        return user is not None and (user == namespace or namespace in self.users.get(user, []))

    def find(self, repo_type: str, repo_id: str, user: str | None) -> Repo:
        """The repository, if it exists and the user may know that it does."""
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or not self.may_read(repo, user):
            status, message = (401, "Invalid username or password.") if user is None else (404, "Repository not found")
            raise HubError(status, message, "RepoNotFound")
        return repo

    def check_gate(self, repo: Repo, user: str | None) -> None:
        if repo.gated and not self.owns(repo.namespace, user) and user not in repo.allowed:
            message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
            raise HubError(401 if user is None else 403, message, "GatedRepo")

    # -- what is kept -------------------------------------------------------------------------------------------------

    def create(self, repo_type: str, repo_id: str, author: str, private: bool = False) -> Repo:
        """A new repository with the first commit that the Hub makes itself."""
        repo = Repo(repo_id, repo_type, self.now(), private)
        self.repos[repo_type, repo_id] = repo
        self.commit(repo, "refs/heads/main", {".gitattributes": self.keep(".gitattributes", GIT_ATTRIBUTES)}, author,
                    "initial commit")  # fmt: skip
        return repo

    def keep(self, path: str, data: bytes, lfs: bool | None = None) -> File:
        """The file that stands for `data` in a commit; the data goes to the blobs."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        lfs = is_lfs(path, len(data)) if lfs is None else lfs
        return File(sha256, len(data), lfs, git_blob(lfs_pointer(sha256, len(data)) if lfs else data))

    def large_file(self, sha256: str, size: int | None) -> File:
        """The LFS file of that sha256, which must have been uploaded."""
        xet, real = self.xet.get(sha256, (None, 0))
        if sha256 in self.blobs:
            real = len(self.blobs[sha256])
        elif xet is None:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        if size not in (None, real):
            raise HubError(400, f"LFS object {sha256} has {real} bytes, not {size}")
        return File(sha256, real, True, git_blob(lfs_pointer(sha256, real)), xet)

    def commit(
        self,
        repo: Repo,
        ref: str,
        files: dict[str, File],
        author: str,
        title: str,
        message: str = "",
        squash: bool = False,
    ) -> Commit:
        """Moves `ref` to a new commit with exactly these files."""
        parent = None if squash else repo.refs.get(ref)
        date = self.now()
        names = {path: file.oid for path, file in sorted(files.items())}
        sha = hashlib.sha1(json.dumps([repo.id, parent, author, title, message, date, names]).encode()).hexdigest()
        repo.commits[sha] = Commit(sha, parent, title, message, author, date, dict(sorted(files.items())))
        repo.refs[ref] = sha
        return repo.commits[sha]

    def merge(self, repo: Repo, pull: Discussion, author: str) -> Commit:
        """Applies to main what the pull request changed since it was opened."""
        assert pull.base is not None
        assert pull.ref is not None
        base, head = repo.commits[pull.base].files, repo.at(pull.ref).files
        files = {path: file for path, file in repo.at("main").files.items() if path in head or path not in base}
        files |= {path: file for path, file in head.items() if base.get(path) != file}
        pull.status = "merged"
        commit = self.commit(repo, "refs/heads/main", files, author, f"{pull.title} (#{pull.num})")
        pull.merged = commit.sha
        return commit
