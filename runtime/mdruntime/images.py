"""Image files: read, and written as contact sheets and animations, with Pillow if installed."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.errors import ProviderError, SamplingError

__all__ = [
    "check_folder",
    "check_target",
    "enlarge",
    "fitted",
    "read_image",
    "save_animation",
    "save_image",
    "sheet",
]

Image = NDArray[np.uint8]  # (height, width, 3)

_STILL = (".png", ".jpg", ".jpeg", ".webp")
_MOVING = (".gif", ".png", ".webp")
_SMALLEST_SIDE = 64  # images below it are enlarged, to be looked at
_GAP = 2


def _pillow() -> Any:
    try:
        from PIL import Image as pillow  # noqa: N813 - the module is named like a class
    except ImportError:
        raise ProviderError(
            "image files need Pillow; install it with: python -m pip install pillow"
        ) from None
    return pillow


def check_target(path: Path, *, moving: bool = False) -> None:
    """Refuse a file that could not be written, before an image is generated for it.

    Raises:
        SamplingError: a suffix that is no image format, or a folder that does not exist.
        PermissionError: a folder that cannot be written to.
        ProviderError: Pillow is not installed.
    """
    _pillow()
    suffixes = _MOVING if moving else _STILL
    if path.suffix.lower() not in suffixes:
        raise SamplingError(f"{str(path)!r} must end in one of {', '.join(suffixes)}")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Refuse a file that could not be written for its folder's sake.

    Raises:
        SamplingError: the folder does not exist, or the path is a folder itself.
        PermissionError: the folder cannot be written to.
    """
    if not path.parent.is_dir():
        raise SamplingError(f"the folder {str(path.parent)!r} does not exist; create it first")
    if path.is_dir():
        raise SamplingError(f"{str(path)!r} is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {str(path.parent)!r} cannot be written to; name another")


def read_image(path: Path) -> Image:
    """Read an image file, upright as its camera says.

    Raises:
        SamplingError: there is no such file, or it is not an image.
        ProviderError: Pillow is not installed.
    """
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise SamplingError(f"the image {str(path)!r} does not exist") from None
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
        raise SamplingError(f"{str(path)!r} is not an image that can be read ({error})") from None


def fitted(image: Image, height: int, width: int) -> Image:
    """Return an image resized and cropped at its centre to a size."""
    from PIL import ImageOps

    page = _pillow().fromarray(image)
    return np.asarray(ImageOps.fit(page, (width, height)))


def enlarge(images: NDArray[np.uint8], scale: int = 0) -> NDArray[np.uint8]:
    """Return images (..., height, width, 3) with every pixel repeated ``scale`` times.

    A scale of 0 brings small images to about 64 pixels and leaves others as they are.
    """
    if scale == 0:
        scale = max(1, -(-_SMALLEST_SIDE // min(images.shape[-3:-1])))
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)


def sheet(images: NDArray[np.uint8], columns: int = 0) -> Image:
    """Return one image with all of ``images`` (batch, height, width, 3), row by row.

    Args:
        images: uint8.
        columns: images in a row; 0 makes the sheet about square.
    """
    batch, height, width, _ = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(batch))), batch)
    rows = -(-batch // columns)
    gap = _GAP if batch > 1 else 0
    page = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        page[top : top + height, left : left + width] = image
    return page


def save_image(path: Path, image: Image, facts: Mapping[str, Any]) -> None:
    """Write an image; a PNG carries ``facts`` as JSON in its text chunk ``mdruntime``."""
    pillow = _pillow()
    arguments = {}
    if path.suffix.lower() == ".png":
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("mdruntime", json.dumps(facts))
        arguments["pnginfo"] = text
    _replace(path, lambda target: pillow.fromarray(image).save(target, **arguments))


def save_animation(path: Path, frames: Sequence[Image], frame_ms: int = 250) -> None:
    """Write frames as an animated GIF, PNG or WebP that loops; the last one stays for a while."""
    pillow = _pillow()
    first, *others = [pillow.fromarray(frame) for frame in frames]
    durations = [frame_ms] * len(others) + [6 * frame_ms]
    _replace(
        path,
        lambda target: first.save(
            target, save_all=True, append_images=others, duration=durations, loop=0
        ),
    )


def _replace(path: Path, write: Any) -> None:
    """Write beside the target and rename: a file with the final name is whole."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
