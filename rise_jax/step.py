"""One optimizer step as a pure function: the same for every stage, data source and preset."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rise_jax import flow
from rise_jax.build import Model
from rise_jax.optim import ema_decay
from rise_jax.trees import combine
from rise_jax.video import to_float


@flax.struct.dataclass
class TrainState:
    """What a step changes. `params`, `ema` and the moments hold trainable leaves only."""

    step: jax.Array  # int32 []
    params: dict
    ema: dict
    opt_state: tuple


def new_state(trainable: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0. The EMA starts as a copy: an alias could not be donated along with the parameters."""
    return TrainState(jnp.int32(0), trainable, jax.tree.map(jnp.copy, trainable), optimizer.init(trainable))


def sample_losses(
    model: Model, params: dict, frozen: dict, batch: dict, t: jax.Array, noise: jax.Array, drop: jax.Array
):
    """Loss of every sample [B] at given times t [B], noise (shape of the latents) and dropped conditions [B] bool."""
    latents = model.encode(frozen["vae"], to_float(batch["video"]))
    states, mask = model.states(frozen, batch)
    context = model.context(params, states, mask, t)
    context = jnp.where(drop[:, None, None], model.null(params), context)
    output = model.dit(params, flow.add_noise(latents, noise, t), t, model.kv(params, context))
    return flow.loss(output, latents, noise, t, model.prediction)


def make_gradients(model: Model, *, drop: float, time_mean: float, time_std: float, accumulate: int = 1) -> Callable:
    """`gradients(trainable, frozen, batch, key, step) -> (loss, gradients)` of the weighted mean of the samples' losses.

    With `accumulate` > 1 that many parts of the batch go one after the other, for the memory of one. The sum is the same up to fp32
    rounding: the mean is over the weights of the whole batch, and draws follow a sample's index. Parts take every accumulate-th row,
    so that each device finds its share of every part among its own rows.
    """

    def loss_fn(trainable, frozen, batch, total, key, step):
        keys = flow.sample_keys(key, step, batch["index"])
        t = flow.draw_times(keys, time_mean, time_std, model.shift)
        noise = flow.draw_noise(keys, model.latent_shape(batch["video"].shape[1:4]))
        losses = sample_losses(
            model, combine(trainable, frozen["params"]), frozen, batch, t, noise, flow.draw_drops(keys, drop)
        )
        return jnp.sum(losses * batch["weight"]) / total

    def gradients(trainable, frozen, batch, key, step):
        rows = {name: value for name, value in batch.items() if name != "step"}
        total = jnp.maximum(jnp.sum(batch["weight"]), 1.0)
        of_part = lambda rows: jax.value_and_grad(loss_fn)(trainable, frozen, rows, total, key, step)
        if accumulate == 1:
            return of_part(rows)
        add = lambda sums, rows: (jax.tree.map(jnp.add, sums, of_part(rows)), None)
        zeros = jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), trainable)
        return jax.lax.scan(add, zeros, jax.tree.map(lambda value: _parts(value, accumulate), rows))[0]

    return gradients


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    drop: float,
    time_mean: float,
    time_std: float,
    ema: float,
    accumulate: int = 1,
) -> Callable:
    """`train_step(state, frozen, batch, key) -> (state, metrics)`, pure; the caller jits it and donates the state.

    batch: video uint8 [B, T, H, W, 3]; states [B, L, d_llm] and states_mask [B, L] (or the token ids of the in-step LLM);
    index int32 [B], the global sample index; weight float32 [B], 0 for a clip that could not be read; step int32 [].
    B is a multiple of `accumulate`, see `make_gradients`.
    frozen: {"params": leaves that are not trained, "vae": ..., "llm": ..., "prefix": ...}, the last two for in-step states.

    A non-finite loss or gradient leaves the state as it was, and so does every later batch (`batch["step"]` runs ahead of
    `state.step`), so the caller may read `metrics["finite"]` late and still stop before the update.
    """
    gradients_of = make_gradients(model, drop=drop, time_mean=time_mean, time_std=time_std, accumulate=accumulate)

    def train_step(state: TrainState, frozen: dict, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        loss, gradients = gradients_of(state.params, frozen, batch, key, state.step)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step, ema)
        averaged = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        new = TrainState(state.step + 1, params, averaged, opt_state)
        go = finite & (state.step == batch["step"])
        state = jax.tree.map(lambda new, old: jnp.where(go, new, old), new, state)
        return state, {"loss": loss, "grad_norm": norm, "finite": finite}

    return train_step


def make_eval_step(model: Model) -> Callable:
    """`eval_step(params, frozen, batch, times, key) -> losses [B, len(times)]`: fixed times, noise fixed by the sample index."""

    def eval_step(params, frozen, batch, times, key):
        keys = flow.sample_keys(key, 0, batch["index"])
        noise = flow.draw_noise(keys, model.latent_shape(batch["video"].shape[1:4]))
        size = batch["index"].shape[0]
        keep = jnp.zeros(size, bool)
        at = lambda t: sample_losses(model, params, frozen, batch, jnp.full(size, t), noise, keep)
        return jax.lax.map(at, jnp.asarray(times, jnp.float32)).T

    return eval_step


def _parts(rows: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]; part i has rows i, i + count, i + 2 count, ..."""
    return rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)
