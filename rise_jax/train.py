"""--mode=train: from a config to a trained run. One loop for every stage; it stops, resumes and ends here."""

import itertools
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rise_jax import run_config, runs
from rise_jax.build import backend_from, describe_attention, language_from, model_from
from rise_jax.checkpoint import Checkpoints
from rise_jax.condition_kinds import check_texts
from rise_jax.conditions import cached_states, complete
from rise_jax.data.loader import make_loader
from rise_jax.data.open import open_source
from rise_jax.data.sources import check_clips, identity_of
from rise_jax.flops import step_flops
from rise_jax.language import states_in_batch
from rise_jax.loop import batches_on, compile_step, run_steps
from rise_jax.models.remat import check_remat
from rise_jax.optim import make_optimizer
from rise_jax.origin import asks_for_null, check_backbone, check_parts, check_states, find_start, parameters_of
from rise_jax.processes import Stop, check_agreed, from_first, is_first, meet, with_signal
from rise_jax.published import check_files, load_vae, vae_identity
from rise_jax.report import peak_memory_gib, read_metrics, write_summary
from rise_jax.sharding import check_batch, describe, make_mesh, process_rows, shardings
from rise_jax.step import make_train_step
from rise_jax.throughput import Work, device_memory_gib, peak_tflops
from rise_jax.trees import partition, tree_sha256
from rise_jax.validate import validate
from rise_jax.workdir import check_workdir, claimed_workdir, write_config

LOG = logging.getLogger(__name__)
HEARD = 256  # texts whose states calibrate a new adapter
TAIL = 50  # steps in the final loss of the summary


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains until `run.steps` and returns the exit code. A workdir with a checkpoint is continued, a finished one left alone."""
    validate(config)
    with _claimed(config, workdir), Checkpoints(workdir / "checkpoints", keep=config.run.keep) as checkpoints:
        steps = checkpoints.steps()
        done = min(from_first(_summarised(workdir)), max(steps, default=0))
        if done >= config.run.steps:
            print(
                f"{workdir} is finished: {done} steps, run.steps={config.run.steps}. Raise run.steps to go on, or use another "
                "--workdir."
            )
            return 0
        return _run(config, workdir, checkpoints, begun=bool(steps))


@contextmanager
def _claimed(config: ConfigDict, workdir: Path) -> Iterator[None]:
    """The workdir with its lock, and a config that does not contradict its own; process 0 claims it for all of the run's processes."""
    if not is_first():
        meet("workdir")
        yield
        return
    with claimed_workdir(workdir):
        check_workdir(workdir, config.to_dict())
        meet("workdir")
        yield


def _summarised(workdir: Path) -> int:
    """The step of its summary, which may be one from before run.steps was raised; 0 without one."""
    file = workdir / "summary.json"
    try:
        return int(json.loads(file.read_text())["steps"]) if file.exists() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it, the end of the run writes it again") from error


def _run(config: ConfigDict, workdir: Path, checkpoints: Checkpoints, begun: bool) -> int:
    """A run that has begun does not depend on the folder that it started from."""
    origin = None if begun else find_start(config.run.init_from, config.run.preset)
    check_agreed(str(origin), f"run.init_from={config.run.init_from!r}")
    if origin:
        runs.check_run(origin)
    null = not begun and asks_for_null(origin, config.model)
    check_files(config.model, null=null, calibrate=not (begun or origin))
    mesh = make_mesh(**config.mesh)
    check_batch(config.run.batch_size, mesh, config.run.accumulate)
    check_remat(config.model.dit.get("remat", "none"), jax.local_devices()[0])
    backend = backend_from(config.model)
    where = f"{describe(mesh)}, {describe_attention(config.model, backend, mesh)}"
    source = open_source(**_source_settings(config))
    language = language_from(config.model, mesh=mesh)
    width, identity = language.width, language.identity
    states = states_in_batch if config.data.states == "cached" else language.states_in_step
    model = model_from(config.model, width, states, backend=backend)
    partition(model.abstract, list(config.model.trainable))
    if begun:
        meta = checkpoints.meta()
        runs.check_heard(str(workdir), meta["llm"], identity)
        check_clips(str(workdir), meta.get("data", identity_of(source)), source)
    else:
        _check_origin(config, model, origin, language)
    check_texts(source.texts, language)
    if is_first() and not begun:
        write_config(workdir, config.to_dict())
    with jax.set_mesh(mesh):
        table, frozen, heard = _conditions(config, workdir, source, language)
        del language  # with cached states, the devices need its parameters no longer
        frozen["vae"], vae = load_vae(config.model.vae.path, partial(shardings, mesh=mesh))
        optimizer = make_optimizer(
            config.optim.learning_rate,
            config.optim.warmup,
            config.optim.weight_decay,
            config.optim.clip,
            kind=config.optim.kind,
            b2=config.optim.b2,
            decay_from=config.optim.decay_from,
            decay_until=config.optim.decay_until,
        )
        start, state, frozen["params"], meta = _state(
            config,
            workdir,
            checkpoints,
            model,
            optimizer,
            {"llm": identity, "vae": vae, "data": identity_of(source)},
            heard,
            origin,
            mesh,
        )
        if is_first() and begun:  # its files are what they were, wherever the config says that they lie now
            write_config(workdir, config.to_dict())
        step_fn = make_train_step(
            model,
            optimizer,
            drop=config.optim.drop,
            ema=config.optim.ema,
            time_mean=config.optim.time_mean,
            time_std=config.optim.time_std,
            accumulate=config.run.accumulate,
        )
        batches = make_loader(
            source,
            batch_size=config.run.batch_size,
            seed=config.run.seed,
            start_step=start,
            rows=process_rows(config.run.batch_size, mesh),
            workers=config.data.workers,
            max_bad=config.data.max_bad,
            quarantine_file=workdir / "quarantine.jsonl",
            process=jax.process_index(),
        )
        _announce(config, source, start, state, frozen, where)
        code = 0
        if start < config.run.steps:
            batches = batches_on(mesh, batches, table, start)
            plain = model_from(config.model, width, states)
            step_fn, batches, work = _ready(config, mesh, plain, step_fn, state, frozen, batches)
            code, state = run_steps(
                config, workdir, checkpoints, mesh, step_fn, start, state, frozen, batches, meta, work
            )
    if code == 0:
        _finish(config, workdir, state)
    return code


def _check_origin(config, model, origin, language) -> None:
    if origin:
        meta = check_states(origin, language.identity)
        check_backbone(origin, meta, config.model, vae_identity(config.model.vae.path))
    check_parts(config, model.abstract, parameters_of(origin, language.width, config.model) if origin else {}, origin)


def _ready(config, mesh, plain, step_fn, state, frozen, batches) -> tuple[Any, Iterator[dict], Work]:
    """(compiled step, batches, what a step does); the step's state lies after it as before it, in the same memory.

    Operations are counted on `plain`, the model with plain attention: what a kernel pads is not work that the mathematics needs.
    """
    first = next(batches)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step_fn = jax.jit(with_signal(step_fn), donate_argnums=0, out_shardings=(placed, None))
    signalled = first | {"signal": Stop(mesh).numbers()}
    compiled = compile_step(step_fn, state, frozen, signalled, jax.random.key(config.run.seed))
    samples, *size = first["video"].shape[:4]
    cells = math.prod(plain.latent_shape(tuple(size))[:3])
    work = Work(
        samples=samples,
        frames=samples * size[0],
        tokens=samples * cells // math.prod(plain.patch),
        flops=step_flops(plain, state.params, frozen, first),
        devices=jax.device_count(),
        peak=peak_tflops(jax.devices()[0].device_kind),
    )
    return compiled, itertools.chain([first], batches), work


def _source_settings(config: ConfigDict) -> dict:
    names = ("source", "path", "split", "frames", "height", "width", "fps", "texts")
    return {name: config.data[name] for name in names} | {"seed": config.run.seed}


def _conditions(config, workdir, source, language) -> tuple[dict, dict, tuple]:
    """(per-text rows that go with a batch, frozen inputs of the step, states and mask of some texts)."""
    pairs = complete(source.texts, language, workdir / "captions.jsonl")
    if config.data.states == "cached":
        states, mask = cached_states(pairs, language, workdir / "states.npz")
        return dict(states=states, states_mask=mask), {}, (states[:HEARD], mask[:HEARD])
    frozen = {"llm": language.params, "prefix": language.prefix}
    return language.tokens(pairs), frozen, language.teach(pairs[:HEARD])


def _state(config, workdir, checkpoints, model, optimizer, identities, heard, origin, mesh):
    """(step, state, frozen parameters, meta) of a new run, which starts from the one in `origin`, or of the newest checkpoint."""
    trainable, rest = partition(model.abstract, list(config.model.trainable))
    place = lambda tree: shardings(tree, mesh)
    found = checkpoints.restore(runs.abstract_state(trainable, optimizer, place))
    if found:
        step, state, meta = found
        if step > config.run.steps:
            raise ValueError(f"run.steps={config.run.steps}: {workdir} is at step {step} already; nearest: {step}")
        LOG.info("continuing %s at step %d", workdir, step)
        runs.check_vae(str(workdir), meta["vae"], identities["vae"])
        frozen = runs.read_frozen(workdir, config.model, rest, model.abstract, meta["provenance"], place)
        return step, state, frozen, meta
    source = _source(config, origin, heard[0].shape[-1], place) if origin else None
    if source:
        LOG.info("starting from the EMA of %s, step %d", origin, source.step)
    params, provenance = runs.initial_parameters(model, config, source, identities["llm"], heard, place)
    trained, frozen = partition(params, list(config.model.trainable))
    runs.refuse_random(frozen, provenance)
    runs.write_frozen(workdir, frozen, provenance)
    state = runs.born_state(trained, optimizer, place)
    meta = {"config": config.to_dict(), "provenance": provenance, "versions": _versions()} | identities
    return 0, state, frozen, meta


def _source(config, origin: Path, d_llm: int, place) -> runs.Run:
    """The run to start from, without what comes from published files here too."""
    paths = run_config.moved_paths(origin, config.model)
    return runs.read_run(origin, d_llm, place, paths=paths, published_too=not config.model.dit.path)


def _announce(config, source, start, state, frozen, where) -> None:
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    print(
        f"{config.run.stage}, preset {config.run.preset}: {count(state.params):,} trainable and {count(frozen['params']):,} frozen "
        f"parameters (the LLM is frozen too), {len(source):,} clips of {'x'.join(map(str, source.shape[:3]))}, "
        f"{len(source.texts):,} texts, batch {config.run.batch_size}, steps {start} to {config.run.steps}, "
        f"{where}",
        flush=True,
    )


def _finish(config, workdir: Path, state) -> None:
    hashes = {
        "params_sha256": tree_sha256(state.params),
        "ema_sha256": tree_sha256(state.ema),
    }  # of all processes' parts
    if not is_first():
        return
    lines = read_metrics(workdir)
    losses = [line["loss"] for line in lines[-TAIL:]]
    summary = {
        "steps": config.run.steps,
        "final_loss": math.fsum(losses) / len(losses),
        "seconds": math.fsum(line["step_seconds"] for line in lines),
        **hashes,
        "peak_memory_gib": peak_memory_gib(),
        **device_memory_gib(),
    }
    write_summary(workdir, summary)
    print(
        f"{workdir}: {config.run.steps} steps done, loss {summary['final_loss']:.4f} over the last {len(losses)}",
        flush=True,
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
