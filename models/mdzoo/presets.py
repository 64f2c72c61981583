"""Presets of the published models: the authors' sampler first, then ours by cost.

``published`` is what the authors' repository runs. ``fast``, ``balanced`` and ``best`` take more
passes in this order, and ``default`` is ``balanced``; their quality was not measured with published
weights. Image models take Hayakawa et al.'s samplers for these (arXiv 2510.04525): positions chosen
before tokens, spread over the image first and by the moment later. On ``glyphs``, the one image
model whose samples could be judged, half of MaskGIT's rounds are as good that way (Frechet distance
4.75 +- 0.52 with 4 rounds, MaskGIT's 4.98 +- 0.46 with 8; examples/paper), so ``fast`` has half of
them. A second step a round by a partial pass gained nothing there (4.92 +- 0.27) and costs a third
more on a CPU: it is left to ``best``, and to MaskBit's many rounds. Text models stay with ancestral
sampling.

Sources: valeoai/Maskgit-pytorch and Halton-MaskGIT, google-research/maskgit, LTH14/mage,
huggingface/diffusers (aMUSEd), bytedance/1d-tokenizer (TiTok), markweberdev/maskbit,
kuleshov-group/mdlm, jdeschena/sdtt, ML-GSAI/SMDM. Guidance weights are w in
``(1 + w) conditional - w unconditional`` everywhere (``mdruntime.guidance``).

Unlike the originals,

- a code that does not exist is never drawn: valeoai's v1.0 and Halton-MaskGIT may draw the mask
  itself, and turn it into code 1023 or 16383 before decoding;
- a Halton order is always rolled by an offset of the sample's, which Halton-MaskGIT's
  ``randomize`` turns on and its configuration file off;
- the logits' factor that rises from 1 to 1.2 in Halton-MaskGIT's README is left out: in its
  configuration file it stays at 1;
- MDLM, SDTT and SMDM reveal every token in one of the rounds, all equally likely; the originals
  stop at t = 1e-5, where one token in 100,000 is still hidden: MDLM and SDTT put the likeliest
  value there, SMDM draws it in the last round;
- rounds of ancestral sampling that reveal nothing are left out, as MDLM's cache leaves out their
  passes; tokens are drawn by inverting the CDF in float32, not by Gumbel noise that a rounding to
  single precision cuts off, which lowers the temperature;
- MAGE counts the tokens that a round hides on the first image of the batch; here each image is on
  its own.
"""

from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL

__all__ = [
    "amused",
    "digits",
    "halton",
    "mage",
    "maskbit",
    "maskgit",
    "maskgit_jax",
    "mdlm",
    "prose",
    "sdtt",
    "smdm",
    "titok",
]

Presets = dict[str, Sampling]


def _named(published: Sampling, fast: Sampling, balanced: Sampling, best: Sampling) -> Presets:
    """Return the presets under the names that all models share."""
    return {
        "default": balanced,
        "published": published,
        "fast": fast,
        "balanced": balanced,
        "best": best,
    }


def _hybrid(published: Sampling, fast: int, balanced: int, best: int) -> Presets:
    """Return presets whose rounds explore early and exploit late.

    Args:
        published: the authors' sampler; its schedule, temperatures and guidance stay.
        fast: rounds of the preset of that name.
        balanced: rounds of this one.
        best: and of this one, whose rounds make a second step by a partial pass.
    """
    # Explore early: what is far apart is nearly independent, and informs all that is left.
    ours = published.but(order="hybrid", exploration=(1.0, 0.0))
    return _named(
        published,
        fast=ours.but(rounds=fast),
        balanced=ours.but(rounds=balanced),
        best=ours.but(rounds=best, substeps=2),
    )


def digits() -> Presets:
    """Return the presets of the digits and glyphs, which were trained for this project."""
    published = Sampling(rounds=8, order="maskgit", guidance=1.0)
    return _hybrid(published, 4, 8, 16)


def prose() -> Presets:
    """Return presets of the prose for weights of one's own; the shipped ones have a study."""
    return _named(_ancestral(128), _ancestral(16), balanced=_ancestral(32), best=_ancestral(64))


def maskgit(rounds: int, guidance: float, alpha: float) -> Presets:
    """Return the presets of valeoai's MaskGIT v1.0.

    Args:
        rounds: steps; 8 at 256 pixels, 15 at 512.
        guidance: weight in the last round; it rises from 0.
        alpha: Gumbel temperature in the first round.
    """
    published = Sampling(
        rounds=rounds,
        schedule="v1-arccos",
        order="maskgit",
        alpha=alpha,
        annealing="linear-full",  # their ramp, 1 - i / (n - 1), begins at the whole temperature
        guidance=guidance,
        guidance_schedule="linear",
    )
    return _hybrid(published, rounds // 2, rounds, 2 * rounds)


_HALTON_GUIDANCE = {
    # Those of the best FID of each size: larger models need less.
    "tiny": 1.5,
    "small": 1.0,
    "base": 0.7,
    "large": 0.5,
}


def halton(name: str) -> Presets:
    """Return the presets of a Halton-MaskGIT, such as ``halton-small-256``."""
    size = name.split("-")[1]
    published = Sampling(
        rounds=32, schedule="halton", order="halton", guidance=_HALTON_GUIDANCE[size]
    )
    # The order is known beforehand, so a partial pass needs 6 % of the rows: the more rounds share
    # a full pass the cheaper, and the staler the rest of the keys and values.
    shared = published.but(refresh="recent", refresh_interval=2)
    return _named(
        published,
        fast=shared.but(refresh_interval=4),
        balanced=shared,
        # Plain tokens: the model's own sampler has no temperature that alpha could stand for.
        best=published.but(
            order="hybrid", exploitation_order="u-moment", exploration=(1.0, 0.0), substeps=2
        ),
    )


def maskgit_jax(side: int) -> Presets:
    """Return the presets of the original MaskGIT for images of ``side`` pixels."""
    published = Sampling(rounds=16, schedule="cosine", order="maskgit", alpha=4.5)  # their demo
    paper = {256: 8, 512: 12}[side]
    return _hybrid(published, paper // 2, paper, published.rounds)


def mage() -> Presets:
    """Return the presets of MAGE, whose README samples hotter and longer than its defaults."""
    published = Sampling(rounds=20, schedule="cosine", order="maskgit", alpha=6.0)
    return _hybrid(published, 8, 16, 32)


def amused() -> Presets:
    """Return the presets of aMUSEd."""
    published = Sampling(
        rounds=12,
        schedule="cosine",
        order="maskgit",
        alpha=2.0,
        annealing="linear-full",  # temperatures from 2 in the first step to 0 in the last
        guidance=9.0,  # scale 10 in u + 10 (c - u)
    )
    return _hybrid(published, 6, 12, 24)


_TITOK = {  # name: rounds, alpha, guidance weight, its schedule
    "titok-l32": (8, 9.5, 4.5, "linear-open"),
    "titok-b64": (8, 11.0, 3.0, "linear-open"),
    "titok-s128": (64, 2.8, 5.9, "power-cosine"),  # scale 6.9 in u + 6.9 (c - u)
}


def titok(name: str) -> Presets:
    """Return the presets of a TiTok generator.

    All are the authors' sampler: its tokens' law is not the moment sampler's, and partial passes
    over so short a canvas save nothing.
    """
    rounds, alpha, guidance, schedule = _TITOK[name]
    published = _titok_annealed(
        Sampling(
            rounds=rounds,
            schedule="arccos",
            order="titok",
            alpha=alpha,
            guidance=guidance,
            guidance_schedule=schedule,
            guidance_power=3.0,
        )
    )
    # Twice the rounds, but S-128 has one for two tokens already.
    best = published if rounds == 64 else _titok_annealed(published.but(rounds=2 * rounds))
    fast = _titok_annealed(published.but(rounds=rounds // 2))
    return _named(published, fast, published, best)


def _titok_annealed(sampling: Sampling) -> Sampling:
    """Set the softmax temperature 0.5 + 0.8 (1 - (i + 1) / n) of round i of n."""
    first = 1.3 - 0.8 / sampling.rounds
    return sampling.but(temperature=first, temperature_decay=0.5 / first)


_MASKBIT = {  # bits: guidance weight, alpha, exponent of guidance
    10: (6.4, 10.5, 2.5),
    12: (7.1, 8.2, 3.0),
    14: (7.1, 7.8, 3.0),
    16: (6.5, 7.5, 2.5),
    18: (5.7, 8.5, 2.5),
}


def maskbit(bits: int) -> Presets:
    """Return the presets of a MaskBit generator.

    For 14 bits the authors publish 128 and 256 rounds too.
    """
    guidance, alpha, power = _MASKBIT[bits]
    published = Sampling(
        rounds=64,
        schedule="arccos",
        order="maskgit",
        alpha=alpha,
        guidance=guidance,
        guidance_schedule="power-cosine",
        guidance_power=power,
    )
    presets = _hybrid(published, 16, 32, 64)
    # In so many rounds caching pays most: four steps a round make the authors' 64 of 16.
    presets["fast"] = presets["fast"].but(substeps=4, refresh="recent")
    if bits == 14:
        presets["published-128"] = published.but(rounds=128, alpha=9.0)
        presets["published-256"] = published.but(rounds=256, alpha=10.3, guidance=5.8)
    return presets


def _ancestral(rounds: int) -> Sampling:
    # Confident positions first would be no improvement: MDLM's users found it clearly worse.
    return Sampling(rounds=rounds, schedule=ANCESTRAL, order="vanilla")


def mdlm() -> Presets:
    """Return the presets of MDLM: 1000 rounds in the README, 128 in the configuration file."""
    published = _ancestral(1000)
    # The order is known beforehand: rounds may share a full pass and recompute few rows between.
    fast = _ancestral(128).but(refresh="recent", refresh_interval=4)
    return _named(published, fast, balanced=_ancestral(128), best=published)


def sdtt() -> Presets:
    """Return the presets of SDTT's students, which were distilled for 16 to 64 rounds."""
    return _named(_ancestral(256), _ancestral(16), balanced=_ancestral(32), best=_ancestral(64))


def smdm() -> Presets:
    """Return the presets of SMDM: unsupervised guidance, with the prompt hidden, as its sampler."""
    published = _ancestral(512).but(guidance=2.0)
    return _named(
        published,
        fast=published.but(rounds=128),
        balanced=published.but(rounds=256),
        best=published,
    )
