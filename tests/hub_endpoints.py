"""What the Hugging Face clients call, one function per endpoint. The HTTP around them is in hub_server.py."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, quote

import yaml

from tests import hub_metadata, hub_xet
from tests.hub_core import PREFIX, Answer, Hub, Request
from tests.hub_store import Commit, Discussion, File, HubError, Repo, is_lfs

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


# -- endpoints: repositories ------------------------------------------------------------------------------------------


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Answer:
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
def delete(hub: Hub, request: Request) -> object:
    wanted = request.json()
    repo_id = f"{wanted.get('organization') or request.user}/{wanted['name']}"
    repo = hub.store.find(wanted.get("type") or "model", repo_id, request.user)
    hub.writable(request, repo.namespace)
    del hub.store.repos[repo.type, repo.id]
    return {}


@route("POST", "/api/repos/move")
def move(hub: Hub, request: Request) -> object:
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
def settings(hub: Hub, request: Request, kind: str, repo_id: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.writable(request, repo.namespace)
    wanted = request.json()
    repo.gated = wanted.get("gated", repo.gated)
    repo.private = wanted["visibility"] == "private" if "visibility" in wanted else wanted.get("private", repo.private)
    return {"private": repo.private, "gated": repo.gated}


@route("GET", "/api/{T}/{id}/auth-check(?P<write>/write)?")
def auth_check(hub: Hub, request: Request, kind: str, repo_id: str, write: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.store.check_gate(repo, request.user)
    if write:
        hub.writable(request, repo.namespace)
    return {}


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> object:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "id": org, "name": org, "roleInOrg": "admin"} for org in hub.store.users[request.user]]
    access = {"displayName": "test", "role": request.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": access}
    user = {"type": "user", "id": request.user, "name": request.user, "fullname": request.user}
    return user | {"isPro": False, "orgs": orgs, "auth": auth}


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: Hub, request: Request) -> object:
    return {}


# -- endpoints: commits -----------------------------------------------------------------------------------------------


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Answer:
    errors, warnings = hub_metadata.validate(request.json()["content"])
    messages = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(messages, 400 if errors else 200)


@route("POST", "/api/{T}/{id}/preupload/{rev}")
def preupload(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> object:
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
def lfs_batch(hub: Hub, request: Request, kind: str, repo_id: str) -> object:
    repo, asked, objects = hub.store.find(kind, repo_id, request.user), request.json(), []
    hub.signed_in(request)
    transfer = "basic"
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in hub.store.blobs:
            objects.append({"oid": oid, "size": size})
            continue
        upload: dict[str, object] = {"href": f"{hub.url}/storage/{oid}"}
        if size > hub.part_size and "multipart" in asked["transfers"]:
            transfer, count = "multipart", -(-size // hub.part_size)
            header = {f"{n:05d}": f"{hub.url}/storage/{oid}/{n}" for n in range(1, count + 1)}
            header["chunk_size"] = str(hub.part_size)
            upload = {"href": f"{hub.url}/storage/{oid}/complete", "header": header}
        verify = {"href": f"{hub.address(repo)}.git/info/lfs/objects/verify"}
        objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    return {"transfer": transfer, "objects": objects}


def _store_large(hub: Hub, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, f"the content does not have the sha256 {oid}")
    hub.store.blobs[oid] = data


@route("PUT", "/storage/{oid}")
def upload(hub: Hub, request: Request, oid: str) -> object:
    _store_large(hub, oid, request.body)
    return {}


@route("PUT", "/storage/{oid}/{n}")
def upload_part(hub: Hub, request: Request, oid: str, n: str) -> Answer:
    hub.parts.setdefault(oid, {})[int(n)] = request.body
    return Answer({}, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("POST", "/storage/{oid}/complete")
def complete(hub: Hub, request: Request, oid: str) -> object:
    parts = hub.parts.get(oid, {})
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    if missing := set(numbers) - set(parts):
        raise HubError(400, f"parts {sorted(missing)} were never uploaded")
    _store_large(hub, oid, b"".join(parts[number] for number in sorted(numbers)))
    del hub.parts[oid]
    return {}


@route("POST", r"/{P}{id}\.git/info/lfs/objects/verify")
def lfs_verify(hub: Hub, request: Request, kind: str, repo_id: str) -> object:
    asked = request.json()
    if len(hub.store.blobs.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, "the object was not uploaded in full", "EntryNotFound")
    return {}


@route("POST", "/api/{T}/{id}/commit/{rev}")
def commit(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.signed_in(request)
    pull_request = request.flag("create_pr")
    if not pull_request:
        hub.writable(request, repo.namespace)
    if PREFIX[kind] + repo_id in hub.races:
        hub.seed(repo_id, hub.races.pop(PREFIX[kind] + repo_id), repo_type=kind, user="somebody", message="a race")
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


def _apply(hub: Hub, files: dict[str, File], operations: list[dict[str, Any]]) -> dict[str, File]:
    for operation in operations:
        value = operation["value"]
        path = value["path"]
        match operation["key"]:
            case "file":
                decode = base64.b64decode if value.get("encoding") == "base64" else str.encode
                files[path] = hub.store.keep(path, decode(value["content"]), lfs=False)
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


BRIEF = ("_id", "id", "modelId", "likes", "private", "downloads", "tags", "pipeline_tag", "library_name", "createdAt")
FULL = {"author", "sha", "lastModified", "gated", "disabled", "siblings"}


def _id(repo: Repo) -> str:
    return hashlib.sha1(f"{repo.type} {repo.created}".encode()).hexdigest()[:24]


def info(hub: Hub, repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """Everything the Hub says about a repository at a commit; listings and `expand` take parts of it."""
    data: Any = {}
    config: Any = {}
    with contextlib.suppress(KeyError, ValueError, yaml.YAMLError):
        data = hub_metadata.metadata(hub.content(commit.files["README.md"]).decode())
    with contextlib.suppress(KeyError, ValueError):
        config = json.loads(hub.content(commit.files["config.json"]))
    data, config = (value if isinstance(value, dict) else {} for value in (data, config))
    # What YAML reads as a date is a string in JSON.
    data = json.loads(json.dumps(data, default=str))
    siblings: list[dict[str, object]] = []
    for path, file in commit.files.items():
        siblings.append({"rfilename": path})
        if blobs:
            siblings[-1] |= {"size": file.size, "blobId": file.oid}
            siblings[-1] |= {"lfs": {"sha256": file.sha256} | file.pointer} if file.lfs else {}
    found: dict[str, Any] = {"_id": _id(repo), "id": repo.id, "author": repo.namespace, "sha": commit.sha}
    found |= {"lastModified": commit.date, "private": repo.private, "gated": repo.gated, "disabled": False}
    found |= {"downloads": 0, "likes": 0, "createdAt": repo.created, "siblings": siblings, "cardData": data or None}
    found |= {"usedStorage": sum(file.size for file in commit.files.values())}
    if repo.type != "model":
        return found | {"tags": hub_metadata.dataset_tags(data)}
    paths = set(commit.files)
    found |= {"modelId": repo.id, "tags": hub_metadata.tags(data, paths, config), "config": config or None}
    found |= {key: data[key] for key in ("pipeline_tag", "library_name", "model-index") if data.get(key)}
    if data.get("base_model"):
        bases = data["base_model"] if isinstance(data["base_model"], list) else [data["base_model"]]
        models = [{"id": base} for base in bases]
        found["baseModels"] = {"relation": hub_metadata.relation(data, paths), "models": models}
    results = [path for path in sorted(paths) if fnmatch.fnmatch(path, ".eval_results/*.yaml")]
    found["evalResults"] = [one for path in results for one in _results(path, hub.content(commit.files[path]))]
    return found


def _results(path: str, text: bytes) -> list[dict[str, object]]:
    """The entries of a file of evaluation results, or what is wrong with it."""
    try:
        entries = json.loads(json.dumps(yaml.safe_load(text), default=str))
        assert all({"id", "task_id"} <= entry["dataset"].keys() and "value" in entry for entry in entries)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, AssertionError) as error:
        return [{"filename": path, "error": f"invalid evaluation results: {error!r}"}]
    return [{"filename": path, "data": entry} for entry in entries]


@route("GET", "/api/{T}/{id}(?:/revision/{rev})?")
def repo_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    found = info(hub, repo, repo.at(revision or "main"), blobs=request.flag("blobs"))
    if wanted := request.query.get("expand"):
        return {key: value for key, value in found.items() if key in {"_id", "id", *wanted}}
    return found


@route("GET", "/api/{T}")
def listing(hub: Hub, request: Request, kind: str) -> Answer:
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
    keys = set(BRIEF)
    for flag, more in (("full", FULL), ("cardData", {"cardData"}), ("config", {"config"})):
        keys |= more if request.flag(flag) else set()
    keys = {"_id", "id", *query["expand"]} if "expand" in query else keys
    size = min(int(query.get("limit", [hub.page_size])[0]), hub.page_size)
    return _page(hub, request, [{key: value for key, value in one.items() if key in keys} for one in found], size)


def _page(hub: Hub, request: Request, entries: list[Any], size: int | None = None) -> Answer:
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
            found[path]["lfs"] = {"oid": file.sha256} | file.pointer
        if file.xet:
            found[path]["xetHash"] = file.xet
    return found


@route("GET", "/api/{T}/{id}/tree/{rev}(?:/{path})?")
def tree(hub: Hub, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
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
def paths_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    form = parse_qs(request.body.decode())
    entries = _entries(repo, repo.at(revision), form.get("expand", ["false"])[0].lower() in ("1", "true"))
    return [entries[path.rstrip("/")] for path in form.get("paths", []) if path.rstrip("/") in entries]


@route("GET", "/{P}{id}/(?:resolve|raw)/{rev}/{path}")
def resolve(hub: Hub, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
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
def refs(hub: Hub, request: Request, kind: str, repo_id: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)

    def under(prefix: str) -> list[dict[str, str]]:
        names = [ref for ref in repo.refs if ref.startswith(prefix)]
        return [{"name": r.removeprefix(prefix), "ref": r, "targetCommit": repo.refs[r]} for r in names]

    return {
        "branches": under("refs/heads/"),
        "tags": under("refs/tags/"),
        "pullRequests": under("refs/pr/"),
        "converts": [],
    }


def _new_ref(hub: Hub, request: Request, repo: Repo, ref: str, at: str) -> object:
    hub.writable(request, repo.namespace)
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(at).sha
    return {}


def _drop_ref(hub: Hub, request: Request, repo: Repo, ref: str) -> object:
    hub.writable(request, repo.namespace)
    if ref == "refs/heads/main":
        raise HubError(403, "Cannot delete branch main")
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    return {}


@route("POST", "/api/{T}/{id}/branch/{x}")
def create_branch(hub: Hub, request: Request, kind: str, repo_id: str, x: str) -> object:
    start = request.json().get("startingPoint", "main")
    return _new_ref(hub, request, hub.store.find(kind, repo_id, request.user), f"refs/heads/{x}", start)


@route("DELETE", "/api/{T}/{id}/branch/{x}")
def delete_branch(hub: Hub, request: Request, kind: str, repo_id: str, x: str) -> object:
    return _drop_ref(hub, request, hub.store.find(kind, repo_id, request.user), f"refs/heads/{x}")


@route("POST", "/api/{T}/{id}/tag/{rev}")
def create_tag(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    return _new_ref(hub, request, repo, f"refs/tags/{request.json()['tag']}", revision)


@route("DELETE", "/api/{T}/{id}/tag/{x}")
def delete_tag(hub: Hub, request: Request, kind: str, repo_id: str, x: str) -> object:
    return _drop_ref(hub, request, hub.store.find(kind, repo_id, request.user), f"refs/tags/{x}")


@route("GET", "/api/{T}/{id}/commits/{rev}")
def commits(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    history = hub.store.find(kind, repo_id, request.user).history(revision)
    return _page(hub, request, [
        {"id": one.sha, "title": one.title, "message": one.message, "authors": [{"user": one.author}], "date": one.date}
        for one in history
    ])  # fmt: skip


@route("POST", "/api/{T}/{id}/super-squash/{rev}")
def super_squash(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.writable(request, repo.namespace)
    files, ref = repo.at(revision).files, f"refs/heads/{revision}"
    hub.store.commit(repo, ref, files, str(request.user), request.json()["message"], squash=True)
    return {}


def _open(hub: Hub, repo: Repo, title: str, user: str, text: str, pull_request: bool) -> Discussion:
    num = len(repo.discussions) + 1
    made = Discussion(num, title, user, hub.store.now())
    if pull_request:
        made.ref, made.base = f"refs/pr/{num}", repo.refs["refs/heads/main"]
        repo.refs[made.ref] = made.base
    repo.discussions.append(made)
    _say(hub, made, user, text)
    return made


def _say(hub: Hub, discussion: Discussion, user: str, text: str) -> dict[str, object]:
    data = {"edited": False, "hidden": False, "latest": {"raw": text}}
    return _event(hub, discussion, user, "comment", data)


def _event(hub: Hub, discussion: Discussion, user: str, kind: str, data: object) -> dict[str, object]:
    named = {"id": f"{discussion.num}-{len(discussion.events)}", "type": kind, "createdAt": hub.store.now()}
    discussion.events.append(named | {"author": {"name": user}, "data": data})
    return discussion.events[-1]


def _described(repo: Repo, one: Discussion) -> dict[str, object]:
    found = {"num": one.num, "title": one.title, "author": {"name": one.author}, "createdAt": one.date}
    found |= {"status": one.status, "repo": {"name": repo.id, "type": repo.type}, "isPullRequest": one.ref is not None}
    changes = {"base": "refs/heads/main", "mergeCommitId": one.merged}
    return found | ({"changes": changes, "filesWithConflicts": []} if one.ref else {})


@route("POST", "/api/{T}/{id}/discussions")
def open_discussion(hub: Hub, request: Request, kind: str, repo_id: str) -> object:
    repo, wanted = hub.store.find(kind, repo_id, request.user), request.json()
    hub.signed_in(request)
    text, pull_request = wanted.get("description", ""), wanted.get("pullRequest", False)
    return _described(repo, _open(hub, repo, wanted["title"], str(request.user), text, pull_request))


@route("GET", "/api/{T}/{id}/discussions")
def list_discussions(hub: Hub, request: Request, kind: str, repo_id: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    return {
        "count": len(repo.discussions),
        "start": 0,
        "discussions": [_described(repo, one) for one in repo.discussions],
    }


def _discussion(repo: Repo, n: str) -> Discussion:
    if not 1 <= int(n) <= len(repo.discussions):
        raise HubError(404, f"there is no discussion {n}", "EntryNotFound")
    return repo.discussions[int(n) - 1]


@route("GET", "/api/{T}/{id}/discussions/{n}")
def show_discussion(hub: Hub, request: Request, kind: str, repo_id: str, n: str) -> object:
    repo = hub.store.find(kind, repo_id, request.user)
    one = _discussion(repo, n)
    return _described(repo, one) | {"events": one.events}


@route("POST", "/api/{T}/{id}/discussions/{n}/(?P<verb>comment|status|merge)")
def change_discussion(hub: Hub, request: Request, kind: str, repo_id: str, n: str, verb: str) -> object:
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
def xet_token(hub: Hub, request: Request, kind: str, repo_id: str, verb: str, revision: str) -> Answer:
    repo = hub.store.find(kind, repo_id, request.user)
    hub.store.check_gate(repo, request.user)
    if verb == "write" and revision != "None":  # None stands for a pull request that does not exist yet
        hub.writable(request, repo.namespace)
    if not hub.xet:
        raise HubError(404, "xet is not enabled", "EntryNotFound")
    address, until = f"local://{hub.cas}", int(time.time()) + 3600
    headers = {"X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until), "X-Xet-Cas-Url": address}
    return Answer({"accessToken": "xet", "exp": until, "casUrl": address}, headers=headers)
