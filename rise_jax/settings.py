"""What a published config.json may say: a table of its keys, each with what its value has to be, and all faults told together."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

SHOWN = 80  # characters of a value
LARGEST = 1e30  # of a number: neither infinite nor NaN, which JSON as Python reads it may hold


class Kind(NamedTuple):
    """What a value has to be. `words` end the sentence "KEY=VALUE (...)"; `each` is the kind of a list's entries.

    A null counts as absent, unless a model would take it for a value of its own: then it is not `nullable`.
    """

    words: str
    fits: Callable[[Any], bool]
    each: "Kind | None" = None
    nullable: bool = True


def whole(least: int = 1) -> Kind:
    """An integer; JSON's true and false are none."""
    return Kind(f"must be a whole number >= {least}", lambda value: _is(value, int) and value >= least)


def id_below(count: int) -> Kind:
    """A token of `count`."""
    fits = lambda value: whole(0).fits(value) and value < count
    return Kind(f"must be a token's number, 0 to {count - 1}", fits)


def ids_below(count: int) -> Kind:
    """A token of `count`, or a list of them."""
    one = id_below(count)
    fits = lambda value: one.fits(value) or (_are_ids(value) and max(value) < count)
    return Kind(f"{one.words}, or a list of them", fits)


def check_values(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """As `check_settings`, for keys among others that are not looked at."""
    check_settings({key: value for key, value in values.items() if key in kinds}, kinds, where, free=())


def only(*values: Any, nullable: bool = True) -> Kind:
    """The one value, or the few, that are implemented."""
    return Kind(f"supported: {' or '.join(map(repr, values))}", lambda value: value in values, nullable=nullable)


def list_of(each: Kind, what: str, count: int | None = None) -> Kind:
    """`count` entries, or one and more; `what` is their plural."""
    fits = lambda value: isinstance(value, list) and (len(value) == count if count else bool(value))
    return Kind(f"must be a list of {count or 'one or more'} {what}", fits, each)


EVEN = Kind("must be an even whole number >= 2", lambda value: _is(value, int) and value >= 2 and value % 2 == 0)
ABOVE_0 = Kind("must be a number > 0", lambda value: _is_number(value) and value > 0)
NUMBER = Kind("must be a number", lambda value: _is_number(value))
FLAG = Kind("must be true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("must be an object", lambda value: isinstance(value, dict))
ID = Kind("must be a token's number", whole(0).fits)
IDS = Kind("must be a token's number, or a list of them", lambda value: whole(0).fits(value) or _are_ids(value))
CHAT_TEMPLATE = Kind(
    "must be a text, or a list of objects with name and template",
    lambda value: (
        isinstance(value, str)
        or (
            isinstance(value, list)
            and all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in value)
        )
    ),
)

# Keys that transformers writes for every model and that no encoder's or decoder's states depend on: what the file is, how it was
# trained, what generation and other tasks start with.
_COMMON = """
architectures attn_implementation auto_map dtype model_type name_or_path tokenizer_class torch_dtype transformers.js_config
transformers_version unsloth_fixed unsloth_version
attention_dropout classifier_dropout dropout_rate initializer_factor initializer_range neftune_noise_alpha tf_legacy_loss
bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id pad_token_id sep_token_id
bad_words_ids begin_suppress_tokens cache_implementation diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values
repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p use_cache
finetuning_task id2label label2id num_labels problem_type task_specific_params
chunk_size_feed_forward max_position_embeddings output_attentions output_hidden_states return_dict torchscript use_bfloat16
"""
COMMON = frozenset(_COMMON.split())


def check_settings(
    values: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    where: str,
    *,
    free: Collection[str],
    needed: Iterable[str] = (),
) -> None:
    """Raises one ValueError with a line for every key of `values` that is neither in `kinds` nor `free`, every value that is not of
    its kind, and what is missing of the `needed`.

    Keys that begin with _ are the writing program's own, and a null beside an unknown key asks for nothing.
    """
    known = {*kinds, *free}
    faults = [fault for key, kind in kinds.items() if key in values and (fault := _fault(key, values[key], kind))]
    for key, value in values.items():
        if key not in known and value is not None and not key.startswith("_"):
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
            faults.append(f"{key}={_shown(value)} (unknown; nearest: {near}; delete it if the model does without)")
    faults = [f"not supported: {fault}" for fault in faults]
    if missing := [key for key in needed if values.get(key) is None]:
        faults.append(f"it lacks {', '.join(missing)}")
    raise_faults(faults, where)


def raise_faults(faults: list[str], where: str) -> None:
    """ValueError, a line for each, unless there are none."""
    if faults:
        raise ValueError(f"{where}: {faults[0]}" if len(faults) == 1 else "\n  ".join([f"{where}:", *faults]))


def _fault(key: str, value: Any, kind: Kind) -> str:
    """Without faults "". Of a list with wrong entries, the first."""
    if value is None and kind.nullable:
        return ""
    if kind.each and isinstance(value, list):
        within = (_fault(f"{key}[{i}]", entry, kind.each) for i, entry in enumerate(value))
        if first := next(filter(None, within), ""):
            return first
    return "" if kind.fits(value) else f"{key}={_shown(value)} ({kind.words})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(whole(0).fits, value))


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is(value, int) or _is(value, float)) and -LARGEST < value < LARGEST
