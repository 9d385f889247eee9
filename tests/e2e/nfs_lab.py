"""A laboratory with a real kernel NFS server, on a machine without one.

It boots a User Mode Linux kernel, which is an ordinary process, on the files of this
machine. Inside it, a kernel NFS 4.2 server exports an XFS and the same kernel mounts it
twice, with caches of their own, as two hosts would. A command then runs there with

- ``NFS_A`` and ``NFS_B``: the two mounts,
- ``NFS_EXPORT``: the exported folder as the server sees it,
- ``TMPDIR``: an empty tmpfs.

The laboratory sees and may change every file of this machine; only its mounts, its
processes and its network are its own. It has one processor and `MEMORY` of memory.
Inside, ``rpc.nfsd 0`` stalls the server and ``rpc.nfsd`` resumes it; then locks wait
for its grace period of 10 s.

Run ``python -m tests.e2e.nfs_lab COMMAND ...`` to try something by hand.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

MEMORY = "3G"
BOOT_SECONDS = 60.0
"""Seconds that booting may take on a busy machine; an idle one needs about ten."""

_KERNEL = "linux.uml"
_MODULES = Path("/usr/lib/uml/modules")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS = {
    _KERNEL: "user-mode-linux",
    "modprobe": "kmod",
    "mount.nfs4": "nfs-common",
    "rpc.nfsd": "nfs-kernel-server",
    "mkfs.xfs": "xfsprogs",
}
"""Programs that the laboratory starts, and the Debian package of each."""

_INIT = """\
#!/bin/bash
# The first process of the laboratory: mounts, the server, the command, the end.
export PATH={system_path}
boot() {{
  set -e
  mount -t proc proc /proc
  mount -t sysfs sysfs /sys
  mkdir -p /dev/pts /dev/shm
  mount -t devpts devpts /dev/pts
  for folder in /dev/shm /run /mnt; do mount -t tmpfs tmpfs $folder; done
  mkdir -p /run/lock /mnt/tmp /mnt/a /mnt/b /mnt/export
  mkdir -p /mnt/state/v4recovery
  ip link set lo up

  # The kernel loads further modules by itself through this helper.
  echo {lab}/modprobe > /proc/sys/kernel/modprobe
  {lab}/modprobe --all loop xfs nfsd nfsv4

  truncate -s 1500M /mnt/disk
  mkfs.xfs -q -m reflink=1 /mnt/disk
  mount -o loop /mnt/disk /mnt/export

  mount --bind /mnt/state /var/lib/nfs
  touch /var/lib/nfs/etab /var/lib/nfs/rmtab
  mount --bind {lab}/nfs.conf /etc/nfs.conf
  mount -t nfsd nfsd /proc/fs/nfsd
  rpc.mountd
  exportfs -o rw,fsid=0,no_root_squash,no_subtree_check,insecure 127.0.0.1:/mnt/export
  rpc.nfsd
  # No client can have held a lock before this server's first start.
  echo Y > /proc/fs/nfsd/v4_end_grace

  mount -t nfs4 -o vers=4.2 127.0.0.1:/ /mnt/a
  mount -t nfs4 -o vers=4.2,nosharecache 127.0.0.1:/ /mnt/b
}}
(boot) > {lab}/boot.log 2>&1 < /dev/null && touch {lab}/booted
if [ -e {lab}/booted ]; then
  {lab}/command > {lab}/output 2>&1 < /dev/null
  echo $? > {lab}/status.part
  mv {lab}/status.part {lab}/status
fi
sync
echo o > /proc/sysrq-trigger
sleep 10
"""

_NFS_CONF = """\
# Version 3 would bring lockd, whose own grace period nothing can end. After a restart
# of the server, clients may reclaim their locks for 10 s, the least that it takes.
[nfsd]
threads=4
vers3=n
grace-time=10
lease-time=10
"""

_COMMAND = """\
#!/bin/bash
cd {folder} || exit 1
export PATH={path} HOME={home} TMPDIR=/mnt/tmp
export NFS_A=/mnt/a NFS_B=/mnt/b NFS_EXPORT=/mnt/export
exec {command}
"""

_MODPROBE = """\
#!/bin/sh
exec modprobe --dirname {lab}/modules "$@"
"""


class LabError(Exception):
    """The laboratory did not come up, or the command in it did not end in time."""


class LabResult(NamedTuple):
    """The end of a command in the laboratory."""

    returncode: int
    output: str
    """Its stdout and stderr."""


def nfs_lab_missing() -> str | None:
    """Return why the laboratory cannot run here, or None if it can."""
    if sys.platform != "linux":
        return "the NFS laboratory needs Linux"
    if os.geteuid() != 0:
        return "the NFS laboratory needs root, to serve and to mount"
    packages = [
        package
        for program, package in _PROGRAMS.items()
        if shutil.which(program, path=_SYSTEM_PATH) is None
    ]
    if packages:
        return f"the NFS laboratory needs the Debian packages {' '.join(packages)}"
    return None


def run_in_nfs_lab(command: list[str], timeout: float) -> LabResult:
    """Boot the laboratory, run one command in the current folder there, and halt.

    Args:
        command: The program, looked up with this process's ``PATH``, and its arguments.
        timeout: Seconds that the command may take, `BOOT_SECONDS` not counted.

    Raises:
        LabError: If the laboratory does not come up, or the time is over.
    """
    with tempfile.TemporaryDirectory(prefix="nfs-lab-") as folder:
        lab = Path(folder)
        _furnish(lab, command)
        in_time = _run_kernel(lab, timeout)
        output = _read(lab / "output")
        status = _read(lab / "status")
        if status:
            return LabResult(int(status), output)
        if not (lab / "booted").exists():
            what = "did not come up"
            output = _read(lab / "boot.log") + _read(lab / "console.log")[-2000:]
        elif in_time:
            what = f"halted before the end of {shlex.join(command)}"
        else:
            what = f"was stopped after {timeout:g} s in {shlex.join(command)}"
        raise LabError(f"the NFS laboratory {what}:\n{output}")


def _furnish(lab: Path, command: list[str]) -> None:
    """Write the scripts that run inside, and provide the kernel's modules."""
    (lab / "modules/lib/modules").mkdir(parents=True)
    for release in _MODULES.iterdir():
        (lab / "modules/lib/modules" / release.name).symlink_to(release)
    (lab / "nfs.conf").write_text(_NFS_CONF)
    scripts = {
        "init": _INIT.format(lab=lab, system_path=_SYSTEM_PATH),
        "modprobe": _MODPROBE.format(lab=lab),
        "command": _COMMAND.format(
            folder=shlex.quote(str(Path.cwd())),
            path=shlex.quote(os.environ.get("PATH", _SYSTEM_PATH)),
            home=shlex.quote(str(Path.home())),
            command=shlex.join(command),
        ),
    }
    for name, text in scripts.items():
        (lab / name).write_text(text)
        (lab / name).chmod(0o755)


def _run_kernel(lab: Path, timeout: float) -> bool:
    """Run the kernel until it halts; return False if it had to be killed."""
    arguments = [
        _KERNEL,
        f"mem={MEMORY}",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "rw",
        f"init={lab}/init",
        "con=null",
        "con0=null,fd:1",
        f"umid={lab.name}",
    ]
    with (lab / "console.log").open("wb") as console:
        kernel = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            # A group of its own: each process inside is also a process of this machine.
            start_new_session=True,
        )
        try:
            kernel.wait(BOOT_SECONDS + timeout)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(kernel.pid)
            kernel.wait()
    return True


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the kernel and all its processes have ended


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def main() -> int:
    """Run the command of the command line in the laboratory."""
    reason = nfs_lab_missing()
    if reason is not None:
        sys.exit(reason)
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.e2e.nfs_lab COMMAND [ARGUMENT ...]")
    try:
        result = run_in_nfs_lab(sys.argv[1:], timeout=600)
    except LabError as error:
        sys.exit(str(error))
    sys.stdout.write(result.output)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
