"""A Hub on loopback, as far as a push and a pull need one: repositories, branches, pull requests, LFS, commits.

Commits are whole snapshots in memory, so that what a revision holds can be looked at. `failing` names what goes wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

# huggingface_hub about its own call of httpx, where it uploads to the large file storage
HOSTS_WARNING = "ignore:Use 'content=<...>':DeprecationWarning"
TOKEN = "hf_" + "s3cretS3cretS3cretS3cret"


class Hub:
    """The state of the server.

    Attributes:
        url: where it is.
        repos: name -> branch -> the snapshots (oid, message, files), the latest last.
        private: the names of the private ones.
        blobs: what was uploaded to the large file storage, by its SHA-256.
        failing: of "upload" and "commit", what is refused.
        requests: method and path of each request.
        drop: the connection is cut at uploads, without an answer.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, dict[str, list[tuple[str, str, dict[str, bytes]]]]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.failing: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return self.snapshot(repo, revision)[2]

    def snapshot(self, repo: str, revision: str) -> tuple[str, str, dict[str, bytes]]:
        branches = self.repos[repo]
        if revision in branches:
            return branches[revision][-1]
        return next(each for history in branches.values() for each in history if each[0] == revision)

    def history(self, repo: str, branch: str = "main") -> list[str]:
        """The messages of the commits."""
        return [message for _, message, _ in self.repos[repo][branch]]

    def commit(self, repo: str, branch: str, message: str, files: dict[str, bytes]) -> str:
        history = self.repos[repo].setdefault(branch, [])
        oid = hashlib.sha1(f"{repo} {branch} {len(history)}".encode()).hexdigest()
        history.append((oid, message, dict(files)))
        return oid

    def everything(self) -> bytes:
        """All that was ever stored, to look for what must not be in it."""
        stored = [
            *(name.encode() + content for history in self._histories() for _, _, files in history
              for name, content in files.items()),
            *self.blobs.values(),
        ]  # fmt: skip
        messages = [message.encode() for history in self._histories() for _, message, _ in history]
        return b"\n".join([*stored, *messages])

    def _histories(self) -> Iterator[list[tuple[str, str, dict[str, bytes]]]]:
        for branches in self.repos.values():
            yield from branches.values()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def handle_one(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        body = self.read()
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.route(path.strip("/").split("/"), query, body)

    def read(self) -> bytes:
        """The request's body, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        match parts:
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                self.validate(json.loads(body)["content"])
            case ["api", "models", user, name, *rest] if f"{user}/{name}" in self.hub.repos:
                self.api(f"{user}/{name}", rest, query, body)
            case [user, name, "info", "lfs", "objects", "batch"]:
                self.batch(json.loads(body))
            case ["lfs", oid]:
                self.store(oid, body)
            case [user, name, "resolve", *rest] if f"{user}/{name}" in self.hub.repos:
                self.resolve(f"{user}/{name}", rest)
            case _:
                self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    # --- what is asked

    def create(self, asked: dict[str, Any]) -> None:
        if not self.may_write():
            return
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
            return
        self.hub.repos[repo] = {}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(repo)
        self.hub.commit(repo, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self, readme: str) -> None:
        """As the Hub does of a README that is to be committed: the metadata must be YAML, and a licence a known one."""
        metadata = yaml.safe_load(readme.split("---")[1])
        licence = metadata.get("license")
        fine = licence in (None, "mit", "apache-2.0")
        errors = [] if fine else [{"message": '"license" must be one of [apache-2.0, mit]'}]
        self.answer(200 if fine else 400, {"errors": errors, "warnings": []})

    def api(self, repo: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        branches = self.hub.repos[repo]
        if rest[:1] == ["branch"]:
            branch = "/".join(rest[1:])
            if self.may_write():
                if branch in branches:
                    self.answer(409, {"error": "Reference already exists"})
                else:
                    branches[branch] = list(branches["main"])
                    self.answer(200, {})
            return
        kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if kind == "tree":
            revision = revision.removesuffix("/")
        try:
            oid, _, files = self.hub.snapshot(repo, revision or "main")
        except StopIteration:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": repo, "sha": oid, "siblings": siblings, "private": repo in self.hub.private})
        elif kind == "tree":
            self.answer(200, [self.entry(name, content) for name, content in files.items()])
        elif kind == "preupload" and self.may_write():
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in asked
            ]
            self.answer(200, {"files": modes})
        elif kind == "commit" and self.may_write():
            self.take_commit(repo, revision, query, body)

    @staticmethod
    def entry(name: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def batch(self, asked: dict[str, Any]) -> None:
        if not self.may_write():
            return
        objects = []
        for each in asked["objects"]:
            found = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.blobs:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append(found)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        if "upload" in self.hub.failing:
            self.answer(403, {"error": "The storage is full"})
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer(200, {})

    def take_commit(self, repo: str, branch: str, query: dict[str, list[str]], body: bytes) -> None:
        if "commit" in self.hub.failing:
            self.answer(500, {"error": "Something went wrong"})
            return
        lines = [json.loads(line) for line in body.splitlines()]
        oid, _, files = self.hub.snapshot(repo, branch)
        files, message = dict(files), ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        asks = "create_pr" in query
        if asks:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.hub.repos[repo])
            branch = f"refs/pr/{number}"
        oid = self.hub.commit(repo, branch, message, files)
        found = {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}
        if asks:
            found["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self.answer(200, found)

    def resolve(self, repo: str, rest: list[str]) -> None:
        branches = self.hub.repos[repo]
        known = [*branches, *(oid for history in branches.values() for oid, _, _ in history)]
        place = "/".join(rest)
        revision = next((name for name in known if place.startswith(f"{name}/")), None)
        if revision is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        oid, _, files = self.hub.snapshot(repo, revision)
        content = files.get(place.removeprefix(f"{revision}/"))
        if content is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, {"ETag": tag, "X-Repo-Commit": oid})

    # --- what is answered

    def may_write(self) -> bool:
        """Answer 401 to whoever has no token, or another one."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid username or password."})
        return False

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running() -> Iterator[Hub]:
    """A server on a free port of loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, home: Any, token: str | None = TOKEN) -> dict[str, str]:
    """What a process of its own needs to take the server for the Hub."""
    found = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # its storage is another protocol
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
    }
    return found if token is None else found | {"HF_TOKEN": token}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Hub]:
    """A server that this process takes for the Hub, with an empty cache and the token stored."""
    from huggingface_hub import constants

    with running() as found:
        home = tmp_path / "hf-home"
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the endpoint of then
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        yield found
