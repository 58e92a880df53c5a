"""Checks the pages of `report` and `watch` in a headless Chromium: every picture and switch, phone width, no error.

    python scripts/check_report.py [FOLDER]    keeps the runs, pages and screenshots in FOLDER

The runs are made with the embedded and the analytic teacher, too short to be worth reading. One is watched while it is
trained, killed, and goes on. The system's browser is taken, none is downloaded. Ends with one line, and with status 1
where a page fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch
os.environ["HF_HUB_OFFLINE"] = "1"

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright

from phased_dmd.lab.evaluate import Protocol, evaluate
from phased_dmd.lab.report import write_report
from phased_dmd.lab.report.live import make_server
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"desktop": (1280, 900), "phone": (375, 812)}
DEVICES: dict[str, dict[str, Any]] = {
    f"{name}-{scheme}": {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    for name, (width, height) in SIZES.items()
    for scheme in ("light", "dark")
}
SHORT = {"iterations": 2, "batch_size": 4, "fake.updates": 1, "log_every": 1, "sample_every": 1000}
NANO = {**SHORT, "teacher.base_steps": 3, "plan.steps": 2, "plan.phases": 2}
TOY = {**SHORT, "teacher.fit_steps": 20}
RUNS: dict[str, list[dict[str, Any]]] = {  # of each page: its runs
    "nano-t2i": [NANO, {**NANO, "seed": 1}, {**NANO, "ablation.renoise": "disjoint"}],
    "nano-t2v": [NANO],
    "toy-2d": [TOY, {**TOY, "plan.phases": 1}],
}
WATCHED = {  # long enough that the base's previews are made, and that a line can be seen before it is overtaken
    "iterations": 16, "batch_size": 64, "log_every": 1, "sample_every": 8, "checkpoint_every": 100, "plan.phases": 2,
    "teacher.base_steps": 8,
}  # fmt: skip
PLACE = re.compile(r"phase (\d) of \d, iteration (\d+) of")
PATIENCE = 240  # seconds to wait for a run that shares its processor
PICTURES = """async () => {
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  return images.filter(image => !(image.naturalWidth > 0)).map(image => image.alt);
}"""
SEEN = "() => [...document.querySelectorAll('section *')].map(element => Number(element.checkVisibility())).join('')"
STICKY = """() => [...document.querySelectorAll('.box')].filter(box => box.scrollWidth > box.clientWidth).map(box => {
  box.scrollLeft = box.scrollWidth;
  const cell = box.querySelector('th');
  const gap = cell ? cell.getBoundingClientRect().left - box.getBoundingClientRect().left : 0;
  box.scrollLeft = 0;
  return Math.abs(gap) < 3;
})"""


class PageError(Exception):
    """A page that is not as it should be."""


def expect(holds: bool, complaint: str) -> None:
    if not holds:
        raise PageError(complaint)


def make_pages(folder: Path) -> Iterator[Path]:
    """Distils, evaluates and reports; the path of each page."""
    for recipe, settings in RUNS.items():
        runs = [folder / f"{recipe}-{i}" for i in range(len(settings))]
        for run, overrides in zip(runs, settings, strict=True):
            distill(resolve(recipe, overrides), run)
        evaluate(runs, Protocol(samples=64), cache=folder / "base")
        yield write_report(runs, folder / f"{recipe}.html")


def check(browser: Browser, path: Path, device: str) -> tuple[int, int]:
    """Loads a page, switches all that can be switched; how many switches and pictures it has."""
    context = browser.new_context(**DEVICES[device], offline=True)
    page, problems = _open(context, path.resolve().as_uri())
    broken = page.evaluate(PICTURES)
    expect(not broken, f"pictures that do not load: {broken}")
    page.screenshot(path=path.with_name(f"{path.stem}-{device}.png"), full_page=True)
    switches = _switch_all(page)
    for summary in page.locator("summary").all():
        summary.click()
    _expect_no_sideways_scroll(page, "with all details open")
    expect(all(page.evaluate(STICKY)), "the first column of a table scrolls away")
    expect(not any(problems), "; ".join(filter(None, problems)))
    pictures = page.locator("img").count()
    context.close()
    return switches, pictures


def _switch_all(page: Page) -> int:
    """Chooses every option of every switch; each must change what is seen, and nothing may scroll sideways."""
    options = page.locator("input[type=radio]")
    names = dict.fromkeys(options.evaluate_all("inputs => inputs.map(input => input.name)"))
    expect(bool(names), "there is nothing to switch")
    for name in names:
        labels = page.locator(f"label:has(input[name={name}])").all()
        for label in [*labels[1:], labels[0]]:
            before = page.evaluate(SEEN)
            label.click()
            expect(label.locator("input").is_checked(), f"{name} cannot be switched to {label.inner_text()}")
            expect(page.evaluate(SEEN) != before, f"{name}: {label.inner_text()} changes nothing")
            expect(page.locator("#samples img:visible").count() > 0, f"{name}: {label.inner_text()} shows no picture")
            _expect_no_sideways_scroll(page, f"{name}: {label.inner_text()}")
    return options.count()


def check_without_scripts(browser: Browser, path: Path) -> None:
    """Everything must be seen where no script runs."""
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    for kind in ("img", "[data-set]", "[data-seed]", "[data-figure]"):
        seen, there = page.locator(f"{kind}:visible").count(), page.locator(kind).count()
        expect(seen == there, f"without scripts only {seen} of {there} {kind} are seen")
    context.close()


def _expect_no_sideways_scroll(page: Page, when: str) -> None:
    wide, room = page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    expect(wide <= room, f"the page is {wide} px wide in {room} px ({when})")


def _console(message: ConsoleMessage) -> str | None:
    return f"console {message.type}: {message.text}" if message.type in ("error", "warning") else None


def _outside(request: Request, address: str) -> str | None:
    own = request.url.startswith(("data:", f"{address}state?")) or request.url == address
    return None if own else f"asks for {request.url}"


def _open(context: BrowserContext, address: str) -> tuple[Page, list[str | None]]:
    """Opens a page, and a list that gathers what goes wrong on it."""
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(_console(message)))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", lambda request: problems.append(_outside(request, address)))
    page.goto(address)
    return page, problems


# ---------------------------------------------------------------- a run that is watched


@contextmanager
def served(run: Path) -> Iterator[str]:
    """Serves a run's page in a thread; yields its address."""
    with make_server(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def train(run: Path) -> subprocess.Popen[bytes]:
    """Starts a process that distils the run, or goes on with it, and waits until its folder is there."""
    settings = [word for key, value in WATCHED.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "phased_dmd", "distill", "nano-t2i", "--output", str(run), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait(lambda: (run / "config.json").exists() or process.poll() is not None, "the run does not begin")
    return process


def wait(until: Callable[[], object], complaint: str) -> None:
    """Waits for what must come about; a PageError where it does not."""
    end = time.monotonic() + PATIENCE
    while not until():
        expect(time.monotonic() < end, complaint)
        time.sleep(0.2)


def check_watch(browser: Browser, folder: Path) -> str:
    """Watches a run on all devices while it is trained, killed, goes on from further back, and ends."""
    run = folder / "watched"
    process = train(run)
    with served(run) as address:
        contexts = [browser.new_context(**options) for options in DEVICES.values()]
        opened = [_open(context, address) for context in contexts]
        pages = [page for page, _ in opened]
        for page in pages:
            expect("no update is logged" in _words(page) or _place(page) > (0, 0), "a run that begins has no page")
        _reach(pages, (1, 6))
        process.kill()
        process.wait()
        for page in pages:
            wait(lambda page=page: "Stopped" in _words(page), "the page does not say that the run has stopped")
        before = _place(pages[0])
        process = train(run)
        wait(lambda: "Training" in _words(pages[0]) and _place(pages[0]) < before, "the page does not see it rewound")
        _reach(pages, (2, 9))
        for page, device in zip(pages, DEVICES, strict=True):
            _check_previews(page, device, folder)
        for page in pages:
            wait(lambda page=page: "Finished" in _words(page), "the page does not say that the run is finished")
        for (page, problems), device in zip(opened, DEVICES, strict=True):
            expect(not any(problems), f"watch, {device}: {'; '.join(filter(None, problems))}")
            expect(page.locator(".phases").count() == 0, "a finished run still has bars")
    process.wait()
    line = pages[0].locator("#problem")
    wait(lambda: line.is_visible() and "does not answer" in line.inner_text(), "the page does not say that it is old")
    for context in contexts:
        context.close()
    return f"a run was watched on {len(pages)} devices until its end"


def _words(page: Page) -> str:
    words = page.locator(".words")
    return words.first.inner_text() if words.count() else ""


def _place(page: Page) -> tuple[int, int]:
    """Returns the phase and the iteration that a page shows."""
    found = PLACE.search(_words(page))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _reach(pages: list[Page], place: tuple[int, int]) -> None:
    """Follows all pages until they show a place of the run or a later one; they must move, and show others before."""
    steps = 0
    while not all(_place(page) >= place for page in pages):
        last = [_place(page) for page in pages]
        wait(lambda last=last: [_place(page) for page in pages] != last, f"the figures stop at {last}, before {place}")
        steps += 1
    expect(steps > 2, f"the figures do not move on the way to {place}")


def _check_previews(page: Page, device: str, folder: Path) -> None:
    """Moves the slider to the first preview, which must stay there while the page goes on, and back to the last."""
    slider, title = page.locator("input[name=step]"), page.locator(".slider output")
    broken = page.evaluate(PICTURES)
    expect(not broken, f"watch, {device}: pictures that do not load: {broken}")
    _expect_no_sideways_scroll(page, f"watch, {device}")
    page.screenshot(path=folder / f"watch-{device}.png", full_page=True)
    slider.fill("0")
    expect(title.inner_text() == "phase 1, iteration 8", f"watch, {device}: the slider shows {title.inner_text()}")
    shown = page.locator("#previews img:visible")
    expect(shown.count() == 32, f"watch, {device}: {shown.count()} pictures of a preview of 16 beside the base's")
    page.wait_for_timeout(3000)  # longer than the page waits before it asks again
    expect(title.inner_text() == "phase 1, iteration 8", f"watch, {device}: the slider moves by itself")
    slider.fill(slider.get_attribute("max") or "")


def main(folder: Path) -> str:
    """The line that is printed where all pages are as they should be."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    expect(executable is not None, f"no browser: install Debian's chromium (looked for {', '.join(BROWSERS)})")
    pages, switches, pictures = list(make_pages(folder)), 0, 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        for path in pages:
            for device in DEVICES:
                try:
                    found = check(browser, path, device)
                except PageError as error:
                    raise PageError(f"{path.stem}, {device}: {error}") from error
            switches, pictures = switches + found[0], pictures + found[1]
            check_without_scripts(browser, path)
        watched, version = check_watch(browser, folder), browser.version
        browser.close()
    in_order = f"{len(pages)} pages, {switches} switches and {pictures} pictures are in order"
    return f"{in_order}, and {watched}, in Chromium {version}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        try:
            print(f"check-report: {main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))}")
        except PageError as error:
            print(f"check-report: {error}", file=sys.stderr)
            sys.exit(1)
