"""Published weights straight into our tree, for tests that need no checkpoint of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mathscale_jax import model
from mathscale_jax.config import ModelConfig
from mathscale_jax.convert.mapping import leaves
from mathscale_jax.convert.sources import open_source


def read_model(folder: Path) -> tuple[ModelConfig, model.Params]:
    """The architecture and the float32 parameters of a folder."""
    source = open_source(str(folder))
    by_name = {}
    for leaf in leaves(source.config, source.layout):
        slices = [np.empty(leaf.slice_shape, np.float32) for _ in leaf.tensors]
        for name, place in zip(leaf.tensors, slices, strict=True):
            leaf.from_tensor(source.read(name).astype(np.float32), place)
        by_name[leaf.name] = jnp.asarray(np.stack(slices) if leaf.is_stacked else slices[0])
    specs = model.param_specs(source.config)
    names, treedef = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, model.ParamSpec))
    ordered = [by_name[jax.tree_util.keystr(path, simple=True, separator=".")] for path, _ in names]
    return source.config, jax.tree.unflatten(treedef, ordered)
