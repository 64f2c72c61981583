"""Texts: what is given stays, what is drawn depends on nothing but its own request."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mdruntime
from mdruntime.errors import BundleError, SamplingError
from mdruntime.manifest import TextSpec
from mdruntime.order import HYBRID, ORDERS
from mdruntime.sampling import Sampling
from mdruntime.text import GAP, HIDDEN, TextPipeline

Scripted = Callable[..., tuple[TextPipeline, Any]]
HELLO = [*b"Hello, world. This is long."]


@pytest.fixture(scope="module")
def writer(small_bundle: Callable[[str], Path]) -> TextPipeline:
    """A pipeline of a random model of 32 bytes."""
    return mdruntime.load_text(small_bundle("mdlm"))


def test_prompts_begin_their_texts(writer: TextPipeline) -> None:
    prompts = ["Once", "", "naïve café", "tabs\tand\nlines", "a ___ b", "1 2 3"]
    texts = writer.generate(prompts, seed=1)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert all(len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_texts_depend_on_seed_and_index_but_not_on_the_batch(writer: TextPipeline) -> None:
    prompts = [f"prompt {number}" for number in range(5)]
    together = writer.generate(prompts, seed=3, first_index=7)
    alone = [
        writer.generate([prompt], seed=3, first_index=7 + index)[0]
        for index, prompt in enumerate(prompts)
    ]
    assert together == alone == writer.generate(prompts, seed=3, first_index=7, batch_size=2)
    assert together != writer.generate(prompts, seed=4, first_index=7)
    assert len(set(writer.generate(count=3, seed=3))) == 3


@pytest.mark.parametrize(
    "pieces",
    [
        ["front ", " back"],
        ["", "only the end"],
        ["only the begin", ""],
        ["ä", "é", "中", "😀"],
        ["a ", " b ", " c ", " d ", "."],
        ["_", "__ "],
    ],
    ids=repr,
)
@pytest.mark.parametrize("gap", [1, 3])
def test_infilling_keeps_every_byte_around_the_gaps(
    writer: TextPipeline, pieces: list[str], gap: int
) -> None:
    text = GAP.join(pieces)
    if "_" in pieces[0]:  # more underscores than three are one gap, too
        pieces = ["", " "]
    for seed in range(4):
        (found,) = writer.infill(text, gap=gap, seed=seed)
        assert re.fullmatch("(.+)".join(map(re.escape, pieces)), found, re.DOTALL), found
    canvas = writer.gaps(text, gap)
    hidden = canvas[0] == writer.manifest.denoiser.mask_token
    assert hidden.sum() == gap * (len(pieces) - 1)
    assert bytes(canvas[0][~hidden].tolist()).decode() == "".join(pieces)


def test_texts_of_several_lengths_are_filled_in_as_if_alone(writer: TextPipeline) -> None:
    texts = ["a___", "b___", "c___c___", "d___", "e___e"]
    together = writer.infill(texts, gap=4, seed=5, first_index=2)
    alone = [
        writer.infill([text], gap=4, seed=5, first_index=2 + index)[0]
        for index, text in enumerate(texts)
    ]
    assert together == alone
    assert writer.infill(texts[0], gap=4, seed=5, first_index=2) == alone[:1]


@pytest.mark.parametrize("order", [*ORDERS, HYBRID])
def test_all_orders_write_text(writer: TextPipeline, order: str) -> None:
    for schedule in ("cosine", "ancestral"):
        options: dict[str, Any] = {"order": order, "schedule": schedule, "rounds": 6, "seed": 2}
        texts = writer.generate(["Hi"], length=20, **options)
        assert texts[0].startswith("Hi")
        (filled,) = writer.infill("begin___end", gap=9, **options)
        assert filled.startswith("begin")
        assert filled.endswith("end")


def test_steps_show_ever_fewer_hidden_tokens(writer: TextPipeline) -> None:
    states = list(writer.steps(writer.canvas(["Hey"], count=1), seed=1, rounds=16))
    shown = [state.texts[0].count(HIDDEN) for state in states]
    assert shown == [state.step.hidden for state in states]
    assert all(later < earlier for earlier, later in pairwise(shown))
    assert shown[0] < 29
    assert shown[-1] == 0
    assert all(state.texts[0].startswith("Hey") for state in states)
    assert states[-1].texts == writer.generate(["Hey"], seed=1, rounds=16)


def test_clones_and_unfinished_runs_do_not_disturb(writer: TextPipeline) -> None:
    expected = writer.generate(count=2, seed=9)
    states = writer.steps(writer.canvas(), seed=9)
    next(states)
    with writer.clone() as twin:
        assert twin.generate(count=2, seed=9) == expected
    assert [state.texts for state in states][-1] == expected[:1]


def test_shorter_canvases_are_smaller_passes(scripted: Scripted) -> None:
    pipeline, script = scripted(HELLO)
    assert pipeline.generate(count=2, length=5) == ["Hello"] * 2
    assert {feeds["tokens"].shape[1] for feeds in script.feeds} == {5}
    script.feeds.clear()
    assert pipeline.infill("He___", gap=3) == ["Hello"]
    assert {feeds["tokens"].shape[1] for feeds in script.feeds} == {5}
    script.feeds.clear()
    assert pipeline.generate() == ["Hello, world. This is lo"]
    assert {feeds["tokens"].shape[1] for feeds in script.feeds} == {24}


@pytest.mark.parametrize(("order", "schedule"), [("vanilla", "ancestral"), ("halton", "cosine")])
def test_known_orders_ask_for_no_row_twice(scripted: Scripted, order: str, schedule: str) -> None:
    pipeline, script = scripted(HELLO)
    states = list(pipeline.steps(pipeline.canvas(["Hel"]), order=order, schedule=schedule))
    asked = [feeds["columns"].shape[1] for feeds in script.feeds]
    assert asked == [int(state.step.revealed.sum()) for state in states]
    assert sum(asked) == 21
    script.feeds.clear()
    pipeline.generate(["Hel"], order="moment", schedule=schedule)
    assert script.feeds[0]["columns"].shape[1] == 21


def test_guidance_hides_what_is_given_from_the_unconditional_rows(scripted: Scripted) -> None:
    pipeline, script = scripted(HELLO)
    pipeline.generate(["Hey", "Ho"], guidance=1.5, length=6)
    for feeds in script.feeds:
        seen, bare = np.split(feeds["tokens"], 2)
        for row, given in zip(range(len(seen)), (3, 2), strict=False):
            assert (seen[row, :given] != 256).all()
            assert (bare[row, :given] == 256).all()
            np.testing.assert_array_equal(seen[row, given:], bare[row, given:])
        assert (feeds["guidance"] == 1.5).all()
    script.feeds.clear()
    pipeline.generate(count=2, guidance=1.5, length=6)
    assert all(len(feeds["tokens"]) <= 2 for feeds in script.feeds)
    assert all((feeds["guidance"] == 0).all() for feeds in script.feeds)


def test_texts_end_at_the_token_that_ends_them(scripted: Scripted) -> None:
    text = TextSpec("bytes", begin=1, end=2)
    pipeline, _ = scripted([1, *b"abc", 2, *b"more"], text)
    assert pipeline.generate() == ["abc"]
    assert pipeline.generate(["xy"]) == ["xyc"]
    assert pipeline.canvas(["xy"])[0, :4].tolist() == [1, *b"xy", 256]
    assert pipeline.infill("x___", gap=5) == ["xbc"]


def test_a_token_that_ends_texts_ends_nothing_given(scripted: Scripted) -> None:
    for begin, end in ((1, 2), (2, 2)):
        pipeline, _ = scripted([2], TextSpec("bytes", begin, end))
        assert pipeline.infill("ab___cd___ef___", gap=2) == ["abcdef"]
        assert pipeline.generate(["prompt"]) == ["prompt"]
        states = list(pipeline.steps(pipeline.gaps("ab___cd", 3), rounds=3, schedule="linear"))
        assert [state.texts[0] for state in states] == [f"ab{HIDDEN * n}cd" for n in (2, 1, 0)]


def test_half_characters_do_not_spoil_what_is_given(scripted: Scripted) -> None:
    half = "é".encode()[0]
    pipeline, _ = scripted([half])
    assert pipeline.infill("é___é___x", gap=1) == [
        "é\N{REPLACEMENT CHARACTER}é\N{REPLACEMENT CHARACTER}x"
    ]
    canvas = np.array([[*"é".encode(), 256, half, 256, *"é".encode()[1:]]], np.int32)
    assert pipeline.decode(canvas[0]) == f"é{HIDDEN}\N{REPLACEMENT CHARACTER}{HIDDEN}" + (
        "\N{REPLACEMENT CHARACTER}"
    )


def test_models_of_one_length_go_on_behind_the_last_gap(scripted: Scripted) -> None:
    pipeline, script = scripted([*b"abcdefghijkl"], flexible=False, length=12)
    assert pipeline.infill("ab___ef", gap=2) == ["abcdefghijkl"]
    assert {feeds["tokens"].shape[1] for feeds in script.feeds} == {12}
    with pytest.raises(SamplingError, match="length must be 0 or 12 tokens, got 6"):
        pipeline.generate(length=6)


BAD: list[tuple[Callable[[Any], Any], str]] = [  # Any: some of these are what types forbid
    (lambda p: p.generate("one text"), "prompts must be a list of texts"),
    (lambda p: p.generate([]), "prompts must be a list of texts"),
    (lambda p: p.generate([3]), "a prompt must be text, got '3'"),
    (lambda p: p.generate([b"bytes"]), "a prompt must be text"),
    (lambda p: p.generate(["half \ud83d"]), "a prompt must be valid Unicode"),
    (lambda p: p.generate(["x" * 24]), "must leave room on a canvas of 24 tokens, got 24 tokens"),
    (lambda p: p.generate(["x" * 9], length=9), "shorten it or allow for a larger length"),
    (lambda p: p.generate(length=25), "length must be between 1 and 24 tokens, got 25"),
    (lambda p: p.generate(length=-1), "length must be between 0"),
    (lambda p: p.generate(count=0), "count must be between 1"),
    (lambda p: p.generate(seed=-1), "seed must be between 0"),
    (lambda p: p.generate(batch_size=0), "batch_size must be between 1"),
    (lambda p: p.generate(rounds=0), "rounds must be between 1 and 4096"),
    (lambda p: p.generate(colour="red"), "no sampling option 'colour'"),
    (lambda p: p.infill("no gap __"), "must have a gap '___', got 'no gap __'"),
    (lambda p: p.infill(["fine ___", None]), "a text with gaps must be text, got 'None'"),
    (lambda p: p.infill("\udce9___"), "a text with gaps must be valid Unicode"),
    (lambda p: p.infill("x___y___", gap=12), "at most 24 tokens, got 26 with 12 for a gap"),
    (lambda p: p.infill("x___", gap=10**12), "must have at most 24 tokens"),
    (lambda p: p.infill("x___", gap=0), "gap must be between 1"),
    (lambda p: p.infill("x___", gap=1.5), "gap must be a whole number, got 1.5"),
    (lambda p: list(p.steps([[1, 300]])), "tokens must be integers from 0 to 255, or the mask"),
    (lambda p: list(p.steps([[0.5]])), "tokens must be integers"),
    (lambda p: list(p.steps([[1] * 25])), r"must have shape \(batch, at most 24\)"),
    (lambda p: p.decode([1, -2]), "tokens must be integers from 0 to 255"),
    (lambda p: p.sampling("nonsense"), "preset must be one of default"),
]


@pytest.mark.parametrize(("ask", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_requests_are_refused_in_one_line(
    scripted: Scripted, ask: Callable[[TextPipeline], Any], text: str
) -> None:
    pipeline, script = scripted(HELLO)
    with pytest.raises(SamplingError, match=text) as caught:
        ask(pipeline)
    assert len(str(caught.value).splitlines()) == 1
    assert script.feeds == []


def test_bundles_are_opened_by_the_function_for_them(
    small_bundle: Callable[[str], Path], digits_bundle: Path
) -> None:
    with pytest.raises(BundleError, match=r"makes text, not images; use mdruntime\.load_text"):
        mdruntime.load(small_bundle("mdlm"))
    with pytest.raises(BundleError, match=r"makes images, not text; use mdruntime\.load"):
        mdruntime.load_text(digits_bundle)
    with mdruntime.load_text(small_bundle("mdlm")) as writer:
        assert writer.provider == "cpu"
        assert isinstance(writer.sampling("fast", rounds=3), Sampling)
        assert writer.bundle.manifest is writer.manifest
