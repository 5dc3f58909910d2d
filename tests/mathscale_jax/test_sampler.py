"""What the sampler draws: the right distribution, from the right randomness, as a plain forward pass would."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from mathscale_jax import model
from mathscale_jax.config import ModelConfig
from mathscale_jax.sampler import Draws, Prompt, Sampler, SamplingSettings
from mathscale_jax.sampler.draw import next_tokens

EOS = 2
CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=160,
)
WINDOWED = CONFIG.model_copy(update={"sliding_window": 11})
# The 0.1 % point of chi-square is below mean + 4.5 standard deviations for every number of cells used here.
CHI_SQUARE_DEVIATIONS = 4.5


@pytest.fixture(scope="module")
def params() -> model.Params:
    return jax.tree.map(lambda p: p * 8, jax.jit(lambda: model.init(CONFIG, 1))())


@pytest.fixture(scope="module")
def sampler(params: model.Params) -> Sampler:
    return Sampler(CONFIG, params, eos_id=EOS, num_pieces=CONFIG.vocab_size, dtype="float32")


def expected_probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Nucleus sampling written as a loop over the ranked tokens (Holtzman et al. 2019)."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    kept, mass = np.zeros_like(p), 0.0
    for token in np.argsort(-p):
        kept[token] = p[token]
        mass += p[token]
        if mass >= top_p:
            break
    return kept / kept.sum()


def assert_follows(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * len(tokens)
    chi_square = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + CHI_SQUARE_DEVIATIONS * max(2 * freedom, 1) ** 0.5


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 1.0), (1.0, 0.8), (0.7, 0.95), (1.0, 0.01)]
)
def test_a_hundred_thousand_draws_follow_the_known_distribution(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 1.5
    count = 100_000
    uniform = Draws.uniform(Draws(0).problem_key("p"), jnp.arange(count), jnp.zeros(count, jnp.int32))
    drawn = next_tokens(
        jnp.broadcast_to(jnp.asarray(logits), (count, 12)), uniform, temperature=temperature, top_p=top_p
    )
    assert_follows(np.asarray(drawn), expected_probabilities(logits, temperature, top_p))


def test_extreme_uniform_numbers_never_draw_a_token_without_probability() -> None:
    logits = jnp.array([[-jnp.inf, 0.0, 1.0, -jnp.inf]] * 2)
    drawn = next_tokens(logits, jnp.array([0.0, 1.0 - 2**-24]), temperature=1.0)
    assert drawn.tolist() == [1, 2]


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert next_tokens(jnp.array([[0.1, 3.0, 2.9]]), jnp.array([0.99]), temperature=0.0).tolist() == [1]


def test_draws_depend_on_seed_problem_sample_and_position_only() -> None:
    def draws(seed: int, problem: str, samples: list[int], positions: list[int]) -> list[float]:
        return Draws.uniform(Draws(seed).problem_key(problem), jnp.array(samples), jnp.array(positions)).tolist()

    together = draws(0, "a", [0, 1, 2, 1], [5, 5, 5, 6])
    assert draws(0, "a", [1], [5]) == together[1:2]  # whatever the rows beside it
    assert draws(0, "a", [2, 0], [5, 5]) == [together[2], together[0]]
    other = [*together, *draws(1, "a", [1], [5]), *draws(0, "b", [1], [5])]
    assert len(set(other)) == len(other)


def plain_greedy(config: ModelConfig, params: model.Params, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    logits = jax.jit(partial(model.logits, config))
    for _ in range(count):
        padded = np.zeros((1, 160), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(logits(params, jnp.asarray(padded))[0, len(tokens) - 1])))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["full", "window"])
def test_greedy_decoding_equals_running_the_whole_text_again_for_every_token(
    config: ModelConfig, params: model.Params
) -> None:
    settings = SamplingSettings(num_samples=1, temperature=0, max_tokens=70)
    sampler = Sampler(config, params, eos_id=EOS, num_pieces=CONFIG.vocab_size, dtype="float32")
    prompts = [[1, 5, 9, 4], [1, *range(3, 23)] * 3 + [1, 20]]  # the second is longer than one padding unit
    results = sampler.sample([Prompt(str(i), p) for i, p in enumerate(prompts)], settings)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens[0].tolist() == plain_greedy(config, params, prompt, 70)


def test_what_pads_a_vocabulary_is_never_drawn(params: model.Params) -> None:
    sampler = Sampler(CONFIG, params, eos_id=EOS, num_pieces=CONFIG.vocab_size - 5, dtype="float32")
    settings = SamplingSettings(num_samples=256, temperature=20.0, max_tokens=16)
    (result,) = sampler.sample([Prompt("p", [1, 7, 3])], settings)
    drawn = set(np.concatenate(result.tokens).tolist())
    assert drawn == set(range(CONFIG.vocab_size - 5))


def test_second_tokens_follow_the_model_given_the_first(params: model.Params, sampler: Sampler) -> None:
    """The shared prompt and the row's own cache together give each row its own conditional distribution."""
    prompt = [1, 7, 3, 11]
    settings = SamplingSettings(num_samples=20_000, temperature=4.0, top_p=0.95, max_tokens=2)
    (result,) = sampler.sample([Prompt("p", prompt)], settings)
    firsts = np.array([row[0] for row in result.tokens])
    first_logits = np.asarray(model.logits(CONFIG, params, jnp.array([prompt])))[0, -1]
    assert_follows(firsts, expected_probabilities(first_logits, 4.0, 0.95))
    checked = 0
    for first in set(firsts.tolist()) - {EOS}:
        seconds = np.array([row[1] for row in result.tokens if row[0] == first])
        if len(seconds) > 500:
            logits = np.asarray(model.logits(CONFIG, params, jnp.array([[*prompt, first]])))[0, -1]
            assert_follows(seconds, expected_probabilities(logits, 4.0, 0.95))
            checked += 1
    assert checked >= 3


def test_a_response_ends_at_its_first_eos_or_at_max_tokens(sampler: Sampler) -> None:
    (result,) = sampler.sample([Prompt("p", [1, 4])], SamplingSettings(num_samples=64, temperature=1.0, max_tokens=40))
    assert set(result.finish_reasons) == {"eos", "length"}
    for tokens, reason in zip(result.tokens, result.finish_reasons, strict=True):
        if reason == "eos":
            assert tokens[-1] == EOS and EOS not in tokens[:-1] and len(tokens) <= 40
        else:
            assert len(tokens) == 40 and EOS not in tokens


def test_a_problems_samples_do_not_depend_on_the_other_problems(sampler: Sampler) -> None:
    settings = SamplingSettings(num_samples=8, temperature=1.0, max_tokens=50)
    a, b = Prompt("a", [1, 4, 5]), Prompt("b", [1, 9])
    alone = sampler.sample([b], settings)[0]
    among = sampler.sample([a, b], settings)[1]
    assert [row.tolist() for row in alone.tokens] == [row.tolist() for row in among.tokens]


def test_more_samples_keep_the_first_ones(sampler: Sampler) -> None:
    """In float32 on a CPU, where the rows of a product hardly depend on their number, the texts agree too."""
    few, many = (
        sampler.sample([Prompt("a", [1, 4, 5])], SamplingSettings(num_samples=n, temperature=1.0, max_tokens=40))[0]
        for n in (16, 64)
    )
    same = sum(x.tolist() == y.tolist() for x, y in zip(few.tokens, many.tokens[:16], strict=True))
    assert same >= 15


def test_a_response_stops_where_the_context_ends(sampler: Sampler) -> None:
    prompt = Prompt("long", [1] + [5] * 149)
    settings = SamplingSettings(num_samples=32, temperature=1.0, max_tokens=100)
    assert sampler.room(prompt, settings) == 10
    (result,) = sampler.sample([prompt], settings)
    assert max(len(row) for row in result.tokens) == 10


@pytest.mark.parametrize("length", [0, 160, 500])
def test_a_prompt_that_fills_the_context_is_refused(sampler: Sampler, length: int) -> None:
    with pytest.raises(UsageError, match=f"a prompt of {length} tokens"):
        list(sampler.sample([Prompt("p", [1] * length)], SamplingSettings()))


@pytest.mark.parametrize("wrong", [{"temperature": 1e-9}, {"temperature": float("inf")}, {"top_p": 0}, {"seed": 2**32}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


def test_weights_that_are_not_numbers_are_refused(params: model.Params) -> None:
    broken = {**params, "output": params["output"].at[0, 0].set(jnp.nan)}
    with pytest.raises(RunError, match="not finite"):
        Sampler(CONFIG, broken, eos_id=EOS, num_pieces=CONFIG.vocab_size, dtype="float32").sample(
            [Prompt("p", [1, 2])], SamplingSettings()
        )


def test_greedy_with_many_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples=256"):
        SamplingSettings(temperature=0)
