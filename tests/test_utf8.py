"""What editors put at the start of a text file is no part of what was written."""

import pytest

from rise_jax.generate import read_prompts
from rise_jax.text import Instruction
from rise_jax.utf8 import read_utf8


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "texts.txt").write_text("a dog\na café\n", encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / "texts.txt")) == ["a dog", "a café"]


def test_a_byte_order_mark_is_no_part_of_an_instruction(tmp_path):
    for name, encoding in (("plain.txt", "utf-8"), ("marked.txt", "utf-8-sig")):
        (tmp_path / name).write_text("Rewrite the prompt.", encoding=encoding)
    assert Instruction.read(tmp_path / "marked.txt") == Instruction.read(tmp_path / "plain.txt")


def test_only_the_first_mark_is_dropped_and_lines_are_counted_as_before(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\r\n\ufefftwo".encode())
    assert read_utf8(path) == "one\r\n\ufefftwo"
    path.write_bytes("\ufeffone\ntwo ".encode() + b"\xff")
    with pytest.raises(ValueError, match=r"texts.txt, line 2: byte 0xff is not UTF-8"):
        read_utf8(path)
