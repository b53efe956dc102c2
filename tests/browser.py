"""A headless chromium for tests of pages: what the page says on its console, and how it looks."""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # a page that needs the network fails here
    "--enable-logging=stderr",
    "--v=0",
)
_CONSOLE = re.compile(r'^\[[^\]]*CONSOLE[^\]]*\] "(.*)", source: (.*)$', re.MULTILINE | re.DOTALL)
_LINE_START = re.compile(r"\n(?=\[\d+:\d+:)")


def find() -> str | None:
    """Path of the first browser that is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def run(target: str | Path, *arguments: str, seconds: float = 60.0) -> str:
    """Open a file or an address with further arguments; returns the browser's log. Skips the test where no browser is."""
    return _open(target, *arguments, seconds=seconds).stderr


def played(page: Path, script: str, *, width: int = 1280, height: int = 900, seconds: float = 120.0) -> tuple[str, list[str]]:
    """What a page is after its scripts and then ``script`` have run, and all that it said on its console.

    The script runs in a copy of the page beside it, once that has loaded.
    """
    copy = page.with_name(f"played-{page.name}")
    text = page.read_text(encoding="utf-8")
    copy.write_text(f"{text}\n<script>addEventListener('load', async () => {{ {script} }});</script>", encoding="utf-8")
    done = _open(copy, "--dump-dom", f"--window-size={width},{height}", seconds=seconds)
    return done.stdout, _said(done.stderr)


def _open(target: str | Path, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    browser = find()
    if browser is None:
        pytest.skip("no chromium is installed")
    url = Path(target).resolve().as_uri() if isinstance(target, Path) else target
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=4000", *arguments, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done


def console_errors(target: str | Path) -> list[str]:
    """All that a page says on its console: the log does not tell errors from other messages, and our pages say nothing."""
    return _said(run(target, "--dump-dom", "--window-size=1280,900"))


def _said(log: str) -> list[str]:
    return [f"{match[1]} ({match[2]})" for line in _LINE_START.split(log) if (match := _CONSOLE.search(line))]


def screenshot(target: str | Path, picture: Path, *, width: int = 1280, height: int = 900) -> Path:
    """Write a picture of a page, ``width`` x ``height`` pixels from its top, to ``picture``."""
    picture.unlink(missing_ok=True)
    run(target, f"--screenshot={picture}", f"--window-size={width},{height}")
    if not picture.exists():
        raise RuntimeError(f"no picture of {target} was written to {picture}")
    return picture


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and keeps no log but of what is missing."""

    missing: list[str]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Remember which address was asked for in vain."""
        self.missing.append(self.path)
        super().send_error(code, message, explain)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder on a free port: the address, and the list of paths that were asked for in vain."""
    missing: list[str] = []
    handler = type("Handler", (_Quiet,), {"missing": missing})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", missing
        finally:
            server.shutdown()
