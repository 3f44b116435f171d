import pytest

from rise_jax.generate import read_prompts


def test_prompts_are_a_text_several_or_a_file(tmp_path):
    assert read_prompts("a cat") == ["a cat"]
    assert read_prompts("a cat || ein Hund") == ["a cat", "ein Hund"]
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  ein Hund \n", encoding="utf-8")
    assert read_prompts(str(file)) == ["a cat", "ein Hund"]


@pytest.mark.parametrize(
    ("prompts", "message"), [("", "no prompt given"), ("  ", "no prompt given"), ("a||", "prompt 2 of 2 is empty")]
)
def test_empty_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(prompts)


def test_a_text_longer_than_any_file_name_is_a_text():
    assert read_prompts("a cat " * 100) == [("a cat " * 100).strip()]


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt given"):
        read_prompts(str(tmp_path / "prompts.txt"))
