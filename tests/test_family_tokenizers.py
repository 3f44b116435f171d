"""Tokenizers and chats of the published families: Qwen's and Gemma's folders and GGUF files, against transformers."""

import json
from functools import cache

import pytest
import regex
import tokenizers
import transformers

from rise_jax.gguf_tokenizer import tokenizer_from_gguf
from rise_jax.text import Instruction, Prompter, Tokenizer

TEXTS = [
    "a cat running",
    " two  spaces\t\ttabs\n\n\nlines \r\n",
    "1234567 and 3.14, x86_64",
    "一只猫在跑。 👩‍👩‍👧 ❤️",
    "don't WE'LL they've",
    "cafe\u0301 is café",
    "C++ == f(x){ return !x; } // ok?",
    "\x00\x07",
]
CORPUS = ["the cat runs over the hill, the dog and the 2 cats run home at 10:35", "WE'LL don't; x = 12345"] * 4
RULE = Instruction("Rewrite the prompt.", (("dog", "A dog runs."), ("1 car", "A car 12 drives.")))
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}%s{%% for message in messages %%}"
    "{%% if (message['role'] == 'user') != (loop.index0 %% 2 == 0) %%}{{ raise_exception('Roles must alternate') }}{%% endif %%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (first if loop.first else '') + message['content'] | trim }}{{ '<end_of_turn>\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<start_of_turn>model\n' }}{%% endif %%}"
)
FOLDED = GEMMA % (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
)
REFUSED = GEMMA % (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% set first = '' %}"
)
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
}


def trained(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a small corpus, byte-level for Qwen, with pieces and bytes for Gemma."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if kind == "gemma":
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        special, alphabet = [*SPECIAL["gemma"], *(f"<0x{byte:02X}>" for byte in range(256))], []
    else:
        backend.pre_tokenizer, special = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), SPECIAL["qwen"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    vocab = backend.get_vocab()
    words = sorted(vocab, key=vocab.get)
    merged = [word for word in words if word not in special and len(word) > 1]
    if kind == "qwen":
        return vocab, [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    # As SentencePiece's files are converted: every cut of a piece into two, the pieces in the order of their scores.
    cuts = [(word[:i], word[i:]) for word in merged for i in range(len(word) - 1, 0, -1)]
    return vocab, [(left, right) for left, right in cuts if left in vocab and right in vocab]


@cache
def qwen() -> transformers.Qwen2Tokenizer:
    vocab, merges = trained("qwen")
    made = transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    made.chat_template = QWEN
    return made


@cache
def gemma() -> transformers.GemmaTokenizer:
    vocab, merges = trained("gemma")
    made = transformers.GemmaTokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=["<start_of_turn>", "<end_of_turn>"], mask_token=None
    )
    made.chat_template = FOLDED
    return made


def fields(kind: str, **changes) -> dict:
    """The GGUF metadata of the same tokenizer."""
    vocab, merges = trained(kind)
    words = sorted(vocab, key=vocab.get)
    kinds = [3 if word in SPECIAL[kind] else 6 if regex.fullmatch("<0x..>", word) else 1 for word in words]
    found = {
        "model": "gpt2",
        "pre": "qwen2",
        "merges": [" ".join(pair) for pair in merges],
        "eos_token_id": vocab.get("<|im_end|>"),
    }
    if kind == "gemma":
        kinds[vocab["<unk>"]] = 2
        scores = [-float(id) if type == 1 else 0.0 for id, type in enumerate(kinds)]
        found = {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": False}
        found |= {
            "eos_token_id": vocab["<eos>"],
            "bos_token_id": vocab["<bos>"],
            "eot_token_id": vocab["<end_of_turn>"],
        }
    found |= {"tokens": words, "token_type": kinds, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """kind -> the Tokenizer of a folder that transformers saved, its template in chat_template.jinja."""

    @cache
    def make(kind):
        path = tmp_path_factory.mktemp(kind)
        {"qwen": qwen, "gemma": gemma}[kind]().save_pretrained(path)
        assert (path / "chat_template.jinja").exists()
        return Tokenizer.from_folder(path)

    return make


@pytest.mark.parametrize("kind", ["qwen", "gemma"])
@pytest.mark.parametrize("text", TEXTS)
def test_folders_and_gguf_give_transformers_ids(folder, kind, text):
    expected = {"qwen": qwen, "gemma": gemma}[kind]().encode(text, add_special_tokens=False)
    assert folder(kind).encode(text) == expected
    assert tokenizer_from_gguf(fields(kind)).encode(text) == expected
    assert tokenizer_from_gguf(fields(kind)).decode(expected) == folder(kind).decode(expected)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_joins_the_best_pair_first(text):
    """SentencePiece's algorithm written out: characters, then again and again the neighbours whose piece scores best."""
    vocab, _ = trained("gemma")
    parts = list(text.replace(" ", "▁"))
    ids = lambda word: [vocab[word]] if word in vocab else [vocab[f"<0x{byte:02X}>"] for byte in word.encode()]
    while pairs := [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in vocab]:
        best = min(pairs, key=lambda i: vocab[parts[i] + parts[i + 1]])
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    assert tokenizer_from_gguf(fields("gemma")).encode(text) == [id for part in parts for id in ids(part)]


def test_llama_2_prepends_a_space_and_llama_3_keeps_three_digits_together():
    prefixed = tokenizer_from_gguf(fields("gemma", add_space_prefix=True))
    plain = tokenizer_from_gguf(fields("gemma"))
    assert prefixed.encode("the cat") == plain.encode(" the cat")
    assert prefixed.decode(prefixed.encode("the cat")) == "the cat"
    assert (prefixed.bos, prefixed.leading) == (2, (2,))
    words = [
        word
        for word, _ in tokenizer_from_gguf(fields("qwen", pre="llama-bpe")).backend.pre_tokenizer.pre_tokenize_str(
            "a 12345"
        )
    ]
    assert words == ["a", "Ġ", "123", "45"]
    words = [word for word, _ in tokenizer_from_gguf(fields("qwen")).backend.pre_tokenizer.pre_tokenize_str("a 12345")]
    assert words == ["a", "Ġ", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("source", ["folder", "gguf"])
@pytest.mark.parametrize(("kind", "end"), [("qwen", "<|im_end|>"), ("gemma", "<end_of_turn>")])
def test_chats_are_transformers_and_answers_end_where_the_template_ends_them(folder, kind, end, source):
    theirs = {"qwen": qwen, "gemma": gemma}[kind]()
    tokenizer = folder(kind)
    if source == "gguf":
        tokenizer = tokenizer_from_gguf({**fields(kind), "tokenizer.chat_template": theirs.chat_template})
    prompter = Prompter(tokenizer, RULE, 60)
    messages = [{"role": "system", "content": "Rewrite the prompt."}]
    for short, long in RULE.examples:
        messages += [{"role": "user", "content": f"Prompt: {short}"}, {"role": "assistant", "content": long}]
    messages.append({"role": "user", "content": "Prompt: 2 cats"})
    options = dict(add_generation_prompt=True, return_dict=True, enable_thinking=False)
    expected = theirs.apply_chat_template(messages, **options)["input_ids"]
    assert prompter.prefix_ids + prompter.prompt_ids("2 cats") == expected
    assert len(prompter.prefix_ids) > 40 and len(prompter.prompt_ids("2 cats")) <= prompter.width
    assert theirs.convert_tokens_to_ids(end) in prompter.stop
    assert tokenizer.eos[0] in prompter.stop


def test_a_template_without_system_role_gets_the_rule_in_the_first_turn():
    vocab, _ = trained("gemma")
    tokenizer = tokenizer_from_gguf({**fields("gemma"), "tokenizer.chat_template": REFUSED})
    assert not tokenizer.takes_system
    prompter = Prompter(tokenizer, RULE, 60)
    whole = tokenizer.backend.decode(prompter.prefix_ids + prompter.prompt_ids("2 cats"), skip_special_tokens=False)
    assert whole == (
        "<bos><start_of_turn>user\nRewrite the prompt.\n\nPrompt: dog<end_of_turn>\n<start_of_turn>model\nA dog runs.<end_of_turn>\n"
        "<start_of_turn>user\nPrompt: 1 car<end_of_turn>\n<start_of_turn>model\nA car 12 drives.<end_of_turn>\n"
        "<start_of_turn>user\nPrompt: 2 cats<end_of_turn>\n<start_of_turn>model\n"
    )
    assert prompter.stop == (vocab["<eos>"], vocab["<end_of_turn>"])


def test_a_gguf_header_without_scores_is_refused():
    header = fields("gemma")
    del header["tokenizer.ggml.scores"]
    with pytest.raises(ValueError, match=r"lacks tokenizer\.ggml\.scores: it holds no complete tokenizer"):
        tokenizer_from_gguf(header)
