"""The models by name: what each is, where its files are published, and how it is sampled."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from mdruntime.manifest import TextSpec
from mdzoo import (
    amused,
    halton,
    llama,
    llamagen,
    mage,
    mage_checkpoint,
    maskbit,
    maskbit_vqgan,
    maskgit,
    maskgit_jax,
    maskgit_vqgan,
    mdlm,
    presets,
    titok,
    titok_tokenizer,
    vqgan,
    vqmodel,
)
from mdzoo.conv import ConvConfig
from mdzoo.entry import Entry, Images
from mdzoo.maskgit import MaskGITConfig
from mdzoo.mdlm import MDLMConfig
from mdzoo.palette import Palette
from mdzoo.vqgan import VQGANConfig

__all__ = ["CATALOGUE"]

_HUB = "huggingface.co"


def _fixed(build: Callable[[Any], nn.Module], config: Any) -> Callable[[Any], nn.Module]:
    """Return a maker of random tokenizers of always the same sizes."""
    return lambda _: build(config).eval()


def _digits() -> Entry:
    return Entry(
        name="digits",
        family=maskgit.FAMILY,
        task="class to image",
        summary="handwritten digits, 8 x 8 pixels of 17 grey levels",
        config=MaskGITConfig(
            grid=8, codebook=17, classes=10, width=96, depth=5, heads=4, hidden=384
        ),
        files={},
        licence="Apache-2.0; data: UCI digits, CC BY 4.0",
        presets=presets.digits(),
        images=Images(_no_palette, lambda config: Palette(config.grid, config.codebook)),
        shipped="digits.safetensors",
    )


def _glyphs() -> Entry:
    sizes = VQGANConfig(
        widths=(32, 32, 64), stem=32, blocks=1, latent=64, embedding=8, codebook=256
    )
    return Entry(
        name="glyphs",
        family=maskgit.FAMILY,
        task="class to image",
        summary="letters and digits in many fonts, 32 x 32 pixels in 64 tokens",
        config=MaskGITConfig(
            grid=8, codebook=256, classes=62, width=160, depth=6, heads=5, hidden=640
        ),
        files={},
        licence="Apache-2.0; data: drawn with free fonts, see models/README.md",
        presets=presets.digits(),
        images=Images(vqgan.load, _fixed(vqgan.VQGAN, sizes)),
        shipped="glyphs.safetensors",
        shipped_tokenizer="glyphs-tokenizer.safetensors",
    )


def _prose() -> Entry:
    return Entry(
        name="prose",
        family=mdlm.FAMILY,
        task="text",
        summary="sentences about Python, 128 tokens of a vocabulary of 1024",
        config=MDLMConfig(128, 1024, width=128, depth=5, heads=4, hidden=512),
        files={},
        licence="Apache-2.0; data: Python's documentation, PSF licence",
        presets=presets.prose(),
        text=TextSpec(""),
        shipped="prose.safetensors",
        shipped_tokenizer="prose-tokenizer.json",
    )


def _no_palette(*_: Any, **__: Any) -> nn.Module:
    raise AssertionError("a palette is not loaded")


def _maskgit(grid: int, rounds: int, guidance: float, alpha: float) -> Entry:
    pixels, where = 16 * grid, f"{_HUB}, llvictorll/Maskgit-pytorch, pretrained_maskgit"
    return Entry(
        name=f"maskgit{pixels}",
        family=maskgit.FAMILY,
        task="class to image",
        summary=f"MaskGIT of valeoai, ImageNet, {pixels} x {pixels} pixels",
        config=MaskGITConfig(
            grid=grid, codebook=1024, classes=1000, width=768, depth=24, heads=16, hidden=3072
        ),
        files={
            "--checkpoint": f"{where}/MaskGIT/MaskGIT_ImageNet_{pixels}.pth",
            "--tokenizer": f"{where}/VQGAN/last.ckpt",
        },
        licence="MIT (valeoai MaskGIT), MIT (taming-transformers VQGAN)",
        presets=presets.maskgit(rounds, guidance, alpha),
        images=Images(vqgan.load, _fixed(vqgan.VQGAN, ConvConfig())),
    )


def _halton(name: str) -> Entry:
    _, size, side = name.split("-")
    return Entry(
        name=name,
        family=halton.FAMILY,
        task="class to image",
        summary=f"Halton-MaskGIT {size} of valeoai, ImageNet, {side} x {side} pixels",
        config=halton.PUBLISHED[name],
        files={
            "--checkpoint": f"{_HUB}, llvictorll/Halton-Maskgit, ImageNet_{side}_{size}.pth",
            "--tokenizer": f"{_HUB}, FoundationVision/LlamaGen, vq_ds16_c2i.pt",
        },
        licence="MIT (Halton-MaskGIT), MIT (LlamaGen VQ)",
        presets=presets.halton(name),
        images=Images(llamagen.load, _fixed(llamagen.LlamaGenVQ, llamagen.VQ16)),
    )


def _mdlm(name: str) -> Entry:
    size = name.rpartition("-")[2]
    where = {
        "owt": "kuleshov-group/mdlm-owt",
        "small": "jdeschena/sdtt, revision baselines_kld_step_70000",
        "medium": "jdeschena/sdtt, a revision scaling_400k_md_step_N",
        "large": "jdeschena/sdtt, a revision scaling_400k_large_step_N",
    }
    what = "MDLM" if size == "owt" else f"SDTT {size} (distilled MDLM)"
    return Entry(
        name=name,
        family=mdlm.FAMILY,
        task="text",
        summary=f"{what}, OpenWebText, 1024 tokens of GPT-2",
        config=mdlm.PUBLISHED[name],
        files={
            "--checkpoint": f"{_HUB}, {where[size]}, model.safetensors",
            "--tokenizer": f"{_HUB}, openai-community/gpt2, tokenizer.json",
        },
        licence="Apache-2.0" if size == "owt" else "repository without a licence file",
        presets=presets.mdlm() if size == "owt" else presets.sdtt(),
        text=TextSpec("", begin=50256, end=50256),
    )


def _titok(name: str) -> Entry:
    size = name.partition("-")[2]
    file = size.replace("-", "")
    return Entry(
        name=name,
        family=titok.FAMILY,
        task="class to image",
        summary=f"TiTok {size.upper()}, ImageNet, 256 x 256 pixels in {size[1:]} tokens",
        config=titok.PUBLISHED[name],
        files={
            "--checkpoint": f"{_HUB}, fun-research/TiTok, generator_titok_{file}.bin",
            "--tokenizer": f"{_HUB}, fun-research/TiTok, tokenizer_titok_{file}.bin",
        },
        licence="Apache-2.0 (for research, says its README)",
        presets=presets.titok(name),
        images=Images(
            titok_tokenizer.load,
            _fixed(titok_tokenizer.TiTokTokenizer, titok_tokenizer.PUBLISHED[name]),
        ),
    )


def _mage(name: str) -> Entry:
    return Entry(
        name=name,
        family=mage.FAMILY,
        task="image",
        summary=f"MAGE ViT-{name[5].upper()}, ImageNet without classes, 256 x 256 pixels",
        config=mage_checkpoint.PUBLISHED[name],
        files={"--checkpoint": "Google Drive, see the README of github.com/LTH14/mage"},
        licence="MIT",
        presets=presets.mage(),
        images=Images(
            maskgit_vqgan.load,
            _fixed(maskgit_vqgan.MaskGITVQGAN, maskgit_vqgan.PUBLISHED),
            inside="file",
        ),
    )


def _maskbit(bits: int) -> Entry:
    name = f"maskbit-{bits}bit"
    return Entry(
        name=name,
        family=maskbit.FAMILY,
        task="class to image",
        summary=f"MaskBit {bits} bit, ImageNet, 256 x 256 pixels",
        config=maskbit.PUBLISHED[name],
        files={
            "--checkpoint": f"{_HUB}, markweber/maskbit_generator_{bits}bit",
            "--tokenizer": f"{_HUB}, markweber/maskbit_tokenizer_{bits}bit",
        },
        licence="Apache-2.0",
        presets=presets.maskbit(bits),
        images=Images(
            maskbit_vqgan.load,
            _fixed(maskbit_vqgan.MaskBitVQ, maskbit_vqgan.published(bits)),
        ),
    )


def _maskgit_jax(side: int) -> Entry:
    where = "storage.googleapis.com/maskgit-public/checkpoints"
    return Entry(
        name=f"maskgit-jax-{side}",
        family=maskgit_jax.FAMILY,
        task="class to image",
        summary=f"the original MaskGIT (JAX), ImageNet, {side} x {side} pixels",
        config=maskgit_jax.PUBLISHED[f"maskgit-jax-{side}"],
        files={
            "--checkpoint": f"{where}/maskgit_imagenet{side}_checkpoint",
            "--tokenizer": f"{where}/tokenizer_imagenet{side}_checkpoint",
        },
        licence="Apache-2.0",
        presets=presets.maskgit_jax(side),
        images=Images(
            maskgit_vqgan.load,
            _fixed(maskgit_vqgan.MaskGITVQGAN, maskgit_vqgan.PUBLISHED),
        ),
    )


def _amused(side: int) -> Entry:
    return Entry(
        name=f"amused-{side}",
        family=amused.FAMILY,
        task="text to image",
        summary=f"aMUSEd, {side} x {side} pixels",
        config=amused.PUBLISHED[f"amused-{side}"],
        files={"--checkpoint": f"{_HUB}, amused/amused-{side} (the whole folder)"},
        licence="see the model card (openrail++ as far as known)",
        presets=presets.amused(),
        images=Images(vqmodel.load, _fixed(vqmodel.VQModel, vqmodel.PUBLISHED), inside="vqvae"),
    )


def _smdm(name: str) -> Entry:
    file = {"smdm-170m": "mdm-170M-100e18", "smdm-1028m": "mdm-1028M-1600e18"}[name]
    return Entry(
        name=name,
        family=llama.FAMILY,
        task="text",
        summary=f"SMDM {name[5:].upper()}, SlimPajama, 2048 tokens of Llama 2",
        config=llama.PUBLISHED[name],
        files={
            "--checkpoint": f"{_HUB}, nieshen/SMDM, {file}.safetensors",
            "--tokenizer": f"{_HUB}, TinyLlama/TinyLlama_v1.1, tokenizer.json",
        },
        licence="Apache-2.0",
        presets=presets.smdm(),
        text=TextSpec("", begin=1, end=2),
    )


def _entries() -> Iterator[Entry]:
    yield _digits()
    yield _glyphs()
    yield _prose()
    yield _maskgit(16, 8, 3.0, 4.5)
    yield _maskgit(32, 15, 2.8, 7.0)
    yield from map(_halton, halton.PUBLISHED)
    yield from map(_mdlm, mdlm.PUBLISHED)
    yield from map(_titok, titok.PUBLISHED)
    yield from map(_mage, mage_checkpoint.PUBLISHED)
    yield from map(_maskbit, (10, 12, 14, 16, 18))
    yield from map(_maskgit_jax, (256, 512))
    yield from map(_amused, (256, 512))
    yield from map(_smdm, llama.PUBLISHED)


CATALOGUE = {entry.name: entry for entry in _entries()}
