"""Where compiled programs are kept."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import environment

_PROGRAM = """
import jax, jax.numpy as jnp
from mathscale_jax.compiled import keep_compiled
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(jnp.arange(3))
"""


@pytest.mark.parametrize(
    "variable, folder", [("JAX_COMPILATION_CACHE_DIR", ""), ("XDG_CACHE_HOME", "mathscale_jax/compiled")]
)
def test_programs_are_kept_where_the_environment_says(tmp_path: Path, variable: str, folder: str) -> None:
    here = {key: value for key, value in environment().items() if key != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", _PROGRAM], env={**here, variable: str(tmp_path)}, check=True, timeout=60)
    assert any(path.name.startswith("jit_") for path in (tmp_path / folder).iterdir())
