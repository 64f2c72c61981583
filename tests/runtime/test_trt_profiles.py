"""Shapes that engines are built for, and how requests are padded to them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mdruntime.errors import BundleError
from mdruntime.manifest import (
    DenoiserSpec,
    GraphSpec,
    Manifest,
    PromptSpec,
    TensorSpec,
    TextSpec,
    VerificationRecord,
    WeightsSpec,
)
from mdruntime.records import from_json, to_json
from mdruntime.sampling import Sampling
from mdruntime.trt.fitting import Ranges, fit, largest_batch, padded_to
from mdruntime.trt.profiles import BatchRange, Profile, profiles

BUCKETS = (8, 16, 17)
UP_TO_8 = (BatchRange(1, 1), BatchRange(2, 8))


def tensor(name: str, *shape: int | str, dtype: str = "int32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def graph(
    *inputs: TensorSpec,
    caches: tuple[tuple[str, str], ...] = (),
    outputs: tuple[TensorSpec, ...] = (),
) -> GraphSpec:
    return GraphSpec("graph.onnx", 23, {}, inputs, outputs, caches, ())


def denoiser_graph(canvas: int | str = 17, *more: TensorSpec) -> GraphSpec:
    """The names of axes are the tracer's: they differ between inputs that mean the same."""
    return graph(
        tensor("tokens", "s15", "2*s18"),
        tensor("positions", "s15", "s18"),
        tensor("columns", "s15", "s79"),
        tensor("conditional", "s20"),
        tensor("unconditional", "s20"),
        *(tensor(n, "s20", dtype="float32") for n in ("guidance", "temperature", "beta")),
        tensor("token_beta", "s20", dtype="float32"),
        tensor("uniforms", "s20", "2*s79", dtype="float32"),
        *more,
        tensor("past.0.key", "s15", 4, canvas, 24, dtype="float16"),
        tensor("past.0.value", "s15", 4, canvas, 24, dtype="float16"),
        caches=(("past.0.key", "present.0.key"), ("past.0.value", "present.0.value")),
    )


def manifest(spec: dict[str, Any], graphs: dict[str, GraphSpec], **changes: Any) -> Manifest:
    sizes = {
        "length": 16,
        "canvas": 17,
        "first": 1,
        "grid": (4, 4),
        "patch": (1, 1),
        "codebook": 32,
        "mask_token": 32,
        "classes": 10,
        "layers": 1,
        "context": (),
    }
    values: dict[str, Any] = {
        "format": 4,
        "name": "toy",
        "family": "toy",
        "task": "test",
        "precision": "fp16",
        "weights": WeightsSpec("random", 0, {}, 1, "none"),
        "denoiser": DenoiserSpec(**{**sizes, **spec}),
        "image": None,
        "text": None,
        "prompt": None,
        "graphs": graphs,
        "buckets": BUCKETS,
        "presets": {"default": Sampling()},
        "files": {"graph.onnx": None},
        "verification": VerificationRecord("none", {}, {}),
        "toolchain": {},
        "study": None,
    }
    return Manifest(**{**values, **changes})


def spans(profile: Profile, name: str) -> list[tuple[int, ...]]:
    """Smallest, usual and largest size, axis by axis."""
    return list(zip(*profile.shapes[name], strict=True))


def test_every_bucket_and_range_of_batches_has_a_profile() -> None:
    made = profiles(manifest({}, {"denoiser": denoiser_graph()}), "denoiser", UP_TO_8)
    assert [spans(one, "positions") for one in made] == [
        [rows, (m, m, m)] for rows in ((1, 2, 2), (2, 16, 16)) for m in BUCKETS
    ]
    assert len({one.name for one in made}) == 6
    for one in made[:3]:
        assert spans(one, "conditional") == spans(one, "beta") == [(1, 1, 1)]
    for one in made[3:]:
        assert spans(one, "conditional") == [(2, 8, 8)]
        assert spans(one, "past.0.key") == [(2, 16, 16), (4,) * 3, (17,) * 3, (24,) * 3]


def test_wanted_columns_are_free_up_to_the_rows_of_the_bucket() -> None:
    first, *_ = profiles(manifest({}, {"denoiser": denoiser_graph()}), "denoiser")
    assert spans(first, "columns") == [(1, 2, 2), (1, 8, 8)]
    assert spans(first, "uniforms") == [(1, 1, 1), (1, 8, 8)]


def test_slots_multiply_tokens_and_uniforms_only() -> None:
    found = manifest({"patch": (1, 2), "length": 32}, {"denoiser": denoiser_graph()})
    _, middle, _ = profiles(found, "denoiser")
    assert spans(middle, "tokens")[1] == (32, 32, 32)
    assert spans(middle, "uniforms")[1] == (2, 32, 32)
    assert spans(middle, "positions")[1] == (16, 16, 16)
    assert spans(middle, "columns")[1] == (1, 16, 16)


@pytest.mark.parametrize(
    ("spec", "more", "twice"),
    [
        ({}, {}, True),
        ({"unconditional": False}, {}, False),
        ({"classes": 0}, {}, False),
        ({"classes": 0}, {"text": TextSpec("bytes")}, True),
        ({"classes": 0}, {"prompt": PromptSpec("tokenizer.json", 40, 8, 1, 2, 0)}, True),
    ],
)
def test_rows_are_doubled_where_guidance_is_possible(
    spec: dict[str, Any], more: dict[str, Any], twice: bool
) -> None:
    made = profiles(manifest(spec, {"denoiser": denoiser_graph()}, **more), "denoiser", UP_TO_8)
    assert spans(made[0], "positions")[0] == ((1, 2, 2) if twice else (1, 1, 1))
    assert spans(made[-1], "positions")[0] == ((2, 16, 16) if twice else (2, 8, 8))


def test_canvases_of_text_are_free_and_so_are_full_passes_over_them() -> None:
    found = manifest({"flexible": True}, {"denoiser": denoiser_graph("s44")})
    small, _, full = profiles(found, "denoiser")
    assert spans(small, "past.0.key")[2] == spans(full, "past.0.value")[2] == (1, 17, 17)
    assert spans(small, "positions")[1] == (8, 8, 8)
    assert spans(full, "positions")[1] == (1, 17, 17)


def test_conditions_have_a_row_each_and_visible_columns_are_some_of_the_rows() -> None:
    more = tensor("visible", "s15", "s3"), tensor("condition.text", "s15", 8, 24, dtype="float16")
    made = profiles(manifest({}, {"denoiser": denoiser_graph(17, *more)}), "denoiser", UP_TO_8)
    assert spans(made[-1], "visible") == [(2, 16, 16), (1, 9, 17)]
    assert spans(made[-1], "condition.text") == [(2, 16, 16), (8, 8, 8), (24, 24, 24)]


def test_condition_graphs_see_up_to_two_conditions_a_sample_and_images_come_one_by_one() -> None:
    graphs = {
        "condition": graph(tensor("prompt", "rows", 8)),
        "decoder": graph(tensor("tokens", "batch", 16)),
        "encoder": graph(tensor("images", "batch", 8, 8, 3, dtype="uint8")),
    }
    found = manifest({}, graphs)
    alone, several = profiles(found, "condition", UP_TO_8)
    assert spans(alone, "prompt") == [(1, 2, 2), (8, 8, 8)]
    assert spans(several, "prompt") == [(2, 9, 16), (8, 8, 8)]
    for name, inner in (("decoder", (16,)), ("encoder", (8, 8, 3))):
        (one,) = profiles(found, name, UP_TO_8)
        assert set(*one.shapes.values()) == {(1, *inner)}


def test_an_axis_of_unknown_meaning_is_refused() -> None:
    strange = denoiser_graph(17, tensor("time", "s15", "s99", dtype="float32"))
    with pytest.raises(BundleError, match=r"'time' has the shape .*'s15'; this bundle is of anoth"):
        profiles(manifest({}, {"denoiser": strange}), "denoiser")
    decoder = graph(tensor("tokens", "batch", "length"))
    with pytest.raises(BundleError, match=r"'tokens' has .* its axis 'length'"):
        profiles(manifest({}, {"decoder": decoder}), "decoder")


def test_profiles_survive_json() -> None:
    for one in profiles(manifest({}, {"denoiser": denoiser_graph()}), "denoiser", UP_TO_8):
        assert from_json(Profile, to_json(one)) == one


def ranges(spec: dict[str, Any] | None = None, canvas: int | str = 17) -> list[Ranges]:
    found = manifest(spec or {}, {"denoiser": denoiser_graph(canvas)})
    return [one.shapes for one in profiles(found, "denoiser", UP_TO_8)]


def request(rows: int, batch: int, m: int, k: int, slots: int = 1, canvas: int = 17) -> Any:
    """Shapes of a pass; caches as the session adds them."""
    return {
        "tokens": (rows, m * slots),
        "positions": (rows, m),
        "columns": (rows, k),
        **dict.fromkeys(("conditional", "unconditional", "guidance", "temperature"), (batch,)),
        **dict.fromkeys(("beta", "token_beta"), (batch,)),
        "uniforms": (batch, k * slots),
        "past.0.key": (rows, 4, canvas, 24),
        "past.0.value": (rows, 4, canvas, 24),
    }


@pytest.mark.parametrize("guided", [1, 2])
def test_every_pass_fits_the_smallest_bucket_that_holds_it(guided: int) -> None:
    made = ranges()
    passes = [(b, m, k) for b in range(1, 9) for m in range(1, 18) for k in range(1, m + 1)]
    for batch, m, k in passes:
        found = fit(made, request(guided * batch, batch, m, k))
        assert found is not None
        bucket = min(size for size in BUCKETS if size >= m)
        assert found.profile == BUCKETS.index(bucket) + (0 if batch == 1 else 3)
        assert found.shapes["tokens"] == found.shapes["positions"] == (guided * batch, bucket)
        columns = found.shapes["columns"][1]
        assert k <= columns < k + -(-bucket // 8)
        assert columns <= bucket
        assert found.shapes["uniforms"] == (batch, columns)


def test_wanted_columns_come_in_few_sizes() -> None:
    found = [fit(ranges(), request(1, 1, 17, k)) for k in range(1, 18)]
    assert {one.shapes["columns"][1] for one in found if one} == {3, 6, 9, 12, 15, 17}


@pytest.mark.parametrize(("rows", "batch", "m"), [(9, 9, 8), (17, 8, 8), (1, 1, 18)])
def test_what_no_profile_takes_fits_nowhere(rows: int, batch: int, m: int) -> None:
    assert fit(ranges(), request(rows, batch, m, 1)) is None
    assert largest_batch(ranges()) == 8


def test_full_passes_over_texts_are_padded_to_small_buckets_only() -> None:
    graphs = {"denoiser": denoiser_graph("s44")}
    sizes = {"flexible": True, "canvas": 64, "length": 64}
    text = manifest(sizes, graphs, buckets=(8, 16, 64), text=TextSpec("bytes"))
    made = [one.shapes for one in profiles(text, "denoiser")]
    for canvas, profile, rows in ((5, 0, 8), (13, 1, 16), (20, 2, 20), (64, 2, 64)):
        found = fit(made, request(1, 1, canvas, canvas, canvas=canvas))
        assert found is not None
        assert (found.profile, found.shapes["positions"]) == (profile, (1, rows))
        assert found.shapes["past.0.key"] == (1, 4, canvas, 24)


def test_padding_repeats_the_last_row_with_all_its_slots() -> None:
    shapes = request(2, 2, 2, 1, slots=2)
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
    target = np.zeros((2, 8), np.int32)
    padded_to(target, "tokens", tokens, shapes)
    assert target.tolist() == [[1, 2, 3, 4, 3, 4, 3, 4], [5, 6, 7, 8, 7, 8, 7, 8]]
    target = np.zeros((2, 3), np.int32)
    padded_to(target, "positions", np.array([[4, 2], [0, 9]], np.int32), shapes)
    assert target.tolist() == [[4, 2, 2], [0, 9, 9]]


def test_inputs_of_another_type_are_not_converted() -> None:
    with pytest.raises(TypeError, match="float64"):
        padded_to(np.zeros(3, np.float32), "beta", np.zeros(3), {})


def test_the_first_profile_is_the_one_of_the_smallest_bucket_and_batch() -> None:
    found = manifest({}, {"denoiser": denoiser_graph()})
    assert profiles(found, "denoiser") == profiles(found, "denoiser", UP_TO_8)[:3]
    assert replace(profiles(found, "denoiser")[0], name="").shapes["tokens"][0] == (1, 8)
