import errno
import fcntl
import os
import subprocess
import sys

import pytest

from rise_jax.workdir import check_workdir, config_differences, lock_workdir, write_config, write_json

CONFIG = {"run": {"steps": 10, "seed": 0, "keep": 2}, "mesh": {"data": -1}, "data": {"workers": 0, "path": None}}


def changed(**groups):
    return {group: {**CONFIG.get(group, {}), **groups.get(group, {})} for group in {**CONFIG, **groups}}


def claim(workdir, config):
    check_workdir(workdir, config)
    write_config(workdir, config)


def test_the_same_config_and_free_keys_pass(tmp_path):
    claim(tmp_path, CONFIG)
    claim(tmp_path, CONFIG)
    run = {"steps": 20, "keep": 5, "accumulate": 2, "profile": "1:3"}
    longer = changed(run=run, model={"dit": {"remat": "blocks"}}, mesh={"data": 2}, data={"workers": 4})
    claim(tmp_path, longer)
    claim(tmp_path, longer)


def test_another_config_is_refused_with_all_differences(tmp_path):
    claim(tmp_path, CONFIG)
    with pytest.raises(ValueError) as error:
        check_workdir(tmp_path, changed(run={"seed": 1, "steps": 99}, data={"path": "clips", "new": 1}))
    message = str(error.value)
    assert "run.seed: 0 -> 1" in message
    assert 'data.path: null -> "clips"' in message
    assert "data.new: absent -> 1" in message
    assert "steps" not in message
    check_workdir(tmp_path, CONFIG)  # the refused one left nothing behind


def test_differences_see_type_and_absence():
    assert config_differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1.5}}) == {
        "a.b": ("1", "1.5"),
        "a.c": ("2", "absent"),
    }
    assert config_differences({"a": (1, 2)}, {"a": [1, 2]}) == {}


def test_a_config_file_cut_short_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"run": ')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        check_workdir(tmp_path, CONFIG)


@pytest.mark.slow
def test_the_second_run_in_a_workdir_is_refused_and_told_by_whom(tmp_path):
    lock = lock_workdir(tmp_path / "run")
    code = f"from rise_jax.workdir import lock_workdir\nlock_workdir({str(tmp_path / 'run')!r})"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"is in use by process {os.getpid()}" in second.stderr
    lock.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    """Some network disks answer flock so; there is none here to ask."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        OSError, match="cannot lock workdir .*run: No locks available; its file system must support flock"
    ):
        lock_workdir(tmp_path / "run")


def test_a_workdir_that_cannot_be_made_or_written_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot use workdir /sys/rise: "):
        lock_workdir("/sys/rise")
    with pytest.raises(OSError, match="cannot write /sys/kernel/x.json: "):
        write_json("/sys/kernel/x.json", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot use workdir .*/file/run: Not a directory"):
        lock_workdir(tmp_path / "file" / "run")
