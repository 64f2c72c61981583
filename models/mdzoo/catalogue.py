"""The models by name: what each is, which files it needs and how it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor, nn

from mdruntime.manifest import ImageSpec, WeightsSpec
from mdruntime.sampling import Sampling
from mdzoo import checkpoint, maskgit
from mdzoo.checkpoint import CheckpointError
from mdzoo.decoder import Palette, VQGANImages
from mdzoo.maskgit import MaskGIT, MaskGITConfig
from mdzoo.vqgan import VQGAN, VQGANConfig

__all__ = ["CATALOGUE", "Entry", "Model", "Sources", "load", "load_denoiser"]


SETTINGS = ("heads", "classes", "codebook")
"""What --set may name: the sizes that tensor shapes cannot tell."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model; satisfies ``mdexport.Model``."""

    name: str
    family: str
    task: str
    denoiser: MaskGIT
    decoder: nn.Module
    image: ImageSpec
    weights: WeightsSpec
    presets: Mapping[str, Sampling]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that can be asked for by name."""

    name: str
    family: str
    task: str
    summary: str
    config: MaskGITConfig  # of the published weights; a checkpoint's own sizes win over it
    pixels: int  # on a side of the square image
    files: Mapping[str, str]  # option of the command line to where that file is published
    licence: str
    presets: Mapping[str, Sampling]
    shipped: str = ""  # file of this package that holds the weights

    @property
    def parameters(self) -> int:
        """Parameters of the denoiser."""
        with torch.device("meta"):
            return sum(tensor.numel() for tensor in MaskGIT(self.config).parameters())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where weights come from: files, a seed, or what this package ships."""

    checkpoint: Path | None = None
    vqgan: Path | None = None
    random_seed: int | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    """Some of ``SETTINGS``."""


_HUB = "huggingface.co, llvictorll/Maskgit-pytorch, pretrained_maskgit"
_VQGAN = f"{_HUB}/VQGAN/last.ckpt"
_TAMING = "MIT (valeoai MaskGIT), MIT (taming-transformers VQGAN)"


def _maskgit(grid: int, rounds: int, guidance: float, alpha: float) -> Entry:
    pixels = 16 * grid
    default = Sampling(
        rounds=rounds,
        schedule="v1-arccos",
        order="hybrid",
        exploration=(1.0, 0.0),
        alpha=alpha,
        substeps=2,
        guidance=guidance,
        guidance_schedule="linear",
    )
    return Entry(
        name=f"maskgit{pixels}",
        family="maskgit",
        task="class to image",
        summary=f"MaskGIT of valeoai, ImageNet, {pixels} x {pixels} pixels",
        config=MaskGITConfig(
            grid=grid, codebook=1024, classes=1000, width=768, depth=24, heads=16, hidden=3072
        ),
        pixels=pixels,
        files={
            "--checkpoint": f"{_HUB}/MaskGIT/MaskGIT_ImageNet_{pixels}.pth",
            "--vqgan": _VQGAN,
        },
        licence=_TAMING,
        presets={
            "default": default,
            "maskgit": default.but(order="maskgit", substeps=1),
        },
    )


_DIGITS = Entry(
    name="digits",
    family="maskgit",
    task="class to image",
    summary="handwritten digits, 8 x 8 pixels of 17 grey levels",
    config=MaskGITConfig(grid=8, codebook=17, classes=10, width=96, depth=5, heads=4, hidden=384),
    pixels=8,
    files={},
    licence="Apache-2.0; data: UCI digits, CC BY 4.0",
    presets={
        "default": Sampling(
            rounds=8, order="hybrid", exploration=(1.0, 0.0), substeps=2, guidance=1.0
        ),
        "maskgit": Sampling(rounds=8, order="maskgit", guidance=1.0),
    },
    shipped="digits.safetensors",
)

CATALOGUE = {
    entry.name: entry for entry in (_DIGITS, _maskgit(16, 8, 3.0, 4.5), _maskgit(32, 15, 2.8, 7.0))
}


def load(entry: Entry, sources: Sources) -> Model:
    """Load a model with its decoder.

    Args:
        entry: from the catalogue.
        sources: files or a seed; the shipped weights where there are any and nothing is given.

    Raises:
        CheckpointError: a file is missing, damaged, or of another architecture.
    """
    denoiser = load_denoiser(entry, sources)
    config = denoiser.config
    if entry.shipped:
        decoder: nn.Module = Palette(config.grid, config.codebook)
    else:
        decoder = VQGANImages(_load_vqgan(entry, sources, config))
    pixels = entry.pixels * config.grid // entry.config.grid
    return Model(
        name=entry.name,
        family=entry.family,
        task=entry.task,
        denoiser=denoiser,
        decoder=decoder.eval(),
        image=ImageSpec(pixels, pixels),
        weights=_weights(entry, sources, denoiser),
        presets=entry.presets,
    )


def load_denoiser(entry: Entry, sources: Sources) -> MaskGIT:
    """Load a denoiser alone, in float32.

    Raises:
        CheckpointError: the file is missing, damaged, or of another architecture.
    """
    for name in sources.settings:
        if name not in SETTINGS:
            raise CheckpointError(f"--set must name one of {', '.join(SETTINGS)}, got {name!r}")
    if sources.random_seed is not None:
        return _random_denoiser(entry, sources)
    state, source = _read(entry, sources)
    model = MaskGIT(maskgit.infer(state, entry.config, sources.settings))
    checkpoint.fit(model, maskgit.from_published(state), source=source)
    return model.eval()


def _random_denoiser(entry: Entry, sources: Sources) -> MaskGIT:
    if sources.settings:
        raise CheckpointError("--set describes a checkpoint; random weights have the model's sizes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sources.random_seed or 0)
        model = MaskGIT(entry.config)
        maskgit.initialise(model)
    return model.eval()


def _read(entry: Entry, sources: Sources) -> tuple[dict[str, Tensor], str]:
    if sources.checkpoint is not None:
        return checkpoint.read(sources.checkpoint), sources.checkpoint.name
    if not entry.shipped:
        raise CheckpointError(_missing(entry, "--checkpoint"))
    with as_file(files("mdzoo") / "weights" / entry.shipped) as path:
        return checkpoint.read(path), entry.shipped


def _missing(entry: Entry, option: str) -> str:
    wanted = "; ".join(f"{name} FILE from {where}" for name, where in entry.files.items())
    return (
        f"{entry.name} needs {option}: its weights are published at {wanted}. "
        "Or try it with --random-weights 0"
    )


def _load_vqgan(entry: Entry, sources: Sources, config: MaskGITConfig) -> VQGAN:
    if sources.random_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sources.random_seed)
            return VQGAN(VQGANConfig(codebook=config.codebook))
    if sources.vqgan is None:
        raise CheckpointError(_missing(entry, "--vqgan"))
    state = checkpoint.read(sources.vqgan)
    sizes = VQGANConfig.from_state(state)
    if sizes.codebook != config.codebook:
        raise CheckpointError(
            f"{sources.vqgan.name} has a codebook of {sizes.codebook}, the denoiser one of "
            f"{config.codebook}: they do not belong together"
        )
    vqgan = VQGAN(sizes)
    checkpoint.fit(vqgan, state, source=sources.vqgan.name)
    return vqgan


def _weights(entry: Entry, sources: Sources, denoiser: MaskGIT) -> WeightsSpec:
    parameters = sum(tensor.numel() for tensor in denoiser.parameters())
    if sources.random_seed is not None:
        return WeightsSpec("random", sources.random_seed, {}, parameters, "none")
    given = [path for path in (sources.checkpoint, sources.vqgan) if path is not None]
    origin = "checkpoint" if sources.checkpoint is not None else "trained"
    hashes = {path.name: checkpoint.sha256(path) for path in given}
    if not given:
        with as_file(files("mdzoo") / "weights" / entry.shipped) as path:
            hashes = {path.name: checkpoint.sha256(path)}
    return WeightsSpec(origin, -1, hashes, parameters, entry.licence)
