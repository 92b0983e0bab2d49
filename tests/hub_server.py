"""A Hub on the loopback interface: what the Hugging Face clients ask of hf.co, with faults on demand.

`with HubServer() as hub:` serves until the block ends; by hand: `python -m tests.hub_server --port 8000`.
Each function under `# -- endpoints` answers one row of the table of calls that the clients make.
"""

import argparse
import base64
import contextlib
import email.utils
import fnmatch
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests import hub_metadata, hub_xet
from tests.hub_store import Commit, Discussion, File, HubError, Repo, Store, is_lfs

LOCAL = "127.0.0.1"
PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}


@dataclass
class Request:
    """One call, as the endpoints see it and as `hub.requests` logs it."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
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


@dataclass
class Fault:
    """Something that goes wrong for the next `times` requests that match (None: for all)."""

    kind: str  # fail | cut | slow | lose
    method: str | None
    path: str
    times: int | None
    status: int = 503
    message: str = ""
    after_bytes: int = 0
    seconds: float = 0.0

    def matches(self, request: Request) -> bool:
        return self.times != 0 and self.method in (None, request.method) and re.search(self.path, request.path) is not None


Endpoint = Callable[..., Answer | object]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []
PLACES = {
    "{T}": "(?P<kind>model|dataset|space)s",
    "{P}": "(?:(?P<kind>dataset|space)s/)?",
    "{id}": "(?P<repo_id>[^/]+/[^/]+?)",
    "{rev}": "(?P<revision>[^/]+)",
    "{path}": "(?P<path>.+)",
    "{n}": "(?P<n>[0-9]+)",
    "{oid}": "(?P<oid>[0-9a-f]{64})",
    "{x}": "(?P<x>[^/]+)",
}


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    """Registers an endpoint. HEAD goes where GET goes."""
    for name, regex in PLACES.items():
        pattern = pattern.replace(name, regex)

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class HubServer:
    """A Hub in a thread. `hub.url` is its address; it forgets everything at `reset()` and ends with its `with` block.

    Args:
        port: the port; 0 takes a free one.
        xet: offer xet, through a content store in a local folder, instead of LFS uploads.
        part_size: bytes; larger LFS files are uploaded in parts of this size.
        page_size: entries of a listing before it goes on at a `Link`.
    """

    def __init__(self, *, port: int = 0, xet: bool = False, part_size: int = 1 << 30, page_size: int = 1000):
        self._port, self._defaults = port, {"xet": xet, "part_size": part_size, "page_size": page_size}
        self.lock = threading.RLock()
        self.xet, self.part_size, self.page_size = xet, part_size, page_size
        self._folder = tempfile.TemporaryDirectory(prefix="hub-xet-")
        self.reset()

    def reset(self) -> None:
        """An empty Hub with no users, no log and no faults, as it was constructed."""
        with self.lock:
            self.store = Store()
            self.requests: list[Request] = []
            self.received: list[bytes] = []  # bodies, what they hold in base64, and the addresses asked for
            self.errors: list[str] = []  # tracebacks of what should not happen in here
            self.faults: list[Fault] = []
            self._races: dict[str, dict[str, bytes]] = {}
            self._parts: dict[str, dict[int, bytes]] = {}
            for name, value in self._defaults.items():
                setattr(self, name, value)
            self.cas = Path(tempfile.mkdtemp(dir=self._folder.name))

    def start(self) -> "HubServer":
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Threads((LOCAL, self._port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://{LOCAL}:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="hub").start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what tests set up and look at ------------------------------------------------------------------------------

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process that is to meet this Hub: ours, with `home` for its caches and `token` to log in."""
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_XET_CACHE")
        kept = {key: value for key, value in os.environ.items() if key not in names}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "0" if self.xet else "1"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def add_user(self, name: str, orgs: tuple[str, ...] = (), role: str = "write") -> str:
        """A token of the user, who is made if new and joins the organisations. `role="read"`: it may not write."""
        with self.lock:
            return self.store.add_user(name, orgs, role)

    def expire_token(self, token: str) -> None:
        """From now on the token is refused with 401."""
        self.store.tokens[token].expired = True

    @property
    def repos(self) -> dict[str, Repo]:
        """The repositories by id; those of datasets and spaces as datasets/ns/name and spaces/ns/name."""
        return {PREFIX[kind] + repo_id: repo for (kind, repo_id), repo in self.store.repos.items()}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files at a revision, with the `.gitattributes` that the Hub itself puts into every repository."""
        with self.lock:
            return {path: self.content(file) for path, file in self.repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        return self.repos[repo_id].history(revision)

    def ever_saw(self, secret: str | bytes) -> bool:
        """Whether the secret is in anything that was ever sent here: bodies, base64 inside them, files and addresses."""
        secret = secret.encode() if isinstance(secret, str) else secret
        with self.lock:
            return any(secret in body for body in [*self.received, *self.store.blobs.values()])

    def seed(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path],
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
            new = {path: self.store.keep(path, _bytes(data)) for path, data in files.items()}
            ref = repo.ref_name(revision) or f"refs/heads/{revision}"
            before = repo.at(ref if ref in repo.refs else "main").files
            return self.store.commit(repo, ref, {**before, **new}, author, message).sha

    # -- faults ------------------------------------------------------------------------------------------------------

    def fail(self, *, times: int | None = 1, status: int = 503, method: str | None = None, path: str = "", message: str = "") -> None:  # fmt: skip
        """The next requests are answered with an error and not carried out."""
        self.faults.append(Fault("fail", method, path, times, status=status, message=message or "planned failure"))

    def forbid_commits(self, times: int | None = None) -> None:
        """Commits are answered with 403."""
        self.fail(times=times, status=403, method="POST", path="/commit/", message="You may not commit here")

    def cut(self, *, path: str = "", after_bytes: int = 0, times: int | None = 1, method: str | None = None) -> None:
        """The connection breaks after so many bytes: of the body that comes in, or of a GET's answer, whose length is
        announced in full."""
        self.faults.append(Fault("cut", method, path, times, after_bytes=after_bytes))

    def slow(self, *, path: str = "", seconds: float = 0.2, times: int | None = None, method: str | None = None) -> None:
        """Answers come late."""
        self.faults.append(Fault("slow", method, path, times, seconds=seconds))

    def lose_answer(self, *, path: str = "", times: int | None = 1, method: str | None = None) -> None:
        """The request is carried out, and the connection breaks before the answer."""
        self.faults.append(Fault("lose", method, path, times))

    def race(self, repo_id: str, files: Mapping[str, bytes | str | Path]) -> None:
        """Just before the next commit to the repository is handled, another one with these files lands on main."""
        self._races[repo_id] = {path: _bytes(data) for path, data in files.items()}

    def take_fault(self, kind: str, request: Request) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.kind == kind and fault.matches(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
            return fault

    # -- inside ------------------------------------------------------------------------------------------------------

    def content(self, file: File) -> bytes:
        if file.sha256 not in self.store.blobs and file.xet:
            self.store.blobs[file.sha256] = hub_xet.read(self.cas, file.xet, file.size)
        return self.store.blobs[file.sha256]

    def answer(self, request: Request) -> Answer:
        """Finds the endpoint and calls it. Every outcome is an answer."""
        try:
            self._log_in(request)
            if fault := self.take_fault("fail", request):
                raise HubError(fault.status, fault.message)
            method = "GET" if request.method == "HEAD" else request.method
            for verb, pattern, endpoint in ROUTES:
                if verb == method and (match := pattern.fullmatch(request.path)):
                    places = {name: unquote(value or "") for name, value in match.groupdict().items()}
                    if "kind" in places:
                        places["kind"] = places["kind"] or "model"
                    result = endpoint(self, request, **places)
                    return result if isinstance(result, Answer) else Answer(result)
            raise HubError(404, f"No such endpoint: {request.method} {request.path}", "RepoNotFound")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            headers |= getattr(error, "headers", {})
            return Answer(error.body, error.status, headers)
        except Exception:
            self.errors.append(traceback.format_exc())
            return Answer({"error": "the test server itself failed"}, 500)

    def _log_in(self, request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return
        token = self.store.tokens.get(given)
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        if token.expired:
            raise HubError(401, "User Access Token is expired")
        request.user, request.role = token.user, token.role

    def writable(self, request: Request, namespace: str) -> None:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self.store.owns(namespace, request.user) or request.role != "write":
            raise HubError(403, f"You don't have the rights to write to {namespace}")

    def address(self, repo: Repo) -> str:
        return f"{self.url}/{PREFIX[repo.type]}{repo.id}"


def _bytes(data: bytes | str | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data.encode() if isinstance(data, str) else data


# -- endpoints: repositories ------------------------------------------------------------------------------------------


@route("POST", "/api/repos/create")
def create(hub: HubServer, request: Request) -> Answer:
    wanted = request.json()
    namespace = wanted.get("organization") or request.user or ""
    hub.writable(request, namespace)
    kind, repo_id = wanted.get("type") or "model", f"{namespace}/{wanted['name']}"
    if not hub_metadata.is_repo_id(repo_id):
        raise HubError(400, f"Invalid repo name: {repo_id}")
    if repo := hub.store.repos.get((kind, repo_id)):
        raise HubError(409, f"You already created this {kind} repo", body={"url": hub.address(repo)})
    private = wanted.get("private") or wanted.get("visibility") == "private"
    repo = hub.store.create(kind, repo_id, str(request.user), bool(private))
    return Answer({"url": hub.address(repo), "name": repo_id, "id": _id(repo)})


@route("DELETE", "/api/repos/delete")
def delete(hub: HubServer, request: Request) -> object:
    wanted = request.json()
    repo = hub.store.find(
        wanted.get("type") or "model", f"{wanted.get('organization') or request.user}/{wanted['name']}", request.user
    )
    hub.writable(request, repo.namespace)
    del hub.store.repos[repo.type, repo.id]
    return {}


@route("POST", "/api/repos/move")
def move(hub: HubServer, request: Request) -> object:
    wanted = request.json()
    repo = hub.store.find(wanted["type"], wanted["fromRepo"], request.user)
    hub.writable(request, repo.namespace)
    hub.writable(request, wanted["toRepo"].partition("/")[0])
    if (repo.type, wanted["toRepo"]) in hub.store.repos:
        raise HubError(409, "There is already a repository with this name")
    del hub.store.repos[repo.type, repo.id]
    repo.id = wanted["toRepo"]
    hub.store.repos[repo.type, repo.id] = repo
    return {}


@route("PUT", "/api/{T}/{id}/settings")
def settings(hub: HubServer, request: Request, kind: str, repo_id: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.writable(request, repo.namespace)
    wanted = request.json()
    repo.gated = wanted.get("gated", repo.gated)
    repo.private = wanted["visibility"] == "private" if "visibility" in wanted else wanted.get("private", repo.private)
    return {"private": repo.private, "gated": repo.gated}


@route("GET", "/api/{T}/{id}/auth-check(?P<write>/write)?")
def auth_check(hub: HubServer, request: Request, kind: str, repo_id: str, write: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.store.check_gate(repo, request.user)
    if write:
        hub.writable(request, repo.namespace)
    return {}


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> object:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "id": org, "name": org, "roleInOrg": "admin"} for org in hub.store.users[request.user]]
    access = {"displayName": "test", "role": request.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": access}
    user = {"type": "user", "id": request.user, "name": request.user, "fullname": request.user}
    return user | {"isPro": False, "orgs": orgs, "auth": auth}


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: HubServer, request: Request) -> object:
    return {}


# -- endpoints: commits -----------------------------------------------------------------------------------------------


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Answer:
    errors, warnings = hub_metadata.validate(request.json()["content"])
    messages = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(messages, 400 if errors else 200)


@route("POST", "/api/{T}/{id}/preupload/{rev}")
def preupload(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo, asked = hub.store.find(kind, repo_id, request.user), request.json()
    if not request.flag("create_pr"):
        hub.writable(request, repo.namespace)
    there = repo.at(revision).files
    ignored = asked.get("gitIgnore")
    if ignored is None:
        ignored = hub.content(there[".gitignore"]).decode() if ".gitignore" in there else ""
    rules = [rule.strip().rstrip("/") for rule in ignored.splitlines() if rule.strip() and not rule.startswith("#")]
    answers = []
    for file in asked["files"]:
        path = file["path"]
        lfs = is_lfs(path, file["size"])
        names = [path, *path.split("/")]
        skip = any(fnmatch.fnmatch(name, rule.lstrip("/")) for rule in rules for name in names)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": skip}
        answers.append(answer | ({"oid": there[path].etag} if path in there else {}))
    return {"files": answers, "commitOid": repo.at(revision).sha}


@route("POST", r"/{P}{id}\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request, kind: str, repo_id: str) -> object:
    repo, asked, objects = hub.store.find(kind, repo_id, request.user), request.json(), []
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    transfer = "basic"
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in hub.store.blobs:
            objects.append({"oid": oid, "size": size})
            continue
        upload: dict[str, object] = {"href": f"{hub.url}/storage/{oid}"}
        if size > hub.part_size and "multipart" in asked["transfers"]:
            transfer, count = "multipart", -(-size // hub.part_size)
            parts = {f"{n:05d}": f"{hub.url}/storage/{oid}/{n}" for n in range(1, count + 1)}
            upload = {"href": f"{hub.url}/storage/{oid}/complete", "header": {"chunk_size": str(hub.part_size), **parts}}
        verify = {"href": f"{hub.address(repo)}.git/info/lfs/objects/verify"}
        objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    return {"transfer": transfer, "objects": objects}


def _store_large(hub: HubServer, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, f"the content does not have the sha256 {oid}")
    hub.store.blobs[oid] = data


@route("PUT", "/storage/{oid}")
def upload(hub: HubServer, request: Request, oid: str) -> object:
    _store_large(hub, oid, request.body)
    return {}


@route("PUT", "/storage/{oid}/{n}")
def upload_part(hub: HubServer, request: Request, oid: str, n: str) -> Answer:
    hub._parts.setdefault(oid, {})[int(n)] = request.body
    return Answer({}, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("POST", "/storage/{oid}/complete")
def complete(hub: HubServer, request: Request, oid: str) -> object:
    parts = hub._parts.get(oid, {})
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    if missing := set(numbers) - set(parts):
        raise HubError(400, f"parts {sorted(missing)} were never uploaded")
    _store_large(hub, oid, b"".join(parts[number] for number in sorted(numbers)))
    del hub._parts[oid]
    return {}


@route("POST", r"/{P}{id}\.git/info/lfs/objects/verify")
def lfs_verify(hub: HubServer, request: Request, kind: str, repo_id: str) -> object:
    asked = request.json()
    if len(hub.store.blobs.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, "the object was not uploaded in full", "EntryNotFound")
    return {}


@route("POST", "/api/{T}/{id}/commit/{rev}")
def commit(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    pull_request = request.flag("create_pr")
    if not pull_request:
        hub.writable(request, repo.namespace)
    if PREFIX[kind] + repo_id in hub._races:
        hub.seed(repo_id, hub._races.pop(PREFIX[kind] + repo_id), repo_type=kind, user="somebody", message="a race")
    ref, before = repo.ref_name(revision), repo.at(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(400, f"{revision} is no branch")
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = header["value"]
    if header.get("parentCommit") not in (None, before.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = _apply(hub, dict(before.files), operations)
    title, message = header["summary"], header.get("description", "")
    result = {}
    if pull_request:
        pull = _open(hub, repo, title, str(request.user), message, pull_request=True)
        ref, result = str(pull.ref), {"pullRequestUrl": f"{hub.address(repo)}/discussions/{pull.num}"}
    made = hub.store.commit(repo, ref, files, str(request.user), title, message)
    return {"success": True, "commitUrl": f"{hub.address(repo)}/commit/{made.sha}", "commitOid": made.sha} | result


def _apply(hub: HubServer, files: dict[str, File], operations: list[dict[str, Any]]) -> dict[str, File]:
    for operation in operations:
        value = operation["value"]
        path = value["path"]
        match operation["key"]:
            case "file":
                data = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
                files[path] = hub.store.keep(path, data, lfs=False)
            case "lfsFile":
                if hub.xet and value["oid"] not in hub.store.blobs:
                    hub.store.xet.update(hub_xet.hashes(hub.cas))
                files[path] = hub.store.large_file(value["oid"], value.get("size"))
                hub.content(files[path])
            case "deletedFile":
                if files.pop(path, None) is None:
                    raise HubError(404, f"{path} does not exist", "EntryNotFound")
            case "deletedFolder":
                inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
                if not inside:
                    raise HubError(404, f"{path} does not exist", "EntryNotFound")
                for name in inside:
                    del files[name]
            case other:
                raise HubError(400, f"unknown operation {other}")
    folders = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
    if clash := folders & set(files):
        raise HubError(400, f"{sorted(clash)} are both files and folders")
    return files


# -- endpoints: reading -----------------------------------------------------------------------------------------------


def _id(repo: Repo) -> str:
    return hashlib.sha1(f"{repo.type} {repo.created}".encode()).hexdigest()[:24]


def info(hub: HubServer, repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, object]:
    """Everything the Hub says about a repository at a commit; listings and `expand` take parts of it."""
    data, config = {}, {}
    with contextlib.suppress(KeyError, ValueError, yaml.YAMLError):
        data = hub_metadata.metadata(hub.content(commit.files["README.md"]).decode())
    with contextlib.suppress(KeyError, ValueError):
        config = json.loads(hub.content(commit.files["config.json"]))
    data, config = (value if isinstance(value, dict) else {} for value in (data, config))
    # What YAML reads as a date is a string in JSON.
    data = json.loads(json.dumps(data, default=str))
    siblings = []
    for path, file in commit.files.items():
        siblings.append({"rfilename": path})
        if blobs:
            siblings[-1] |= {"size": file.size, "blobId": file.oid}
            siblings[-1] |= {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}
    found = {"_id": _id(repo), "id": repo.id, "author": repo.namespace, "sha": commit.sha, "lastModified": commit.date}
    found |= {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
    found |= {"createdAt": repo.created, "siblings": siblings, "cardData": data or None}
    found |= {"usedStorage": sum(file.size for file in commit.files.values())}
    if repo.type != "model":
        return found | {"tags": hub_metadata.dataset_tags(data)}
    paths = set(commit.files)
    found |= {"modelId": repo.id, "tags": hub_metadata.tags(data, paths, config), "config": config or None}
    found |= {key: data[key] for key in ("pipeline_tag", "library_name", "model-index") if data.get(key)}
    if data.get("base_model"):
        bases = data["base_model"] if isinstance(data["base_model"], list) else [data["base_model"]]
        found["baseModels"] = {"relation": hub_metadata.relation(data, paths), "models": [{"id": base} for base in bases]}
    if results := [path for path in paths if fnmatch.fnmatch(path, ".eval_results/*.yaml")]:
        found["evalResults"] = [
            {"filename": path, "data": entry}
            for path in sorted(results)
            for entry in json.loads(json.dumps(yaml.safe_load(hub.content(commit.files[path])), default=str))
        ]
    return found


@route("GET", "/api/{T}/{id}(?:/revision/{rev})?")
def repo_info(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    found = info(hub, repo, repo.at(revision or "main"), blobs=request.flag("blobs"))
    if wanted := request.query.get("expand"):
        return {key: value for key, value in found.items() if key in {"_id", "id", *wanted}}
    return found


@route("GET", "/api/{T}")
def listing(hub: HubServer, request: Request, kind: str) -> Answer:
    query = request.query
    repos = [repo for (of, _), repo in hub.store.repos.items() if of == kind and hub.store.may_read(repo, request.user)]
    found = [info(hub, repo, repo.at("main")) for repo in sorted(repos, key=lambda repo: repo.id)]
    found = [one for one in found if {*query.get("filter", []), *query.get("pipeline_tag", [])} <= {*one["tags"]}]
    found = [one for one in found if all(word.lower() in one["id"].lower() for word in query.get("search", []))]
    found = [one for one in found if query.get("author", [one["author"]])[0].lower() == one["author"].lower()]
    if "gated" in query:
        found = [one for one in found if bool(one["gated"]) == request.flag("gated")]
    if (key := query.get("sort", [""])[0]) in ("lastModified", "createdAt", "downloads", "likes"):
        found.sort(key=lambda one: one[key], reverse=True)
    brief = {"_id", "id", "modelId", "likes", "private", "downloads", "tags", "pipeline_tag", "library_name", "createdAt"}
    full = {"author", "sha", "lastModified", "gated", "disabled", "siblings"}
    keys = brief | (full if request.flag("full") else set()) | ({"cardData"} if request.flag("cardData") else set())
    keys = {"_id", "id", *query["expand"]} if "expand" in query else keys | ({"config"} if request.flag("config") else set())
    size = min(int(query.get("limit", [hub.page_size])[0]), hub.page_size)
    return _page(hub, request, [{key: value for key, value in one.items() if key in keys} for one in found], size)


def _page(hub: HubServer, request: Request, entries: list[Any], size: int | None = None) -> Answer:
    """One page of a listing, and the `Link` to the next one."""
    size, start = size or hub.page_size, int(request.query.get("cursor", ["0"])[0])
    more = {key: values for key, values in request.query.items() if key != "cursor"} | {"cursor": [str(start + size)]}
    query = "&".join(f"{quote(key)}={quote(value, safe='')}" for key, values in more.items() for value in values)
    link = {"Link": f'<{hub.url}{request.path}?{query}>; rel="next"'} if start + size < len(entries) else {}
    return Answer(entries[start : start + size], headers=link)


def _entries(repo: Repo, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """All files and folders of a commit by path."""
    found: dict[str, dict[str, Any]] = {}
    last = {"lastCommit": {"id": commit.sha, "title": commit.title, "date": commit.date}} if expand else {}
    for path, file in commit.files.items():
        for n in range(1, path.count("/") + 1):
            folder = "/".join(path.split("/")[:n])
            inside = [(name, one.oid) for name, one in commit.files.items() if name.startswith(folder + "/")]
            oid = hashlib.sha1(json.dumps(inside).encode()).hexdigest()
            found.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder} | last)
        found[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path} | last
        if file.lfs:
            found[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        if file.xet:
            found[path]["xetHash"] = file.xet
    return found


@route("GET", "/api/{T}/{id}/tree/{rev}(?:/{path})?")
def tree(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
    repo = hub.store.find(kind, repo_id, request.user)
    commit, folder = repo.at(revision), path.strip("/")
    entries = _entries(repo, commit, request.flag("expand"))
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    inside = [one for name, one in entries.items() if name.startswith(folder + "/" if folder else "")]
    depth = folder.count("/") + 1 if folder else 0
    chosen = [one for one in inside if request.flag("recursive") or one["path"].count("/") == depth]
    return _page(hub, request, chosen)


@route("POST", "/api/{T}/{id}/paths-info/{rev}")
def paths_info(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    form = parse_qs(request.body.decode())
    entries = _entries(repo, repo.at(revision), form.get("expand", ["false"])[0].lower() in ("1", "true"))
    return [entries[path.rstrip("/")] for path in form.get("paths", []) if path.rstrip("/") in entries]


@route("GET", "/{P}{id}/(?:resolve|raw)/{rev}/{path}")
def resolve(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.store.check_gate(repo, request.user)
    commit = repo.at(revision)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    file = commit.files.get(path)
    if file is None:
        message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Answer({"error": "Entry not found"}, 404, headers | message)
    headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
    headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)} if file.lfs else {}
    if file.xet and hub.xet:
        token = f"{hub.url}/api/{kind}s/{repo_id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
    data = hub.content(file)
    if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "")):
        first, last = asked.groups()
        start = int(first) if first else max(len(data) - int(last or 0), 0)
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        if start >= len(data):
            return Answer({}, 416, headers | {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return Answer(status=206, headers=headers, data=data[start : end + 1])
    return Answer(headers=headers, data=data)


# -- endpoints: refs and discussions ----------------------------------------------------------------------------------


@route("GET", "/api/{T}/{id}/refs")
def refs(hub: HubServer, request: Request, kind: str, repo_id: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)

    def under(prefix: str) -> list[dict[str, str]]:
        names = [ref for ref in repo.refs if ref.startswith(prefix)]
        return [{"name": r.removeprefix(prefix), "ref": r, "targetCommit": repo.refs[r]} for r in names]

    return {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "pullRequests": under("refs/pr/"), "converts": []}


def _new_ref(hub: HubServer, request: Request, repo: Repo, ref: str, at: str) -> object:
    hub.writable(request, repo.namespace)
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(at).sha
    return {}


def _drop_ref(hub: HubServer, request: Request, repo: Repo, ref: str) -> object:
    hub.writable(request, repo.namespace)
    if ref == "refs/heads/main":
        raise HubError(403, "Cannot delete branch main")
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    return {}


@route("POST", "/api/{T}/{id}/branch/{x}")
def create_branch(hub: HubServer, request: Request, kind: str, repo_id: str, x: str) -> object:
    start = request.json().get("startingPoint", "main")
    return _new_ref(hub, request, hub.store.find(kind, repo_id, request.user), f"refs/heads/{x}", start)


@route("DELETE", "/api/{T}/{id}/branch/{x}")
def delete_branch(hub: HubServer, request: Request, kind: str, repo_id: str, x: str) -> object:
    return _drop_ref(hub, request, hub.store.find(kind, repo_id, request.user), f"refs/heads/{x}")


@route("POST", "/api/{T}/{id}/tag/{rev}")
def create_tag(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    return _new_ref(hub, request, repo, f"refs/tags/{request.json()['tag']}", revision)


@route("DELETE", "/api/{T}/{id}/tag/{x}")
def delete_tag(hub: HubServer, request: Request, kind: str, repo_id: str, x: str) -> object:
    return _drop_ref(hub, request, hub.store.find(kind, repo_id, request.user), f"refs/tags/{x}")


@route("GET", "/api/{T}/{id}/commits/{rev}")
def commits(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    history = hub.store.find(kind, repo_id, request.user).history(revision)
    return _page(hub, request, [
        {"id": one.sha, "title": one.title, "message": one.message, "authors": [{"user": one.author}], "date": one.date}
        for one in history
    ])  # fmt: skip


@route("POST", "/api/{T}/{id}/super-squash/{rev}")
def super_squash(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.writable(request, repo.namespace)
    files, ref = repo.at(revision).files, f"refs/heads/{revision}"
    hub.store.commit(repo, ref, files, str(request.user), request.json()["message"], squash=True)
    return {}


def _open(hub: HubServer, repo: Repo, title: str, user: str, text: str, pull_request: bool) -> Discussion:
    num = len(repo.discussions) + 1
    made = Discussion(num, title, user, hub.store.now())
    if pull_request:
        made.ref, made.base = f"refs/pr/{num}", repo.refs["refs/heads/main"]
        repo.refs[made.ref] = made.base
    repo.discussions.append(made)
    _say(hub, made, user, text)
    return made


def _say(hub: HubServer, discussion: Discussion, user: str, text: str) -> dict[str, object]:
    data = {"edited": False, "hidden": False, "latest": {"raw": text}}
    return _event(hub, discussion, user, "comment", data)


def _event(hub: HubServer, discussion: Discussion, user: str, kind: str, data: object) -> dict[str, object]:
    named = {"id": f"{discussion.num}-{len(discussion.events)}", "type": kind, "createdAt": hub.store.now()}
    discussion.events.append(named | {"author": {"name": user}, "data": data})
    return discussion.events[-1]


def _described(repo: Repo, one: Discussion) -> dict[str, object]:
    found = {"num": one.num, "title": one.title, "author": {"name": one.author}, "createdAt": one.date}
    found |= {"status": one.status, "repo": {"name": repo.id, "type": repo.type}, "isPullRequest": one.ref is not None}
    changes = {"base": "refs/heads/main", "mergeCommitId": one.merged}
    return found | ({"changes": changes, "filesWithConflicts": []} if one.ref else {})


@route("POST", "/api/{T}/{id}/discussions")
def open_discussion(hub: HubServer, request: Request, kind: str, repo_id: str) -> object:
    repo, wanted = hub.store.find(kind, repo_id, request.user), request.json()
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    text, pull_request = wanted.get("description", ""), wanted.get("pullRequest", False)
    return _described(repo, _open(hub, repo, wanted["title"], request.user, text, pull_request))


@route("GET", "/api/{T}/{id}/discussions")
def list_discussions(hub: HubServer, request: Request, kind: str, repo_id: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    return {"count": len(repo.discussions), "start": 0, "discussions": [_described(repo, one) for one in repo.discussions]}


def _discussion(repo: Repo, n: str) -> Discussion:
    if not 1 <= int(n) <= len(repo.discussions):
        raise HubError(404, f"there is no discussion {n}", "EntryNotFound")
    return repo.discussions[int(n) - 1]


@route("GET", "/api/{T}/{id}/discussions/{n}")
def show_discussion(hub: HubServer, request: Request, kind: str, repo_id: str, n: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    one = _discussion(repo, n)
    return _described(repo, one) | {"events": one.events}


@route("POST", "/api/{T}/{id}/discussions/{n}/(?P<verb>comment|status|merge)")
def change_discussion(hub: HubServer, request: Request, kind: str, repo_id: str, n: str, verb: str) -> object:
    repo, wanted = hub.store.find(kind, repo_id, request.user), request.json()
    hub.writable(request, repo.namespace)
    one, user = _discussion(repo, n), str(request.user)
    if verb == "comment":
        return {"newMessage": _say(hub, one, user, wanted["comment"])}
    if verb == "merge":
        if one.ref is None or one.status != "open":
            raise HubError(400, f"discussion {n} is no open pull request")
        hub.store.merge(repo, one, user)
    else:
        one.status = wanted["status"]
    return {"newStatus": _event(hub, one, user, "status-change", {"status": one.status})}


# -- endpoints: xet ---------------------------------------------------------------------------------------------------


@route("GET", "/api/{T}/{id}/xet-(?P<verb>read|write)-token/{rev}")
def xet_token(hub: HubServer, request: Request, kind: str, repo_id: str, verb: str, revision: str) -> Answer:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.store.check_gate(repo, request.user)
    if verb == "write" and revision != "None":  # None stands for a pull request that does not exist yet
        hub.writable(request, repo.namespace)
    if not hub.xet:
        raise HubError(404, "xet is not enabled", "EntryNotFound")
    address, until = f"local://{hub.cas}", int(time.time()) + 3600
    headers = {"X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until), "X-Xet-Cas-Url": address}
    return Answer({"accessToken": "xet", "exp": until, "casUrl": address}, headers=headers)


# -- HTTP -------------------------------------------------------------------------------------------------------------


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Cut(Exception):
    """The connection is to break now."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True
    server_hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)
            yield piece
        if left:
            raise _Cut  # by the client

    def _read_body(self, request: Request) -> None:
        hub, parts, size, cut = self.server_hub, [], 0, None
        if request.method in ("POST", "PUT"):
            cut = hub.take_fault("cut", request)
        try:
            for piece in self._pieces():
                parts.append(piece)
                size += len(piece)
                if cut and size >= cut.after_bytes:
                    raise _Cut
            if cut:
                raise _Cut
        finally:
            request.body = b"".join(parts)
            with hub.lock:
                hub.received += [unquote(self.path).encode(), request.body, *_base64_inside(request)]

    def _serve(self) -> None:
        hub, address = self.server_hub, urlsplit(self.path)
        request = Request(self.command, address.path, parse_qs(address.query, keep_blank_values=True), self.headers)
        try:
            self._read_body(request)
            if fault := hub.take_fault("slow", request):
                time.sleep(fault.seconds)
            with hub.lock:
                hub.requests.append(request)
                answer = hub.answer(request)
                request.status = answer.status
            if hub.take_fault("lose", request):
                raise _Cut
            self._send(request, answer)
        except (_Cut, OSError):
            self.close_connection = True
            # Lingering for no time makes the close a reset, which the other side cannot take for an end.
            with contextlib.suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def _send(self, request: Request, answer: Answer) -> None:
        body = json.dumps(answer.json).encode() if answer.data is None else answer.data
        headers = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body))} | answer.headers
        self.send_response_only(answer.status)
        self.send_header("Date", email.utils.formatdate(usegmt=True))
        for name, value in headers.items():
            self.send_header(name, value.replace("\n", " "))
        self.end_headers()
        if request.method == "HEAD":
            return
        if request.method == "GET" and (cut := self.server_hub.take_fault("cut", request)):
            self.wfile.write(body[: cut.after_bytes])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
            return
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


def _base64_inside(request: Request) -> list[bytes]:
    """What commits and samples carry in base64."""
    found = []
    for text in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', request.body):
        with contextlib.suppress(ValueError):
            found.append(base64.b64decode(text))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on the loopback interface, with one user: alice.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--xet", action="store_true")
    options = parser.parse_args()
    with HubServer(port=options.port, xet=options.xet) as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.add_user('alice', ('acme',))}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
