"""Everything that must pass before a change goes in: lint, format, types, compiled tests, tests. Stops at the first failure.

Run it with the environment's Python (see README.md): ``.venv/bin/python scripts/test.py [--fast] [pytest arguments]``.
Arguments that it does not know go to the last pytest run, whose summary is the last line printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def ensure_browser() -> None:
    """Install Debian's chromium, with which the report's tests open pages, if no browser is there and apt can; else say so."""
    if any(map(shutil.which, BROWSERS)):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print("no chromium here, and no apt-get as root to install it: the tests that open pages cannot run", flush=True)
        return
    print("installing chromium with apt-get", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", "chromium"]):
        if subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.DEVNULL).returncode:
            print(f"apt-get {command[0]} failed: the tests that open pages cannot run", flush=True)
            return


def step(name: str, *command: str, last: bool = False, **environment: str) -> None:
    """Run ``python -m command`` from the root; exit with its code on failure. Prints the time of all but the last step."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | environment).returncode
    if not last:
        print(f"== {name}: {'failed' if code else 'passed'} in {time.perf_counter() - start:.1f} s", flush=True)
    if code:
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description="Lint, check types and test; other arguments go to the last pytest.")
    parser.add_argument("--fast", action="store_true", help="skip lint, format and types")
    options, further = parser.parse_known_args()

    ensure_browser()
    if not options.fast:
        step("lint", "ruff", "check")
        step("format", "ruff", "format", "--check")
        step("types", "mypy")
    if (ROOT / "tests" / "compiled").is_dir():
        step("compiled tests", "pytest", "tests/compiled", "-n", "2", "--dist", "worksteal", ATTNLAB_TYPECHECK="0")
    step("tests", "pytest", "tests", "--ignore=tests/compiled", "-n", "2", "--dist", "loadfile", *further, last=True)


if __name__ == "__main__":
    main()
