"""Tokenizers from the metadata of GGUF files: byte-level byte pairs ("gpt2") and SentencePiece byte pairs ("llama")."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rise_jax.settings import check_values, id_below
from rise_jax.text import Tokenizer

PREFIX = "tokenizer.ggml."
CONTROLS = ("bos", "eos", "eot", "padding")  # what is read of their numbers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type (GGUF specification, "Tokenizer")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> what splits a text into words, as in the tokenizer.json of the model that it is named after.
SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    **{
        name: [
            pre_tokenizers.Split(tokenizers.Regex(WORDS.format(numbers=numbers)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        for name, numbers in (("qwen2", r"\p{N}"), ("llama-bpe", r"\p{N}{1,3}"))
    },
}


def tokenizer_from_gguf(fields: dict, where: str = "the GGUF file") -> Tokenizer:
    """From plain Python values by key; ValueError for a tokenizer kind that is not known here, for missing fields, or for parts
    that do not fit each other. Messages call the file `where`."""
    field = lambda key, default=None: fields.get(PREFIX + key, default)
    model, pre = field("model"), field("pre")
    if model != "llama" and (model != "gpt2" or pre not in SPLITS):
        raise ValueError(
            f"{where} has tokenizer.ggml.model={model!r}, pre={pre!r}; only 'llama', and 'gpt2' with "
            f"{', '.join(map(repr, SPLITS))}, are known for GGUF: "
            "use the model's Hugging Face folder (config.json, *.safetensors, tokenizer) instead"
        )
    listed = "scores" if model == "llama" else "merges"
    needed = ("tokens", "token_type", listed, "eos_token_id")
    missing = [f"tokenizer.ggml.{key}" for key in needed if field(key) is None]
    if missing:
        raise ValueError(f"{where}'s header lacks {', '.join(missing)}: it holds no complete tokenizer")
    words, types = field("tokens"), field("token_type")
    check_ids(fields, where)
    _check_lists(words, {"token_type": types} | ({"scores": field("scores")} if model == "llama" else {}), where)
    if model == "llama":
        backend = _sentencepiece(words, types, field("scores"), field("add_space_prefix", True))
    else:
        backend = _byte_level(words, _pairs(field("merges"), {*words}, where), pre)
    _add(backend, words, types)
    ends = tuple(dict.fromkeys(id for id in (field("eos_token_id"), field("eot_token_id")) if id is not None))
    opens = field("add_bos_token", model == "llama" or pre == "llama-bpe")
    leading = (field("bos_token_id"),) if opens and field("bos_token_id") is not None else ()
    pad = field("padding_token_id", ends[0])
    template, source = fields.get("tokenizer.chat_template"), f"{where}, tokenizer.chat_template"
    return Tokenizer(backend, ends, pad, field("bos_token_id"), leading, template, source)


def check_ids(fields: dict, where: str) -> None:
    """ValueError for a control token's number that no token has."""
    kind = id_below(len(fields[f"{PREFIX}tokens"]))
    check_values(fields, {f"{PREFIX}{name}_token_id": kind for name in CONTROLS}, where)


def _check_lists(words: list[str], lists: dict[str, list], where: str) -> None:
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != len(words):
            count = len(values) if isinstance(values, list) else repr(values)
            raise ValueError(f"{where}: len({PREFIX}{name})={count} must be that of {PREFIX}tokens, {len(words)}")


def _pairs(merges: list[str], words: set[str], where: str) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise ValueError(f"{where}: {PREFIX}merges={merges!r} must be a list of pairs of tokens")
    pairs = []
    for number, merge in enumerate(merges):
        left, _, right = str(merge).partition(" ")
        if not (left in words and right in words and left + right in words):
            raise ValueError(
                f"{where}: {PREFIX}merges[{number}]={merge!r} must be two tokens with a space between, and one together"
            )
        pairs.append((left, right))
    return pairs


def _byte_level(words: list[str], pairs: list[tuple[str, str]], pre: str) -> tokenizers.Tokenizer:
    vocab = {word: id for id, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(words: list[str], types: list[int], scores: list[float], prefixed: bool) -> tokenizers.Tokenizer:
    """SentencePiece joins the neighbours whose piece has the best score; pairs in that order are the same byte-pair merges."""
    vocab = {word: id for id, word in enumerate(words)}
    pieces = {word: score for word, kind, score in zip(words, types, scores) if kind in (NORMAL, USER_DEFINED)}
    cuts = ((word[:i], word[i:], score) for word, score in pieces.items() for i in range(1, len(word)))
    pairs = [cut for cut in cuts if cut[0] in pieces and cut[1] in pieces]
    pairs.sort(key=lambda cut: (-cut[2], -len(cut[0])))
    unknown = next((word for word, kind in zip(words, types) if kind == UNKNOWN), None)
    merges = [(left, right) for left, right, _ in pairs]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefixed else space
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add(backend: tokenizers.Tokenizer, words: list[str], types: list[int]) -> None:
    """Makes control and user-defined tokens units that no merge touches."""
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        own = [word for word, t in zip(words, types) if t == kind]
        add([tokenizers.AddedToken(word, special=kind == CONTROL, normalized=False) for word in own])
