import json
from pathlib import Path

import jax.numpy as jnp
import pytest

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


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # the file format's own check

    run(tmp_path, 0, 2)
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, values = path.read_bytes(), {}
    while content:
        size, crc = int.from_bytes(content[:8], "little"), int.from_bytes(content[8:12], "little")
        assert masked_crc32c(content[:8]) == crc
        event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
        values.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
    assert values[1, "loss"] == 0.5
    assert values[2, "loss"] == 1.0


def test_summary_and_peak_memory(tmp_path):
    write_summary(tmp_path, {"steps": 3, "loss": 0.5})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3, "loss": 0.5}
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_gib() == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)  # the line is in KiB
