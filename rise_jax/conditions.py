"""What training knows of its texts, made once and kept beside the run: missing rephrasings, and the LLM's states."""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rise_jax.data.sources import Text
from rise_jax.language import Language

LOG = logging.getLogger(__name__)


def complete(texts: list[Text], language: Language, file: Path) -> list[Text]:
    """Texts with every missing rephrasing written by the LLM; kept in `file` (JSON lines), read from it the next time.

    Raises ValueError when `file` was written by another LLM or instruction.
    """
    missing = sorted({text.prompt for text in texts if text.rephrased is None})
    if not missing:
        return texts
    known = _read_written(file, language.identity)
    new = [prompt for prompt in missing if prompt not in known]
    if new:
        LOG.info("the LLM writes %d missing captions into %s", len(new), file)
        known |= dict(zip(new, _write(new, language)))
        lines = [
            {"llm": language.identity},
            *({"prompt": key, "rephrased": value} for key, value in sorted(known.items())),
        ]
        _replace(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return [text if text.rephrased is not None else Text(text.prompt, known[text.prompt]) for text in texts]


def cached_states(texts: list[Text], language: Language, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Teacher-forced states float32 [n, R, d_llm] and mask bool [n, R] of complete texts, from `file` or written to it.

    The file carries the fingerprint of everything it depends on; raises ValueError when that has changed since.
    """
    fingerprint = fingerprint_of(texts, language)
    if file.exists():
        with np.load(file) as saved:
            if str(saved["fingerprint"]) != fingerprint:
                raise ValueError(
                    f"{file} holds states of other texts, another LLM or another instruction "
                    f"(fingerprint {str(saved['fingerprint'])[:12]}, now {fingerprint[:12]}): remove it, or use another --workdir"
                )
            return saved["states"], saved["mask"]
    states, mask = language.teach(
        texts, progress=lambda steps: tqdm(steps, desc="LLM states", unit="batch", disable=None)
    )
    scratch = file.with_suffix(".tmp.npz")
    np.savez(scratch, states=states, mask=mask, fingerprint=fingerprint)
    os.replace(scratch, file)
    return states, mask


def fingerprint_of(texts: list[Text], language: Language) -> str:
    """SHA-256 over the LLM, its dtype, the instruction, the token budget and all texts."""
    content = json.dumps([language.identity, language.max_new, texts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _write(prompts: list[str], language: Language) -> list[str]:
    written = language.rephrase(
        prompts, progress=lambda steps: tqdm(steps, desc="LLM captions", unit="batch", disable=None)
    ).texts
    empty = [prompt for prompt, text in zip(prompts, written) if not text]
    if empty:
        raise ValueError(
            f"the LLM wrote nothing for {len(empty)} of {len(prompts)} prompts, the first: {empty[0]!r}; give `rephrased`"
        )
    return written


def _read_written(file: Path, identity: dict) -> dict[str, str]:
    if not file.exists():
        return {}
    head, *lines = (json.loads(line) for line in file.read_text().splitlines())
    if head["llm"] != identity:
        raise ValueError(f"{file} was written by another LLM or instruction: remove it, or use another --workdir")
    return {line["prompt"]: line["rephrased"] for line in lines}


def _replace(file: Path, content: bytes) -> None:
    scratch = file.with_name(file.name + ".tmp")
    scratch.write_bytes(content)
    os.replace(scratch, file)
