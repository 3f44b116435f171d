"""What training knows of its texts, made once and kept beside the run (missing rephrasings, the LLM's states), and what use hears."""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rise_jax.condition_kinds import Condition
from rise_jax.data.sources import Text
from rise_jax.language import Pair, Rephrasings, differing
from rise_jax.processes import check_agreed, from_first, is_first
from rise_jax.video import write_file

LOG = logging.getLogger(__name__)
PART = 4096  # prompts: minutes of an LLM's work
NAMED = 5  # prompts in an error
# Keys of the first line of captions, and of the others.
HEAD, LINE = {"llm", "max_new"}, {"prompt", "rephrased", "tokens"}


def complete(texts: list[Text], language: Condition, file: Path) -> list[Pair]:
    """Texts as pairs, every missing rephrasing written by the LLM; kept in `file` (JSON lines), read from it the next time.

    What is written is kept every PART prompts, so that a run that is ended meanwhile goes on from there. Where the condition needs
    none, none is written. Several processes write them together, and process 0 keeps them. Raises ValueError when `file` is damaged or
    was written by another LLM or instruction, and, once the others are written and kept, when the LLM wrote nothing for some prompts.
    """
    unwritten = lambda text: language.writes and text.rephrased is None
    missing = sorted({text.prompt for text in texts if unwritten(text)})
    known = _read_written(file, language) if missing else {}
    new = [prompt for prompt in missing if prompt not in known]
    check_agreed(new, str(file))
    if new:
        LOG.info("the LLM writes %d missing captions into %s", len(new), file)
    for first in range(0, len(new), PART):
        known |= _write(new[first : first + PART], language)
        if is_first():
            lines = [_head(language), *({"prompt": prompt, **known[prompt]} for prompt in sorted(known))]
            write_file(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    _check_written([prompt for prompt in new if prompt not in known], len(new), file)
    return [
        Pair(text.prompt, known[text.prompt]["tokens"]) if unwritten(text) else language.pair(text) for text in texts
    ]


def cached_states(pairs: list[Pair], language: Condition, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training's states float32 [n, L, d_llm] and mask bool [n, L], from `file` or written to it.

    The file carries the fingerprint of everything it depends on; raises ValueError when that has changed since, or when the file is
    damaged. Several processes compute them together, and process 0 writes the file.
    """
    fingerprint = fingerprint_of(pairs, language)
    if from_first(file.exists()):
        states, mask, was, llm = _read_states(file)
        if was != fingerprint:
            names = differing(llm, language.identity) if llm else []
            raise ValueError(
                f"{file} holds states of other texts, another LLM, instruction or condition (fingerprint "
                f"{was[:12]}, now {fingerprint[:12]}{_named(names)}): remove it, or use another --workdir"
            )
        return states, mask
    states, mask = language.teach(
        pairs, progress=lambda steps: tqdm(steps, desc="LLM states", unit="batch", disable=None)
    )
    if is_first():
        content = io.BytesIO()
        np.savez(content, states=states, mask=mask, fingerprint=fingerprint, llm=json.dumps(language.identity))
        write_file(file, content.getvalue())
    return states, mask


def rephrased(
    prompts: Sequence[str], language: Condition, *, temperature: float = 0.0, seeds: Sequence[int] | None = None
) -> Rephrasings:
    """What conditions the videos of `prompts`, for use; warns of those for which the LLM wrote nothing."""
    heard = language.rephrase(prompts, temperature=temperature, seeds=seeds)
    silent = [prompt for prompt, text in zip(prompts, heard.texts, strict=True) if text == ""]
    if silent and is_first():
        LOG.warning("%s; their videos follow no text", _silence(silent, len(prompts)))
    return heard


def fingerprint_of(pairs: list[Pair], language: Condition) -> str:
    """SHA-256 over the LLM, its dtype, the layer, the instruction, the condition, the token budget and all texts."""
    content = json.dumps([language.identity, language.length, pairs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _write(prompts: list[str], language: Condition) -> dict[str, dict]:
    """What the LLM wrote, by prompt; those for which it wrote nothing are left out."""
    tokens, texts = language.write(
        prompts, progress=lambda steps: tqdm(steps, desc="LLM captions", unit="batch", disable=None)
    )
    return {prompt: {"rephrased": text, "tokens": ids} for prompt, text, ids in zip(prompts, texts, tokens) if text}


def _check_written(silent: list[str], asked: int, file: Path) -> None:
    if silent:
        raise ValueError(
            f"{_silence(silent, asked)}; give their `rephrased` (what it wrote for others is kept in {file})"
        )


def _silence(prompts: list[str], asked: int) -> str:
    named = ", ".join(f"{prompt[:80]!r}" for prompt in prompts[:NAMED])
    more = f" and {len(prompts) - NAMED} more" if len(prompts) > NAMED else ""
    return f"the LLM wrote nothing for {len(prompts)} of {asked} prompts: {named}{more}"


def _read_states(file: Path) -> tuple[np.ndarray, np.ndarray, str, dict]:
    """States, mask, fingerprint, and the LLM's identity: {} in files of earlier versions. Raises ValueError where it is damaged."""
    try:
        with np.load(file) as saved:
            llm = json.loads(str(saved["llm"])) if "llm" in saved else {}
            return saved["states"], saved["mask"], str(saved["fingerprint"]), llm
    except (zipfile.BadZipFile, EOFError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(file, str(error).strip("'")) from error


def _head(language: Condition) -> dict:
    return {"llm": language.identity, "max_new": language.length}


def _read_written(file: Path, language: Condition) -> dict[str, dict]:
    if not file.exists():
        return {}
    head, *lines = _read_lines(file)
    if head != _head(language):
        names = differing(head["llm"], language.identity)
        raise ValueError(
            f"{file} was written by another LLM or instruction, for another condition or length{_named(names)}: "
            "remove it, or use another --workdir"
        )
    return {line.pop("prompt"): line for line in lines}


def _read_lines(file: Path) -> list[dict]:
    """What `complete` wrote: a head, and one object per prompt. Raises ValueError with the line that is not whole."""
    rows = []
    for number, line in enumerate(file.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        row, needed = _parsed(line), LINE if rows else HEAD
        if not isinstance(row, dict) or not needed <= row.keys():
            raise _damaged(file, f"line {number} is no JSON object with {', '.join(sorted(needed))}")
        rows.append(row)
    return rows


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file} is damaged ({reason}): remove it, and it is made again")


def _named(names: list[str]) -> str:
    return f"; {', '.join(names)} differ" if names else ""
