"""What this host has: free memory within its limits, and the cuDNN that the process loaded. Linux."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

# (limit, usage, statistics) of the process's control group, versions 2 and 1
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_host_bytes(stated_bytes: int = 0) -> int:
    """Memory that the processes of this host, or of its container, can still take. `stated_bytes`: see `free_bytes`."""
    groups = [tuple(_text(path) for path in files) for files in CGROUP_FILES]
    return free_bytes(_text("/proc/meminfo") or "", groups, stated_bytes)


def free_bytes(meminfo: str, groups: list[tuple[str | None, ...]], stated_bytes: int = 0) -> int:
    """The smaller of MemAvailable and what each control group's limit leaves; pages of files can be given back.

    `stated_bytes`: what the recipe says that the host has in all. Where that is more than MemTotal it counts instead:
    a virtual machine may be given its memory only as it uses it.
    """
    total, free = (_meminfo_bytes(meminfo, name) for name in ("MemTotal", "MemAvailable"))
    if total is not None and free is not None:
        free += max(0, stated_bytes - total)
    free = 2**63 if free is None else free
    for limit, usage, statistics in groups:
        if limit is None or usage is None or not limit.strip().isdigit():  # "max": no limit
            continue
        reclaimable = re.search(r"^(?:total_)?inactive_file (\d+)", statistics or "", re.MULTILINE)
        free = min(free, int(limit) - int(usage) + (int(reclaimable.group(1)) if reclaimable else 0))
    return free


def _meminfo_bytes(meminfo: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def cudnn_wheel() -> str | None:
    """Version of the cuDNN that came with torch as a wheel, None where it came in another way."""
    for package in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def loaded_libraries(name: str) -> list[str]:
    """Paths of the shared libraries of this process whose file name begins with `name`."""
    maps = _text("/proc/self/maps") or ""
    return sorted(set(re.findall(rf"(/\S*/{re.escape(name)}\S*)$", maps, re.MULTILINE)))


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
