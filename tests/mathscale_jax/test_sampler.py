"""What the sampler draws: the right distribution, from the right randomness, as a plain forward pass would."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from mathscale_jax import model
from mathscale_jax.config import MeshSettings, ModelConfig
from mathscale_jax.mesh import make_mesh
from mathscale_jax.sampler import Draws, Prompt, PromptTooLong, Sampler, SamplingSettings, schedule
from mathscale_jax.sampler.decode import CacheDtype
from mathscale_jax.sampler.draw import next_tokens
from mathscale_jax.sampler.schedule import Limits, first_waves
from mathscale_jax.step import param_shardings

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


def mesh_of(data: int, tensor: int) -> Mesh:
    devices = np.asarray(jax.devices()[: data * tensor]).reshape(data, 1, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def make(params: model.Params, config: ModelConfig = CONFIG, mesh: Mesh | None = None, **options: Any) -> Sampler:
    """On one device, where nothing else is asked for: it compiles several times as fast as on eight."""
    mesh = mesh or mesh_of(1, 1)
    placed = jax.tree.map(jax.device_put, params, param_shardings(config, mesh))
    options = {"num_pieces": config.vocab_size, "eos_id": EOS, **options}
    return Sampler(config, placed, dtype="float32", mesh=mesh, **options)


@pytest.fixture(scope="module")
def sampler(params: model.Params) -> Sampler:
    return make(params)


def expected_probabilities(
    logits: np.ndarray, temperature: float, top_p: float = 1.0, top_k: int | None = None
) -> np.ndarray:
    """The k most probable tokens, then nucleus sampling as a loop over the ranked tokens (Holtzman et al. 2019)."""
    p = np.exp(logits.astype(np.float64) / temperature)
    if top_k is not None:
        p[np.argsort(-p)[top_k:]] = 0
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
    rare = (probabilities > 0) & (probabilities * len(tokens) < 5)  # chi-square wants 5 in each cell: one cell of all
    counts = np.append(counts[~rare], counts[rare].sum())
    probabilities = np.append(probabilities[~rare], probabilities[rare].sum())
    expected = probabilities[probabilities > 0] * len(tokens)
    chi_square = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + CHI_SQUARE_DEVIATIONS * max(2 * freedom, 1) ** 0.5


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        *((1.0, 1.0, None), (0.7, 1.0, None), (1.5, 1.0, None), (1.0, 0.8, None), (0.7, 0.95, None), (1.0, 0.01, None)),
        *((1.0, 1.0, 5), (0.7, 1.0, 1), (1.0, 0.8, 6), (0.7, 0.5, 3), (1.0, 1.0, 400)),
    ],
)
def test_a_hundred_thousand_draws_follow_the_known_distribution(
    temperature: float, top_p: float, top_k: int | None
) -> None:
    # 300 tokens, most of them improbable: blocks of the vocabulary with much and with little of the mass.
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) - 8
    logits[::25] += 10
    count = 100_000
    uniform = Draws.uniform(Draws(0).problem_key("p"), jnp.arange(count), jnp.zeros(count, jnp.int32))
    every = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    drawn = next_tokens(every, uniform, temperature=temperature, top_p=top_p, top_k=top_k)
    assert_follows(np.asarray(drawn), expected_probabilities(logits, temperature, top_p, top_k))


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
    sampler = make(params, config)
    prompts = [[1, 5, 9, 4], [1, *range(3, 23)] * 3 + [1, 20]]  # the second is longer than one padding unit
    results = sampler.sample([Prompt(str(i), p) for i, p in enumerate(prompts)], settings)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens[0].tolist() == plain_greedy(config, params, prompt, 70)


def test_what_pads_a_vocabulary_is_never_drawn(params: model.Params) -> None:
    sampler = make(params, num_pieces=CONFIG.vocab_size - 5)
    settings = SamplingSettings(num_samples=256, temperature=20.0, max_tokens=16)
    (result,) = sampler.sample([Prompt("p", [1, 7, 3])], settings)
    drawn = set(np.concatenate(result.tokens).tolist())
    assert drawn == set(range(CONFIG.vocab_size - 5))


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_second_tokens_follow_the_model_given_the_first(params: model.Params, cache_dtype: CacheDtype) -> None:
    """The shared prompt and the row's own cache together give each row its own conditional distribution."""
    sampler = make(params, cache_dtype=cache_dtype)
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
    assert sampler.sample([], settings) == []


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
    with pytest.raises(PromptTooLong, match=f"a prompt of {length} tokens"):
        list(sampler.sample([Prompt("p", [1] * length)], SamplingSettings()))


@pytest.mark.parametrize("wrong", [{"temperature": 1e-9}, {"temperature": float("inf")}, {"top_p": 0}, {"seed": 2**32}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


def test_weights_that_are_not_numbers_are_refused(params: model.Params) -> None:
    broken = {**params, "output": params["output"].at[0, 0].set(jnp.nan)}
    with pytest.raises(RunError, match="not finite"):
        make(broken).sample([Prompt("p", [1, 2])], SamplingSettings())


def test_greedy_with_many_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples=256"):
        SamplingSettings(temperature=0)


# Few problems, as each shape of a grid takes a second to compile.
GROUP = [Prompt(str(i), [1, *range(3, 3 + length)]) for i, length in enumerate((3, 17, 2))]
GROUP += [Prompt("longer than a padding unit", [1, *range(3, 23), *range(3, 23), *range(3, 23), 7, 8, 9, 10])]
DRAWN = SamplingSettings(num_samples=16, temperature=1.0, max_tokens=80)


@pytest.fixture(scope="module")
def drawn(sampler: Sampler) -> list[list[list[int]]]:
    return texts_of(sampler)


def texts_of(sampler: Sampler, settings: SamplingSettings = DRAWN) -> list[list[list[int]]]:
    return [[row.tolist() for row in result.tokens] for result in sampler.sample(GROUP, settings)]


def share_that_differs(one: list[list[list[int]]], other: list[list[list[int]]]) -> float:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return float(np.mean([a != b for a, b in pairs]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the schedule did what."""
    counts = dict.fromkeys(("_packed", "_halves", "_joined"), 0)

    def counting(name: str) -> Any:
        original = getattr(schedule, name)

        def count(*arguments: Any) -> Any:
            counts[name] += 1
            return original(*arguments)

        return count

    for name in counts:
        monkeypatch.setattr(schedule, name, counting(name))
    return counts


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["full", "window"])
def test_samples_are_the_same_one_problem_after_another(
    params: model.Params, config: ModelConfig, calls: dict[str, int]
) -> None:
    whole = texts_of(make(params, config))
    assert share_that_differs(texts_of(make(params, config, rows=16)), whole) < 0.005
    assert calls["_packed"] and calls["_joined"]


def test_rows_that_outgrow_the_caches_go_on_in_halves(params: model.Params, calls: dict[str, int]) -> None:
    never = {"eos_id": CONFIG.vocab_size - 1, "num_pieces": CONFIG.vocab_size - 1}
    whole = texts_of(make(params, **never))
    assert calls == {"_packed": 0, "_halves": 0, "_joined": 0}
    assert share_that_differs(texts_of(make(params, **never, max_tokens=1300)), whole) < 0.005
    assert calls["_halves"] and {len(row) for rows in whole for row in rows} == {80}


def test_samples_are_the_same_in_chunks_of_any_length(
    params: model.Params, drawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mathscale_jax.sampler.schedule", "mathscale_jax.sampler.generate"):
        monkeypatch.setattr(f"{name}.STEPS_PER_CHUNK", 7)
    assert share_that_differs(texts_of(make(params)), drawn) < 0.005


@pytest.mark.parametrize(("data", "tensor"), [(2, 2), (3, 1)])
def test_samples_are_the_same_on_other_meshes(params: model.Params, drawn: Any, data: int, tensor: int) -> None:
    assert share_that_differs(texts_of(make(params, mesh=mesh_of(data, tensor))), drawn) < 0.005


def test_samples_are_the_same_with_weights_that_lie_elsewhere(params: model.Params, drawn: Any) -> None:
    """As a training run has them, on all devices in another dtype and layout: the sampler makes a copy for itself."""
    mesh = make_mesh(MeshSettings(data=2, fsdp=4, tensor=1))
    trained = jax.tree.map(jax.device_put, params, param_shardings(CONFIG, mesh))
    sampler = Sampler(CONFIG, trained, eos_id=EOS, num_pieces=CONFIG.vocab_size, dtype="float32")
    assert sampler.mesh.size == 8
    assert share_that_differs(texts_of(sampler), drawn) < 0.005


def test_layers_apart_give_the_same_samples(params: model.Params, drawn: Any) -> None:
    sampler = make(params)
    sampler.params = model.layers_apart(jax.tree.map(jnp.copy, sampler.params))
    assert share_that_differs(texts_of(sampler), drawn) < 0.005


def test_the_log_probability_of_a_sample_is_that_of_its_tokens(params: model.Params) -> None:
    settings = DRAWN.model_copy(update={"logprobs": True, "temperature": 0.7, "top_k": 9})
    sampler, every_logit = make(params), jax.jit(partial(model.logits, CONFIG))
    for prompt, result in zip(GROUP, sampler.sample(GROUP, settings), strict=True):
        for tokens, logprob in list(zip(result.tokens, result.logprobs, strict=True))[:5]:
            whole = np.zeros((1, 160), np.int32)
            whole[0, : len(prompt.tokens) + len(tokens)] = [*prompt.tokens, *tokens.tolist()]
            logits = jax.nn.log_softmax(every_logit(params, whole)[0], axis=-1)
            expected = sum(logits[len(prompt.tokens) - 1 + i, token] for i, token in enumerate(tokens.tolist()))
            assert logprob == pytest.approx(float(expected), abs=2e-3)


def test_a_response_ends_where_it_first_holds_a_stop_string(params: model.Params, drawn: Any) -> None:
    sampler = make(params, text=lambda tokens: "".join(chr(ord("a") + token) for token in tokens))
    settings = DRAWN.model_copy(update={"stop": ("fg", "j")})
    seen = set()
    for result, whole in zip(sampler.sample(GROUP, settings), drawn, strict=True):
        for tokens, reason, unstopped in zip(result.tokens, result.finish_reasons, whole, strict=True):
            text = sampler.text(unstopped) if sampler.text else ""
            ends = [text.index(stop) + len(stop) for stop in settings.stop if stop in text]
            assert len(tokens) == min([*ends, len(unstopped)])
            assert tokens.tolist() == unstopped[: len(tokens)]
            assert (reason == "stop") == bool(ends)
            seen.add(reason)
    assert seen >= {"stop", "eos"}


def test_stop_strings_come_from_the_command_line() -> None:
    assert SamplingSettings(stop="\n\n").stop == ("\n\n",)  # type: ignore[arg-type]
    assert SamplingSettings(stop='["a", "[b"]').stop == ("a", "[b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop"):
        SamplingSettings(stop="")  # type: ignore[arg-type]


def test_a_device_too_small_for_one_sample_is_said(params: model.Params) -> None:
    with pytest.raises(UsageError, match=r"needs caches for \d+ tokens; beside the weights there is room for 100"):
        make(params, max_tokens=100).sample(GROUP, DRAWN)
    with pytest.raises(UsageError, match="room for 0"):
        make(params, memory=1.0).sample(GROUP, DRAWN)


def test_sizes_are_few_and_hold_what_is_asked_for() -> None:
    sizes = {schedule.size_for(number) for number in range(1, 257)}
    assert sizes == {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256}
    for number in range(1, 257):
        assert schedule.size_for(number) == min(size for size in sizes if size >= number)
        assert schedule.size_for(number, 8) % 8 == 0 and schedule.size_for(number, 8) >= number


@pytest.mark.parametrize("grid", [(1, 256), (4, 64), (2, 96), (8, 1), (1, 1)])
@pytest.mark.parametrize("split", [1, 8])
def test_a_chunk_ends_early_exactly_where_its_rows_can_be_packed(grid: tuple[int, int], split: int) -> None:
    limits = Limits(256, 10**6, split)
    problems, of_one = schedule._next_smaller(grid, limits)
    for lines, rows in itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1)):
        alive = (np.arange(grid[0]) < lines)[:, None] & (np.arange(grid[1]) < rows)
        smaller = np.prod(schedule._grid_for(alive, limits)) < alive.size
        assert smaller == (lines <= problems or rows <= of_one)


@pytest.mark.parametrize("limits", [Limits(8, 10_000), Limits(64, 4000), Limits(256, 10**6, 8), Limits(1, 10**5)])
@pytest.mark.parametrize("num_samples", [1, 5, 64, 300])
def test_waves_hold_every_sample_once_and_keep_the_limits(limits: Limits, num_samples: int) -> None:
    waves = first_waves([64, 128, 64, 64, 64], num_samples, limits)
    every = [(problem, sample) for wave in waves for problem, samples in wave for sample in samples]
    assert sorted(every) == [(problem, sample) for problem in range(5) for sample in range(num_samples)]
    for wave in waves:
        rows = schedule.power_of_two(max(len(samples) for _, samples in wave), limits.split)
        assert len(wave) * rows <= limits.rows
        assert limits.tokens_of((len(wave), rows), 128, schedule.FEWEST_SLOTS) <= limits.tokens
