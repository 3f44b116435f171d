"""The launchers: shell that shellcheck finds nothing in, a JobSet that says what main.py needs; local.sh runs in test_survive.py."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from launch import demo
from rise_jax.validate import validate

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_is_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install -r tests/requirements.txt"
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_local_needs_a_number():
    done = subprocess.run(["launch/local.sh", "two"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: launch/local.sh N FLAGS" in done.stderr


def local(tmp_path, body, count=2):
    """local.sh with a stand-in for main.py's interpreter: the shell lines `body`, which see JAX_PROCESS_ID."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exec {sys.executable} "$@"\n{body}\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stand_in)}
    command = ["launch/local.sh", str(count), "--config=x"]
    # A shell cannot trap what was ignored when it began, as SIGINT is where the tests themselves run in a script's background.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heard)


def test_local_tells_each_process_who_it_is(tmp_path):
    process = local(tmp_path, 'echo "$* $JAX_NUM_PROCESSES $JAX_PROCESS_ID ${JAX_COORDINATOR_ADDRESS%:*}"', 3)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert sorted(lines) == [f"main.py --config=x 3 {number} 127.0.0.1" for number in range(3)]


@pytest.mark.slow
def test_local_ends_all_when_one_fails(tmp_path):
    waits = "trap 'echo told; exit 0' TERM; for i in {1..500}; do sleep 0.1; done"
    process = local(tmp_path, f"((JAX_PROCESS_ID == 1)) && {{ sleep 2; exit 3; }}; {waits}")
    assert process.communicate(timeout=60)[0] == "told\n"
    assert process.returncode == 3


@pytest.mark.slow
def test_local_kills_what_does_not_hear(tmp_path):
    process = local(
        tmp_path, "((JAX_PROCESS_ID == 1)) && { sleep 1; exit 3; }; trap '' TERM; while true; do sleep 0.1; done"
    )
    process.communicate(timeout=60)
    assert process.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_hands_signals_on_and_waits(number, tmp_path):
    process = local(
        tmp_path, "trap 'echo stopped; exit 75' TERM INT; echo ready; for i in {1..500}; do sleep 0.1; done"
    )
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "stopped\n" * 2
    assert process.returncode == 75


def test_make_leaves_an_environment_that_is_somebody_elses(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").touch()
    done = subprocess.run(
        ["make", "env", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and ".venv is there, without the mark (.begun)" in done.stderr
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["mine"]


def test_tpu_pod_says_how_it_is_used():
    named = {"PATH": "/usr/bin:/bin", "TPU_NAME": "a", "ZONE": "b"}
    done = subprocess.run(["launch/tpu_pod.sh"], cwd=ROOT, capture_output=True, text=True, check=False, env=named)
    assert done.returncode == 2 and "create | setup | run FLAGS" in done.stderr


def test_the_jobset_is_one_indexed_job_with_a_pod_per_host():
    (document,) = yaml.safe_load_all((ROOT / "launch" / "gke.yaml").read_text())
    assert document["kind"] == "JobSet" and document["spec"]["failurePolicy"]["maxRestarts"] > 0
    (group,) = document["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    (mount,) = container["volumeMounts"]
    assert f"--workdir={mount['mountPath']}/" in container["command"][-1]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"]}


@pytest.mark.slow
def test_a_bucket_is_no_workdir():
    command = [sys.executable, "main.py", "--config=configs/stage1.py", "--workdir=gs://bucket/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: --workdir=gs://bucket/run is no folder: mount the bucket")
    assert not (ROOT / "gs:").exists()


@pytest.mark.parametrize(("stage", "words"), [(1, "STAGE1"), (2, "STAGE2"), (2, "GENERATE"), (2, "EVALUATE")])
def test_the_demos_commands_are_valid(stage, words, monkeypatch):
    trains = words.startswith("STAGE")  # the others take the run's own
    words = ["main.py", *(word for word in getattr(demo, words) if word.startswith("--config."))]
    monkeypatch.setattr(sys, "argv", words)  # where ml_collections looks for the keys
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", str(ROOT / f"configs/stage{stage}.py"), flag_values=values)
    values(words)
    validate(values.config)
    assert trains == (values.config.data.height == 16) and values.config.sample.height == 0
