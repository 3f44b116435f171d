"""Files that grow: whole additions or none, and a reason with the path."""

import pytest
from full_disk import limited

from rise_jax.writing import Growing


def test_a_file_is_added_to_and_its_folder_made(tmp_path):
    for content in (b"one\n", b"two\n"):
        file = Growing(tmp_path / "new" / "a.jsonl")
        file.write(content)
        assert (tmp_path / "new" / "a.jsonl").read_bytes().endswith(content), "before it is closed"
        file.close()
    assert (tmp_path / "new" / "a.jsonl").read_bytes() == b"one\ntwo\n"


def test_what_does_not_fit_is_not_there_in_part(tmp_path):
    file = Growing(tmp_path / "a.jsonl")
    file.write(b"a whole line\n")
    with limited(20), pytest.raises(OSError) as caught:
        file.write(b"another line\n")
    assert str(caught.value) == f"[Errno 27] cannot write {tmp_path}/a.jsonl: File too large"
    file.write(b"a third\n")
    file.close()
    assert (tmp_path / "a.jsonl").read_bytes() == b"a whole line\na third\n"


def test_a_new_file_must_be_new(tmp_path):
    (tmp_path / "a").write_bytes(b"kept")
    with pytest.raises(FileExistsError, match="cannot write .*/a: File exists"):
        Growing(tmp_path / "a", "xb")
    assert (tmp_path / "a").read_bytes() == b"kept"


def test_a_folder_that_cannot_be_made_is_told():
    with pytest.raises(OSError, match="cannot write /sys/rise_jax_test/a: "):
        Growing("/sys/rise_jax_test/a")
