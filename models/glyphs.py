"""Images of letters and digits: the data of the ``glyphs`` model.

The 62 characters 0-9, A-Z and a-z are drawn with the font files that ``glyph_fonts.tsv`` lists:
those that matplotlib bundles, and those of Debian's packages of the same table. Whole families
are held out, so no style of the evaluation was trained on. All characters of a font keep their
relative sizes and stand on one line, since only these tell c from C.

    apt-get install $(python models/glyphs.py --packages)    installs the fonts
    python models/glyphs.py --sheet glyphs.png               draws a sample of the data
"""

import argparse
import csv
import hashlib
import string
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""The class of a character is its index here."""

TABLE = Path(__file__).with_name("glyph_fonts.tsv")
ROOTS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path.home() / ".fonts")

# Shares of the side of an image.
CAPITAL = 0.56  # height of an H
BASELINE = 0.73  # of all characters, from the top
SHIFT = 0.04  # largest, along either axis

TURN = 4.0  # largest rotation in degrees
SHEAR = 0.08  # largest horizontal move per vertical one
SIZE = 0.06  # largest change of the logarithm of height and, by itself, of width
FINE = 4  # pixels of a master along one pixel of an image

Images = NDArray[np.uint8]  # (count, side, side): ink is 0 and paper 255
Labels = NDArray[np.int64]  # (count,)


class FontError(RuntimeError):
    """A font file of the table is not on this machine."""


@dataclass(frozen=True, slots=True)
class Face:
    """A font file of the table."""

    package: str
    licence: str
    file: str
    sha256: str  # its first 16 digits
    use: str  # "train" or "held-out"


@cache
def table() -> tuple[Face, ...]:
    """Return the fonts of the data set."""
    with TABLE.open(encoding="utf-8") as lines:
        return tuple(Face(**row) for row in csv.DictReader(lines, delimiter="\t"))


def packages() -> list[str]:
    """Return Debian's packages of the table; matplotlib's own fonts come with it."""
    return sorted({face.package for face in table()} - {"matplotlib"})


def installed(use: str, *, partial: bool = False) -> dict[Face, Path]:
    """Find the font files of one use.

    Args:
        use: "train" or "held-out".
        partial: do with those that are here.

    Raises:
        FontError: a file is missing or another version; with ``partial``, all of them are.
    """
    wanted = [face for face in table() if face.use == use]
    found = {face: path for face in wanted if (path := _find(face)) is not None}
    absent = [face for face in wanted if face not in found]
    if absent and not (partial and found):
        raise FontError(
            f"all {len(wanted)} {use} fonts of {TABLE.name} must be installed in the version "
            f"listed, found {len(found)}; get the packages "
            f"{' '.join(sorted({face.package for face in absent}))}"
        )
    return found


def _find(face: Face) -> Path | None:
    for path in _files().get(face.file, ()):
        if hashlib.sha256(path.read_bytes()).hexdigest().startswith(face.sha256):
            return path
    return None


@cache
def _files() -> dict[str, list[Path]]:
    """Return all font files of this machine by their names."""
    plot = find_spec("matplotlib")
    bundled = [Path(plot.origin).parent / "mpl-data" / "fonts"] if plot and plot.origin else []
    found: dict[str, list[Path]] = {}
    for root in (*bundled, *ROOTS):
        for path in sorted(root.rglob("*.?tf")):
            found.setdefault(path.name, []).append(path)
    return found


def masters(path: Path, side: int) -> list[Image.Image]:
    """Draw all characters of a font in white on black, larger than needed.

    Args:
        path: of the font file.
        side: pixels of the images to be; those returned have ``FINE`` times as many.
    """
    size = side * FINE
    # The basic layout is the same whether or not libraqm is here.
    probe = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = probe.getbbox("H", anchor="ls")
    font = probe.font_variant(size=CAPITAL * size**2 / (bottom - top))
    drawn = []
    for character in CHARACTERS:
        left, _, right, _ = font.getbbox(character, anchor="ls")
        image = Image.new("L", (size, size))
        place = ((size - left - right) / 2, BASELINE * size)
        ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="ls")
        drawn.append(image)
    return drawn


def vary(count: int, side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw maps from points of an image to those of its master.

    Returns:
        (count, 6): rows a, b, c, d, e, f of (x, y) -> (a x + b y + c, d x + e y + f), in pixels
        of a master.
    """
    centre = np.array([0.5, BASELINE - CAPITAL / 2]) * side * FINE
    turn, shear = rng.uniform(-1, 1, (2, count)) * [[np.deg2rad(TURN)], [SHEAR]]
    wide, high = np.exp(rng.uniform(-SIZE, SIZE, (2, count)))
    shift = rng.uniform(-SHIFT, SHIFT, (count, 2)) * side * FINE
    cos, sin = np.cos(turn), np.sin(turn)
    # Scales after a shear after a rotation, all about the centre.
    linear = np.array([[wide * (cos + shear * sin), wide * (shear * cos - sin)],
                       [high * sin, high * cos]])  # fmt: skip
    linear = linear.transpose(2, 0, 1)
    constant = centre - np.einsum("nij,nj->ni", linear, centre + shift)
    return np.concatenate([linear, constant[..., None]], axis=-1).reshape(count, 6)


def draw(face: Face, path: Path, side: int, variants: int, seed: int) -> Images:
    """Return images (62 * variants, side, side) of a font, character by character.

    They follow from the seed and the font alone, whatever other fonts there are.
    """
    rng = np.random.default_rng([seed, zlib.crc32(face.sha256.encode())])
    images = np.empty((len(CHARACTERS), variants, side, side), np.uint8)
    for row, master in zip(images, masters(path, side), strict=True):
        for image, numbers in zip(row, vary(variants, side, rng), strict=True):
            image[:] = _shrink(master, numbers, side)
    return images.reshape(-1, side, side)


def _shrink(master: Image.Image, numbers: NDArray[np.float64], side: int) -> Images:
    """Map a master and shrink it; it is sampled twice along every pixel of the image."""
    step = FINE / 2
    scaled = numbers.reshape(2, 3) * [step, step, 1]
    moved = master.transform(
        (2 * side, 2 * side),
        Image.Transform.AFFINE,
        tuple(scaled.flat),
        Image.Resampling.BILINEAR,
    )
    return 255 - np.asarray(moved.reduce(2))


def dataset(
    use: str, *, side: int, variants: int, seed: int, partial: bool = False
) -> tuple[Images, Labels]:
    """Draw ``variants`` images of each character of each font of one use.

    Args:
        use: "train" or "held-out".
        side: pixels.
        variants: images of a character of a font.
        seed: of their sizes, places and slants.
        partial: do with the fonts that are here.

    Raises:
        FontError: fonts are missing.
    """
    faces = installed(use, partial=partial)
    images = [draw(face, path, side, variants, seed) for face, path in faces.items()]
    labels = np.repeat(np.arange(len(CHARACTERS)), variants)
    return np.concatenate(images), np.tile(labels, len(faces))


def sheet(images: Images, columns: int) -> Images:
    """Lay images (count, side, side) out row by row; what is left over in the last row goes."""
    rows, side = len(images) // columns, images.shape[1]
    grid = images[: rows * columns].reshape(rows, columns, side, side)
    return grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)


def _examples(side: int) -> Iterator[Images]:
    for use, every in (("train", 16), ("held-out", 5)):
        for face, path in list(installed(use, partial=True).items())[::every]:
            yield draw(face, path, side, 1, 0)


def main() -> None:
    """Name the packages, or draw a sample: a row a font, the held-out ones last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--packages", action="store_true")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--side", type=int, default=32)
    options = parser.parse_args()
    if options.packages:
        sys.stdout.write(" ".join(packages()) + "\n")
    if options.sheet:
        rows = np.concatenate(list(_examples(options.side)))
        Image.fromarray(sheet(rows, len(CHARACTERS))).save(options.sheet)


if __name__ == "__main__":
    main()
