"""From the sampler's requests to feeds of a graph and back, with a function for a graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.conditions import Conditions
from mdruntime.denoiser import Condition, Denoiser
from mdruntime.errors import SamplingError
from mdruntime.head import Controls, Draws, draw
from mdruntime.manifest import ContextRow, DenoiserSpec
from mdruntime.sampler import Pass, Result
from mdruntime.session import Feeds, FunctionSession

MASK, DROPPED = 6, 19


def spec(**changes: Any) -> DenoiserSpec:
    """Two by two tokens; the class row comes last, class c is 10 + c."""
    sizes: dict[str, Any] = {
        "length": 4,
        "canvas": 5,
        "first": 0,
        "grid": (2, 2),
        "patch": (1, 1),
        "codebook": 6,
        "mask_token": MASK,
        "classes": 9,
        "layers": 1,
        "context": (ContextRow(4, 10, DROPPED),),
    }
    return DenoiserSpec(**{**sizes, **changes})


PLAIN = spec()
PAIRS = spec(  # two by four tokens, a row for each two side by side; the class row comes first
    length=8, first=1, grid=(2, 4), patch=(1, 2), context=(ContextRow(0, 10, DROPPED),)
)
SEEING = spec(first=1, context=(ContextRow(0, -1, 17),), visible=True, refresh_context=True)


class Recording(FunctionSession):
    """A function's session that keeps the canvases it is told of."""

    def __init__(self, graph: "Graph") -> None:
        super().__init__(graph.answer)
        self.graph = graph

    def start(self, canvas: int) -> None:
        self.graph.canvases.append(canvas)


class Graph:
    """Answers with where an output stands and with what it was fed, and keeps the feeds."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.feeds: list[dict[str, Any]] = []
        self.canvases: list[int] = []
        self.session = Recording(self)

    def answer(self, feeds: Feeds) -> Mapping[str, NDArray[Any]]:
        self.feeds.append(dict(feeds))
        active = len(feeds["conditional"])
        rows = np.take_along_axis(feeds["positions"], feeds["columns"], axis=1)[:active]
        where = (rows[..., None] * 10 + np.arange(self.slots)).reshape(active, -1)
        assert feeds["uniforms"].shape == where.shape
        logits = np.eye(100, 6, dtype=np.float32)[where % 100] + feeds["uniforms"][..., None]
        rest = dict.fromkeys(Draws._fields, where.astype(np.float32))
        return {
            **rest,
            "sampled": where.astype(np.int32),
            "log_prob": feeds["uniforms"],
            "logits": logits,
        }

    @property
    def last(self) -> dict[str, Any]:
        return self.feeds[-1]


def request(
    tokens: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]] | None = None,
    *,
    samples: Sequence[int] | None = None,
    guidance: float = 0.0,
    logits: bool = False,
) -> Pass:
    active = len(tokens)
    numbers = np.arange(1, 1 + np.size(wanted)).reshape(np.shape(wanted)) / 100
    ones: NDArray[np.float32] = np.ones(active, np.float32)
    return Pass(
        samples=np.array(range(active) if samples is None else samples),
        positions=None if positions is None else np.array(positions),
        tokens=np.array(tokens, np.int32),
        wanted=np.array(wanted),
        controls=Controls(np.float32(guidance) * ones, 2 * ones, 3 * ones, 4 * ones),
        uniforms=numbers.astype(np.float32),
        logits=logits,
    )


def test_a_full_pass_feeds_tokens_and_class_and_asks_for_what_is_wanted() -> None:
    graph = Graph()
    denoiser = Denoiser(graph.session, PLAIN, Conditions.of([3, -1]))
    denoiser(request([[1, MASK, 2, MASK], [MASK] * 4], [[1, 3], [2, 0]]))
    assert graph.canvases == [5]
    feeds = graph.last
    assert feeds["tokens"].tolist() == [[1, MASK, 2, MASK, 13], [MASK] * 4 + [DROPPED]]
    assert feeds["positions"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert feeds["columns"].tolist() == [[1, 3], [2, 0]]
    assert feeds["conditional"].tolist() == feeds["unconditional"].tolist() == [0, 1]
    numbers = {name: feeds[name].tolist() for name in ("temperature", "beta", "token_beta")}
    assert numbers == {"temperature": [2, 2], "beta": [3, 3], "token_beta": [4, 4]}
    assert {array.dtype.name for array in feeds.values()} == {"int32", "float32"}


def test_guidance_doubles_the_rows_and_drops_the_class_in_the_second_half() -> None:
    graph = Graph()
    denoiser = Denoiser(graph.session, PLAIN, Conditions.of([3, 5, -1]))
    denoiser(request([[MASK] * 4] * 3, [[0]] * 3, guidance=1.5))
    assert graph.last["tokens"][:, 4].tolist() == [13, 15, DROPPED, DROPPED, DROPPED, DROPPED]
    assert graph.last["guidance"].tolist() == [1.5, 1.5, 0]  # no class, nothing to strengthen
    assert graph.last["conditional"].tolist() == [0, 1, 2]
    assert graph.last["unconditional"].tolist() == [3, 4, 5]
    assert graph.last["positions"].shape == (6, 5)
    assert graph.last["columns"].shape == (6, 2)
    assert graph.last["uniforms"].shape == (3, 2)


@pytest.mark.parametrize(
    ("changes", "labels"), [({"unconditional": False}, [3, 5]), ({}, [-1, -1])]
)
def test_without_anything_to_guide_by_no_row_is_doubled(
    changes: dict[str, Any], labels: list[int]
) -> None:
    graph = Graph()
    Denoiser(graph.session, spec(**changes), Conditions.of(labels))(
        request([[MASK] * 4] * 2, [[0]] * 2, guidance=2.0)
    )
    assert len(graph.last["tokens"]) == 2
    assert graph.last["guidance"].tolist() == [0, 0]


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_partial_pass_keeps_the_rows_of_the_full_pass(guidance: float) -> None:
    graph = Graph()
    denoiser = Denoiser(graph.session, PLAIN, Conditions.of([0, 1, 2]))
    samples = [0, 2]
    denoiser(request([[MASK] * 4] * 2, [[3], [0]], samples=samples, guidance=guidance))
    partial = request(
        [[5, MASK], [4, MASK]], [[1], [2]], [[3, 1], [0, 2]], samples=samples, guidance=guidance
    )
    found = denoiser(partial)
    halves = 2 if guidance else 1
    assert graph.canvases == [5]  # no new canvas
    assert graph.last["positions"].tolist() == [[3, 1], [0, 2]] * halves
    assert graph.last["tokens"].tolist() == [[5, MASK], [4, MASK]] * halves
    assert graph.last["columns"].tolist() == [[1, 1], [1, 1]] * halves  # never one alone
    assert found.draws.sampled.tolist() == [[10], [20]]


def test_tokens_that_share_a_row_are_asked_for_together_and_answered_apart() -> None:
    # Rows: 0 the class; 1 tokens 0, 1; 2 tokens 2, 3; 3 tokens 4, 5; 4 tokens 6, 7.
    graph = Graph(slots=2)
    denoiser = Denoiser(graph.session, PAIRS, Conditions.of([3]))
    full = denoiser(request([[0, 1, 2, 3, 4, 5, MASK, MASK]], [[7, 6, 2]]))
    assert graph.last["tokens"].tolist() == [[13, 0, 0, 1, 2, 3, 4, 5, MASK, MASK]]
    assert graph.last["positions"].tolist() == [[0, 1, 2, 3, 4]]
    assert graph.last["columns"].tolist() == [[2, 4]]
    # Of the two rows' four outputs tokens 2, 3, 6, 7 stand side by side.
    assert graph.last["uniforms"] == pytest.approx(np.array([[0.03, 0, 0.02, 0.01]]))
    assert full.draws.sampled.tolist() == [[41, 40, 20]]
    assert full.draws.log_prob == pytest.approx(np.array([[0.01, 0.02, 0.03]]))
    partial = denoiser(request([[1, MASK, 5]], [[6]], [[7, 6, 1]]))
    assert graph.last["positions"].tolist() == [[1, 4]]
    assert graph.last["tokens"].tolist() == [[0, 5, MASK, 1]]  # token 0 stays in token 1's row
    assert graph.last["columns"].tolist() == [[1, 1]]
    assert graph.last["uniforms"] == pytest.approx(np.array([[0.01, 0, 0, 0]]))
    assert partial.draws.sampled.tolist() == [[40]]


def test_samples_whose_tokens_share_more_rows_repeat_one() -> None:
    graph = Graph(slots=2)
    denoiser = Denoiser(graph.session, PAIRS, Conditions.of([3, 4]))
    denoiser(request([[MASK] * 8] * 2, [[0], [0]]))
    found = denoiser(request([[MASK, MASK]] * 2, [[0, 1], [0, 7]], [[0, 1], [0, 7]]))
    assert graph.last["positions"].tolist() == [[1, 1], [1, 4]]
    assert found.draws.sampled.tolist() == [[10, 11], [10, 41]]
    assert found.draws.log_prob == pytest.approx(np.array([[0.01, 0.02], [0.03, 0.04]]))


def test_context_rows_are_recomputed_in_partial_passes_where_the_model_needs_it() -> None:
    graph = Graph()
    denoiser = Denoiser(graph.session, SEEING, Conditions.of([-1]))
    denoiser(request([[MASK] * 4], [[0]]))
    found = denoiser(request([[2, MASK]], [[3]], [[1, 3]]))
    assert graph.last["positions"].tolist() == [[0, 2, 4]]
    assert graph.last["tokens"].tolist() == [[17, 2, MASK]]
    assert graph.last["columns"].tolist() == [[2, 2]]
    assert found.draws.sampled.tolist() == [[40]]


def test_the_columns_that_are_not_hidden_are_named_where_the_model_needs_it() -> None:
    graph = Graph()
    denoiser = Denoiser(graph.session, SEEING, Conditions.of([-1, -1]))
    denoiser(request([[MASK] * 4, [MASK, 1, 2, MASK]], [[0], [0]]))
    assert [set(row) for row in graph.last["visible"].tolist()] == [{0}, {0, 2, 3}]
    denoiser(request([[5, MASK], [4, 3]], [[3], [3]], [[1, 3], [0, 3]]))
    assert [set(row) for row in graph.last["visible"].tolist()] == [{0, 1}, {0, 1, 2}]
    Denoiser(graph.session, PLAIN, Conditions.of([1]))(request([[MASK] * 4], [[0]]))
    assert "visible" not in graph.last


def test_given_tokens_are_hidden_in_the_rows_without_a_condition() -> None:
    given = np.array([[True, False, False, False], [False] * 4])
    graph = Graph()
    denoiser = Denoiser(graph.session, PLAIN, Conditions(np.array([-1, -1]), given=given))
    denoiser(request([[1, MASK, MASK, 2], [3, MASK, MASK, MASK]], [[1], [1]], guidance=1.0))
    tokens = graph.last["tokens"][:, :4]
    assert tokens.tolist()[:2] == [[1, MASK, MASK, 2], [3, MASK, MASK, MASK]]
    # The token at 3 was there before or was drawn since: only what is given is hidden.
    assert tokens.tolist()[2:] == [[MASK, MASK, MASK, 2], [3, MASK, MASK, MASK]]
    assert graph.last["guidance"].tolist() == [1, 0]
    denoiser(request([[1, 5], [3, 5]], [[1], [1]], [[0, 1], [0, 1]], guidance=1.0))
    assert graph.last["tokens"].tolist() == [[1, 5], [3, 5], [MASK, 5], [3, 5]]


def recorder(asked: list[NDArray[np.int32]]) -> Condition:
    """A condition graph that keeps what it was asked for."""

    def answer(rows: NDArray[np.int32]) -> Mapping[str, NDArray[Any]]:
        asked.append(rows)
        return {"scale": rows[..., None] * np.ones(2), "shift": -rows}

    return answer


def test_what_stays_the_same_is_computed_once_for_every_distinct_condition() -> None:
    asked: list[NDArray[np.int32]] = []
    graph = Graph()
    conditions = Conditions.of([4, 2, 4])
    denoiser = Denoiser(graph.session, PLAIN, conditions, condition=recorder(asked))
    denoiser(request([[MASK] * 4] * 3, [[0]] * 3, guidance=1.0))
    denoiser(request([[MASK] * 4] * 2, [[0]] * 2, samples=[1, 2], guidance=1.0))
    assert graph.feeds[0]["condition.shift"].tolist() == [-4, -2, -4, 1, 1, 1]
    assert graph.feeds[1]["condition.shift"].tolist() == [-2, -4, 1, 1]
    assert graph.feeds[1]["condition.scale"].tolist() == [[2, 2], [4, 4], [-1, -1], [-1, -1]]
    denoiser(request([[MASK] * 4] * 2, [[0]] * 2, samples=[0, 1]))
    assert graph.last["condition.shift"].tolist() == [-4, -2]
    (rows,) = asked
    assert sorted(rows.tolist()) == [-1, 2, 4]


def test_prompts_and_negative_prompts_are_the_conditions_of_the_two_halves() -> None:
    graph = Graph()
    prompts, negative = np.array([[1, 2], [3, 4]], np.int32), np.array([[9, 9]] * 2, np.int32)
    conditions = Conditions(np.array([-1, -1]), prompts, negative)
    bare = spec(context=(), canvas=4, classes=0)
    denoiser = Denoiser(graph.session, bare, conditions, condition=recorder([]))
    denoiser(request([[MASK] * 4], [[0]], samples=[1], guidance=9.0))
    assert graph.last["condition.shift"].tolist() == [[-3, -4], [-9, -9]]
    assert graph.last["guidance"].tolist() == [9]


def test_a_shorter_text_starts_a_canvas_of_its_own_length() -> None:
    graph = Graph()
    text = spec(length=9, canvas=9, grid=(9,), patch=(1,), context=(), flexible=True)
    Denoiser(graph.session, text, Conditions.of([-1]))(request([[MASK] * 3], [[2]]))
    assert graph.canvases == [3]
    assert graph.last["positions"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("head", "logits"), [("graph", True), ("graph", False), ("numpy", True)])
def test_logits_come_back_in_the_order_of_the_wanted_tokens(head: str, logits: bool) -> None:
    graph = Graph(slots=2)
    denoiser = Denoiser(graph.session, PAIRS, Conditions.of([3]), head=head)
    asked = request([[MASK] * 8], [[7, 2, 6]], logits=logits)
    found: Result = denoiser(asked)
    if head == "graph" and not logits:
        assert found.logits is None
        return
    assert found.logits is not None
    tokens = np.array([[41, 20, 40]])
    expected = np.eye(100, 6, dtype=np.float32)[tokens] + asked.uniforms[..., None]
    np.testing.assert_allclose(found.logits, expected)
    if head == "numpy":
        for one, other in zip(
            found.draws, draw(expected, asked.controls, asked.uniforms), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(SamplingError, match="head must be one of graph, numpy, got 'tail'"):
        Denoiser(Graph().session, PLAIN, Conditions.of([1]), head="tail")
