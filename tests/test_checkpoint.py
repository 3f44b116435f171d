import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rise_jax.checkpoint import Checkpoints
from rise_jax.sharding import make_mesh, shardings
from rise_jax.trees import named_leaves

ROOT = Path(__file__).parents[1]


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(step, width=64):
    kernel = jax.random.normal(jax.random.key(step), (width, width))
    params = {"a": {"kernel": kernel, "bias": jnp.full((width,), step, jnp.bfloat16)}}
    return State(jnp.int32(step), params, optax.adamw(1.0).init(params))


def abstract(state, placed=None):
    placed = placed or jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, placed)


def assert_same(restored, state):
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for name, leaf in named_leaves(restored).items():
        expected = named_leaves(state)[name]
        assert leaf.dtype == expected.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes(), name


@pytest.fixture
def saved(tmp_path):
    """Steps 1 and 2, saved and closed."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"name": f"step {step}"})
    checkpoints.close()
    return tmp_path / "checkpoints"


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_restores_every_bit_and_the_meta_data(saved):
    step, state, meta = Checkpoints(saved).restore(abstract(make_state(0)))
    assert (step, meta) == (2, {"name": "step 2"})
    assert_same(state, make_state(2))
    step, state, _ = Checkpoints(saved).restore(abstract(make_state(0)), step=1)
    assert step == 1
    assert_same(state, make_state(1))


def test_a_folder_that_is_only_read_is_opened_without_a_word(saved, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        Checkpoints(saved, read_only=True).close()
    assert not caplog.records


def test_nothing_saved_is_none_and_a_step_that_is_not_there_is_named(tmp_path, saved):
    assert Checkpoints(tmp_path / "new").restore(abstract(make_state(0))) is None
    assert Checkpoints(tmp_path / "absent", read_only=True).restore(abstract(make_state(0))) is None
    assert not (tmp_path / "absent").exists()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it has \[1, 2\]"):
        Checkpoints(saved).restore(abstract(make_state(0)), step=7)


def test_restores_to_another_mesh(saved):
    for mesh in (make_mesh(data=1, fsdp=8), make_mesh(data=4, fsdp=2)):
        placed = shardings(make_state(0), mesh)
        _, state, _ = Checkpoints(saved, read_only=True).restore(abstract(make_state(0), placed))
        assert state.params["a"]["kernel"].sharding == placed.params["a"]["kernel"]
        assert state.opt_state[0].mu["a"]["kernel"].sharding == placed.params["a"]["kernel"]
        assert_same(state, make_state(2))


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(step, 4), {})
    checkpoints.save(4, make_state(5, 4), {})  # a step that is there is left alone
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [3, 4]
    assert_same(Checkpoints(tmp_path).restore(abstract(make_state(0, 4)))[1], make_state(4, 4))


def test_a_state_that_is_donated_right_after_the_save_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = make_state(1, 1024)
    checkpoints.save(1, state, {})
    for _ in range(5):
        state = advance(state)
    checkpoints.close()
    assert_same(Checkpoints(tmp_path).restore(abstract(make_state(0, 1024)))[1], make_state(1, 1024))


def test_digests_are_written_while_the_caller_goes_on(tmp_path, monkeypatch):
    """Reading the files is held up: save() returns all the same, and wait() does not until it is over."""
    held = threading.Event()
    rescue = threading.Timer(60, held.set)  # so that a save that waits fails instead of hanging
    rescue.start()
    monkeypatch.setattr("rise_jax.checkpoint._crc32", lambda path: held.wait() and 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    assert not held.is_set() and not (tmp_path / "1" / "digest.json").exists()
    held.set()
    checkpoints.wait()
    assert (tmp_path / "1" / "digest.json").exists()
    rescue.cancel()
    checkpoints.close()


def test_a_digest_that_cannot_be_written_is_told_by_the_next_wait(tmp_path, monkeypatch):
    def fails(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rise_jax.checkpoint._crc32", fails)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(OSError, match="cannot write checkpoint .*/1: .*No space left on device"):
        checkpoints.wait()
    checkpoints.close()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "reason"), [(cut, "bytes, not"), (flip_a_bit, "has changed"), (Path.unlink, "is missing")]
)
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(saved, caplog, damage, reason):
    damage(largest_file(saved / "2"))
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(saved)
        step, state, _ = checkpoints.restore(abstract(make_state(0)))
    assert step == 1
    assert_same(state, make_state(1))
    assert re.search(rf"{saved}/2 is damaged \(.*{reason}.*\); using step 1", caplog.text)
    # The run goes on, and saves the lost step again.
    assert (saved.parent / "damaged-2").is_dir()
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert_same(Checkpoints(saved).restore(abstract(make_state(0)))[1], make_state(2))


@pytest.mark.parametrize("victim", ["state/_METADATA", "meta/metadata", "state"])
def test_damage_is_found_without_digests_too(saved, victim, caplog):
    (saved / "2" / "digest.json").unlink()
    cut(largest_file(saved / "2" / victim) if (saved / "2" / victim).is_dir() else saved / "2" / victim)
    assert Checkpoints(saved, read_only=True).restore(abstract(make_state(0)))[0] == 1
    assert f"{saved}/2 is damaged" in caplog.text
    assert (saved / "2").is_dir(), "read_only changes nothing on disk"


def test_when_all_are_damaged_nothing_starts_anew(saved):
    for step in (1, 2):
        cut(largest_file(saved / str(step)))
    with pytest.raises(OSError, match=r"no checkpoint in .* can be read:\n  step 2: .*\n  step 1: "):
        Checkpoints(saved).restore(abstract(make_state(0)))
    with pytest.raises(OSError, match=r"step 2: .* bytes, not"):
        Checkpoints(saved).restore(abstract(make_state(0)), step=2)


def test_another_model_is_told_all_differences_at_once(saved):
    wanted = make_state(0)
    wanted.params["a"] = {"kernel": jnp.zeros((64, 8)), "scale": jnp.zeros(3), "bias": jnp.zeros(64)}
    with pytest.raises(ValueError) as error:
        Checkpoints(saved).restore(abstract(wanted))
    assert "missing in the checkpoint: params/a/scale float32[3]" in str(error.value)
    assert "different: params/a/kernel is float32[64, 64] in the checkpoint, float32[64, 8] here" in str(error.value)
    assert "different: params/a/bias is bfloat16[64] in the checkpoint, float32[64] here" in str(error.value)
    del wanted.params["a"]["bias"]
    with pytest.raises(ValueError, match=r"only in the checkpoint: params/a/bias bfloat16\[64\]"):
        Checkpoints(saved).restore(abstract(wanted))


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(OSError, match="cannot make /sys/rise/checkpoints: "):
        Checkpoints("/sys/rise/checkpoints")


def python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", f"import conftest\nfrom test_checkpoint import *\n{code}", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


FULL_DISK = """
import resource
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, make_state(1, 8), {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoints.save(2, make_state(2, 256), {})
    checkpoints.wait()
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_names_path_and_reason_and_spares_the_last_good_one(tmp_path):
    process = python(FULL_DISK, tmp_path)
    output, errors = process.communicate(timeout=120)
    assert re.search(rf"cannot write checkpoint {tmp_path}/2: File too large", output), output + errors[-2000:]
    step, state, _ = Checkpoints(tmp_path).restore(abstract(make_state(0, 8)))
    assert step == 1
    assert_same(state, make_state(1, 8))


SAVE_FOREVER = """
checkpoints = Checkpoints(sys.argv[1], keep=2)
step = int(sys.argv[2])
while True:
    step += 1
    checkpoints.save(step, make_state(step, 512), {})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_while_saving_leaves_the_last_good_one(tmp_path):
    """Kills a process that only saves, at random moments; what is restored is always, bit for bit, a state it saved."""
    rng, newest = random.Random(0), 0
    for _ in range(3):
        process = python(SAVE_FOREVER, tmp_path, newest)
        begun = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        step, state, _ = Checkpoints(tmp_path).restore(abstract(make_state(0, 512)))
        assert step >= begun[1], "save(n) returns after save(n-1) is on disk"
        assert_same(state, make_state(step, 512))
        newest = step
