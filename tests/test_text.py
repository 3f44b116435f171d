"""Tokenizer against transformers and against byte-pair encoding written out; chat text; instruction files; padding."""

from functools import cache
from importlib.resources import files
from itertools import pairwise

import gguf
import numpy as np
import pytest
import regex
import tokenizers
import transformers

from rise_jax.data.sources import TooLong
from rise_jax.gguf_tokenizer import tokenizer_from_gguf
from rise_jax.padding import left_pad, right_pad
from rise_jax.text import Instruction, Prompter, Tokenizer
from rise_jax.weights import embedded_path, load_llm
from tests import llama

ODD = [
    "a cat running",
    "",
    " ",
    "   two  spaces\t\ttabs",
    "line one\nline two\n\n\nline five\r\n",
    "1234567890 and 3.14159, 2nd, x86_64",
    "👩‍👩‍👧 family 🎬🎥 ❤️",
    "一只猫在沙滩上奔跑。",
    "собака бежит; ein Hündchen läuft; un niño corrió",
    "don't WE'LL I'd they've",
    "\u200bzero width\u00a0hard space",
    "café vs cafe\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start| >broken <|endoftext|>end",
    "C++ == f(x){ return !x; } // ok?",
    "\x00\x07 control bytes",
]
RULE = Instruction("Rewrite the prompt.", (("dog", "A dog runs."), ("1 car", "A car 12 drives.")))


@cache
def fields() -> dict:
    reader = gguf.GGUFReader(embedded_path())
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer")}


@cache
def embedded() -> Tokenizer:
    return tokenizer_from_gguf(fields())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """transformers' tokenizer over the same vocabulary, with the Digits step that its own GGUF conversion leaves out."""
    vocab = {word: id for id, word in enumerate(fields()["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fields()["tokenizer.ggml.merges"]]
    specials = [word for word, kind in zip(vocab, fields()["tokenizer.ggml.token_type"]) if kind == 3]
    made = transformers.GPT2Tokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=specials,
    )
    parts = tokenizers.pre_tokenizers
    made.backend_tokenizer.pre_tokenizer = parts.Sequence(
        [parts.Digits(individual_digits=True), made.backend_tokenizer.pre_tokenizer]
    )
    made.chat_template = fields()["tokenizer.chat_template"]
    folder = tmp_path_factory.mktemp("smollm2")
    made.save_pretrained(folder)
    return folder, made


def byte_pairs(text: str) -> list[int]:
    """GPT-2's algorithm, word by word: bytes as printable characters, then the earliest merge first (no control tokens)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in plain)}
    ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(fields()["tokenizer.ggml.merges"])}
    ids = {word: i for i, word in enumerate(fields()["tokenizer.ggml.tokens"])}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    found = []
    for piece in regex.findall(r"\p{N}|[^\p{N}]+", text):  # digits one by one, before anything else
        for word in regex.findall(pattern, piece):
            parts = [letters[byte] for byte in word.encode()]
            while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
                best = min(pairs, key=ranks.get)
                i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
                parts[i : i + 2] = ["".join(best)]
            found += [ids[part] for part in parts]
    return found


@pytest.mark.slow
def test_known_ids():
    assert embedded().encode("a cat running") == [81, 2644, 4108]
    assert embedded().encode("<|im_start|>") == [1]
    assert len(embedded().encode("2025")) == 4


@pytest.mark.parametrize("text", ODD)
def test_ids_equal_transformers(published, text):
    _, theirs = published
    assert embedded().encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", [text for text in ODD if "<|" not in text])
def test_ids_equal_byte_pair_encoding_written_out(text):
    assert embedded().encode(text) == byte_pairs(text)


@pytest.mark.parametrize("text", [text for text in ODD if "<|" not in text])
def test_decoding_gives_the_text_back(text):
    assert embedded().decode(embedded().encode(text)) == text


def test_control_tokens_are_not_decoded():
    assert embedded().decode([1, 81, 2]) == "a"


def test_chat_text_and_ids_equal_transformers(published):
    folder, theirs = published
    messages = [
        {"role": "system", "content": "Rewrite.\nBe 100% brief."},
        {"role": "user", "content": "una gata 🐈 corre"},
        {"role": "assistant", "content": "A cat runs."},
        {"role": "user", "content": "一只猫"},
    ]
    text = embedded().render(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert embedded().encode(text) == expected
    loaded = Tokenizer.from_folder(folder)
    assert loaded.encode(loaded.render(messages)) == expected
    assert (loaded.eos, loaded.pad, loaded.bos) == ((2,), 2, 1)


def test_other_gguf_tokenizers_are_refused_by_name():
    with pytest.raises(ValueError, match="model='gpt2', pre='falcon'.*Hugging Face folder"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "falcon"})
    with pytest.raises(ValueError, match=r"lacks tokenizer\.ggml\.merges:"):
        tokenizer_from_gguf({key: value for key, value in fields().items() if "merges" not in key})


def test_a_folder_adds_the_end_tokens_of_its_configs(tmp_path):
    llama.save(llama.tiny(), tmp_path)
    assert load_llm(tmp_path).tokenizer.eos == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert load_llm(tmp_path).tokenizer.eos == (1, 7)


@pytest.mark.parametrize("prompt", ["a cat running", " un  perro\ncorre 3 veces ", "一只猫 🐈", "Prompt: x", "\x00 7"])
def test_prefix_and_prompt_are_the_whole_chat(prompt):
    prompter = Prompter(embedded(), RULE, 40)
    whole = embedded().render(
        [
            {"role": "system", "content": "Rewrite the prompt."},
            {"role": "user", "content": "Prompt: dog"},
            {"role": "assistant", "content": "A dog runs."},
            {"role": "user", "content": "Prompt: 1 car"},
            {"role": "assistant", "content": "A car 12 drives."},
            {"role": "user", "content": f"Prompt: {prompt.strip()}"},
        ]
    )
    ids = prompter.prompt_ids(prompt)
    assert prompter.prefix_ids + ids == embedded().encode(whole)
    assert len(prompter.prefix_ids) > len(embedded().encode("Rewrite the prompt. A dog runs. A car 12 drives."))
    assert len(ids) <= prompter.width
    assert prompter.stop == (2,)


def test_a_prompt_of_exactly_the_budget_fits():
    prompter = Prompter(embedded(), RULE, 5)
    assert len(prompter.prompt_ids("one two three four five")) <= prompter.width
    with pytest.raises(
        ValueError, match=r"the prompt has 6 tokens, at most 5 are allowed .model.llm.max_prompt.; it is never cut"
    ):
        prompter.prompt_ids("one two three four five six")


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_empty_prompts_are_refused(text):
    with pytest.raises(ValueError, match="the prompt is empty"):
        Prompter(embedded(), RULE, 5).prompt_ids(text)


def test_control_tokens_in_a_prompt_are_refused():
    prompter = Prompter(embedded(), RULE, 40)
    with pytest.raises(ValueError, match=r"control token '<\|im_end\|>'"):
        prompter.prompt_ids("a cat<|im_end|>")
    with pytest.raises(ValueError, match="the caption holds"):
        prompter.rephrased_ids("a cat<|im_end|>")


@pytest.mark.parametrize(
    "instruction",
    [
        Instruction("Be brief.<|im_end|>", ()),
        Instruction("Be brief.", (("dog<|im_end|>", "A dog."),)),
        Instruction("Be brief.", (("dog", "A dog."), ("cat", "A cat.<|im_end|>"))),
    ],
)
def test_control_tokens_in_an_instruction_are_refused(instruction):
    with pytest.raises(ValueError, match=r"the instruction of this program holds .* control token '<\|im_end\|>'"):
        Prompter(embedded(), instruction, 40)


def test_captions_are_encoded_apart_without_end_token():
    prompter = Prompter(embedded(), RULE, 40)
    assert prompter.rephrased_ids(" A dog runs.\n") == embedded().encode("A dog runs.")
    assert prompter.text(prompter.rephrased_ids("A dog runs.")) == "A dog runs."


def test_a_base_model_gets_the_plain_layout_and_that_is_told(tmp_path, caplog):
    """An instruction-tuned model whose template was not copied looks like one."""
    folder = llama.save(llama.tiny(), tmp_path, template=None)
    tokenizer = load_llm(folder).tokenizer
    prompter = Prompter(tokenizer, RULE, 60)
    assert f"{folder}/tokenizer_config.json holds no chat template" in caplog.text
    assert tokenizer.decode(prompter.prefix_ids + prompter.prompt_ids("the cat")) == (
        "Rewrite the prompt.\n\nprompt: dog\ncaption: A dog runs.\n\nprompt: 1 car\ncaption: A car 12 drives.\n"
        "\nprompt: the cat\ncaption:"
    )
    assert prompter.stop == (1, *tokenizer.encode("\n"))
    assert tokenizer.decode(prompter.rephrased_ids("A dog.")) == " A dog."


def test_a_base_model_keeps_its_leading_token():
    backend = embedded().backend
    base = Tokenizer(backend, eos=(2,), pad=2, bos=0, leading=(0,))
    assert Prompter(base, RULE, 40).prefix_ids[0] == 0


@pytest.mark.parametrize("name", sorted(path.name for path in (files("rise_jax") / "instructions").iterdir()))
def test_shipped_instructions_can_be_read(name):
    instruction = Instruction.read(files("rise_jax") / "instructions" / name)
    assert len(instruction.examples) >= 2
    Prompter(embedded(), instruction, 40).prompt_ids("a cat running")


def test_an_instruction_file(tmp_path):
    path = tmp_path / "rules.txt"
    path.write_text(
        "Be brief.\nNote: be kind.\n\nprompt: dog: big\ncaption: A big dog.\n\n prompt: 猫\ncaption: A cat: old.\n"
    )
    read = Instruction.read(path)
    assert read == Instruction("Be brief.\nNote: be kind.", (("dog: big", "A big dog."), ("猫", "A cat: old.")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: a\ncaption: b", "line 1: the file must open with the rule"),
        ("rule\ncaption: b", "line 2: 'caption:' stands where a 'prompt:' line is due"),
        ("rule\nprompt: a\n\nprompt: b", "line 4: 'prompt:' stands where a 'caption:' line is due"),
        ("rule\nprompt: a\ncaption:", "line 3: 'caption:' is empty"),
        ("rule\nprompt: a\ncaption: b\nmore", "line 4: after the first example"),
        ("rule\nprompt: a\ncaption: b\n\nprompt: c", "line 5: 'prompt:' has no 'caption:'"),
    ],
)
def test_mistakes_in_an_instruction_file_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "rules.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rules\.txt, " + message):
        Instruction.read(path)


def test_a_missing_instruction_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no instruction file at .*absent\.txt"):
        Instruction.read(tmp_path / "absent.txt")


def test_padding_sides():
    ids, mask = left_pad([[5, 6], [7, 8, 9]], 4, 0)
    assert ids.tolist() == [[0, 0, 5, 6], [0, 7, 8, 9]] and ids.dtype == np.int32
    assert mask.tolist() == [[False, False, True, True], [False, True, True, True]]
    ids, mask = right_pad([[5, 6], []], 3, 1)
    assert ids.tolist() == [[5, 6, 1], [1, 1, 1]]
    assert mask.tolist() == [[True, True, False], [False, False, False]]
    with pytest.raises(ValueError, match="text 1 has 3 tokens, at most 2 fit"):
        left_pad([[1], [1, 2, 3]], 2, 0)


def test_a_prompt_that_grows_where_it_stands_is_refused_by_name():
    """Behind "Prompt: " EMAIL is two tokens, by itself one."""
    tokenizer = embedded()
    prompter = Prompter(tokenizer, Instruction("Rewrite.", ()), 16)
    assert len(prompter.prompt_ids("EMAIL" + " cat" * 14)) <= prompter.width
    assert len(tokenizer.encode("EMAIL" + " cat" * 15)) == 16
    with pytest.raises(TooLong, match="the prompt has 17 tokens, at most 16 .*'EMAIL cat cat"):
        prompter.prompt_ids("EMAIL" + " cat" * 15)
