"""A stand-in of the hub: a server on this machine that takes commits and gives files, as huggingface_hub asks for them."""

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


@contextmanager
def local_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]], list[tuple[str, Any]]]]:
    """Yields its address, the files of each repository by name, and what was asked in JSON."""
    repositories: dict[str, dict[str, bytes]] = {}
    asked: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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
            body = self.rfile.read(int(self.headers["Content-Length"]))
            rows = [json.loads(line) for line in body.splitlines()] if body else []
            asked.append((self.path, rows))
            parts = self.path.strip("/").split("/")
            if self.path == "/api/repos/create":
                name = f"{rows[0].get('organization') or 'me'}/{rows[0]['name']}"
                repositories.setdefault(name, {})
                return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            if self.path == "/api/validate-yaml":  # of the card
                return self.answer({"warnings": [], "errors": []})
            name = "/".join(parts[2:4])
            if parts[4] == "preupload":
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in rows[0]["files"]]
                return self.answer({"files": files})
            for row in rows:
                if row["key"] == "file":
                    repositories[name][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            address = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if path[:2] == ["api", "models"]:
                files = repositories.get("/".join(path[2:4]))
                if files is None:
                    return self.answer({"error": "none"}, {"X-Error-Code": "RepoNotFound"}, 404)
                names = [
                    {"type": "file", "path": n, "rfilename": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()
                ]
                if path[4:5] == ["tree"]:
                    return self.answer(names)
                return self.answer({"id": "/".join(path[2:4]), "sha": COMMIT, "siblings": names, "private": True})
            data = repositories.get("/".join(path[:2]), {}).get("/".join(path[4:]))
            if data is None:
                return self.answer({"error": "none"}, {"X-Error-Code": "EntryNotFound"}, 404)
            etag = hashlib.sha1(data).hexdigest()
            self.answer(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Size": str(len(data))})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories, asked
    finally:
        server.shutdown()
