"""The memory of this machine that its processes can still have."""

from __future__ import annotations

from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free() -> float:
    """Bytes that the host, or the container that this runs in, has left; infinite where the system does not say."""
    lines = MEMINFO.read_text(encoding="ascii").splitlines() if MEMINFO.is_file() else []
    found = [int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")]
    limit, used = CGROUP / "memory.max", CGROUP / "memory.stat"
    if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="ascii").strip()).isdigit():
        fields = dict(line.split() for line in used.read_text(encoding="ascii").splitlines())
        found.append(float(int(most) - int(fields.get("anon", 0))))
    return min(found, default=float("inf"))
