"""A Hub on the loopback interface: what the Hugging Face clients ask of hf.co, with faults on demand.

`with HubServer() as hub:` serves until the block ends; by hand: `python -m tests.hub_server --port 8000`.
What it answers is in hub_endpoints.py, what it keeps in hub_store.py, how it reads cards in hub_metadata.py.
"""

import argparse
import base64
import contextlib
import email.utils
import http.server
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_core import PREFIX, Answer, Hub, Request
from tests.hub_endpoints import ROUTES
from tests.hub_store import Commit, HubError, Repo

LOCAL = "127.0.0.1"
UNSET = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN"),
    *("HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"),
)


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
        here = self.method in (None, request.method) and re.search(self.path, request.path)
        return self.times != 0 and bool(here)


class HubServer(Hub):
    """A Hub in a thread. `hub.url` is its address; it forgets everything at `reset()` and ends with its `with` block.

    Args:
        port: the port; 0 takes a free one.
        options: `xet`, `part_size` and `page_size` of `Hub`.
    """

    def __init__(self, *, port: int = 0, **options: Any):
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Threads((LOCAL, port), Handler, bind_and_activate=False)
        self._server.server_bind()
        self._thread: threading.Thread | None = None
        self.port = self._server.server_address[1]
        self._options = options
        self.reset()

    def reset(self) -> None:
        """An empty Hub with no users, no log and no faults, as it was constructed."""
        self.remove_xet()
        super().__init__(f"http://{LOCAL}:{self.port}", **self._options)
        self.requests: list[Request] = []
        self.errors: list[str] = []  # tracebacks of what should not happen in here
        self.faults: list[Fault] = []

    def start(self) -> Self:
        """Answers from now on. The port is taken, and refuses, since the construction."""
        if self._thread is None:
            self._server.server_activate()
            self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="hub")
            self._thread.start()
        return self

    def stop(self) -> None:
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self.remove_xet()

    def remove_xet(self) -> None:
        if hasattr(self, "cas"):
            shutil.rmtree(self.cas, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what tests set up and look at ------------------------------------------------------------------------------

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """Our environment for a process that is to meet this Hub, with `home` for its caches and `token` to log in."""
        kept = {key: value for key, value in os.environ.items() if key not in UNSET}
        place = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "0" if self.xet else "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        return kept | place | quiet | ({"HF_TOKEN": token} if token else {})

    def add_user(self, name: str, orgs: tuple[str, ...] = (), role: str = "write") -> str:
        """A token of the user, who is made if new and joins the organisations. `role="read"`: it may not write."""
        with self.lock:
            return self.store.add_user(name, orgs, role)

    def token(self, name: str) -> str:
        """The user's first token that still holds."""
        return next(token for token, of in self.store.tokens.items() if of.user == name and not of.expired)

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
        """Whether the secret is in anything that was ever sent here: bodies, base64 in them, files, addresses."""
        secret = secret.encode() if isinstance(secret, str) else secret
        with self.lock:
            return any(secret in body for body in self.received)

    # -- faults ------------------------------------------------------------------------------------------------------

    def fail(
        self,
        *,
        times: int | None = 1,
        status: int = 503,
        method: str | None = None,
        path: str = "",
        message: str = "planned failure",
    ) -> None:
        """The next requests are answered with an error and not carried out."""
        self.faults.append(Fault("fail", method, path, times, status=status, message=message))

    def forbid_commits(self, times: int | None = None) -> None:
        """Commits are answered with 403."""
        self.fail(times=times, status=403, method="POST", path="/commit/", message="You may not commit here")

    def cut(self, *, path: str = "", after_bytes: int = 0, times: int | None = 1, method: str | None = None) -> None:
        """The connection breaks after so many bytes: of the body that comes in, or of a GET's answer, whose length is
        announced in full."""
        self.faults.append(Fault("cut", method, path, times, after_bytes=after_bytes))

    def slow(self, *, path: str = "", seconds: float, times: int | None = None, method: str | None = None) -> None:
        """Answers come late."""
        self.faults.append(Fault("slow", method, path, times, seconds=seconds))

    def lose_answer(self, *, path: str = "", times: int | None = 1, method: str | None = None) -> None:
        """The request is carried out, and the connection breaks before the answer."""
        self.faults.append(Fault("lose", method, path, times))

    def take_fault(self, kind: str, request: Request) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.kind == kind and fault.matches(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
            return fault

    # -- inside ------------------------------------------------------------------------------------------------------

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
        query = parse_qs(address.query, keep_blank_values=True)
        request = Request(self.command, address.path, query, self.headers)
        hub.requests.append(request)
        try:
            self._read_body(request)
            if fault := hub.take_fault("slow", request):
                time.sleep(fault.seconds)
            with hub.lock:
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
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | answer.headers
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
