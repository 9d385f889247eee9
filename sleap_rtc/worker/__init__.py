"""The worker role: own jobs and run them beside the GPU.

``python -m sleap_rtc.worker ...`` is ``sleap-rtc daemon --role worker ...``.
"""

from sleap_rtc.worker.daemon import run_worker
from sleap_rtc.worker.options import WorkerOptions, read_options

__all__ = ["WorkerOptions", "read_options", "run_worker"]
