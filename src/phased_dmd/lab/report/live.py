"""`watch`: the page of a run while it goes, served to this machine alone, or written to a file again and again."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from phased_dmd.checkpoint import RunFolder
from phased_dmd.errors import UserError
from phased_dmd.lab.report import render_page, render_sections, write_report

POLICY = (  # what a page may load: what it holds, and the state of its run
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LEAST = 1.0  # seconds for which a rendered page is new enough, and between two looks for a run that has not begun


class Page:
    """Renders the sections of a run's page, once for all that ask at about the same time."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._lock, self._rendered, self._sections = threading.Lock(), -LEAST, {}

    def sections(self) -> dict[str, str]:
        """Returns the HTML of each section; raises UserError or OSError where the run cannot be read now."""
        with self._lock:
            if time.monotonic() - self._rendered >= LEAST:
                self._sections = render_sections([self.run])
                self._rendered = time.monotonic()
            return self._sections

    def whole(self) -> str:
        """Returns the page, which asks for what is newer; an empty one, which then says why, where there is none."""
        try:
            sections = self.sections()
        except (UserError, OSError):
            sections = {}
        return render_page(sections, versions_of(sections))

    def news(self, known: dict[str, list[str]]) -> dict[str, object]:
        """Returns the sections that differ from those known by their versions, or the problem of reading them."""
        try:
            sections = self.sections()
        except (UserError, OSError) as error:
            return {"sections": {}, "problem": " ".join(str(error).split())}
        versions = versions_of(sections)
        changed = {name: version for name, version in versions.items() if known.get(name) != [version]}
        new = {name: {"version": version, "html": sections[name]} for name, version in changed.items()}
        return {"sections": new, "problem": ""}


def versions_of(sections: Mapping[str, str]) -> dict[str, str]:
    """Returns what tells one version of each section from another."""
    return {name: hashlib.blake2b(html.encode(), digest_size=8).hexdigest() for name, html in sections.items()}


def wait_for(run: Path) -> None:
    """Waits until a run has begun in its folder, such as that of a job which is still in a queue."""
    while RunFolder(run).begins():
        time.sleep(LEAST)


def serve(run: Path, port: int, ready: Callable[[str], object]) -> None:
    """Serves a run's page on the loopback interface until the process is interrupted.

    port: 0 takes a free one. ready: called with the page's address. A folder that is no run, and a port that cannot be
    had, are a UserError.
    """
    RunFolder(run).config()
    with make_server(run, port) as server:
        ready(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()


def make_server(run: Path, port: int) -> ThreadingHTTPServer:
    """Returns the server of a run's page on the loopback interface; a UserError where the port cannot be had."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, Page(run)))
    except OSError as error:
        raise UserError(f"--port: {port} cannot be had: {error.strerror}; 0 takes a free one") from error


class Handler(BaseHTTPRequestHandler):
    """Answers GET of / and /state, and only by the server's own names."""

    def __init__(self, page: Page, *connection: Any) -> None:
        self.page = page
        super().__init__(*connection)

    def handle(self) -> None:
        """Answers a connection, until the browser leaves, which it may in the middle of an answer."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answers a request; the base class refuses those of other methods."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):  # another's name (DNS rebinding)
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        asked = urlsplit(self.path)
        match asked.path:
            case "/":
                self._answer("text/html", self.page.whole())
            case "/state":
                self._answer("application/json", json.dumps(self.page.news(parse_qs(asked.query))))
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(HTTPStatus.OK)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(data)), "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the terminal has the page's address."""


def keep_writing(run: Path, output: Path, every: float, ready: Callable[[str], object]) -> None:
    """Writes a run's page to a file, every so many seconds until the run is finished."""
    folder = RunFolder(run)
    config = folder.config()
    while True:
        finished = folder.finished(config)  # before it is read: the last page has all
        ready(str(write_report([run], output)))
        if finished:
            return
        time.sleep(every)
