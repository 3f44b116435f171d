"""--mode=export: a run's newest checkpoint (EMA) as one folder for others, in Orbax and safetensors (exported.py has the layout)."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
from ml_collections import ConfigDict

from rise_jax.exported import write_export
from rise_jax.pipeline import open_run


def export(config: ConfigDict, workdir: Path, paths: Mapping[str, str] = MappingProxyType({})) -> int:
    """Writes WORKDIR/export. The model, and the sample defaults that go with it, are the workdir's run's; `paths` as in
    Pipeline.from_run.

    Raises FileExistsError where there is an export already, FileNotFoundError where there is no run.
    """
    if jax.process_count() > 1:
        raise ValueError(f"--mode=export runs in one process, this is one of {jax.process_count()}: start it alone")
    folder = workdir / "export"
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it, or move it away, to export again")
    run, language, vae = open_run(workdir, paths, tile=config.model.vae.tile if config else 0)
    write_export(folder, run, language, vae)
    print(
        f"{folder}: step {run.step} of {run.config.run.stage}, preset {run.config.run.preset}; "
        f'in Python: Pipeline.from_export("{folder}")',
        flush=True,
    )
    return 0
