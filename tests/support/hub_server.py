"""A small server that speaks the part of the Hugging Face hub's HTTP interface by which models are downloaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote, unquote, urlsplit

MAIN = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".ckpt", ".bin")
"""Files that the hub keeps apart from git: named by SHA-256, and served from another address."""

INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
BLOB = re.compile(r"/blobs/(?P<repo>[^/]+/[^/]+)/(?P<name>.+)")


@dataclass
class Repository:
    """Files by name, as one commit."""

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": MAIN})
    refusal: tuple[int, str] | None = None
    """Status and X-Error-Code with which every request is refused."""
    token: str | None = None
    """Who has this token is not refused."""


@dataclass
class Hub:
    """Repositories by id, what was asked of them, and what is to go wrong."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range) of every request."""
    breaks: dict[str, list[int]] = field(default_factory=dict)
    """File name -> after how many bytes the connection is dropped, one for each transfer."""
    on_break: Callable[[], object] = field(default=lambda: None)
    """A function that is called just before."""

    def add(self, repo: str, files: dict[str, bytes], **options) -> None:
        self.repositories[repo] = Repository(files, **options)

    def transferred(self) -> list[str]:
        """The names of the files whose bytes were asked for, sorted."""
        matches = (BLOB.fullmatch(path) or FILE.fullmatch(path) for method, path, _ in self.log if method == "GET")
        return sorted(unquote(match["name"]) for match in matches if match)


def read_tree(folder: Path) -> dict[str, bytes]:
    """The files under a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; as HTTP/1.0 it then closes the connection, so that none outlives the server."""

    def log_message(self, *_: object) -> None:
        """Nothing on standard error: tests read `Hub.log`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.log.append((self.command, path, self.headers["Range"]))
        routes = ((TREE, self._tree), (INFO, self._info), (FILE, self._file), (BLOB, self._blob))
        found = ((pattern.fullmatch(path), answer) for pattern, answer in routes)
        match, answer = next(((match, answer) for match, answer in found if match), (None, None))
        if match is None:
            return self._refuse(404, "")
        parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
        repo = hub.repositories.get(parts["repo"])
        if repo is None:
            # as the hub does for who is not logged in: missing and private look the same
            return self._refuse(401, "RepoNotFound")
        known = repo.token and self.headers["Authorization"] == f"Bearer {repo.token}"
        if repo.refusal and not known and answer != self._blob:
            return self._refuse(*repo.refusal)
        wanted = parts.get("revision") or "main"
        commit = repo.revisions.get(wanted, wanted if wanted in repo.revisions.values() else None)
        return self._refuse(404, "RevisionNotFound") if commit is None else answer(repo, parts, commit)

    def _info(self, repo: Repository, parts: dict[str, str], commit: str) -> None:
        self._json({"id": parts["repo"], "sha": commit, "siblings": [{"rfilename": name} for name in repo.files]})

    def _tree(self, repo: Repository, parts: dict[str, str], commit: str) -> None:
        entries = []
        for name, content in repo.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _file(self, repo: Repository, parts: dict[str, str], commit: str) -> None:
        name = parts["name"]
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound")
        content = repo.files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not name.endswith(LARGE):
            return self._content(name, content, headers | {"ETag": f'"{git_id(content)}"'})
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
        elsewhere = self.server.hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's storage is
        location = f"{elsewhere}/blobs/{parts['repo']}/{quote(name)}"
        return self._answer(302, headers | linked | {"Location": location})

    def _blob(self, repo: Repository, parts: dict[str, str], commit: str) -> None:
        if self.headers["Authorization"]:
            return self._refuse(400, "")  # a token is the hub's business only
        self._content(parts["name"], repo.files[parts["name"]], {"Accept-Ranges": "bytes"})

    def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        start = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
        if start:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        breaks = self.server.hub.breaks.get(name) if self.command == "GET" else None
        self._answer(206 if start else 200, headers, content[start:], stop=breaks.pop(0) if breaks else None)

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}")

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"", stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])
        if stop is not None:
            self.server.hub.on_break()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """The name under which git keeps the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
