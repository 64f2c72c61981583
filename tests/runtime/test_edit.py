"""Editing: which tokens are hidden, what the encoder sees, what does not change."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mdruntime
from mdruntime import edit
from mdruntime.bundle import Bundle
from mdruntime.errors import SamplingError
from mdruntime.manifest import DenoiserSpec, ImageSpec
from mdruntime.pipeline import Pipeline
from mdruntime.randomness import Randomness
from mdruntime.runner import Runner
from mdruntime.session import Feeds, Outputs, Session, Wrapper, open_session

ONE = ImageSpec(8, 8, 2)


def spec_of(grid: tuple[int, int], patch: tuple[int, int] = (1, 1)) -> DenoiserSpec:
    length = grid[0] * grid[1]
    rows = length // (patch[0] * patch[1])
    return DenoiserSpec(length, rows, 0, grid, patch, 16, 16, 0, 1, ())


class Watching(Wrapper):
    """A session that keeps what it was fed."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.feeds: list[Feeds] = []

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        self.feeds.append(feeds)
        return super().run(feeds, fetch)

    def clone(self) -> "Watching":
        return self


@pytest.fixture(params=["maskgit", "maskbit"])
def watched(
    request: pytest.FixtureRequest,
    small_bundle: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Pipeline, dict[str, Watching]]:
    """A pipeline of a model with an encoder, and its sessions."""
    sessions: dict[str, Watching] = {}

    def opened(bundle: Bundle, graph: str, provider: str, **options: Any) -> Session:
        sessions[graph] = Watching(open_session(bundle, graph, provider, **options))
        return sessions[graph]

    monkeypatch.setattr("mdruntime.session.open_session", opened)
    bundle = mdruntime.open_bundle(small_bundle(request.param))
    return Pipeline(Runner(bundle)), sessions


def pictures(pipeline: Pipeline, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures that the decoder can draw, and that differ from each other."""
    spec = pipeline.manifest.denoiser
    tokens = np.random.default_rng(seed).integers(0, spec.codebook, (count, spec.length))
    return pipeline.decode(tokens.astype(np.int32))


@pytest.mark.parametrize(
    ("spec", "per_cell"),
    [(spec_of((4, 4)), 1), (spec_of((4, 8), (1, 2)), 2)],
    ids=["one token", "two tokens"],
)
def test_every_token_that_a_masked_pixel_touches_is_hidden(
    spec: DenoiserSpec, per_cell: int
) -> None:
    for row, column in np.ndindex(8, 8):
        mask = np.zeros((1, 8, 8), bool)
        mask[0, row, column] = True
        hidden = edit.hidden_tokens(spec, ONE, mask)
        cell = row // 2 * 4 + column // 2
        expected = [cell * per_cell + slot for slot in range(per_cell)]
        assert np.flatnonzero(hidden[0]).tolist() == expected
    border = np.zeros((1, 8, 8), bool)
    border[0, 1:3, 3:5] = True  # one pixel of each of four cells
    assert edit.hidden_tokens(spec, ONE, border).sum() == 4 * per_cell


def test_masks_are_one_for_each_or_one_for_all() -> None:
    images, mask = np.zeros((3, 8, 6, 3), np.uint8), np.zeros((8, 6), np.uint8)
    mask[2, 3] = 7
    for given in (mask, mask[None], np.stack([mask] * 3), mask.astype(float), mask > 0):
        found = edit.masks_of(images, given)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, np.stack([mask > 0] * 3))


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 0.5, 1.0])
def test_variations_hide_a_share_that_grows_with_strength(share: float) -> None:
    source = Randomness(5, range(64))
    hidden = edit.hidden_share(share, source, 16)
    assert (hidden.sum(axis=1) == max(1, round(16 * share))).all()
    more = edit.hidden_share(min(1.0, share + 0.2), source, 16)
    assert (more | ~hidden).all()
    chance = hidden.mean()  # of every token alike: 64 samples, within five standard deviations
    spread = 5 * np.sqrt(64 * chance * (1 - chance))
    assert (abs(hidden.sum(axis=0) - 64 * chance) <= spread).all()
    np.testing.assert_array_equal(edit.hidden_share(share, source.take([3]), 16), hidden[3:4])


def test_pictures_are_laid_where_they_are_told() -> None:
    image = ImageSpec(6, 8, 2)
    given = np.arange(1, 61, dtype=np.uint8).reshape(1, 4, 5, 3)
    for top in range(-3, 6):
        for left in range(-4, 8):
            canvas, masks = edit.placed(image, given[0], top, left)
            for row, column in np.ndindex(6, 8):
                inside = 0 <= row - top < 4 and 0 <= column - left < 5
                assert masks[0, row, column] == (not inside)
                expected = given[0, row - top, column - left] if inside else edit.UNKNOWN
                assert (canvas[0, row, column] == expected).all()


def test_the_encoder_never_sees_masked_pixels(
    watched: tuple[Pipeline, dict[str, Watching]],
) -> None:
    pipeline, sessions = watched
    images = pictures(pipeline, 2)
    mask = np.zeros(images.shape[1:3], bool)
    mask[1:3, 2:7] = True
    options: dict[str, Any] = {"labels": [1, 2], "seed": 3}
    drawn = pipeline.inpaint(images, mask, **options)
    for feeds, image in zip(sessions["encoder"].feeds, images, strict=True):
        assert (feeds["images"][0][mask] == edit.UNKNOWN).all()
        np.testing.assert_array_equal(feeds["images"][0][~mask], image[~mask])
    other = images.copy()
    other[:, mask] = 255 - other[:, mask]
    np.testing.assert_array_equal(pipeline.inpaint(other, mask, **options), drawn)


def test_only_hidden_tokens_change_whatever_the_label(
    watched: tuple[Pipeline, dict[str, Watching]],
) -> None:
    pipeline, sessions = watched
    images = pictures(pipeline, 2)
    spec = pipeline.manifest.denoiser
    mask = np.zeros((2, *images.shape[1:3]), bool)
    mask[0, :4, :4], mask[1, 2:, 2:] = True, True
    hidden = edit.hidden_tokens(spec, pipeline.image, mask)
    known = pipeline.encode(np.where(mask[..., None], np.uint8(edit.UNKNOWN), images))
    results = []
    for labels in ([1, 1], [7, 7]):
        sessions["decoder"].feeds.clear()
        results.append(pipeline.inpaint(images, mask, labels, seed=1))
        tokens = np.concatenate([feeds["tokens"] for feeds in sessions["decoder"].feeds])
        np.testing.assert_array_equal(tokens[~hidden], known[~hidden])
        assert (tokens[hidden] != known[hidden]).any()
    assert (results[0] != results[1]).any()


def test_pixels_are_kept_where_asked_for(watched: tuple[Pipeline, dict[str, Watching]]) -> None:
    pipeline, _ = watched
    images = pictures(pipeline, 1)
    mask = np.zeros(images.shape[1:3], bool)
    mask[:, :3] = True
    drawn = pipeline.inpaint(images, mask, [4], seed=2)
    kept = pipeline.inpaint(images, mask, [4], seed=2, keep_pixels=True)
    np.testing.assert_array_equal(kept[:, mask], drawn[:, mask])
    np.testing.assert_array_equal(kept[:, ~mask], images[:, ~mask])
    assert (drawn[:, ~mask] != images[:, ~mask]).any()


def test_outpainting_is_inpainting_of_the_rest(
    watched: tuple[Pipeline, dict[str, Watching]],
) -> None:
    pipeline, _ = watched
    images = pictures(pipeline, 2)
    height, width = images.shape[1:3]
    canvas, mask = np.full_like(images, 9), np.ones((height, width), bool)
    canvas[:, :-2, 3:], mask[:-2, 3:] = images[:, 2:, :-3], False
    found = pipeline.outpaint(images, -2, 3, [5, 6], seed=8, keep_pixels=True)
    expected = pipeline.inpaint(canvas, mask, [5, 6], seed=8, keep_pixels=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[:, :-2, 3:], images[:, 2:, :-3])


@pytest.mark.parametrize("family", ["maskgit", "maskbit", "titok"])
def test_variations_keep_the_other_tokens(small_bundle: Callable[[str], Path], family: str) -> None:
    with mdruntime.load(small_bundle(family)) as pipeline:
        images = pictures(pipeline, 3)
        spec, known = pipeline.manifest.denoiser, pipeline.encode(images)
        hidden = edit.hidden_share(0.25, Randomness(6, range(4, 7)), spec.length)
        canvas = np.where(hidden, spec.mask_token, known)
        options: dict[str, Any] = {"seed": 6, "first_index": 4}
        found = pipeline.vary(images, 0.25, [1, 2, 3], **options)
        np.testing.assert_array_equal(found, pipeline.complete(canvas, [1, 2, 3], **options))
        one = pipeline.vary(images[1], 0.25, [2], seed=6, first_index=5, batch_size=1)
        np.testing.assert_array_equal(one, found[1:2])
        assert (pipeline.vary(images, 0.25, [1, 2, 3], seed=7) != found).any()
        everything = pipeline.vary(images, 1.0, [1, 2, 3], **options)
        np.testing.assert_array_equal(everything, pipeline.generate([1, 2, 3], **options))


def test_an_edit_does_not_depend_on_the_batch(
    watched: tuple[Pipeline, dict[str, Watching]],
) -> None:
    pipeline, _ = watched
    images = pictures(pipeline, 3)
    mask = np.zeros(images.shape[1:3], bool)
    mask[2:6, 2:6] = True
    together = pipeline.inpaint(images, mask, [1, 2, 3], seed=4)
    for index in range(3):
        alone = pipeline.inpaint(images[index], mask, [index + 1], seed=4, first_index=index)
        np.testing.assert_array_equal(alone, together[index : index + 1])


def test_a_mask_of_nothing_leaves_all_tokens(
    watched: tuple[Pipeline, dict[str, Watching]],
) -> None:
    pipeline, _ = watched
    images = pictures(pipeline, 1)
    found = pipeline.inpaint(images, np.zeros(images.shape[1:3]), [3])
    np.testing.assert_array_equal(found, pipeline.decode(pipeline.encode(images)))


def test_models_whose_tokens_have_no_place_refuse_regions(
    small_bundle: Callable[[str], Path],
) -> None:
    with mdruntime.load(small_bundle("titok")) as pipeline:
        images = pictures(pipeline, 1)
        with pytest.raises(SamplingError, match="belongs to no place of the image"):
            pipeline.inpaint(images, np.ones(images.shape[1:3]), [1])
        with pytest.raises(SamplingError, match="belongs to no place of the image"):
            pipeline.outpaint(images[:, 2:], 0, 0, [1])


def blank(*shape: int) -> NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


BAD: list[tuple[Callable[[Any], Any], str]] = [  # Any: some of these are what types forbid
    (lambda p: p.encode(blank(1, 9, 8, 3)), r"images must be 8 x 8 pixels.*got shape \(1, 9, 8"),
    (lambda p: p.encode(blank(8, 8)), "images must be 8 x 8 pixels"),
    (lambda p: p.encode(blank(8, 8, 4)), "images must be uint8"),
    (lambda p: p.encode(blank(0, 8, 8, 3)), "images must be uint8"),
    (lambda p: p.encode(np.zeros((8, 8, 3))), "images must be uint8.*got float64"),
    (lambda p: p.encode([blank(8, 8, 3), blank(9, 8, 3)]), "images must all have one size"),
    (lambda p: p.inpaint(blank(8, 8, 3), blank(8, 9)), "masks must have the size of the images"),
    (lambda p: p.inpaint(blank(8, 8, 3), blank(2, 8, 8)), r"8 x 8 pixels \(1 of them, or one"),
    (lambda p: p.inpaint(blank(2, 8, 8, 3), blank(3, 8, 8)), r"\(2 of them, or one for all\)"),
    (lambda p: p.inpaint(blank(8, 8, 3), blank(8, 8), [1, 2]), "labels must be 1, one per canvas"),
    (lambda p: p.inpaint(blank(8, 8, 3), blank(8, 8), [99]), "labels must be between 0 and 9"),
    (lambda p: p.inpaint(blank(8, 8, 3), blank(8, 8), prompts=["a"]), "takes no prompts"),
    (lambda p: p.outpaint(blank(4, 4, 3), 8, 0), "the image must overlap the canvas"),
    (lambda p: p.outpaint(blank(4, 4, 3), 0, -4), "the image must overlap the canvas"),
    (lambda p: p.outpaint(blank(9, 9, 3), 0, -1), "must leave some of the canvas"),
    (lambda p: p.outpaint(blank(4, 4, 3), 1.5, 0), "top and left must be whole numbers, got 1.5"),
    (lambda p: p.vary(blank(8, 8, 3), 0), "strength must be above 0 and at most 1, got 0"),
    (lambda p: p.vary(blank(8, 8, 3), 1.01), "strength must be above 0"),
    (lambda p: p.vary(blank(8, 8, 3), float("nan")), "strength must be above 0.*got nan"),
    (lambda p: p.vary(blank(8, 8, 3), "0.5"), "strength must be above 0.*got '0.5'"),
    (lambda p: p.vary(blank(8, 8, 3), 0.5, keep_pixels=True), "no sampling option 'keep_pixels'"),
]


@pytest.mark.parametrize(("ask", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_requests_are_refused_in_one_line(
    small_bundle: Callable[[str], Path], ask: Callable[[Pipeline], Any], text: str
) -> None:
    with (
        mdruntime.load(small_bundle("maskgit")) as pipeline,
        pytest.raises(SamplingError, match=text) as caught,
    ):
        ask(pipeline)
    assert len(str(caught.value).splitlines()) == 1


def test_a_bundle_without_an_encoder_says_so(small_bundle: Callable[[str], Path]) -> None:
    bundle = mdruntime.open_bundle(small_bundle("maskgit"))
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != "encoder"}
    blind = Pipeline(Runner(Bundle(bundle.folder, replace(bundle.manifest, graphs=graphs))))
    with pytest.raises(SamplingError, match="this bundle has no encoder"):
        blind.vary(blank(8, 8, 3), 0.5)
