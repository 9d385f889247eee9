"""The resources of this process, printed by itself in one line."""

import json
import re
import resource
import time
from pathlib import Path


class Stopwatch:
    """Measures the resources since its creation."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._cpu = _cpu_seconds()

    def tell(self) -> None:
        """Print the seconds and the resources as one line of JSON."""
        told = {
            "seconds": time.monotonic() - self._began,
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 3),
            "peak_bytes": _peak_bytes(),
        }
        print(json.dumps(told), flush=True)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return None if found is None else int(found[1]) * 1024
