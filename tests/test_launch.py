"""The launchers: shell that shellcheck finds nothing in, a JobSet that says what main.py needs; local.sh runs in test_survive.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
