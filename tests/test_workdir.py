import errno
import fcntl
import os
import subprocess
import sys

import pytest

from rise_jax.workdir import (
    check_workdir,
    claimed_workdir,
    config_differences,
    lock_workdir,
    set_aside,
    write_config,
    write_json,
)

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
    longer = changed(run=run, model={"dit": {"remat": "blocks"}}, mesh={"data": 2}, data={"workers": 4, "max_bad": 0.2})
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


def fail_in(workdir, *, making=()):
    def start():
        with claimed_workdir(workdir):
            for name in making:
                (workdir / name).mkdir(parents=True)
            raise KeyError

    with pytest.raises(KeyError):
        start()


@pytest.mark.parametrize("making", [(), ("checkpoints",)])
def test_a_start_that_failed_leaves_no_new_workdir(tmp_path, making):
    (tmp_path / "runs").mkdir()
    fail_in(tmp_path / "runs" / "new", making=making)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


@pytest.mark.parametrize("making", [("checkpoints/4",), ("checkpoints", "frozen"), ("mine",)])
def test_a_start_that_failed_keeps_what_was_written(tmp_path, making):
    fail_in(tmp_path / "new", making=making)
    assert all((tmp_path / "new" / name).is_dir() for name in making) and (tmp_path / "new" / "lock").is_file()


def test_a_start_that_failed_leaves_a_workdir_that_was_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    for name in ("empty", "old"):
        fail_in(tmp_path / name)
    assert (tmp_path / "empty").is_dir() and (tmp_path / "old" / "checkpoints").is_dir()


def test_a_start_in_a_new_workdir_that_is_in_use_leaves_it(tmp_path):
    with claimed_workdir(tmp_path / "run"):
        with pytest.raises(RuntimeError, match="is in use by process"), claimed_workdir(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / "lock").is_file()
    assert (tmp_path / "run" / "lock").is_file(), "a start that did not fail"


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The first start takes the lock of a workdir and removes both when the second has opened the file, not yet locked it."""
    flock, first = fcntl.flock, [True]

    def late(file, flags):
        if first and first.pop():
            (tmp_path / "run" / "lock").unlink()
            (tmp_path / "run").rmdir()
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_workdir(tmp_path / "run") as file:
        assert os.path.samestat(os.fstat(file.fileno()), (tmp_path / "run" / "lock").stat())


def test_what_earlier_calls_left_is_kept_in_order_and_told(tmp_path, capsys):
    """Files that belong together keep one number; one above those that are there, also where some were removed."""
    files, folder = [tmp_path / "evaluation.json", tmp_path / "evaluation.png"], tmp_path / "samples"
    for call in ("a", "b", "c"):
        set_aside(*files)
        set_aside(folder)
        folder.mkdir(exist_ok=True)
        for path in (*(files[:1] if call == "b" else files), folder / "000.png"):
            path.write_text(call)
    left = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "evaluation-1.json": "a",
        "evaluation-1.png": "a",
        "evaluation-2.json": "b",
        "evaluation.json": "c",
        "evaluation.png": "c",
        "samples-1/000.png": "a",
        "samples-2/000.png": "b",
        "samples/000.png": "c",
    }
    assert f"{folder} of an earlier call is samples-2 now\n" in capsys.readouterr().out
    (tmp_path / "evaluation-1.json").unlink()
    (tmp_path / "evaluation-1.png").unlink()
    set_aside(*files)
    assert (tmp_path / "evaluation-3.json").read_text() == (tmp_path / "evaluation-3.png").read_text() == "c"


def test_an_empty_folder_is_not_kept(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    set_aside(tmp_path / "samples", tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["samples"] and not capsys.readouterr().out


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


def test_a_null_condition_may_be_another_path_and_what_is_new_may_be_off(tmp_path):
    claim(tmp_path, changed(model={"null": "a.safetensors"}))
    claim(tmp_path, changed(model={"null": "b.safetensors", "more": False}))
    with pytest.raises(ValueError, match='model.null: "b.safetensors" -> "learned"'):
        check_workdir(tmp_path, changed(model={"null": "learned", "more": False}))
    with pytest.raises(ValueError, match="model.most: absent -> true"):
        check_workdir(tmp_path, changed(model={"null": "b.safetensors", "more": False, "most": True}))


@pytest.mark.parametrize("part", ["llm", "dit", "vae", "native"])
def test_files_may_be_moved_but_not_added_or_dropped(tmp_path, part):
    config = lambda path: changed(model={part: {"path": path}})
    claim(tmp_path, config("here"))
    claim(tmp_path, config("/there"))
    with pytest.raises(ValueError, match=f'model.{part}.path: "/there" -> ""'):
        check_workdir(tmp_path, config(""))
    (tmp_path / "other").mkdir()
    claim(tmp_path / "other", config(""))
    with pytest.raises(ValueError, match=f'model.{part}.path: "" -> "here"'):
        check_workdir(tmp_path / "other", config("here"))


def test_of_a_linked_folder_what_it_leads_to_is_set_aside(tmp_path):
    """Videos on another disk stay there, and so do those to come."""
    (tmp_path / "run").mkdir(), (tmp_path / "disk" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "disk" / "samples")
    (tmp_path / "disk" / "samples" / "000.png").touch()
    set_aside(tmp_path / "run" / "samples")
    assert (tmp_path / "disk" / "samples-1" / "000.png").exists()
    assert (tmp_path / "run" / "samples").is_symlink() and [*(tmp_path / "run" / "samples").iterdir()] == []


def test_links_to_a_folder_of_another_name_are_numbered_by_it(tmp_path):
    (tmp_path / "run").mkdir(), (tmp_path / "disk" / "of run.1").mkdir(parents=True)
    link = tmp_path / "run" / "samples"
    link.symlink_to(tmp_path / "disk" / "of run.1")
    for call in ("a", "b", "c"):
        set_aside(link)
        (link / "000.png").write_text(call)
    left = {path.parent.name: path.read_text() for path in (tmp_path / "disk").rglob("*.png")}
    assert sorted(left.values()) == ["a", "b", "c"] and left["of run.1"] == "c"
