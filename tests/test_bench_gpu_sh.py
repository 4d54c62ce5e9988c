"""bench/gpu.sh without a GPU: its arguments, its time limits, its summary. What it runs is tested elsewhere."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.sh"
# Plays the interpreter: quick questions are answered, everything else takes too long.
SLEEPER = f"""#!/bin/bash
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
echo "begun: $*"
sleep 60
"""

pytestmark = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="needs bash and timeout")


def start(*arguments, **variables) -> subprocess.Popen:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(["bash", str(SCRIPT), *map(str, arguments)], env=environment, text=True, **pipes)


def run(*arguments, **variables) -> tuple[int, str]:
    process = start(*arguments, **variables)
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


@pytest.fixture
def sleeper(tmp_path):
    path = tmp_path / "sleeper"
    path.write_text(SLEEPER)
    path.chmod(0o755)
    return str(path)


def test_gpu_sh_without_arguments_shows_its_use():
    code, output = run()
    assert code == 2
    assert "bench/gpu.sh OUTDIR [SECTION...]" in output
    assert "set -uo" not in output


def test_gpu_sh_unknown_section(tmp_path):
    code, output = run(tmp_path, "nothing", DEVICE="cpu")
    assert code == 2
    assert "unknown section 'nothing'" in output


def test_gpu_sh_without_a_gpu(tmp_path):
    code, output = run(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert code == 2
    assert "torch finds no GPU" in output


def test_gpu_sh_runs_a_section_alone_and_sums_up(tmp_path):
    code, output = run(tmp_path / "out", "info", DEVICE="cpu")
    assert code == 0, output
    assert [line.split()[:2] for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()] == [
        ["info", "ok"]
    ]
    assert "backend" in (tmp_path / "out" / "info.log").read_text()


def test_gpu_sh_failure_is_named_and_the_rest_goes_on(tmp_path):
    code, output = run(tmp_path, "parity", "sanitizer", DEVICE="cpu", PYTEST_ADDOPTS="--no-such-option")
    assert code == 1
    assert "parity     FAILED (exit 4)" in output
    assert "sanitizer  ok" in output


def test_gpu_sh_slow_section_is_stopped_and_what_has_no_time_is_not_started(tmp_path, sleeper):
    begun = time.monotonic()
    code, output = run(tmp_path / "out", "parity", "ops", DEVICE="cpu", PYTHON=sleeper, TOTAL="3", LEAST="2")
    assert time.monotonic() - begun < 40
    assert "parity     stopped at its limit" in output
    assert "ops        not started: the 3 s are used up" in output
    assert "begun: -m pytest" in (tmp_path / "out" / "parity.log").read_text()  # what it wrote is kept
    assert code == 0


def test_gpu_sh_interrupted_leaves_nothing_running(tmp_path, sleeper):
    process = start(tmp_path / "out", "parity", DEVICE="cpu", PYTHON=sleeper)
    log = tmp_path / "out" / "parity.log"
    while not (log.exists() and "begun" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    left = subprocess.run(["pgrep", "-f", sleeper], capture_output=True, text=True)
    assert left.stdout == ""
