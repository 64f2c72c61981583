import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import entr, log_softmax, logsumexp

from mdruntime.errors import SamplingError
from mdruntime.halton import halton_grid, halton_line
from mdruntime.head import Controls, draw
from mdruntime.order import HYBRID, ORDERS, View, find_order, hybrid, ranking
from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampler import Canvas, Denoise, Step, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.turn import Clock

CANVAS = Canvas(length=16, grid=(4, 4), mask_token=8)
BETA, ALPHA = 1.5, 2.0
KNOWN = [name for name, order in ORDERS.items() if order.known]
PLANS = {
    "plain": Sampling(rounds=5),
    "chosen": Sampling(rounds=3, substeps=3, schedule="linear"),
    "recent": Sampling(rounds=2, substeps=4, refresh="recent"),
    "shared": Sampling(rounds=8, refresh_interval=3, refresh="recent", schedule="arccos"),
    "bounded": Sampling(rounds=4, entropy_bound=2.0, substeps=2),
}
REFUSED = [(order, plan) for order in ("maskgit", "titok") for plan in PLANS if plan != "plain"]


def unmasked(
    denoise: Denoise, sampling: Sampling, indices: Sequence[int], tokens: Tokens | None = None
) -> list[Step]:
    if tokens is None:
        tokens = np.full((len(indices), CANVAS.length), CANVAS.mask_token, np.int32)
    return list(unmask(denoise, tokens, CANVAS, sampling, Randomness(1, indices)))


def view_of(logits: NDArray[np.float32], randomness: Randomness, grid: tuple[int, ...]) -> View:
    batch, length, _ = logits.shape
    ones = np.ones(batch, np.float32)
    controls = Controls(0 * ones, ones, np.float32(BETA) * ones, ones)
    return View(
        draws=draw(logits, controls, randomness.uniforms(Purpose.TOKEN, 0, length)),
        gumbels=randomness.gumbels(0, length),
        alpha=np.full(batch, ALPHA),
        grid=grid,
        randomness=randomness,
    )


@pytest.fixture(scope="module")
def logits() -> NDArray[np.float32]:
    return np.random.default_rng(4).normal(0, 2, (5, 24, 11)).astype(np.float32)


@pytest.fixture(scope="module")
def view(logits: NDArray[np.float32]) -> View:
    return view_of(logits, Randomness(2, range(5)), (4, 6))


def defined_scores(name: str, logits: NDArray[np.float32], view: View) -> NDArray[np.float64]:
    """Return the scores that an order's definition gives, in float64."""
    log_p = log_softmax(logits.astype(np.float64), axis=-1)
    two = np.sort(np.exp(log_p), axis=-1)[..., -2:]
    sampled = view.draws.sampled[..., None].astype(int)
    drawn = np.take_along_axis(log_p, sampled, axis=-1)[..., 0]
    scores = {
        "moment": logsumexp(BETA * log_p, axis=-1) + view.gumbels,
        "maskgit": drawn + ALPHA * view.gumbels,
        "titok": np.take_along_axis(logits, sampled, axis=-1)[..., 0] + ALPHA * view.gumbels,
        "top-probability": two[..., 1],
        "margin": two[..., 1] - two[..., 0],
        "entropy": -entr(np.exp(log_p)).sum(axis=-1),
    }
    return np.asarray(scores[{"u-moment": "moment", "maskgit-exact": "maskgit"}.get(name, name)])


@pytest.mark.parametrize("name", [name for name in ORDERS if name not in KNOWN])
def test_exploitation_orders_rank_by_their_definition(
    name: str, logits: NDArray[np.float32], view: View
) -> None:
    hidden = np.ones((5, 24), bool)
    found = ranking(find_order(name).score(view), hidden)
    expected = np.argsort(-defined_scores(name, logits, view), axis=-1)
    assert np.array_equal(found, expected)


def test_the_moment_sampler_has_noise_of_scale_one_whatever_alpha(view: View) -> None:
    noise = find_order("moment").score(view) - view.draws.log_moment
    np.testing.assert_allclose(noise, view.gumbels, atol=1e-5)


@pytest.mark.parametrize("name", KNOWN)
def test_known_orders_do_not_look_at_the_denoiser(name: str, view: View) -> None:
    other = view_of(np.zeros((5, 24, 11), np.float32), view.randomness, view.grid)
    assert np.array_equal(find_order(name).score(view), find_order(name).score(other))


@pytest.mark.parametrize(
    ("name", "grid", "order"),
    [
        ("halton", (4, 6), halton_grid(4, 6)),
        ("halton", (24,), halton_line(24)),  # base 2 on a line of text
        ("halton-1d", (24,), halton_line(24)),
        ("halton-1d", (4, 6), halton_line(24)),
    ],
)
def test_halton_orders_are_rolled_by_an_offset_per_sample(
    name: str, grid: tuple[int, ...], order: NDArray[np.int64], logits: NDArray[np.float32]
) -> None:
    randomness = Randomness(2, range(5))
    found = ranking(
        find_order(name).score(view_of(logits, randomness, grid)), np.ones((5, 24), bool)
    )
    offsets = [int(np.flatnonzero(order == first[0])[0]) for first in found]
    assert np.array_equal(found, [np.roll(order, -offset) for offset in offsets])
    assert len(set(offsets)) > 1


def test_halton_offsets_are_uniform() -> None:
    # 12,000 offsets among 6: a total variation of 0.04 shows with probability > 0.999 at a
    # false-alarm rate of 1e-6.
    randomness = Randomness(6, range(12_000))
    view = view_of(np.zeros((12_000, 6, 2), np.float32), randomness, (2, 3))
    first = np.argmax(find_order("halton").score(view), axis=-1)
    assert stats.chisquare(np.bincount(first, minlength=6)).pvalue > 1e-6


def test_random_orders_are_uniform_permutations() -> None:
    # 12,000 permutations of 4 positions: a total variation of 0.05 shows as above.
    randomness = Randomness(6, range(12_000))
    view = view_of(np.zeros((12_000, 4, 2), np.float32), randomness, (4,))
    orders = np.argsort(find_order("random").score(view), axis=-1)
    names, counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)
    assert len(names) == 24
    assert stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize("name", ["vanilla", "temperature"])
def test_random_positions_are_the_same_whatever_the_law_of_the_tokens(
    name: str, view: View
) -> None:
    assert np.array_equal(find_order(name).score(view), find_order("random").score(view))


def test_ties_are_broken_by_position() -> None:
    scores = np.arange(1000)[None] % 2 + 0.5
    expected = [*range(1, 1000, 2), *range(0, 1000, 2)]
    assert ranking(scores, np.ones((1, 1000), bool))[0].tolist() == expected


def test_visible_positions_are_not_ranked() -> None:
    scores = np.array([[5.0, 4.0, 3.0, np.inf], [1.0, np.nan, 3.0, 4.0]])
    hidden = np.array([[False, True, True, False], [True, False, True, True]])
    assert [row.tolist() for row in ranking(scores, hidden)] == [[1, 2], [3, 2, 0]]


def test_laws_of_tokens_belong_to_the_samplers_that_define_them() -> None:
    laws = {name: order.law for name, order in ORDERS.items() if order.law != "plain"}
    assert laws == {"moment": "tempered", "temperature": "tempered", "titok": "annealed"}


def test_only_maskgit_and_titok_draw_tokens_before_positions() -> None:
    assert [name for name, order in ORDERS.items() if order.draws_first] == ["maskgit", "titok"]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(SamplingError, match=r"order must be one of moment, .*, got 'best'"):
        find_order("best")


def test_hybrid_takes_the_first_of_one_ranking_and_then_of_the_other() -> None:
    rng = np.random.default_rng(5)
    for count, _ in itertools.product(range(1, 10), range(5)):
        one, other = rng.permutation(9), rng.permutation(9)
        for explored in range(count + 1):
            expected = one[:explored].tolist()
            expected += [place for place in other.tolist() if place not in expected]
            assert hybrid(one, other, count, explored).tolist() == expected[:count]


@pytest.mark.parametrize(
    ("share", "parent"),
    [
        (0.0, {"order": "moment"}),
        (1.0, {"order": "halton", "tokens": "tempered"}),
    ],
)
@pytest.mark.parametrize("plan", PLANS)
def test_hybrid_at_the_ends_of_its_share_is_one_of_its_parents(
    toy: Callable[[int], Denoise], share: float, parent: dict[str, str], plan: str
) -> None:
    sampling = PLANS[plan].but(order=HYBRID, exploration=(share, share))
    steps = unmasked(toy(4), sampling, range(4))
    parents = unmasked(toy(4), PLANS[plan].but(**parent), range(4))
    for step, same in zip(steps, parents, strict=True):
        assert np.array_equal(step.revealed, same.revealed)
        assert np.array_equal(step.tokens, same.tokens)


@pytest.mark.parametrize("exploitation", ["u-moment", "maskgit-exact", "entropy"])
def test_hybrid_at_share_zero_is_any_exploitation_order(
    toy: Callable[[int], Denoise], exploitation: str
) -> None:
    sampling = Sampling(order=HYBRID, exploitation_order=exploitation, exploration=(0, 0))
    found = unmasked(toy(4), sampling, range(4))[-1]
    parent = unmasked(toy(4), Sampling(order=exploitation), range(4))[-1]
    assert np.array_equal(found.tokens, parent.tokens)


def test_exploring_positions_are_revealed_first(toy: Callable[[int], Denoise]) -> None:
    # Four rounds of four positions in two passes: the first pass reveals the two next of Halton.
    sampling = Sampling(order=HYBRID, rounds=4, schedule="linear", substeps=2)
    hidden = np.ones((3, 16), bool)
    scores = find_order("halton").score(
        view_of(np.zeros((3, 16, 2), np.float32), Randomness(1, range(3)), CANVAS.grid)
    )
    for step in unmasked(toy(3), sampling, range(3)):
        if step.part == 0:
            for row, ranked in zip(step.revealed, ranking(scores, hidden), strict=True):
                assert set(np.flatnonzero(row)) == set(ranked[:2])
        hidden &= ~step.revealed


def test_the_exploration_share_follows_the_rounds() -> None:
    sampling = Sampling(order=HYBRID, exploration=(1.0, 0.2))
    clock = Clock(sampling, np.array([5]), [np.arange(5)[::-1]])
    turns = [clock.turn(np.array([0]), np.array([5 - index])) for index in range(5)]
    shares = [turn.exploration[0] for turn in turns]
    assert shares == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("share", "explored"), [(0.0, 0), (0.3, 1), (0.4, 2), (0.7, 3), (1.0, 4)])
def test_the_share_of_exploring_positions_is_rounded(
    toy: Callable[[int], Denoise], share: float, explored: int
) -> None:
    # Two orders that are known, revealed one by one, and the first four positions of their hybrid.
    def ranked(order: str) -> list[int]:
        sampling = Sampling(order=order, rounds=16, schedule="linear")
        return [int(np.argmax(step.revealed[0])) for step in unmasked(toy(1), sampling, [3])]

    sampling = Sampling(
        order=HYBRID,
        exploitation_order="halton-1d",
        exploration=(share, share),
        rounds=4,
        schedule="linear",
    )
    expected = hybrid(np.array(ranked("halton")), np.array(ranked("halton-1d")), 4, explored)
    found = unmasked(toy(1), sampling, [3])[0].revealed[0]
    assert set(np.flatnonzero(found)) == set(expected)


@pytest.mark.parametrize(
    ("order", "plan"),
    [pair for pair in itertools.product([*ORDERS, HYBRID], PLANS) if pair not in REFUSED],
)
def test_eight_samples_together_are_eight_single_ones(
    toy: Callable[[int], Denoise], order: str, plan: str
) -> None:
    sampling = PLANS[plan].but(order=order)
    together = unmasked(toy(8), sampling, range(8))[-1].tokens
    single = [unmasked(toy(1), sampling, [index])[-1].tokens[0] for index in range(8)]
    assert np.array_equal(together, single)
