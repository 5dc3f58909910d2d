"""Drawing many samples per problem: the prompt computed once, its samples decoded together."""

from mathscale_jax.sampler.draw import Draws, SamplingSettings
from mathscale_jax.sampler.generate import ProblemSamples, Prompt, PromptTooLong, Sampler

__all__ = ["Draws", "ProblemSamples", "Prompt", "PromptTooLong", "Sampler", "SamplingSettings"]
