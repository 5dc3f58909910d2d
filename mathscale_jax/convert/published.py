"""Published weights read straight onto devices, for sampling from a folder without importing it first."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipeline.progress import Progress
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Meta
from mathscale_jax.convert.dtypes import cast, numpy_dtype
from mathscale_jax.convert.importing import described
from mathscale_jax.convert.mapping import Leaf, leaves
from mathscale_jax.convert.sources import open_source


def is_published(path: str) -> bool:
    """Whether a folder is one of published weights, and no checkpoint of ours."""
    return any((Path(path) / name).exists() for name in ("config.json", "params.json"))


class Published:
    """A folder of published weights, opened. Raises UsageError as an import does."""

    def __init__(self, path: str):
        self.name = path
        self._source = open_source(path)
        self.meta: Meta
        self.tokenizer: Tokenizer
        self.meta, self.tokenizer = described(self._source)

    def restore_params(self, shardings: Any = None, dtype: str = "float32") -> model.Params:
        """The weights in `dtype`, laid out by `shardings` (a dict like the parameters'), or all on one device.

        The host holds one published tensor at a time.
        """
        config = self.meta.model
        by_name = model.named_leaves(shardings) if shardings is not None else {}
        every: dict[str, jax.Array] = {}
        with Progress(config.num_parameters * numpy_dtype(dtype).itemsize, "loading", "bytes") as bar:
            for leaf in leaves(config, self._source.layout):
                every[leaf.name] = self._read(leaf, by_name.get(leaf.name), dtype)
                bar.update(every[leaf.name].nbytes)
        specs = model.param_specs(config)
        places = jax.tree.map(lambda _: 0, specs, is_leaf=lambda x: isinstance(x, model.ParamSpec))
        return jax.tree.unflatten(jax.tree.structure(places), [every[name] for name in model.named_leaves(places)])

    def _read(self, leaf: Leaf, sharding: NamedSharding | None, dtype: str) -> jax.Array:
        place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if not leaf.is_stacked:
            return jax.device_put(self._tensor(leaf, 0, dtype), place)
        of_layer = place if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        stacked = jax.jit(lambda: jnp.zeros(leaf.spec.shape, dtype), out_shardings=place)()
        for i in range(len(leaf.tensors)):
            stacked = _put(stacked, jax.device_put(self._tensor(leaf, i, dtype), of_layer), np.int32(i))
        return stacked

    def _tensor(self, leaf: Leaf, i: int, dtype: str) -> np.ndarray:
        ours = np.empty(leaf.slice_shape, numpy_dtype(dtype))
        leaf.from_tensor(cast(self._source.read(leaf.tensors[i]), ours.dtype, leaf.tensors[i]), ours)
        return ours


@partial(jax.jit, donate_argnums=0)
def _put(stacked: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)
