"""Processor time and memory of this machine and of a process tree, from /proc. Standard library only."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def busy_seconds(stat: str) -> float:
    """Processor seconds of all cores, stolen ones included, from the text of /proc/stat."""
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def tree(root: int) -> list[int]:
    """Process ids of `root` and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def tree_seconds(root: int) -> float:
    """Processor seconds of a process tree so far, with children that have ended and were waited for."""
    total = 0
    for pid in tree(root):
        if (fields := _stat(pid)) is not None:
            total += sum(int(field) for field in fields[11:15])
    return total / TICKS


def tree_rss(root: int) -> int:
    """Resident bytes of a process tree; pages that its processes share count once for each."""
    total = 0
    for pid in tree(root):
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return total * os.sysconf("SC_PAGE_SIZE")


def tree_peak_rss(root: int) -> int:
    """Sum of the most resident bytes that each living process of a tree has ever had."""
    total = 0
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the command's name (state, parent, ...), or None if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


@dataclass(frozen=True, slots=True)
class LoadMeter:
    """Cores that were busy with something else than the process tree `root`, since the meter was made."""

    root: int
    begun: float
    busy: float
    own: float

    @staticmethod
    def start(root: int) -> LoadMeter:
        """A meter that counts from now."""
        busy = busy_seconds(Path("/proc/stat").read_text())
        return LoadMeter(root, time.perf_counter(), busy, tree_seconds(root))

    def foreign_cores(self) -> float:
        """Mean of cores used by others since the start; the clock ticks of the kernel are the resolution."""
        now = LoadMeter.start(self.root)
        others = (now.busy - self.busy) - (now.own - self.own)
        return max(0.0, others / max(now.begun - self.begun, 1 / TICKS))
