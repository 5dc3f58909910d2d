"""Compiled programs that are kept on disk, so that the next process starts at once."""

import jax

from data_pipeline.files import cache_folder

_SECONDS = 0.3  # what takes less to compile is not worth a file


def keep_compiled() -> None:
    """From now on programs are kept in ~/.cache/mathscale_jax/compiled, or in $JAX_COMPILATION_CACHE_DIR.

    A program is found again by what it computes, jax's version, its flags and the device: a stale one never is.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
