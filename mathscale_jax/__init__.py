"""LLaMA-family models in JAX: weights in, training, sampling, weights out."""
