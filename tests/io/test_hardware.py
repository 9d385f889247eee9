"""The description of this machine."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sleap_rtc.io.hardware import describe_machine, find_sleap_nn

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="programs are found by other rules there"
)


def add_environment(prefix: Path, version: str, interpreter: str) -> Path:
    """Make an environment as pip does; return its program."""
    packages = prefix / "lib" / "python3.11" / "site-packages"
    (packages / "sleap_nn").mkdir(parents=True)
    (packages / f"sleap_nn-{version}.dist-info").mkdir()
    (packages / "sleap_nn_extras-9.9.dist-info").mkdir()
    (prefix / "bin").mkdir()
    program = prefix / "bin" / "sleap-nn"
    program.write_text(f"#!{interpreter}\nraise SystemExit('must not be started')\n")
    program.chmod(0o755)
    return program


def test_the_machine_describes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    info = describe_machine(tmp_path)
    assert info.hostname == socket.gethostname()
    assert info.sleap_nn == ""
    free = shutil.disk_usage(tmp_path).free
    assert abs(info.disk_free - free) < 2**30
    assert msgspec.json.encode(info)


def test_sleap_nn_is_found_beside_its_interpreter(tmp_path: Path) -> None:
    program = add_environment(tmp_path, "0.3.5", f"{tmp_path}/bin/python3")
    assert find_sleap_nn(str(program.parent)) == "0.3.5"


def test_a_program_that_was_copied_elsewhere_leads_to_its_environment(
    tmp_path: Path,
) -> None:
    program = add_environment(tmp_path / "env", "0.4.0", f"{tmp_path}/env/bin/python")
    (tmp_path / "bin").mkdir()
    shutil.copy(program, tmp_path / "bin" / "sleap-nn")
    assert find_sleap_nn(str(tmp_path / "bin")) == "0.4.0"


@pytest.mark.parametrize(
    "interpreter", ["/bin/sh", "/usr/bin/env python3", "", "/\x00"]
)
def test_a_link_to_a_program_leads_to_its_environment(
    tmp_path: Path, interpreter: str
) -> None:
    program = add_environment(tmp_path / "env", "0.3.5rc1", interpreter)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sleap-nn").symlink_to(program)
    assert find_sleap_nn(str(tmp_path / "bin")) == "0.3.5rc1"


def test_a_program_without_its_package_has_no_version(tmp_path: Path) -> None:
    program = tmp_path / "sleap-nn"
    program.write_bytes(b"\x7fELF \xff\xfe")
    program.chmod(0o755)
    assert find_sleap_nn(str(tmp_path)) == ""


# A driver library of three GPUs, the second of which is lost (NVML error 15).
DRIVER = r"""
#include <string.h>
static int gpus[3] = {0, 1, 2};
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, int **gpu) {
    *gpu = &gpus[i];
    return i == 1 ? 15 : 0;
}
int nvmlDeviceGetName(int *gpu, char *name, unsigned size) {
    strncpy(name, *gpu ? "NVIDIA A40" : "NVIDIA RTX A5000", size);
    return 0;
}
int nvmlDeviceGetMemoryInfo(int *gpu, memory *info) {
    info->total = *gpu ? 48305799168ULL : 25769803776ULL;
    return 0;
}
const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : "?"; }
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="a driver library cannot be built here",
)
def test_gpus_come_from_the_driver_and_keep_their_numbers(tmp_path: Path) -> None:
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    library = str(tmp_path / "libnvidia-ml.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    program = (
        "from sleap_rtc.io.hardware import find_gpus\n"
        "for _ in range(2):\n"
        "    print([(gpu.model, gpu.memory_mb) for gpu in find_gpus()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    expected = (
        "[('NVIDIA RTX A5000', 24576), ('does not answer: GPU is lost', 0), "
        "('NVIDIA A40', 46068)]\n"
    )
    assert done.stdout == expected * 2
