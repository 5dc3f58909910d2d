"""The one table between our parameters and the tensors of published LLaMA weights, used both ways.

A published matrix is [out, in] with heads and head_dim flattened into one dimension; ours is [in, out] with heads
apart. Hugging Face rotates the two halves of a head against each other, as we do. Meta rotates neighbours: the rows
of its query and key matrices are reordered.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mathscale_jax.config import ModelConfig
from mathscale_jax.model import ParamSpec, param_specs

LeafPath = tuple[str, ...]

_HF_LAYER = {
    ("attention_norm", "scale"): "input_layernorm",
    ("attention", "query"): "self_attn.q_proj",
    ("attention", "key"): "self_attn.k_proj",
    ("attention", "value"): "self_attn.v_proj",
    ("attention", "output"): "self_attn.o_proj",
    ("mlp_norm", "scale"): "post_attention_layernorm",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
_META_LAYER = {
    ("attention_norm", "scale"): "attention_norm",
    ("attention", "query"): "attention.wq",
    ("attention", "key"): "attention.wk",
    ("attention", "value"): "attention.wv",
    ("attention", "output"): "attention.wo",
    ("mlp_norm", "scale"): "ffn_norm",
    ("mlp", "gate"): "feed_forward.w1",
    ("mlp", "up"): "feed_forward.w3",
    ("mlp", "down"): "feed_forward.w2",
}
# The embedding table is [vocab, embed] everywhere.
_NOT_TRANSPOSED = (("embedding",),)
_ROTATED = (("blocks", "attention", "query"), ("blocks", "attention", "key"))
_ROWS_AT_A_TIME = 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """How somebody else names and lays out the tensors of this model."""

    names: Mapping[LeafPath, str]  # with {layer} where there is one tensor a layer
    rotates_neighbours: bool
    ignored: tuple[str, ...]  # endings of tensors that carry no information: RoPE's frequencies are computed


HF = Layout(
    {
        ("embedding",): "model.embed_tokens.weight",
        **{("blocks", *path): f"model.layers.{{layer}}.{name}.weight" for path, name in _HF_LAYER.items()},
        ("norm", "scale"): "model.norm.weight",
        ("output",): "lm_head.weight",
    },
    rotates_neighbours=False,
    ignored=("rotary_emb.inv_freq",),
)
META = Layout(
    {
        ("embedding",): "tok_embeddings.weight",
        **{("blocks", *path): f"layers.{{layer}}.{name}.weight" for path, name in _META_LAYER.items()},
        ("norm", "scale"): "norm.weight",
        ("output",): "output.weight",
    },
    rotates_neighbours=True,
    ignored=("rope.freqs",),
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters, and the published tensors it is made of: one per layer, or a single one."""

    path: LeafPath
    spec: ParamSpec
    tensors: tuple[str, ...]
    rotates_neighbours: bool

    @property
    def name(self) -> str:
        """The dotted name of the parameter."""
        return ".".join(self.path)

    @property
    def is_stacked(self) -> bool:
        """Whether axis 0 counts layers."""
        return self.spec.axes[0] == "layers"

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of what one tensor fills."""
        return self.spec.shape[1:] if self.is_stacked else self.spec.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each published tensor."""
        if not self._is_transposed:
            return self.slice_shape
        rows, columns = self._matrix_shape
        return columns, rows

    def from_tensor(self, tensor: np.ndarray, into: np.ndarray) -> None:
        """Fills `into`, of `slice_shape`, with a published tensor."""
        if self.rotates_neighbours and self.path in _ROTATED:
            tensor = neighbours_to_halves(tensor, self.slice_shape[-1])
        if self._is_transposed:
            _transpose(tensor, into.reshape(self._matrix_shape))
        else:
            into[...] = tensor

    def to_tensor(self, ours: np.ndarray, into: np.ndarray) -> None:
        """Fills `into`, of `tensor_shape`, with our slice, as Hugging Face lays it out."""
        if self._is_transposed:
            _transpose(ours.reshape(self._matrix_shape), into)
        else:
            into[...] = ours

    @property
    def _is_transposed(self) -> bool:
        return len(self.slice_shape) > 1 and self.path not in _NOT_TRANSPOSED

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        # The residual stream is the first axis of what reads it and the last axis of what writes to it.
        axes = self.spec.axes[1:] if self.is_stacked else self.spec.axes
        size = int(np.prod(self.slice_shape))
        rows = self.slice_shape[0] if axes[0] == "embed" else size // self.slice_shape[-1]
        return rows, size // rows


def leaves(config: ModelConfig, layout: Layout = HF) -> Iterator[Leaf]:
    """All parameters of a model with the tensors they correspond to."""
    for path, name in layout.names.items():
        spec: Any = param_specs(config)
        for key in path:
            spec = spec[key]
        names = tuple(name.format(layer=i) for i in range(config.num_layers)) if "{layer}" in name else (name,)
        yield Leaf(path, spec, names, layout.rotates_neighbours)


def neighbours_to_halves(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """The [heads * head_dim, embed] matrix of queries or keys from Meta's order of rows to Hugging Face's and ours.

    A head's pair i is its rows 2 i and 2 i + 1 there, and i and i + head_dim / 2 here.
    """
    return matrix.reshape(-1, head_dim // 2, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _transpose(matrix: np.ndarray, into: np.ndarray) -> None:
    """A few rows at a time, as bits, which is several times as fast as numpy's own."""
    bits = np.dtype(f"u{matrix.dtype.itemsize}")
    matrix, into = matrix.view(bits), into.view(bits)
    for start in range(0, len(matrix), _ROWS_AT_A_TIME):
        into[:, start : start + _ROWS_AT_A_TIME] = matrix[start : start + _ROWS_AT_A_TIME].T
