"""The config in a run's folder, and where the files that it names lie now."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rise_jax.language import shipped_instructions
from rise_jax.published import LEARNED, NATIVE, PIXELS
from rise_jax.weights import EMBEDDED
from rise_jax.workdir import flattened, may_differ

GROUPS = ("model", "data", "optim", "sample", "run")  # of a run's config
#: What a run takes from files: the key that says where.
PARTS = {part: f"model.{part}.path" for part in ("llm", "dit", "vae", "native")}
PARTS |= {"null": "model.null", "instruction": "model.llm.instruction", "data": "data.path"}

#: Values of these keys that are no paths.
WORDS = {"llm": (EMBEDDED,), "vae": (PIXELS,), "null": (LEARNED, NATIVE), "instruction": shipped_instructions()}


def read_config(workdir: Path) -> dict:
    """The config a workdir was made with. Raises FileNotFoundError for a folder that holds no run, ValueError for one with another
    config.json."""
    file = Path(workdir) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {file.name} in it")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{workdir} holds no run: its {file.name} is not JSON ({error})") from error
    lacking = [name for name in GROUPS if not (isinstance(config, dict) and isinstance(config.get(name), dict))]
    if lacking:
        raise ValueError(f"{workdir} holds no run: its {file.name} is that of something else, without {lacking[0]!r}")
    return config


def config_at(workdir: Path, paths: Mapping[str, str]) -> ConfigDict:
    """A run's config, `paths` = {one of PARTS: where it lies now} applied. Raises as `read_config` does; ValueError for another
    part."""
    config = ConfigDict(read_config(workdir))
    for part, path in paths.items():
        if part not in PARTS:
            raise ValueError(f"paths names {part!r}; files belong to {', '.join(PARTS)}")
        config.update_from_flattened_dict({PARTS[part]: str(path)})
    return config


def moved_paths(workdir: Path, model: ConfigDict) -> dict[str, str]:
    """For `config_at`: where the files that a run's config names, and that are gone, lie by the `model` group of another config."""
    theirs, ours = (flattened({"model": group}) for group in (read_config(workdir)["model"], model.to_dict()))
    pairs = {part: (theirs.get(key), ours.get(key)) for part, key in PARTS.items()}
    gone = lambda part, path: path and path not in WORDS.get(part, ()) and not Path(path).exists()
    return {part: now for part, (was, now) in pairs.items() if gone(part, was) and now and Path(now).exists()}


def typed_paths(workdir: Path, typed: Mapping[str, Any]) -> dict[str, str]:
    """Of the settings {dotted key: value} that were typed for a mode that uses a run: where its files lie, as for `config_at`.

    What the run computes stays as it was trained: raises ValueError listing each key typed with another value than the run's. Only the
    folder of clips may be another: `evaluate` takes its held-out ones from there.
    """
    config = ConfigDict(read_config(workdir))
    own = {key: json.dumps(value) for key, value in flattened(config.to_dict()).items()}
    paths = {part: typed[key] for part, key in PARTS.items() if key in typed}
    used = {key: value for key, value in typed.items() if key.startswith(("model.", "data."))}
    pairs = {key: (own.get(key, "absent"), json.dumps(value)) for key, value in used.items()}
    clips = lambda key, now: key == PARTS["data"] and config.data.source != "scenes" and now != '""'
    fits = lambda key, was, now: was == now or may_differ(key, was, now) or clips(key, now)
    wrong = {key: pair for key, pair in pairs.items() if not fits(key, *pair)}
    if wrong:
        lines = "\n".join(f"  {key}: {was} -> {now}" for key, (was, now) in wrong.items())
        raise ValueError(
            f"{workdir} was made with another config:\n{lines}\nLeave these out: the run's own values are used."
        )
    return paths
