"""Run a job over two NFS mounts; the NFS laboratory starts this on the inside."""

import os
import tempfile
from pathlib import Path

from tests.e2e.harness import EXAMPLES, Lab, tree


def main() -> None:
    """Run a job; print its output and the state of its storage."""
    mine, theirs = (Path(os.environ[name]) for name in ("NFS_A", "NFS_B"))
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        try:
            machine = lab.machine("gpu")
            machine.start_worker("--shared-storage-root", theirs)
            arguments = ("send", EXAMPLES / "synth_job.zip", "--output", "out")
            done = machine.run(*arguments, "--shared-storage-root", mine, timeout=100)
            print(done.err)
            done.expect(0)
            results = tree(machine.home / "out")
        finally:
            lab.close()
    (job,) = Path(os.environ["NFS_EXPORT"], "jobs").iterdir()
    assert results.items() <= tree(job).items()
    print("results:", *sorted(results))


if __name__ == "__main__":
    main()
