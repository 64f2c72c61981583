"""One small model of every family, with random weights, as ``mdzoo.load`` would return it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mdzoo
from mdruntime.manifest import TextSpec
from mdzoo import llamagen, maskbit_vqgan, maskgit_vqgan, vqgan, vqmodel
from mdzoo.clip import ClipConfig
from mdzoo.conv import ConvConfig
from mdzoo.entry import Images
from mdzoo.titok_tokenizer import TiTokTokenizer, TokenizerConfig, TowerConfig
from mdzoo.uvit2d_config import UVitConfig

__all__ = ["SMALL", "small_model"]

TWO_LEVELS: dict[str, Any] = {"widths": (32, 64), "stem": 32, "blocks": 1}

# Of every family: a name of the catalogue, and the sizes that make it small.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "maskgit": (
        "maskgit256",
        {
            "grid": 4,
            "codebook": 32,
            "classes": 10,
            "width": 48,
            "depth": 2,
            "heads": 4,
            "hidden": 96,
        },
    ),
    "halton": (
        "halton-small-256",
        {
            "grid": 4,
            "codebook": 32,
            "classes": 10,
            "width": 64,
            "depth": 2,
            "heads": 6,
            "hidden": 96,
        },
    ),
    "maskgit-jax": (
        "maskgit-jax-256",
        {
            "grid": 4,
            "codebook": 32,
            "classes": 10,
            "width": 48,
            "depth": 2,
            "heads": 4,
            "hidden": 96,
        },
    ),
    "mage": (
        "mage-base",
        {
            "grid": 4,
            "codebook": 32,
            "classes": 80,
            "width": 48,
            "depth": 2,
            "heads": 4,
            "hidden": 96,
            "decoder_width": 32,
            "decoder_depth": 2,
            "decoder_heads": 2,
            "decoder_hidden": 64,
        },
    ),
    "titok": (
        "titok-l32",
        {
            "length": 8,
            "codebook": 32,
            "classes": 10,
            "width": 48,
            "depth": 2,
            "heads": 4,
            "hidden": 96,
        },
    ),
    "titok-uvit": (
        "titok-s128",
        {
            "length": 8,
            "codebook": 32,
            "classes": 10,
            "width": 48,
            "depth": 3,
            "heads": 4,
            "hidden": 96,
        },
    ),
    "maskbit": (
        "maskbit-10bit",
        {"grid": 4, "bits": 6, "classes": 10, "width": 48, "depth": 2, "heads": 4, "hidden": 96},
    ),
    "mdlm": (
        "mdlm-owt",
        {"length": 32, "codebook": 256, "width": 48, "depth": 2, "heads": 4, "hidden": 96},
    ),
    "smdm": (
        "smdm-170m",
        {
            "length": 32,
            "vocabulary": 257,
            "scored": 256,
            "mask": 256,
            "width": 48,
            "depth": 2,
            "heads": 4,
            "hidden": 96,
        },
    ),
}

_TEXT = ClipConfig(
    vocabulary=40, positions=8, width=32, depth=3, heads=4, hidden=48, projection=24, end=39
)
_UVIT = UVitConfig(
    size=4,
    vocabulary=40,
    codebook=32,
    embedding=32,
    channels=32,
    blocks=1,
    block_heads=2,
    width=48,
    depth=2,
    heads=4,
    hidden=64,
    text=32,
    pooled=24,
    micro=8,
)
SMALL["amused"] = ("amused-256", {"transformer": _UVIT, "text": _TEXT})
SMALL["amused-patch"] = (
    "amused-512",
    {"transformer": replace(_UVIT, size=8, patch=2), "text": _TEXT},
)

_CODECS: dict[str, Callable[[Any], Any]] = {
    "maskgit": lambda c: vqgan.VQGAN(ConvConfig(**TWO_LEVELS, codebook=c.codebook)),
    "halton": lambda c: llamagen.LlamaGenVQ(
        replace(llamagen.VQ16, **TWO_LEVELS, codebook=c.codebook)
    ),
    "maskgit-jax": lambda c: maskgit_vqgan.MaskGITVQGAN(
        replace(maskgit_vqgan.PUBLISHED, **TWO_LEVELS, codebook=c.codebook)
    ),
    "mage": lambda c: maskgit_vqgan.MaskGITVQGAN(
        replace(maskgit_vqgan.PUBLISHED, **TWO_LEVELS, codebook=c.codebook)
    ),
    "maskbit": lambda c: maskbit_vqgan.MaskBitVQ(
        replace(maskbit_vqgan.published(c.bits), **TWO_LEVELS)
    ),
    "amused": lambda c: vqmodel.VQModel(
        replace(vqmodel.PUBLISHED, **TWO_LEVELS, codebook=c.transformer.codebook)
    ),
    "amused-patch": lambda c: vqmodel.VQModel(
        replace(vqmodel.PUBLISHED, **TWO_LEVELS, codebook=c.transformer.codebook)
    ),
    "titok": lambda c: _titok_tokenizer(c),
    "titok-uvit": lambda c: _titok_tokenizer(c),
}


def _titok_tokenizer(config: Any) -> TiTokTokenizer:
    tower = TowerConfig(width=32, depth=1, heads=2, hidden=64)
    painter = replace(maskgit_vqgan.PUBLISHED, **TWO_LEVELS, codebook=16, encodes=False)
    return TiTokTokenizer(
        TokenizerConfig(
            config.length,
            encoder=tower,
            decoder=tower,
            grid=4,
            patch=2,
            codebook=config.codebook,
            painter=painter,
        )
    )


def small_entry(family: str) -> mdzoo.Entry:
    name, sizes = SMALL[family]
    entry = mdzoo.CATALOGUE[name]
    images = None
    if entry.images is not None:
        images = Images(entry.images.load, lambda config: _CODECS[family](config).eval())
    text = None if entry.text is None else TextSpec("bytes")
    config = replace(entry.config, **sizes)
    return replace(entry, name=f"small-{family}", config=config, images=images, text=text)


def small_model(family: str, seed: int = 0) -> mdzoo.Model:
    return mdzoo.load(small_entry(family), mdzoo.Sources(random_seed=seed))
