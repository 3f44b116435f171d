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

jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"rise_jax_test_cache_{os.getuid()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_finish(session):
    """Python's collector passes over what the imports left, and comes seldom: else it takes an eighth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
