"""The page in a real browser: no console errors, no request beyond the file itself, nothing wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from tests.machine import PATIENCE_SECONDS
from tests.report.made_run import made_recipe, write_run
from ultralong_ray.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = made_recipe(tmp_path_factory.mktemp("run"))
    directories = write_run(recipe)
    write_report(recipe, directories, directories["report"])
    return Path(directories["report"].location.path) / "report.html"


FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--disable-default-apps",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--hide-scrollbars",
    "--v=0",
    "--window-size=1200,3000",
]


def _visit(page: Path, folder: Path) -> tuple[str, set[str]]:
    """(Chromium's log with console lines, URLs requested by the page) of one headless visit that takes a picture."""
    assert BROWSER is not None
    log = folder / "net.json"
    done = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            f"--screenshot={folder / 'page.png'}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert (folder / "page.png").stat().st_size > 10_000, done.stderr
    # The browser may end before it closes the log's array; the URLs are complete lines of their own.
    text = log.read_text(errors="replace")
    return done.stderr, set(map(json.loads, re.findall(r'"url":("(?:[^"\\]|\\.)*")', text)))


def _from_network(urls: set[str]) -> set[str]:
    """http(s) requests, without those that Chromium makes to its own maker's services."""
    own = re.compile(r"https?://([a-z0-9.-]+\.)?(google|googleapis|gvt1|gstatic)\.com/")
    return {url for url in urls if url.startswith(("http:", "https:", "ws:", "wss:")) and not own.match(url)}


def test_no_console_lines_and_no_requests(report: Path, tmp_path: Path) -> None:
    log, urls = _visit(report, tmp_path)
    assert "CONSOLE" not in log, log
    assert _from_network(urls) == set()


def test_the_probe_sees_errors_and_requests(report: Path, tmp_path: Path) -> None:
    """Not vacuous: the same visit of a page that does both is caught."""
    bad = tmp_path / "bad.html"
    planted = '<img src="http://made-up.example/x.png"><script>console.error("planted")</script>'
    bad.write_text(re.sub(r"<meta http-equiv[^>]*>", "", report.read_text()).replace("</main>", planted + "</main>"))
    log, urls = _visit(bad, tmp_path)
    assert "CONSOLE" in log and "planted" in log
    assert _from_network(urls) == {"http://made-up.example/x.png"}


@pytest.mark.parametrize("width_pixels", [360, 820])
def test_only_tables_and_wide_charts_scroll_sideways(report: Path, tmp_path: Path, width_pixels: int) -> None:
    """Chromium opens no window below 500 pixels, so the page is measured in a frame of the asked width."""
    assert BROWSER is not None
    frame = tmp_path / "frame.html"
    measure = "document.body.dataset.width = this.contentDocument.documentElement.scrollWidth"
    frame.write_text(
        f'<meta charset="utf-8"><body><iframe style="width:{width_pixels}px;height:900px;border:0" onload="{measure}" '
        f'srcdoc="{escape(report.read_text())}"></iframe>'
    )
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS).stdout
    assert re.findall(r'<body data-width="(\d+)"', dom) == [str(width_pixels)]
