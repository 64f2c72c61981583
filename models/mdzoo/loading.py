"""From an entry of the catalogue and a user's files to a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mdruntime.manifest import ImageSpec, TextSpec, WeightsSpec
from mdruntime.study import presets_of
from mdruntime.tokenizer import BYTES, IDS
from mdzoo import amused_direct, checkpoint, folder
from mdzoo.amused_direct import DirectAmused
from mdzoo.checkpoint import CheckpointError
from mdzoo.decoder import Images as Pixels
from mdzoo.decoder import Tokens
from mdzoo.entry import Entry, Images, Model, Sources
from mdzoo.family import ZooDenoiser
from mdzoo.palette import Palette, PaletteTokens
from mdzoo.shipped import packaged, shipped_study
from mdzoo.texts import prompt_files, text_files

__all__ = ["load", "load_denoiser", "load_direct", "unused_tensors"]


WRAPPED = ("backbone.", "model.")
"""What modules around a denoiser put before all of its names."""

UNUSED: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
"""Tensors of a file that its model has no place for, where ``extra_tensors`` allowed them."""


def load(entry: Entry, sources: Sources) -> Model:
    """Load a model with all that belongs to it.

    Args:
        entry: from the catalogue.
        sources: files or a seed; the shipped weights where there are any and nothing is given.

    Raises:
        CheckpointError: a file is missing, damaged, or of another architecture.
    """
    denoiser, state = _denoiser(entry, sources)
    decoder = encoder = image = text = prompt = None
    extra: dict[str, bytes] = {}
    if entry.images is not None:
        codec = _codec(entry, entry.images, sources, denoiser, state)
        decoder, encoder, image = _pictures(codec, denoiser)
    if entry.text is not None:
        text, extra = text_files(
            _text_of(entry, entry.text, denoiser),
            _text_tokenizer(entry, sources),
            _text_fallback(sources, denoiser),
            denoiser.spec.codebook,
        )
    if entry.task == "text to image":
        prompt, extra = prompt_files(sources.checkpoint, denoiser.config.text)
    study = None
    if sources.random_seed is None and sources.checkpoint is None:
        study = shipped_study(entry.name)
    return Model(
        name=entry.name,
        family=entry.family.name,
        task=entry.task,
        denoiser=denoiser,
        decoder=decoder,
        encoder=encoder,
        image=image,
        text=text,
        prompt=prompt,
        files=extra,
        weights=_weights(entry, sources, denoiser),
        presets={**entry.presets, **(presets_of(study) if study else {})},
        study=study,
    )


def load_denoiser(entry: Entry, sources: Sources) -> ZooDenoiser:
    """Load a denoiser alone, in float32.

    Raises:
        CheckpointError: the file is missing, damaged, or of another architecture.
    """
    return _denoiser(entry, sources)[0]


def _denoiser(entry: Entry, sources: Sources) -> tuple[ZooDenoiser, Mapping[str, Tensor]]:
    """Return a denoiser, and the tensors of the file it comes from."""
    known = entry.family.settings
    for name in sources.settings:
        if name not in known:
            names = f"one of {', '.join(known)}" if known else "nothing for this model"
            raise CheckpointError(f"--set must name {names}, got {name!r}")
    if sources.random_seed is not None:
        return _random_denoiser(entry, sources), {}
    family, path = entry.family, _path(entry, sources)
    if family.folder is not None:
        if sources.settings:
            raise CheckpointError("the folder's configs state all sizes; leave --set out")
        return cast(ZooDenoiser, family.folder(path)), {}
    state = checkpoint.read(path, strip=(*family.prefixes, *WRAPPED), ema=True)
    model = family.build(family.infer(state, entry.config, sources.settings))
    ours = family.from_published(state)
    if sources.extra_tensors:
        places = model.state_dict()
        UNUSED[model] = tuple(name for name in ours if name not in places)
        ours = {name: tensor for name, tensor in ours.items() if name in places}
    checkpoint.fit(model, ours, source=path.name)
    return cast(ZooDenoiser, model.eval()), state


def unused_tensors(denoiser: object) -> tuple[str, ...]:
    """Return the names of tensors in a denoiser's file that it has no place for."""
    return UNUSED.get(denoiser, ()) if isinstance(denoiser, nn.Module) else ()


def load_direct(entry: Entry, sources: Sources) -> DirectAmused:
    """Load the part of a text-to-image denoiser that recordings of its inputs are about.

    Raises:
        CheckpointError: a model without such a part, or a bad file.
    """
    if entry.task != "text to image":
        raise CheckpointError(f"{entry.name} reads no text: record tokens, labels and logits")
    return amused_direct.load_direct(_path(entry, sources), entry.config, sources.settings)


def _random_denoiser(entry: Entry, sources: Sources) -> ZooDenoiser:
    if sources.settings:
        raise CheckpointError("--set describes a checkpoint; random weights have the model's sizes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sources.random_seed or 0)
        model = entry.family.build(entry.config)
        entry.family.initialise(model)
    return cast(ZooDenoiser, model.eval())


def _path(entry: Entry, sources: Sources) -> Path:
    if sources.checkpoint is not None:
        return sources.checkpoint
    if not entry.shipped:
        raise CheckpointError(_missing(entry, "--checkpoint"))
    return packaged(entry.shipped)


def _missing(entry: Entry, option: str) -> str:
    wanted = "; ".join(f"{name} FILE from {where}" for name, where in entry.files.items())
    return (
        f"{entry.name} needs {option}: its weights are published at {wanted}. "
        "Or try it with --random-weights 0"
    )


def _codec(
    entry: Entry,
    images: Images,
    sources: Sources,
    denoiser: ZooDenoiser,
    state: Mapping[str, Tensor],
) -> Any:
    """Return the tokenizer that belongs to a denoiser."""
    if sources.random_seed is not None or not (images.inside or entry.needs_tokenizer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sources.random_seed or 0)
            return images.random(denoiser.config)
    path = _path(entry, sources)
    if images.inside == "file" and sources.tokenizer is None:
        codec = images.load(state, source=path.name)
    else:
        inside = folder.root(path) / images.inside if images.inside else None
        given = sources.tokenizer or inside or _shipped_tokenizer(entry)
        if given is None:
            raise CheckpointError(_missing(entry, "--tokenizer"))
        path = given
        codec = images.load(checkpoint.read(path), source=path.name)
    if codec.codebook != denoiser.spec.codebook:
        raise CheckpointError(
            f"{path.name} has a codebook of {codec.codebook}, the denoiser one of "
            f"{denoiser.spec.codebook}: they do not belong together"
        )
    return codec


def _pictures(codec: Any, denoiser: ZooDenoiser) -> tuple[nn.Module, nn.Module | None, ImageSpec]:
    """Return decoder, encoder and size of a model's images."""
    if isinstance(codec, Palette):
        return codec, PaletteTokens(codec), ImageSpec(codec.grid, codec.grid, 1)
    side = denoiser.spec.grid[0] * codec.factor if codec.factor else codec.side
    encodes = getattr(codec, "encoder", None) is not None
    size = ImageSpec(side, side, codec.factor)
    return Pixels(codec).eval(), Tokens(codec).eval() if encodes else None, size


def _text_of(entry: Entry, text: TextSpec, denoiser: ZooDenoiser) -> TextSpec:
    """Return what begins and ends a text; only the published vocabulary is known to have both."""
    if denoiser.spec.codebook == entry.spec.codebook:
        return text
    return TextSpec(text.tokenizer)


def _shipped_tokenizer(entry: Entry) -> Path | None:
    return packaged(entry.shipped_tokenizer) if entry.shipped_tokenizer else None


def _text_tokenizer(entry: Entry, sources: Sources) -> Path | None:
    if sources.tokenizer is not None or sources.random_seed is not None:
        return sources.tokenizer
    return _shipped_tokenizer(entry)


def _text_fallback(sources: Sources, denoiser: ZooDenoiser) -> str:
    """Return the tokenizer of a text model that was given none; empty where it must have one."""
    if denoiser.spec.codebook == 256:
        return BYTES
    return IDS if sources.random_seed is not None else ""


def _weights(entry: Entry, sources: Sources, denoiser: ZooDenoiser) -> WeightsSpec:
    parameters = sum(tensor.numel() for tensor in cast(nn.Module, denoiser).parameters())
    if sources.random_seed is not None:
        return WeightsSpec("random", sources.random_seed, {}, parameters, "none")
    origin = "checkpoint" if sources.checkpoint is not None else "trained"
    hashes = _hashes(_path(entry, sources), entry)
    tokenizer = sources.tokenizer or _shipped_tokenizer(entry)
    if entry.images is not None and tokenizer is not None:
        hashes |= checkpoint.hashes(tokenizer)
    return WeightsSpec(origin, -1, hashes, parameters, entry.licence)


def _hashes(path: Path, entry: Entry) -> dict[str, str]:
    """Return digests of the weights, part by part where a folder has parts."""
    if entry.family.folder is None:
        return checkpoint.hashes(path)
    found: dict[str, str] = {}
    for part in ("transformer", "text_encoder", "vqvae"):
        digests = checkpoint.hashes(folder.root(path) / part)
        found |= {f"{part}/{name}": digest for name, digest in digests.items()}
    return found
