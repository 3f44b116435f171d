"""Chat templates, tokenizers and token numbers that a model cannot have are told in one line that names the file."""

import json

import pytest
import tokenizers
from encoders import write_umt5
from tiny import as_gguf, write_llm

from rise_jax.gguf_tokenizer import tokenizer_from_gguf
from rise_jax.text import Instruction, Prompter
from rise_jax.weights import checked_llm, load_llm
from rise_jax.weights_t5 import checked_t5

RULE = Instruction("Rewrite the prompt.", (("dog", "A dog runs."),))


@pytest.fixture
def llm(tmp_path):
    return write_llm(tmp_path / "llm")


@pytest.fixture
def t5(tmp_path):
    return write_umt5(tmp_path / "t5", 16)


def change(file, **values):
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | values))


def grow(file, word, special=False):
    """Gives a tokenizer one token more."""
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.add_tokens([tokenizers.AddedToken(word, special=special)])
    backend.save(str(file))


def told(function, *arguments):
    with pytest.raises(ValueError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


BAKED = {
    "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 30},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    },
}


@pytest.mark.parametrize("setting", BAKED)
def test_a_text_is_neither_cut_nor_padded_whatever_an_llms_tokenizer_says(llm, setting):
    """The prefix is the whole instruction: its last example closes it."""
    change(llm / "tokenizer.json", **{setting: BAKED[setting]})
    tokenizer = load_llm(llm).tokenizer
    assert tokenizer.decode(tokenizer.encode("cat")) == "cat" and len(tokenizer.encode("cat")) == 3
    assert len(tokenizer.encode("a cat " * 24)) == 144 and tokenizer.leading == ()
    assert tokenizer.decode(Prompter(tokenizer, RULE, 10).prefix_ids).rstrip().endswith("A dog runs.")


@pytest.mark.parametrize("setting", BAKED)
def test_a_text_is_neither_cut_nor_padded_whatever_an_encoders_tokenizer_says(t5, setting):
    change(t5 / "tokenizer.json", **{setting: BAKED[setting]})
    tokenizer = checked_t5(t5)[-1]
    assert tokenizer.encode("red") == [3] and tokenizer.encode("red " * 40) == [3] * 40


TEMPLATES = {
    "{% for m in %}": "the chat template cannot be used (TemplateSyntaxError: ",
    "{{ raise_exception('no chats') }}": "the chat template cannot be used (TemplateError: no chats)",
    "{{ nobody.name }}": "the chat template cannot be used (UndefinedError: 'nobody' is undefined)",
    "{{ messages + 1 }}": "the chat template cannot be used (TypeError: ",
    "<|start|>": "the chat template writes the prompt 0 times, 1 is due",
    "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}": "writes the prompt 2 times, 1 is due",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_cannot_be_used(llm, template):
    change(llm / "tokenizer_config.json", chat_template=template)
    message = told(lambda: Prompter(load_llm(llm).tokenizer, RULE, 10))
    assert message.startswith(f"{llm}/tokenizer_config.json: ") and TEMPLATES[template] in message


def test_a_template_in_a_gguf_file_or_a_file_of_its_own_is_named(llm):
    (llm / "chat_template.jinja").write_text("{{ oops")
    assert told(lambda: Prompter(load_llm(llm).tokenizer, RULE, 10)).startswith(f"{llm}/chat_template.jinja: ")
    tokenizer = load_llm(as_gguf(llm)).tokenizer
    assert tokenizer.source == f"{llm}/model.gguf, tokenizer.chat_template"


def test_a_damaged_file_beside_the_tokenizer_is_named(llm):
    (llm / "tokenizer_config.json").write_text("{")
    assert told(load_llm, llm).startswith(f"{llm}/tokenizer_config.json is not valid JSON")


@pytest.mark.parametrize("value", [3, ["a"], [{"name": "default"}]])
def test_a_chat_template_of_another_type_is_named(llm, value):
    change(llm / "tokenizer_config.json", chat_template=value)
    message = f"{llm}/tokenizer_config.json: not supported: chat_template={value!r} (must be a text, or a list of"
    assert told(load_llm, llm).startswith(message)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [99999999999, -5, "abc", [2, 259], True])
def test_end_tokens_that_no_model_has(llm, file, value):
    change(llm / file, eos_token_id=value)
    message = told(checked_llm, llm)
    assert message.startswith(f"{llm}/{file}: not supported: eos_token_id={value!r} (must be a token's number")
    assert "a list of them" in message


def test_a_tokenizer_with_more_tokens_than_the_embedding(llm):
    grow(llm / "tokenizer.json", "more")
    message = (
        f"{llm}/tokenizer.json: 'more' has the number 259, but the model knows 0 to 258: it is another model's tok"
    )
    assert told(load_llm, llm).startswith(message)


def test_a_control_token_beyond_the_embedding_passes_unless_it_is_used(llm):
    """As Gemma's for images, whose text models have no row for it."""
    grow(llm / "tokenizer.json", "<image>", special=True)
    assert load_llm(llm).tokenizer.encode("<image>") == [259]
    change(llm / "tokenizer_config.json", pad_token="<image>")
    assert told(load_llm, llm).startswith(
        f"{llm}/tokenizer.json: pad_token has the number 259, but the model knows 0 to"
    )


def test_a_tokenizer_with_more_tokens_than_the_encoder(t5):
    for number in range(4, 9):
        grow(t5 / "tokenizer.json", f"more{number}")
    assert told(checked_t5, t5).startswith(
        f"{t5}/tokenizer.json: 'more8' has the number 8, but the encoder knows 0 to 7"
    )


@pytest.mark.parametrize(("key", "value"), [("eos_token_id", 8), ("eos_token_id", [1, 9]), ("pad_token_id", 8)])
def test_control_tokens_beyond_the_encoders_vocabulary(t5, key, value):
    change(t5 / "config.json", **{key: value})
    assert told(checked_t5, t5).startswith(
        f"{t5}/config.json: not supported: {key}={value} (must be a token's number, 0 to 7"
    )


GGUF = {
    "model": "gpt2",
    "pre": "qwen2",
    "tokens": ["a", "<end>", "b", "ab"],
    "token_type": [1, 3, 1, 1],
    "merges": ["a b"],
    "eos_token_id": 1,
}
MERGE = "must be two tokens with a space between, and one together"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("merges", ["a b", "a c"], f"merges[1]='a c' {MERGE}"),
        ("merges", ["b a"], f"merges[0]='b a' {MERGE}"),
        ("merges", ["ab"], f"merges[0]='ab' {MERGE}"),
        ("merges", ["a b ab"], f"merges[0]='a b ab' {MERGE}"),
        ("merges", "a b", "merges='a b' must be a list of pairs of tokens"),
        ("token_type", [1], "len(tokenizer.ggml.token_type)=1 must be that of tokenizer.ggml.tokens, 4"),
        ("eos_token_id", 4, "eos_token_id=4 (must be a token's number, 0 to 3)"),
        ("eos_token_id", "x", "eos_token_id='x' (must be a token's number, 0 to 3)"),
        ("eot_token_id", -1, "eot_token_id=-1 (must be a token's number, 0 to 3)"),
        ("padding_token_id", 77, "padding_token_id=77 (must be a token's number, 0 to 3)"),
    ],
)
def test_parts_of_a_gguf_tokenizer_that_do_not_fit(key, value, message):
    fields = {f"tokenizer.ggml.{name}": entry for name, entry in (GGUF | {key: value}).items()}
    found = told(tokenizer_from_gguf, fields, "m.gguf")
    assert found.startswith("m.gguf: ") and message in found


def test_an_end_token_beyond_a_gguf_embedding_is_told_by_the_header(llm):
    path = as_gguf(llm)
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.eos_token_id") + len(b"tokenizer.ggml.eos_token_id") + 4
    path.write_bytes(data[:at] + (999).to_bytes(4, "little") + data[at + 4 :])
    message = f"{path}: not supported: tokenizer.ggml.eos_token_id=999 (must be a token's number, 0 to 259)"
    assert told(checked_llm, path) == message
