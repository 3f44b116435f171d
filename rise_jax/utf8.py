"""Text files of users, read as UTF-8."""

import codecs
from pathlib import Path


def read_utf8(path: Path | str) -> str:
    """All of a file but a byte order mark, line ends as they are; ValueError names the file and the line of what is not UTF-8."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from error
