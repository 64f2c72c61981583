"""``mdruntime edit``: files in, files out, and one line where that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import mdruntime
from mdruntime.cli import main
from mdruntime.pipeline import Pipeline

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(small_bundle: Callable[[str], Path]) -> Path:
    return small_bundle("maskgit")


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return mdruntime.load(bundle)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with pictures in it."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, (height, width) in {"a": (8, 8), "small": (4, 5), "wide": (24, 40)}.items():
        save(f"{name}.png", random.integers(0, 256, (height, width, 3)).astype(np.uint8))
    mask = np.zeros((8, 8), np.uint8)
    save("black.png", mask)
    mask[1:4, 5:7] = 255
    save("mask.png", mask)
    save("mask9.png", np.full((9, 9), 255, np.uint8))
    wide = np.zeros((24, 40), np.uint8)
    wide[:12, 8:20] = 255  # of the middle 24 x 24 that --fit keeps, the upper left quarter
    save("widemask.png", wide)
    Path("not.png").write_text("no picture")
    return tmp_path


def save(name: str, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(name)


def read(name: str) -> NDArray[np.uint8]:
    with Image.open(name) as image:
        return np.asarray(image)


def ran(capsys: Capture, *arguments: object) -> tuple[Any, str, str]:
    """Run the command line and return its exit code, stdout and stderr."""
    try:
        code: Any = main(["edit", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_every_kind_of_edit_is_the_pipelines(
    bundle: Path, pipeline: Pipeline, place: Path, capsys: Capture
) -> None:
    box = np.zeros((8, 8), bool)
    box[3:5, 1:7] = True
    options: dict[str, Any] = {"labels": [3], "seed": 5, "rounds": 3}
    expected = {
        "--mask mask.png": pipeline.inpaint(read("a.png"), read("mask.png"), **options),
        "--box 1 3 6 2": pipeline.inpaint(read("a.png"), box, **options),
        "--box 1 3 6 2 --keep-pixels": pipeline.inpaint(
            read("a.png"), box, keep_pixels=True, **options
        ),
        "--place -2 1": pipeline.outpaint(read("a.png"), 1, -2, **options),
        "--strength 0.4": pipeline.vary(read("a.png"), 0.4, **options),
    }
    for flags, images in expected.items():
        common = (bundle, "-i", "a.png", "-l", 3, "--seed", 5, "--rounds", 3, "--scale", 1)
        code, out, err = ran(capsys, *common, "-o", "out.png", *flags.split())
        assert code == 0
        assert out.startswith("wrote out.png: 1 image(s) in ")
        assert err == "the weights are random: what you see is noise\n"
        np.testing.assert_array_equal(read("out.png"), images[0])


def test_results_are_counted_and_carry_their_recipe(
    bundle: Path, pipeline: Pipeline, place: Path, capsys: Capture
) -> None:
    common = (bundle, "-i", "small.png", "-o", "out.png", "--place", 1, 2, "--scale", 1, "-n", 3)
    code, out, err = ran(capsys, *common, "-l", "2,3,4", "--batch-size", 2, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["images"] == 3
    assert facts["place"] == [1, 2]
    assert facts["image"] == "small.png"
    assert facts["mask"] is None
    with Image.open("out.png") as image:
        assert json.loads(image.info["mdruntime"]) == facts
        assert image.size == (2 * 10 + 2, 2 * 10 + 2)
    images = np.stack([read("small.png")] * 3)
    drawn = pipeline.outpaint(images, 2, 1, [2, 3, 4])
    np.testing.assert_array_equal(read("out.png")[2:10, 12:20], drawn[1])
    code, out, err = ran(capsys, *common, "-q")
    assert (code, out, err) == (0, "", "")


def test_image_and_mask_are_fitted_alike(
    bundle: Path, pipeline: Pipeline, place: Path, capsys: Capture
) -> None:
    common = (bundle, "-o", "out.png", "--scale", 1, "--fit", "--keep-pixels")
    code, _, _ = ran(capsys, *common, "-i", "wide.png", "--mask", "widemask.png")
    assert code == 0
    with Image.open("wide.png") as image:
        fitted = np.asarray(image.resize((8, 8), box=(8, 0, 32, 24)))
    same = (read("out.png") == fitted).all(axis=-1)
    assert same[5:].all()
    assert same[:, 5:].all()
    assert not same[:4, :4].all()


def test_pictures_are_turned_as_their_camera_says(
    bundle: Path, pipeline: Pipeline, place: Path, capsys: Capture
) -> None:
    with Image.open("a.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # the top of the picture is at the right of the file
        image.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    for name in ("a.png", "turned.png"):
        common = (bundle, "-i", name, "-o", f"new-{name}", "--strength", 0.2, "--scale", 1)
        assert ran(capsys, *common)[0] == 0
    np.testing.assert_array_equal(read("new-turned.png"), read("new-a.png"))


BAD: list[tuple[str, int, str]] = [
    ("-i a.png", 2, "one of the arguments --mask --box --place --strength is required"),
    ("-i a.png --strength 1 --mask mask.png", 2, "not allowed with argument"),
    ("-i no.png --strength 1", 2, "the image 'no.png' does not exist"),
    ("-i not.png --strength 1", 2, "'not.png' is not an image that can be read"),
    ("-i . --strength 1", 2, "'.' is not an image that can be read"),
    ("-i wide.png --strength 1", 2, "the image must be 8 x 8 pixels, got 40 x 24; --fit resizes"),
    ("-i a.png --mask mask9.png", 2, "the mask must have the size of the image, 8 x 8"),
    ("-i wide.png --mask mask9.png --fit", 2, "the size of the image, 40 x 24 pixels, got 9 x 9"),
    ("-i a.png --mask black.png", 2, "the mask 'black.png' is all black"),
    ("-i a.png --mask no.png", 2, "the image 'no.png' does not exist"),
    ("-i a.png --box 1 2 3", 2, "--box: expected 4 arguments"),
    ("-i a.png --box 1 2 3 x", 2, "--box: invalid int value: 'x'"),
    ("-i a.png --box 0 0 9 1", 2, "the box must lie within 8 x 8 pixels"),
    ("-i a.png --box -1 0 2 2", 2, "the box must lie within 8 x 8 pixels"),
    ("-i a.png --box 1 1 0 2", 2, "the box must lie within 8 x 8 pixels and hold one"),
    ("-i a.png --place 0 0", 2, "must leave some of the canvas"),
    ("-i a.png --place 8 0", 2, "must overlap the canvas"),
    ("-i a.png --strength 0", 2, "strength must be above 0 and at most 1, got 0"),
    ("-i a.png --strength 1 --keep-pixels", 2, "--keep-pixels needs a region"),
    ("-i a.png --strength 1 -l 11", 2, "labels must be between 0 and 9, got 11"),
    ("-i a.png --strength 1 -l 1,2 -n 3", 2, "labels must be one, or 3 as --count says, got 2"),
    ("-i a.png --strength 1 -p red", 2, "this model takes no prompts"),
    ("-i a.png --strength 1 -n 0", 2, "count must be between 1 and 4096, got 0"),
    ("-i a.png --strength 1 --batch-size 0", 2, "batch_size must be between 1 and 4096"),
    ("-i a.png --strength 1 --scale 1000", 2, "scale must be between 0 and 256"),
    ("-i a.png --strength 1 --rounds 0", 2, "rounds must be between"),
    ("-i a.png --strength 1 --provider abacus", 4, "provider must be one of"),
]


@pytest.mark.parametrize(("flags", "code", "text"), BAD, ids=[flags for flags, _, _ in BAD])
def test_bad_requests_get_one_line_and_leave_nothing(
    bundle: Path, place: Path, capsys: Capture, flags: str, code: int, text: str
) -> None:
    found, out, err = ran(capsys, bundle, "-o", "out.png", *flags.split())
    assert (found, out, len(err.splitlines())) == (code, "", 1)
    assert text in err
    assert not Path("out.png").exists()


def test_the_target_is_checked_first(bundle: Path, place: Path, capsys: Capture) -> None:
    for target, text in (("out.txt", "must end in one of"), ("no/out.png", "does not exist")):
        code, out, err = ran(capsys, bundle, "-i", "a.png", "--strength", 1, "-o", target)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert text in err


def test_bundles_that_cannot_be_edited_with_are_refused(
    small_bundle: Callable[[str], Path], place: Path, capsys: Capture
) -> None:
    request = ("-i", "a.png", "--fit", "-o", "out.png")
    code, out, err = ran(capsys, small_bundle("mdlm"), *request, "--strength", 1)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "this bundle makes text; fill gaps with: mdruntime generate --infill" in err
    code, out, err = ran(capsys, small_bundle("titok"), *request, "--box", 0, 0, 1, 1)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "make variations instead (vary, or --strength)" in err
    assert ran(capsys, small_bundle("titok"), *request, "--strength", 0.5)[0] == 0
