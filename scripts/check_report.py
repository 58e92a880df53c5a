"""Checks report pages of tiny runs in a headless Chromium: every picture, every switch, phone width, no error.

    python scripts/check_report.py [FOLDER]    keeps the runs, pages and screenshots in FOLDER

The runs are made with the embedded and the analytic teacher, too short to be worth reading. The system's browser is
taken, none is downloaded. Ends with one line, and with status 1 where a page fails.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch
os.environ["HF_HUB_OFFLINE"] = "1"

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from phased_dmd.lab.evaluate import Protocol, evaluate
from phased_dmd.lab.report import write_report
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
SHORT = {"iterations": 2, "batch_size": 4, "fake.updates": 1, "log_every": 1, "sample_every": 1000}
NANO = {**SHORT, "teacher.base_steps": 3, "plan.steps": 2, "plan.phases": 2}
TOY = {**SHORT, "teacher.fit_steps": 20}
RUNS: dict[str, list[dict[str, Any]]] = {  # of each page: its runs
    "nano-t2i": [NANO, {**NANO, "seed": 1}, {**NANO, "ablation.renoise": "disjoint"}],
    "nano-t2v": [NANO],
    "toy-2d": [TOY, {**TOY, "plan.phases": 1}],
}
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
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(_console(message)))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", lambda request: problems.append(_outside(request, path)))
    page.goto(path.resolve().as_uri())
    broken = page.evaluate(PICTURES)
    expect(not broken, f"pictures that do not load: {broken}")
    switches = _switch_all(page)
    for summary in page.locator("summary").all():
        summary.click()
    _expect_no_sideways_scroll(page, "with all details open")
    expect(all(page.evaluate(STICKY)), "the first column of a table scrolls away")
    page.screenshot(path=path.with_name(f"{path.stem}-{device}.png"))
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


def _outside(request: Request, path: Path) -> str | None:
    own = request.url.startswith("data:") or request.url == path.resolve().as_uri()
    return None if own else f"asks for {request.url}"


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
        version = browser.version
        browser.close()
    return f"{len(pages)} pages, {switches} switches and {pictures} pictures are in order in Chromium {version}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        try:
            print(f"check-report: {main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))}")
        except PageError as error:
            print(f"check-report: {error}", file=sys.stderr)
            sys.exit(1)
