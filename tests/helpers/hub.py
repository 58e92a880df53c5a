"""A stand-in of the hub: a server on this machine that takes commits and gives files, as huggingface_hub asks."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers for the repositories of its server, and notes what it was asked in JSON."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, data: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        rows = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        self.server.asked.append((self.path, rows))
        if self.path == "/api/repos/create":
            name = f"{rows[0]['organization']}/{rows[0]['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":  # of the card
            return self.answer({"warnings": [], "errors": []})
        _, _, owner, name, action, *_ = self.path.strip("/").split("/")
        if action == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in rows[0]["files"]]
            return self.answer({"files": files})
        for row in (row["value"] for row in rows if row["key"] == "file"):
            self.server.repositories[f"{owner}/{name}"][row["path"]] = base64.b64decode(row["content"])
        where = f"{self.server.address}/{owner}/{name}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": where, "hookOutput": ""})

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            return self.describe("/".join(path[2:4]), "tree" in path[4:5])
        data = self.server.repositories.get("/".join(path[:2]), {}).get("/".join(path[4:]))
        if data is None:
            return self.answer({"error": "none"}, {"X-Error-Code": "EntryNotFound"}, 404)
        self.answer(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    do_HEAD = do_GET

    def describe(self, name: str, as_tree: bool) -> None:
        if (files := self.server.repositories.get(name)) is None:
            return self.answer({"error": "none"}, {"X-Error-Code": "RepoNotFound"}, 404)
        rows = [
            {"type": "file", "path": file, "rfilename": file, "size": len(data), "oid": "0" * 40}
            for file, data in files.items()
        ]
        self.answer(rows if as_tree else {"id": name, "sha": COMMIT, "siblings": rows, "private": True})


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub() -> Iterator[Server]:
    """Yields the running server; its address is for HF_ENDPOINT."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
