"""`watch`: a page that follows a run, for this machine alone; what it answers, and to whom."""

import http.client
import json
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import run as command

from phased_dmd.checkpoint.lock import Busy, is_held, locked
from phased_dmd.errors import UserError
from phased_dmd.lab.report import SECTIONS, live
from phased_dmd.lab.report.live import LEAST, Page, keep_writing, make_server, serve
from phased_dmd.recipes import resolve


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two phases of which the first has one line of metrics."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(resolve("toy-1d", {"iterations": 10}).model_dump_json())
    log(folder, 2)
    return folder


def log(run: Path, *iterations: int) -> None:
    """Rewinds the metrics to these iterations of the first phase, as a run does that goes on after a kill."""
    rows = [{"phase": 1, "iteration": i, "fake_loss": 1 / i, "generator_loss": 0.1 / i} for i in iterations]
    (run / ".new").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run / ".new").replace(run / "metrics.jsonl")


@contextmanager
def served(run: Path) -> Iterator[int]:
    """Serves a run's page in a thread; yields the port."""
    with make_server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], str]:
    """Returns status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


def test_it_answers_its_own_names_and_nobody_elses(run: Path) -> None:
    with served(run) as port:
        for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
            assert ask(port, "/", host=host)[0] == ask(port, "/state", host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "localhost", f"127.0.0.1:{port + 1}"):
            assert ask(port, "/", host=host)[0] == ask(port, "/state", host=host)[0] == 403


def test_it_serves_the_page_and_its_state_and_no_file(run: Path) -> None:
    with served(run) as port:
        for path in ("/config.json", "/../run/config.json", "/%2e%2e/config.json", "/state/", f"{run}/.new"):
            assert ask(port, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert ask(port, "/", method)[0] == 501
        status, headers, text = ask(port, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and "iteration 2 of 10" in text
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers


def test_a_page_asks_for_what_is_new_and_sees_a_run_rewound(run: Path) -> None:
    """What does not change is not sent again."""
    page, known = Page(run), {}

    def news() -> dict[str, Any]:
        page._rendered = -LEAST
        found: Any = page.news(known)
        known.update({name: [section["version"]] for name, section in found["sections"].items()})
        return found["sections"]

    assert list(news()) == list(SECTIONS)
    log(run, 2, 4)
    found = news()
    assert set(found) == {"top", "training"} and "iteration 4 of 10" in found["top"]["html"]
    log(run, 2)
    assert "iteration 2 of 10" in news()["top"]["html"]
    (run / "metrics.jsonl").unlink()
    assert "iteration 0 of 10" in news()["top"]["html"]


def test_a_run_that_cannot_be_read_is_a_line_on_the_page_and_then_it_goes_on(run: Path) -> None:
    with served(run) as port:
        text = (run / "config.json").read_text()
        (run / "config.json").write_text("{")
        assert "<h1>" not in ask(port, "/")[2]
        answer = json.loads(ask(port, "/state")[2])
        assert answer["sections"] == {} and "config.json cannot be read" in answer["problem"]
        (run / "config.json").write_text(text)
        answer = json.loads(ask(port, "/state")[2])
        assert answer["problem"] == "" and list(answer["sections"]) == list(SECTIONS)


def test_a_page_is_rendered_once_for_all_that_ask_at_a_time(run: Path) -> None:
    page = Page(run)
    first = page.sections()
    log(run, 2, 4)
    assert page.sections() is first


def test_what_cannot_be_served_is_said_before_anything_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(run) as port, pytest.raises(UserError, match=f"--port: {port} cannot be had: .*; 0 takes a free one"):
        serve(run, port, print)
    with pytest.raises(UserError, match="not a run folder"):
        serve(tmp_path, 0, print)
    assert command("watch", str(tmp_path), "--output", str(tmp_path / "p.html"), monkeypatch=monkeypatch) == 2
    assert command("watch", str(run), "--output", str(tmp_path / "no" / "p.html"), monkeypatch=monkeypatch) == 2
    assert "--output: " in capsys.readouterr().err


def test_a_run_that_has_not_begun_is_waited_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder comes first, with a lock, and its configuration a while later; then the file is written into it."""
    config = (run / "config.json").read_bytes()
    shutil.rmtree(run)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            run.mkdir()
            (run / ".lock").touch()
        else:
            (run / "experts").mkdir()
            for phase in (1, 2):
                (run / "experts" / f"phase-{phase}.safetensors").touch()
            (run / "config.json").write_bytes(config)

    monkeypatch.setattr(live.time, "sleep", nap)
    page = run / "watch.html"
    assert command("watch", str(run), "--output", str(page), monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert len(naps) == 2 and f"{run}: not begun yet" in said.err and said.out.split() == [str(page)]
    assert "Finished" in page.read_text()


def test_a_browser_that_leaves_amid_an_answer_is_no_fault(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, ended, faults = threading.Event(), threading.Event(), []
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: faults.append(sys.exc_info()[1]))
    shut = ThreadingHTTPServer.shutdown_request
    monkeypatch.setattr(ThreadingHTTPServer, "shutdown_request", lambda *of: (shut(*of), ended.set()))

    def whole(_page: Page) -> str:
        assert gone.wait(30)
        return "x" * 10**7  # more than a socket takes before anybody reads

    with served(run) as port, monkeypatch.context() as patched:
        patched.setattr(Page, "whole", whole)
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed at once
            browser.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            time.sleep(0.2)  # until it is read
        gone.set()
        assert ended.wait(30)
        assert ask(port, "/state")[0] == 200, "and others are answered"
    assert faults == []


def test_a_file_is_written_until_the_run_is_finished(run: Path, tmp_path: Path) -> None:
    """The run ends between its two writings."""
    said: list[str] = []

    def ready(line: str) -> None:
        said.append(line)
        (run / "experts").mkdir(exist_ok=True)
        for phase in (1, 2):
            (run / "experts" / f"phase-{phase}.safetensors").touch()

    keep_writing(run, tmp_path / "page.html", 0.01, ready)
    assert said == 2 * [str(tmp_path / "page.html")]
    text = (tmp_path / "page.html").read_text()
    assert "Finished: 20 updates in 2 phases." in text and "fetch(" not in text


def test_who_looks_whether_a_run_is_held_keeps_nobody_from_it(tmp_path: Path) -> None:
    """A run takes its lock although another looks at it again and again."""
    path, over = tmp_path / ".lock", threading.Event()
    assert is_held(path) is False and not path.exists()
    with locked(path):
        assert is_held(path) is True
        with pytest.raises(Busy):
            locked(path).__enter__()
    with locked(path, shared=True):
        assert is_held(path) is True
    path.touch()
    assert is_held(path) is False

    def look() -> None:
        while not over.wait(0.005):
            is_held(path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(20):
            with locked(path):
                pass
    finally:
        over.set()
        looking.join()
