"""Who holds a claim, and whether that process still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

HEARTBEAT_SECONDS = 5.0
"""How often a process says that it is alive."""
STALE_SECONDS = 120.0
"""Silence after which a claim from another host counts as abandoned."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one that got the same number.

    Args:
        host: the machine's name, with its boot identifier where it has one.
        pid: process number there.
        started: the process's start time as the system counts it, or 0 where it does not tell.
    """

    host: str
    pid: int
    started: int

    def is_gone(self, silent_for: float) -> bool:
        """Whether this process has ended; of one on another host the silence in seconds decides."""
        if self.host != this_host():
            return silent_for > STALE_SECONDS
        return not is_running(self.pid) or start_time(self.pid) != self.started


def this_host() -> str:
    """Name of this machine and boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + ("/" + boot.read_text().strip() if boot.exists() else "")


def this_process() -> Owner:
    """The running process."""
    return Owner(this_host(), os.getpid(), start_time(os.getpid()))


def is_running(pid: int) -> bool:
    """Whether a process of this number exists here and is not a zombie."""
    status = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            return _fields(status)[0] not in ("Z", "X")
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of the process; 0 where that is not known."""
    try:
        return int(_fields(Path(f"/proc/{pid}/stat"))[19])
    except (OSError, IndexError, ValueError):
        return 0


def _fields(status: Path) -> list[str]:
    # The name, in parentheses, may hold spaces: what follows it begins with the state, field 3 of proc(5).
    return status.read_text().rpartition(")")[2].split()
