"""One JAX setting for all tests: eight CPU devices, and a compilation cache that worker processes and runs share."""

import gc
import os
import tempfile

from quick import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
# Where in the code each operation stands is not needed to compile it, and takes a twentieth of the time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax  # after the flags, which it reads when imported
import pytest

from rise_jax.data.loader import make_loader

jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"rise_jax_test_cache_{os.getuid()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_finish(session):
    """Python's collector passes over what the imports left, and comes seldom: else it takes an eighth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture
def load(tmp_path):
    """load(source, ...) -> a loader with a quarantine file of its own."""

    def load(source, **changes):
        defaults = {"batch_size": 4, "seed": 3, "quarantine_file": tmp_path / "quarantine.jsonl"}
        return make_loader(source, **defaults | changes)

    return load
