"""Settings every test runs under: eight host devices for meshes, and no silent type promotion."""

import os

# Before jax is imported for the first time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false"  # compiles twice as fast, and compiling is most of it
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
