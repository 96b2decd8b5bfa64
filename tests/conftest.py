"""Settings every test runs under: eight host devices for meshes, and no silent type promotion.

Property tests draw the same examples in every run; `--hypothesis-profile=default` searches for new.
"""

import os

# Before jax is imported for the first time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false"  # compiles faster, and compiling is most of the time
)
# LAPACK's threads and XLA's wait for each other on a busy machine: a second, not milliseconds, for
# one Cholesky factorisation of a thousand groups inside a scan.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)  # compiling again: a third less time


@pytest.fixture
def optimized():
    """XLA as users have it, for tests of what depends on its rounding."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
