"""A process that saves one job after the other, for a test to kill.

Arguments: the store, the number of the first job, and the number of jobs, after which
the process waits for its standard input to end. It prints the number of each job once
it is saved.
"""

import sys
from pathlib import Path

from sleap_rtc.worker.job_store import JobRecord, open_store


def main() -> None:
    store = open_store(Path(sys.argv[1]))
    first, count = map(int, sys.argv[2:])
    for number in range(first, first + count):
        store.save(
            JobRecord(
                job_id=f"job_{number:08x}",
                worker_id="worker-here-0123ab",
                route="channel",
                directory="/state/jobs/1",
                package="training.zip",
                size=1,
                state="RUNNING",
                detail=f"{number} " * 300,
                output_path="models",
                results={},
                updated=float(number),
            )
        )
        print(number, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
