import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from full_disk import limited

from rise_jax.report import Report, peak_memory_gib, read_metrics, write_summary
from rise_jax.throughput import Work

tensorboard = pytest.importorskip("tensorboardX")


def run(workdir, start, stop, total=6):
    with Report(workdir, total, start) as report:
        for step in range(start + 1, stop + 1):
            report.log(step, {"loss": jnp.float32(step) / 2, "rate": 0.5})


def test_each_step_has_one_line_with_its_values(tmp_path):
    run(tmp_path, 0, 3)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [0.5, 1.0, 1.5]
    assert all(line["rate"] == 0.5 and line["step_seconds"] >= 0 for line in lines)


def test_a_line_has_the_rates_of_its_step_and_the_memory_so_far(tmp_path):
    work = Work(samples=4, frames=36, tokens=72, flops=8 * 10**12, devices=2, peak=10.0)
    with Report(tmp_path, 1, 0, work) as report:
        report.log(1, {"loss": 1.0})
    (line,) = read_metrics(tmp_path)
    seconds = line["step_seconds"]
    assert {name: line[name] for name in work.rates(seconds)} == work.rates(seconds)
    assert 0 < line["host_memory_gib"] <= peak_memory_gib()
    assert "device_memory_gib" not in line, "a CPU does not say"


def test_a_resumed_run_has_each_step_once(tmp_path):
    run(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    run(tmp_path, 3, 6)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "line", [b"", b"\0" * 20, b'{"step": 2, "lo', b"[2]", b'{"loss": 1.0}', b'{"step": null}', b'{"step": "\xff"}']
)
def test_a_damaged_line_is_told_with_its_file_and_number(tmp_path, line):
    run(tmp_path, 0, 3)
    file = tmp_path / "metrics.jsonl"
    first, _, third = file.read_bytes().splitlines()
    damaged = b"\n".join([first, line, third, b""])
    file.write_bytes(damaged)
    told = rf"{file} is damaged \(line 2 is no JSON object with a step\): remove that line, and the run goes on"
    for reading in (lambda: Report(tmp_path, 6, start_step=3), lambda: read_metrics(tmp_path)):
        with pytest.raises(ValueError, match=told):
            reading()
    assert file.read_bytes() == damaged
    file.write_bytes(damaged.replace(line + b"\n", b"", 1))
    run(tmp_path, 3, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 4]


def test_metrics_come_back_one_step_late_and_flush_gives_the_last(tmp_path):
    with Report(tmp_path, 2) as report:
        assert report.log(1, {"loss": jnp.float32(4)}) is None
        assert report.log(2, {"loss": jnp.float32(5)}) == {"loss": 4.0}
        assert report.flush() == {"loss": 5.0}
        assert report.flush() is None
    assert [line["loss"] for line in read_metrics(tmp_path)] == [4.0, 5.0]


def test_log_does_not_wait_for_the_step_it_is_given(tmp_path):
    """A value that is never ready until released: logging it returns, and only the flush waits."""
    released = []

    def late(x):
        released.append(True)
        return x

    with Report(tmp_path, 1) as report:
        slow = Lazy(late)
        report.log(1, {"loss": slow})
        assert not released
        report.flush()
        assert released


class Lazy:
    """A number that is computed when it is asked for, like an array on a device."""

    def __init__(self, compute):
        self.compute = compute

    def __float__(self):
        return float(self.compute(1.0))


def test_a_loss_that_is_not_finite_is_still_json(tmp_path):
    with Report(tmp_path, 1) as report:
        assert report.log(1, {"loss": jnp.float32(jnp.nan)}) is None
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None


def test_without_a_terminal_the_last_step_is_told_in_one_line(tmp_path, capsys):
    run(tmp_path, 0, 6)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith("step 6/6: loss 3.0000, ")
    assert " s/step, 00:00 left" in out


def events(path):
    """What a TensorBoard file holds, checked as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # the file format's own check

    content, found = path.read_bytes(), []
    while content:
        size, crc = int.from_bytes(content[:8], "little"), int.from_bytes(content[8:12], "little")
        assert masked_crc32c(content[:8]) == crc
        event, crc = content[12 : 12 + size], int.from_bytes(content[12 + size : 16 + size], "little")
        assert masked_crc32c(event) == crc
        found.append(Event.FromString(event))
        content = content[16 + size :]
    return found


def scalars(path):
    return {(event.step, value.tag): value.simple_value for event in events(path) for value in event.summary.value}


def test_tensorboard_holds_the_scalars(tmp_path):
    run(tmp_path, 0, 2)
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = scalars(path)
    assert values[1, "loss"] == 0.5
    assert values[2, "loss"] == 1.0


def test_tensorboard_is_written_step_by_step_and_told_which_steps_come_again(tmp_path):
    with Report(tmp_path, 6, start_step=3) as report:
        report.log(4, {"loss": 1.0})
        report.flush()
        (path,) = (tmp_path / "tensorboard").iterdir()
        assert scalars(path)[4, "loss"] == 1.0
    first, version, start, _ = events(path)
    assert (first.step, first.file_version, version.file_version) == (0, "brain.Event:2", "brain.Event:2")
    assert version.step == start.step == 4 and start.session_log.status == start.session_log.START
    assert all(abs(event.wall_time - path.stat().st_mtime) < 60 for event in events(path))


def test_two_starts_in_one_second_have_tensorboard_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.75e9)
    run(tmp_path, 0, 2)
    run(tmp_path, 2, 3)
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert first.name.startswith("events.out.tfevents.1750000000.") and second.name == f"{first.name}.1"
    assert (2, "loss") in scalars(first) and (3, "loss") in scalars(second)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["metrics.jsonl", "tensorboard/*"])
def test_a_full_disk_ends_the_run_with_the_path(tmp_path, pattern):
    """What the next step adds to the file is refused: the step before is kept, whole, and nothing waits."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' * (200 if pattern == "metrics.jsonl" else 1))
    code = """
import sys
from pathlib import Path
from full_disk import limited
from rise_jax.report import Report
try:
    with Report(sys.argv[1], 100) as report:
        report.log(1, {"loss": 1.0})
        report.flush()
        (file,) = Path(sys.argv[1]).glob(sys.argv[2])
        with limited(file.stat().st_size + 50):  # less than what a step adds to either
            for step in range(2, 40):
                report.log(step, {"loss": 1.0})
except OSError as error:
    print(f"{file.name} told: {error}")
"""
    command = [sys.executable, "-c", code, str(tmp_path), pattern]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
    (file,) = tmp_path.glob(pattern)
    assert done.stdout == f"{file.name} told: [Errno 27] cannot write {file}: File too large\n", done.stderr
    assert "Error" not in done.stderr
    assert {line["step"] for line in read_metrics(tmp_path)} >= {0, 1}
    (file,) = tmp_path.glob("tensorboard/*")
    assert (1, "loss") in scalars(file)


def test_an_error_of_the_run_is_not_hidden_by_a_full_disk(tmp_path):
    def failing():
        with limited(200), Report(tmp_path, 9) as report:
            report.log(1, {"a metric with a name so long that its line does not fit" * 9: 1.0})
            raise RuntimeError("the first")

    with pytest.raises(RuntimeError, match="the first"):
        failing()
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_a_full_disk_is_told_when_a_run_ends_and_all_is_closed(tmp_path):
    report = Report(tmp_path, 9)
    report.log(1, {"loss": 1.0})
    with limited(20), pytest.raises(OSError, match=f"cannot write {tmp_path}/metrics.jsonl: File too large"):
        report.close()
    with pytest.raises(ValueError, match="closed"):
        report._file.write(b"more")


def test_summary_and_peak_memory(tmp_path):
    write_summary(tmp_path, {"steps": 3, "loss": 0.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3, "loss": 0.5}
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_gib() == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)  # the line is in KiB
