"""The harness: a peer that fails is a row, an interrupted run keeps its rows, times are what they are said to be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_suite
import pytest

from bench import runner
from bench.pool import Failed, Pool
from bench.record import Record, command_line, slug
from bench.runner import Options

ROOT = Path(__file__).parent.parent


def options(**changes) -> Options:
    given = {
        "device": "cpu", "dtypes": ("fp32",), "batches": (4,), "models": (), "backends": (),
        "peers": ("eager", "eager-nchw", "compile"), "rounds": 2, "window": 0.01, "limit": 60.0,
    }  # fmt: skip
    return Options(**given | changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The fake suite's rows, and its record's lines."""
    folder = tmp_path_factory.mktemp("records")
    record = Record(folder, "fake", "cpu", ["fp32"])
    # The worker imports the suite by its name, from the root of the repository.
    fake_suite.__name__ = "tests.fake_suite"
    found = runner.run(fake_suite, options(), record, show=lambda text: None)
    return found, [json.loads(line) for line in record.path.read_text().splitlines()]


def row(rows, case: str, system: str) -> dict:
    (found,) = [r for r in rows[0] if r["case"]["name"] == case and r["system"] == system]
    return found


def test_runner_crash_while_preparing_is_one_row(rows):
    found = row(rows, "one", "eager")
    assert found["status"] == "failed"
    assert found["reason"] == "the process was killed by signal 9"


def test_runner_exception_is_one_row_with_its_text(rows):
    found = row(rows, "one", "eager-nchw")
    assert (found["status"], found["reason"]) == ("failed", "RuntimeError: no such thing")


@pytest.mark.parametrize(("case", "what"), [("one", "error 1 is above 0.5"), ("two", "error nan is above 0.5")])
def test_runner_wrong_result_has_no_speed(rows, case, what):
    found = row(rows, case, "compile")
    assert (found["status"], found["reason"]) == ("wrong", what)
    assert "median_ms" not in found


def test_runner_crash_while_timed_is_one_row(rows):
    assert row(rows, "two", "eager")["status"] == "failed"
    assert row(rows, "two", "fused_resnet")["status"] == "ok"


def test_runner_exit_code_and_last_words(rows):
    assert row(rows, "two", "eager-nchw")["reason"] == "the process ended with exit code 3: last words"


def test_runner_goes_on_with_the_systems_that_failed(rows):
    for system in ("eager", "eager-nchw", "compile", "fused_resnet"):
        assert row(rows, "three", system)["status"] == "ok"
    assert row(rows, "one", "fused_resnet")["process"] == row(rows, "three", "fused_resnet")["process"]
    assert row(rows, "three", "eager")["process"] != row(rows, "three", "compile")["process"]


def test_runner_numbers_follow_from_the_median(rows):
    found = row(rows, "three", "eager")
    seconds = found["median_ms"] * 1e-3
    assert 1e-3 < seconds < 0.1  # a call sleeps one millisecond
    assert found["p20_ms"] <= found["median_ms"] <= found["p80_ms"]
    assert found["images_per_s"] == pytest.approx(4 / seconds)
    assert found["gb_per_s"] == pytest.approx(1e-3 / seconds)
    floor = max(2e6 / (found["peak_tflops"] * 1e12), 1e6 / (found["copy_gb_per_s"] * 1e9))
    assert found["of_floor"] == pytest.approx(floor / seconds)
    ours = row(rows, "three", "fused_resnet")
    assert ours["fused_is_faster_by"] == 1.0
    assert found["fused_is_faster_by"] == pytest.approx(found["median_ms"] / ours["median_ms"])


def test_record_round_trip(rows):
    found, (about, *lines) = rows
    assert lines == json.loads(json.dumps(found))
    assert about["suite"] == "fake"
    assert {"hardware", "versions", "commit", "clean", "command", "date", "backends"} <= set(about)


def test_record_overwrites_none_of_the_same_day(tmp_path):
    first, second = (Record(tmp_path, "fake", "cpu", ["fp32", "bf16"]) for _ in range(2))
    assert first.path != second.path
    assert first.path.name.replace(".jsonl", "-2.jsonl") == second.path.name
    assert "-fake-fp32-bf16-" in first.path.name


def test_record_names_no_folder_in_its_command():
    assert command_line(["all", "--quick", "--out", "x/y", "--size", "64"]) == "python -m bench all --quick --size 64"
    assert command_line(["models", "--out=x"]) == "python -m bench models"


def test_record_file_names_are_plain():
    assert slug("Intel(R) Xeon(R) Processor") == "intel-xeon-processor"
    assert slug("NVIDIA H200") == "nvidia-h200"


def test_interrupted_run_keeps_finished_rows(tmp_path):
    code = (
        "import sys, tests.fake_suite as fake; from bench import runner; from bench.record import Record\n"
        "sys.path.insert(0, 'tests'); from test_bench_runner import options\n"
        "fake.CASES[:] = [fake.CASES[2], {'name': 'slow', 'dtype': 'fp32', 'fused_resnet': 'hang'}]\n"
        f"runner.run(fake, options(peers=()), Record({str(tmp_path)!r}, 'fake', 'cpu', ['fp32']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for text in process.stdout:
        if text.strip() == b"slow":  # the second case has begun
            break
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = tmp_path.glob("*.jsonl")
    _, *lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert {(r["case"]["name"], r["status"]) for r in lines} == {("three", "ok")}
    assert workers


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_late_answer_is_a_failure_and_frees_the_process():
    with Pool() as pool:
        worker = pool.worker("eager")
        start = time.monotonic()
        with pytest.raises(Failed, match="no answer within 1 s"):
            worker.ask("prepare", "tests.fake_suite", {"name": "x", "eager": "hang"}, "eager", limit=1.0)
        assert time.monotonic() - start < 20
        assert not worker.alive
        with pytest.raises(Failed, match="gone"):
            pool.running("eager")
        assert pool.worker("eager") is not worker


def test_pool_ends_its_processes():
    with Pool() as pool:
        process = pool.worker("eager")._process
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_missing_peer_is_named(monkeypatch):
    from bench.systems import openvino

    monkeypatch.setattr(
        openvino.importlib.util if hasattr(openvino, "importlib") else sys, "missing", None, raising=False
    )
    monkeypatch.setattr(openvino.OpenVINO, "missing", lambda self, device: "openvino not installed")
    ready, found = runner._prepare(["openvino"], options(), lambda system: pytest.fail("asked for"))
    assert ready == {}
    assert found == [{"system": "openvino", "status": "missing", "reason": "openvino not installed"}]
