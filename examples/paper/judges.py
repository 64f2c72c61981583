"""Judges of what the shipped models make, for ``mdexport study --judge``.

Command   mdexport study BUNDLE --judge examples/paper/judges.py:glyphs (or :digits, :prose)
Time      glyphs: six minutes on a CPU core, once (see cache.py); digits: seconds; prose: ten
Needs     glyphs: the fonts of models/glyphs.py; digits: scikit-learn; prose: Debian's
          python3.11-doc, see models/prose.py

Images are judged by their Fréchet distance to real ones, in the features of a classifier that was
trained on other images; texts by how far two n-gram models tell them from real ones.
"""

import hashlib
import sys
from functools import partial as bind
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import prose as documents
from cache import Arrays, folder, kept
from classifier import Classifier, fit
from glyphs import CHARACTERS, dataset
from image_measures import ImageJudge, Labelled
from mdzoo.vqgan import load
from text_measures import TextJudge
from train_glyph_tokenizer import encode

__all__ = ["digits", "glyphs", "held_out_glyphs", "prose"]

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "models"
TOKENIZER = DATA / "mdzoo" / "weights" / "glyphs-tokenizer.safetensors"

SIDE = 32  # pixels of a glyph that the classifier sees; larger images are shrunk
WIDTHS = (32, 64, 128)  # of the classifier of glyphs
TRAINED_VARIANTS, TRAINED_SEED = 8, 0  # what models/train_glyphs.py draws
CLASSIFIER_SEED, REFERENCE_SEED = 1, 2  # other images of the same fonts
GLYPHS_EPOCHS, DIGITS_EPOCHS = 2, 60


def glyphs(path: Path | None = None, *, partial: bool = False) -> ImageJudge:
    """Return the judge of letters and digits.

    Its classifier and its reference come from the training fonts, in other drawings than those the
    model was trained on. The reference went through the model's tokenizer and back: no sampler can
    draw what the decoder cannot, and a constant distance would hide differences.

    Args:
        path: file that keeps what it needs; None is one in the user's cache folder.
        partial: do with the fonts that are here.

    Raises:
        FontError: fonts are missing.
    """
    path = path or folder() / ("glyphs-partial.npz" if partial else "glyphs.npz")
    what = "judge of glyphs: drawing letters and training a classifier (six minutes, once)"
    arrays = kept(path, _key(partial), bind(_glyph_arrays, partial=partial), what)
    model = _glyph_classifier()
    weights = {name: torch.from_numpy(arrays[f"model.{name}"]) for name in model.state_dict()}
    model.load_state_dict(weights)
    trained = Labelled(*(torch.from_numpy(arrays[name]) for name in ("images", "labels")))
    return ImageJudge(model.eval(), torch.from_numpy(arrays["reference"]), trained)


def held_out_glyphs(*, partial: bool = False) -> Labelled:
    """Return an image of every character of every held-out font; see ``glyphs``."""
    return _drawn("held-out", 1, REFERENCE_SEED, partial=partial)


def digits() -> ImageJudge:
    """Return the judge of scikit-learn's digits.

    Its classifier is trained on every other training image; those between are its reference.
    """
    from train_digits import split

    images, labels, *_ = split()
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    trained = Labelled(torch.from_numpy(pixels), torch.from_numpy(labels))
    model = Classifier(8, classes=10, widths=(32, 64), paper=0)
    fit(model, trained.images[::2], trained.labels[::2], DIGITS_EPOCHS, CLASSIFIER_SEED)
    return ImageJudge(model, trained.images[1::2], trained)


def prose(*, partial: bool = False) -> TextJudge:
    """Return the judge of sentences about Python.

    Args:
        partial: do with the docstrings of the standard library.

    Raises:
        CorpusError: the documentation is missing.
    """
    print("judge of prose: reading the documents (ten seconds)", file=sys.stderr, flush=True)
    train, held_out = (
        [some.text for some in documents.corpus(use, partial=partial)]
        for use in ("train", "held-out")
    )
    return TextJudge(train, held_out)


def _glyph_classifier() -> Classifier:
    return Classifier(SIDE, classes=len(CHARACTERS), widths=WIDTHS)


def _glyph_arrays(*, partial: bool) -> Arrays:
    own = _drawn("train", TRAINED_VARIANTS, CLASSIFIER_SEED, partial=partial)
    model = fit(_glyph_classifier(), own.images, own.labels, GLYPHS_EPOCHS, CLASSIFIER_SEED)
    reference = _brought_back(_drawn("train", 1, REFERENCE_SEED, partial=partial).images)
    trained = _drawn("train", TRAINED_VARIANTS, TRAINED_SEED, partial=partial)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {"reference": reference, "images": trained.images, "labels": trained.labels}
    return {name: _array(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def _brought_back(images: torch.Tensor) -> torch.Tensor:
    """Return images uint8 (count, SIDE, SIDE) as the tokenizer of the glyphs brings them back."""
    codec = load(load_file(TOKENIZER), source=TOKENIZER.name)
    parts = [codec.decode(encode(codec, some)) for some in torch.split(images, 200)]
    grey_levels = (torch.cat(parts).clamp(-1, 1).mean(dim=1) + 1) * 127.5
    return grey_levels.round().to(torch.uint8)


def _array(tensor: torch.Tensor) -> NDArray[np.generic]:
    return tensor.numpy()


def _drawn(use: str, variants: int, seed: int, *, partial: bool) -> Labelled:
    images, labels = dataset(use, side=SIDE, variants=variants, seed=seed, partial=partial)
    return Labelled(torch.from_numpy(images), torch.from_numpy(labels))


def _key(partial: bool) -> str:
    """Return what decides the arrays of ``_glyph_arrays``."""
    files = (DATA / "glyphs.py", DATA / "glyph_fonts.tsv", HERE / "classifier.py", TOKENIZER)
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    seeds = (TRAINED_SEED, CLASSIFIER_SEED, REFERENCE_SEED)
    return str((partial, SIDE, WIDTHS, TRAINED_VARIANTS, GLYPHS_EPOCHS, seeds, hashes))
