"""The command line, and nothing else: flags -> config -> one function of rise_jax per --mode."""

import difflib
import gc
import itertools
import logging
import os
import runpy
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from rise_jax import processes

MODES = ("train", "generate", "evaluate", "export", "plan")
ALL_FLAGS = "All flags: python main.py --helpfull --config=configs/stage1.py"

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/stage0.py, stage1.py or stage2.py, each with [:PRESET]", lock_config=True
)
MODE = flags.DEFINE_enum("mode", "train", MODES, "what to do")
WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; default: runs/STAGE-PRESET")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "join the other processes of a cluster that JAX finds by itself, as on Cloud TPU VMs; a SLURM step, Open MPI, GKE and "
    "JAX_COORDINATOR_ADDRESS are seen without it",
)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "a process silent for so long ends all others", lower_bound=1
)
flags.mark_flag_as_required("config")


def parse(arguments: list[str]) -> list[str]:
    """What is wrong with a flag or with the config it makes is told in a line; absl would show where in the code."""
    try:
        words = flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # The last line: a config file that raised is told with its stack, a key that is not there as the repr of an error.
        told = str(error).replace("\\n", "\n").strip().splitlines()[-1].strip(" \\'\"")
        if isinstance(error, AttributeError | KeyError):
            told = f"no such config key: {_nearest_key(arguments) or told}"
        sys.exit(f"error: {told}\n{ALL_FLAGS}")
    if left := words[1:]:
        sys.exit(f"error: {left[0]!r} belongs to no flag; nearest: {_nearest_flag(left[0])}\n{ALL_FLAGS}")
    return words


def _nearest_flag(word: str) -> str:
    if word in MODES:
        return f"--mode={word}"
    return f"--{word}" if "=" in word else "quotes around a value with blanks"


def _nearest_key(arguments: list[str]) -> str:
    """What is wrong with the first key typed that is none of the config file's, and what is there in its place; "" if all are."""
    names = [word.lstrip("-").partition("=")[0] for word in arguments if word.startswith("-")]
    following = dict(itertools.pairwise(arguments))
    given = [word.partition("=")[2] for word in arguments if word.startswith(("--config=", "-config="))]
    file, _, preset = (given or [following.get("--config", "")])[-1].partition(":")
    try:
        config = runpy.run_path(file)["get_config"](*filter(None, [preset]))
    except Exception:  # anything may be wrong with a file that is somebody's own: the first error tells it
        return ""
    for name in names:
        group, path = config, []
        for word in name.split(".")[1:] if name.startswith("config.") else []:
            if not isinstance(group, ConfigDict) or word not in group:
                return _what_is_there(group, path, word)
            group, path = group[word], [*path, word]
    return ""


def _what_is_there(group, path: list[str], word: str) -> str:
    key, place = ".".join([*path, word]), ".".join(path)
    if not isinstance(group, ConfigDict):
        return f"{key}; nothing is below {place}"
    near = difflib.get_close_matches(word, group, n=1, cutoff=0.0)
    return f"{key}; nearest: {'.'.join([*path, *near])}; {place or 'there'} has {', '.join(sorted(group))}"


def main(_) -> int:
    level = logging.DEBUG if flags.FLAGS.verbosity > 0 else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", force=True)
    for name in ("absl", "jax", "orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Tracing makes objects that stay; Python's collector, walking them again and again, costs a tenth of a start.
    gc.set_threshold(100_000, 20, 100)
    _keep_compiled()
    try:
        code = _run()
    except Exception as error:
        code = _explain(error)
        processes.leave(code)
    return code


def _run() -> int:
    if "://" in WORKDIR.value:
        raise ValueError(
            f"--workdir={WORKDIR.value} is no folder: mount the bucket and give the mount's path, see launch/README.md"
        )
    processes.join_processes(HEARTBEAT.value, DISTRIBUTED.value)
    if not processes.is_first():
        logging.getLogger().setLevel(logging.WARNING)
    config, typed = CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"])
    refuse_labels(typed)
    workdir = Path(WORKDIR.value or f"runs/{config.run.stage}-{config.run.preset}")
    with processes.one_voice():
        code = mode_function(MODE.value)(config, workdir, **_moved(workdir, typed))
        processes.meet("the end")
    return code


def refuse_labels(typed: dict) -> None:
    """ValueError where one of the keys that were typed belongs to the config file, which chose everything else by it."""
    for key in ("run.stage", "run.preset"):
        if key in typed:
            raise ValueError(
                f"config.{key}={typed[key]} would rename the run and change nothing else; nearest: --config=configs/STAGE.py:PRESET"
            )


def _moved(workdir: Path, typed: dict) -> dict:
    """For the modes that use a run: where its files lie now, if typed. What else of model and data is typed has to be the run's."""
    if MODE.value not in ("generate", "evaluate", "export"):
        return {}
    from rise_jax.run_config import typed_paths

    return {"paths": typed_paths(workdir, typed)}


def _explain(error: Exception) -> int:
    """Faults of input, disk or data carry their whole story; a stack trace would bury it (--verbosity=1 shows it)."""
    told = isinstance(error, ValueError | OSError | RuntimeError) and not isinstance(error, jax.errors.JaxRuntimeError)
    if not told and not jax.distributed.is_initialized():
        raise error
    logging.getLogger().log(logging.DEBUG if told else logging.ERROR, "", exc_info=error)
    hint = "" if told else "\nAnother process may have ended first: the reason then stands in its output."
    print(f"error: {error}{hint}", file=sys.stderr)
    return 1


def _keep_compiled() -> None:
    """Compiled programs outlive the process: the same command, or the next one, starts without compiling them again."""
    if jax.config.jax_compilation_cache_dir is None:  # JAX_COMPILATION_CACHE_DIR
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "rise_jax"))


def mode_function(name: str):
    if name == "train":
        from rise_jax.train import train as function
    elif name == "generate":
        from rise_jax.generate import generate as function
    elif name == "evaluate":
        from rise_jax.evaluate import evaluate as function
    elif name == "export":
        from rise_jax.export import export as function
    else:
        from rise_jax.plan import plan as function
    return function


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
