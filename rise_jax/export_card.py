"""adapter/adapter.json of an export: read, and checked key by key before anything is made of it."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

from rise_jax.condition_kinds import CONDITIONS, Native
from rise_jax.flow import PREDICTIONS
from rise_jax.language import Language
from rise_jax.models.adapter import KINDS, TIME_CONDS, Adapter
from rise_jax.models.attention import NAMES, SEQUENCES
from rise_jax.models.dit import DiT
from rise_jax.models.remat import REMAT
from rise_jax.sampler import STEPPERS
from rise_jax.settings import ABOVE_0, FLAG, NUMBER, OBJECT, Kind, check_settings, list_of, only, whole
from rise_jax.tensor_folder import parsed

FORMAT = 2
CARD = "adapter/adapter.json"
TEXT = Kind("must be a text", lambda value: isinstance(value, str))
DTYPE = only("float32", "bfloat16")
# What a value is, wherever its name stands.
OPTIONS = {
    **dict.fromkeys(("d_ctx", "width", "mlp_width", "depth", "heads", "latents", "text_len"), whole()),
    **dict.fromkeys(("max_prompt", "max_new", "length", "steps", "frames", "height", "batch_size"), whole()),
    **dict.fromkeys(("registers", "low_rank"), whole(0)),
    **dict.fromkeys(("unroll", "coordinates", "input_norm", "output_norm", "final_norm"), FLAG),
    **dict.fromkeys(("path", "instruction"), TEXT),
    **dict.fromkeys(("guidance", "temperature", "mean", "std"), NUMBER),
    "layer": Kind("must be a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "null_tokens": whole(),
    "dtype": DTYPE,
    "eps": ABOVE_0,
    "kind": only(*KINDS),
    "patch": list_of(whole(), "whole numbers >= 1", 3),
    "remat": only(*REMAT),
    "stepper": only(*STEPPERS),
    "time_cond": only(*TIME_CONDS),
}
MODEL = {
    "condition": only(*CONDITIONS),
    **dict.fromkeys(("llm", "adapter", "dit", "vae", "native"), OBJECT),
    **dict.fromkeys(("null", "calibrate"), TEXT),
    "dtype": DTYPE,
    "attention": only(*NAMES),
    "sequence": only(*SEQUENCES),
    "trainable": Kind("must be a list of texts", lambda value: isinstance(value, list)),
    "prediction": only(*PREDICTIONS),
    "shift": ABOVE_0,
}
USED = {"model", "llm", "sample", "fps"}  # at the top; the rest is told for people to read
GIVEN = {"d_llm", "dtype", "rngs", "backend", "learned_null", "register_width"}  # to an adapter, not by its group
Group = tuple[str, dict[str, Kind], list[str], set[str]]  # where it stands, {key: kind}, needed keys, keys of any value
SIZE = ("frames", "height", "width")
SAMPLE = ("steps", "guidance", "stepper", *SIZE, "batch_size", "temperature")


def read_card(folder: Path) -> dict:
    """The card of the export in a folder.

    FileNotFoundError where there is none; ValueError for one of another format, or naming each key that is missing, unknown or of
    an impossible value.
    """
    file = folder / CARD
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no export: there is no {CARD} in it")
    card = parsed(file)
    if card.get("format") != FORMAT:
        raise ValueError(f"{file} has format {card.get('format')!r}, this version reads {FORMAT}: export again")
    values = {key: value for key, value in card.items() if key in USED}
    kinds = {**dict.fromkeys(("model", "llm", "sample"), OBJECT), "fps": ABOVE_0}
    free, needed = set(), [*sorted(USED)]
    for group, rows, asked, others in _groups(card):
        inner = _at(card, group)
        if not isinstance(inner, dict):
            continue
        values |= {f"{group}.{key}": value for key, value in inner.items()}
        kinds |= {f"{group}.{key}": kind for key, kind in rows.items()}
        free |= {f"{group}.{key}" for key in others}
        needed += [f"{group}.{key}" for key in asked]
    check_settings(values, kinds, str(file), free=free, needed=needed)
    return card


def _groups(card: dict) -> Iterator[Group]:
    """Each group that says what the export is."""
    condition, options, kind = (_at(card, f"model.{key}") for key in ("condition", "adapter", "adapter.kind"))
    known = condition in list(CONDITIONS)
    group = CONDITIONS[condition].group if known else "llm"
    yield "model", MODEL, ["condition", group, "adapter", "dit", "vae", "dtype", "prediction", "shift"], set()
    yield _llm(card, not known or CONDITIONS[condition].writes)
    yield "sample", {key: OPTIONS.get(key, whole()) for key in SAMPLE}, [*SAMPLE], set()
    yield "model.vae", {"path": TEXT, "dtype": DTYPE, "tile": whole(0)}, ["path"], set()
    yield _options("model.dit", [DiT], {"path"}, {"channels", "d_ctx", "dtype", "rngs", "backend"})
    yield _options(f"model.{group}", [Native if group == "native" else Language], set(), {"mesh", "rules"})
    if kind in list(KINDS):
        takes_all = KINDS.values() if kind == "identity" else ()
        yield _options("model.adapter", [KINDS[kind], Adapter, *takes_all], {"kind", "time_cond"}, GIVEN)
    else:
        yield (
            "model.adapter",
            {"kind": OPTIONS["kind"]},
            ["kind"],
            {*options} - {"kind"} if isinstance(options, dict) else set(),
        )


def _llm(card: dict, writes: bool) -> Group:
    """The row of the LLM: its instruction is null where nothing is written, but it is there."""
    there = isinstance(llm := card.get("llm"), dict) and "instruction" in llm
    kinds = {"identity": OBJECT, "width": whole(), "instruction": TEXT if writes else only(None)}
    return "llm", kinds, ["identity", "width", *(["instruction"] if writes or not there else [])], set()


def _options(group: str, makers: list[Callable], more: set[str], given: set[str]) -> Group:
    """The row of a group whose keys are arguments of the makers but for the `given`; the first's are needed, and `more`."""
    names, needed = {*more}, [*sorted(more)]
    for make in makers:
        parameters = inspect.signature(make.__init__).parameters.values()
        own = [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in given]
        names |= {each.name for each in own}
        needed += [each.name for each in own if each.default is each.empty and make is makers[0]]
    return group, {name: OPTIONS[name] for name in names}, needed, set()


def _at(values: dict, path: str):
    """What stands behind keys that dots join; None where nothing does."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
