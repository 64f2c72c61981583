from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import entr, log_softmax, logsumexp

from mdruntime.head import Controls, Draws, Logits, draw, draw_thinned, guided, invert_cdf

BATCH, LENGTH, CODEBOOK = 6, 50, 40
LAST = 1 - 2**-24  # the largest uniform
# float32 against float64: absolute for each output of the head. Moments reach 100 * log p.
TOLERANCE = {
    "log_moment": 2e-4,
    "log_prob": 1e-5,
    "entropy": 5e-6,
    "top": 5e-7,
    "margin": 1e-6,
    "log_normaliser": 2e-5,
}
BOUNDARY = 1e-6  # tokens may differ where a uniform is this close to a boundary of the CDF
BETAS = (0.3, 1.0, 1.2222, 2.0, 7.0, 100.0)
TEMPERATURES = (0.2, 0.7, 1.0, 1.3, 3.0, 20.0)
ONES = (1.0,) * BATCH

Float64 = NDArray[np.float64]


class Scene(NamedTuple):
    logits: Logits
    uniforms: NDArray[np.float32]


def array(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def controls(
    temperature: tuple[float, ...] = ONES,
    beta: tuple[float, ...] = ONES,
    token_beta: tuple[float, ...] = ONES,
) -> Controls:
    zeros = np.zeros(len(beta), np.float32)
    return Controls(zeros, array(*temperature), array(*beta), array(*token_beta))


def quantiles(rows: int) -> NDArray[np.float32]:
    """The midpoints of ``rows`` equal parts of [0, 1), as one sample (1, rows)."""
    return ((np.arange(rows) + 0.5) / rows).astype(np.float32)[None]


def column(values: NDArray[np.float32]) -> Float64:
    return values.astype(np.float64)[:, None, None]


def reference(scene: Scene, numbers: Controls) -> tuple[dict[str, Float64], Float64]:
    """Return all outputs but the tokens in float64, and the tokens' CDF."""
    scaled = scene.logits / column(numbers.temperature)
    log_p = log_softmax(scaled, axis=-1)
    two = np.sort(np.exp(log_p), axis=-1)[..., -2:]
    outputs = {
        "log_moment": logsumexp(column(numbers.beta) * log_p, axis=-1),
        "log_prob": log_p,
        "entropy": entr(np.exp(log_p)).sum(axis=-1),
        "top": two[..., 1],
        "margin": two[..., 1] - two[..., 0],
        "log_normaliser": logsumexp(scaled, axis=-1),
    }
    tokens = log_softmax(column(numbers.token_beta) * log_p, axis=-1)
    return outputs, np.cumsum(np.exp(tokens), axis=-1)


def inverted(cdf: Float64, uniforms: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.asarray((cdf <= uniforms[..., None]).sum(axis=-1))


def assert_draws_match(found: Draws, scene: Scene, numbers: Controls) -> None:
    outputs, cdf = reference(scene, numbers)
    clear = np.abs(cdf - scene.uniforms[..., None]).min(axis=-1) > BOUNDARY
    assert clear.mean() > 0.99
    expected = inverted(cdf, scene.uniforms)
    assert np.array_equal(found.sampled[clear], expected[clear])
    tokens = found.sampled[..., None].astype(np.int64)
    outputs["log_prob"] = np.take_along_axis(outputs["log_prob"], tokens, axis=-1)[..., 0]
    for name, tolerance in TOLERANCE.items():
        values = getattr(found, name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, outputs[name], rtol=1e-6, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def scene() -> Scene:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (BATCH, LENGTH, CODEBOOK)).astype(np.float32)
    return Scene(logits, rng.random((BATCH, LENGTH), np.float32))


@pytest.mark.parametrize(
    "numbers",
    [
        controls(),
        controls(temperature=TEMPERATURES),
        controls(beta=BETAS),
        controls(token_beta=BETAS),
        controls(TEMPERATURES, BETAS, BETAS[::-1]),
    ],
    ids=["plain", "temperature", "beta", "token beta", "all"],
)
def test_draws_are_those_of_float64_arithmetic(scene: Scene, numbers: Controls) -> None:
    assert_draws_match(draw(scene.logits, numbers, scene.uniforms), scene, numbers)


def test_adding_a_constant_to_the_logits_changes_nothing(scene: Scene) -> None:
    shifted = Scene(scene.logits + np.float32(64), scene.uniforms)
    found = draw(shifted.logits, controls(), shifted.uniforms)
    assert_draws_match(found, shifted, controls())
    plain = draw(scene.logits, controls(), scene.uniforms)
    np.testing.assert_allclose(found.log_normaliser - plain.log_normaliser, 64, atol=1e-4)


def test_temperature_moments_and_tokens_have_exponents_of_their_own(scene: Scene) -> None:
    plain = draw(scene.logits, controls(), scene.uniforms)
    moments = draw(scene.logits, controls(beta=BETAS), scene.uniforms)
    tokens = draw(scene.logits, controls(token_beta=BETAS), scene.uniforms)
    assert np.array_equal(moments.sampled, plain.sampled)
    assert np.array_equal(tokens.log_moment, plain.log_moment)
    assert not np.array_equal(moments.log_moment, plain.log_moment)
    assert not np.array_equal(tokens.sampled, plain.sampled)


def test_moments_of_exponent_one_are_one(scene: Scene) -> None:
    assert draw(scene.logits, controls(), scene.uniforms).log_moment == pytest.approx(0, abs=1e-6)


def test_extreme_logits_neither_overflow_nor_underflow() -> None:
    logits = array(-1e4, 0, 1e4).reshape(1, 1, 3)
    found = draw(logits, controls((1.0,), (100.0,), (100.0,)), np.full((1, 1), LAST, np.float32))
    assert [values.item() for values in found] == [2, 0, 0, 0, 1, 1, 1e4]


def test_impossible_tokens_may_have_logits_of_minus_infinity(scene: Scene) -> None:
    logits = scene.logits.copy()
    logits[..., ::3] = -np.inf
    logits[0, 0, 1:] = -np.inf
    logits[0, 0, 0] = 0
    numbers = controls(TEMPERATURES, BETAS, BETAS[::-1])
    found = draw(logits, numbers, scene.uniforms)
    assert found.sampled[0, 0] == 0
    assert not np.any(found.sampled.ravel()[1:] % 3 == 0)
    assert_draws_match(found, Scene(logits, scene.uniforms), numbers)


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
@pytest.mark.parametrize("size", [3, 1000, 16_384])
def test_tokens_of_probability_zero_are_never_drawn(uniform: float, size: int) -> None:
    rng = np.random.default_rng(size)
    weights = np.where(rng.random((1, 200, size)) < 0.5, rng.random((1, 200, size)), 0)
    weights[..., [0, -1]] = 0
    weights[..., 1] += 1e-3
    tokens = invert_cdf(weights.astype(np.float32), np.full((1, 200), uniform, np.float32))
    assert np.all(np.take_along_axis(weights, tokens[..., None].astype(np.int64), axis=-1) > 0)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (LAST, 3)])
def test_the_token_is_the_first_whose_cumulated_weight_exceeds_the_uniform(
    uniform: float, token: int
) -> None:
    weights = array(0, 1, 0, 3, 0).reshape(1, 1, 5)
    assert invert_cdf(weights, np.full((1, 1), uniform, np.float32)).item() == token


def test_every_quantile_gets_its_token() -> None:
    # Exact up to rounding: of 100,000 equidistant uniforms each token gets its share.
    rows = 100_000
    weights = np.random.default_rng(1).dirichlet(np.full(64, 0.3)).astype(np.float32)
    tokens = invert_cdf(np.broadcast_to(weights, (1, rows, 64)), quantiles(rows))
    shares = np.bincount(tokens[0], minlength=64) / rows
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=2.5 / rows)


def test_large_codebooks_keep_their_law_in_float32() -> None:
    # The CDF of 16384 tokens, cumulated in float32, is off by less than 1e-5 everywhere.
    rows, size = 2000, 16_384
    weights = np.random.default_rng(2).gamma(0.2, size=size).astype(np.float32)
    tokens = invert_cdf(np.broadcast_to(weights, (1, rows, size)), quantiles(rows))[0]
    cdf = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    assert np.all(cdf[tokens] > quantiles(rows)[0] - 1e-5)
    assert np.all(
        (cdf - weights / weights.sum(dtype=np.float64))[tokens] < quantiles(rows)[0] + 1e-5
    )


@pytest.mark.parametrize("token_beta", [0.5, 1.0, 2.0])
def test_tokens_follow_the_tempered_law(token_beta: float) -> None:
    # Chi-square with 20,000 draws over 8 tokens: a total variation of 0.033 shows with
    # probability > 0.999 at a false-alarm rate of 1e-6.
    rng = np.random.default_rng(3)
    log_p = np.log(rng.dirichlet(np.ones(8)))
    logits = np.broadcast_to(log_p.astype(np.float32), (1, 20_000, 8))
    numbers = controls((1.0,), (1.0,), (token_beta,))
    tokens = draw(logits, numbers, rng.random((1, 20_000), np.float32)).sampled[0]
    expected = 20_000 * np.exp(log_softmax(token_beta * log_p))
    assert stats.chisquare(np.bincount(tokens, minlength=8), expected).pvalue > 1e-6


def test_guidance_is_one_plus_w_conditional_minus_w_unconditional(scene: Scene) -> None:
    conditional, unconditional = scene.logits, scene.logits[:, ::-1]
    weights = array(0, 0.5, 1, 2, 3, 5.9)
    expected = (1 + column(weights)) * conditional - column(weights) * unconditional
    found = guided(conditional, unconditional, weights)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_guidance_of_weight_zero_is_the_conditional_model(scene: Scene) -> None:
    found = guided(scene.logits, scene.logits[:, ::-1], np.zeros(BATCH, np.float32))
    assert np.array_equal(found, scene.logits)


def thinned_cdf(logits: Logits, temperature: float, alpha: float, log_wait: float) -> Float64:
    """The law of MaskGIT's second draw from its formula, p^(1 + 1/alpha) exp(-p^(1/alpha) T)."""
    p = np.exp(log_softmax(logits.astype(np.float64) / temperature, axis=-1))
    weights = p ** (1 + 1 / alpha) * np.exp(-(p ** (1 / alpha)) * np.exp(log_wait))
    return np.asarray(np.cumsum(weights / weights.sum(axis=-1, keepdims=True), axis=-1))


@pytest.mark.parametrize("log_wait", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.5])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_thinned_tokens_are_those_of_the_formula(
    scene: Scene, temperature: float, alpha: float, log_wait: float
) -> None:
    found = draw_thinned(
        scene.logits,
        np.full(BATCH, temperature, np.float32),
        np.full(BATCH, alpha),
        np.full((BATCH, LENGTH), log_wait),
        scene.uniforms,
    )
    cdf = thinned_cdf(scene.logits, temperature, alpha, log_wait)
    clear = np.abs(cdf - scene.uniforms[..., None]).min(axis=-1) > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(found[clear], inverted(cdf, scene.uniforms)[clear])


def test_thinned_tokens_at_choice_temperature_zero_are_plain(scene: Scene) -> None:
    rows = 4096
    logits = np.repeat(scene.logits[:1, :1], rows, axis=1)
    logits[..., ::3] = -np.inf
    found = draw_thinned(logits, array(1), np.zeros(1), np.ones((1, rows)), quantiles(rows))
    plain = draw(logits, controls((1.0,), (1.0,), (1.0,)), quantiles(rows)).sampled
    assert (found != plain).sum() <= 1


def test_each_sample_has_its_own_choice_temperature(scene: Scene) -> None:
    temperature, log_wait = np.ones(BATCH, np.float32), np.zeros((BATCH, LENGTH))
    alphas = np.array([0, 0.1, 0.5, 1, 4.5, 0])
    together = draw_thinned(scene.logits, temperature, alphas, log_wait, scene.uniforms)
    for sample in range(BATCH):
        only = slice(sample, sample + 1)
        alone = draw_thinned(
            scene.logits[only],
            temperature[only],
            alphas[only],
            log_wait[only],
            scene.uniforms[only],
        )
        assert np.array_equal(alone, together[only])


@pytest.mark.parametrize("log_wait", [-700.0, 50.0, 700.0])
def test_extreme_waits_give_the_most_or_the_least_probable_token(log_wait: float) -> None:
    # A chosen position that waited long had a token of small probability.
    logits = np.log(array(0.7, 0.2, 0.1)).reshape(1, 1, 3)
    wait, uniform = np.full((1, 1), log_wait), np.full((1, 1), 0.5, np.float32)
    token = draw_thinned(logits, array(1), np.full(1, 0.05), wait, uniform).item()
    assert token == (0 if log_wait < 0 else 2)


def test_eight_samples_together_are_drawn_as_eight_single_ones(scene: Scene) -> None:
    numbers = controls(TEMPERATURES, BETAS, BETAS[::-1])
    together = draw(scene.logits, numbers, scene.uniforms)
    for sample in range(BATCH):
        index = np.array([sample])
        alone = draw(scene.logits[index], numbers.take(index), scene.uniforms[index])
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other[index])
