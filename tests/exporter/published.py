"""Published models of small sizes: weights by the golden rule, and what their originals say.

Of every family there is one whose reference values are published, and one of odd sizes.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mdzoo import halton, llama, mage, maskbit, maskgit, maskgit_jax, titok, titok_checkpoint
from mdzoo.dit import DIT, MDLMConfig
from mdzoo.llama_names import LLADA
from mdzoo.synthetic import golden_weights, toks

Array = NDArray[Any]


def module(path: Path) -> ModuleType:
    """Import a module that is no package's."""
    spec = importlib.util.spec_from_file_location(f"against_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


HERE = Path(__file__).parent
ORIGINAL = module(HERE / "originals.py")
JAX = module(HERE.parent / "models" / "test_maskgit_jax.py")


@dataclass(frozen=True)
class Case:
    """A model, its original, and what both are asked."""

    model: str  # name to ask for it by
    state: dict[str, Tensor]
    tokens: Array  # of one sample, as the original takes them
    original: Callable[[int], Tensor]  # from a label to logits of one sample
    settings: Mapping[str, int]  # what has to be told
    labels: tuple[int, ...] = (3, -1)  # none: the model has no classes
    prefix: str = ""

    def logits(self) -> Array:
        """Return what the original says, float32, sample by sample."""
        return np.stack([np.float32(self.original(label)) for label in self.labels or (-1,)])

    def arrays(self) -> dict[str, Array]:
        """Return the recording in its plainest form."""
        tokens = np.stack([self.tokens] * len(self.labels or (-1,)))
        labels = {"labels": np.array(self.labels)} if self.labels else {}
        return {"tokens": tokens, "logits": self.logits(), **labels}


def filled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the golden rule, which goes by the published names."""
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def _maskgit(**sizes: int) -> Case:
    config = maskgit.MaskGITConfig(**sizes)
    state = filled(maskgit.to_published(maskgit.MaskGIT(config).state_dict()))
    ids = toks(config.length, config.codebook, config.codebook).numpy()
    return Case(
        "maskgit256",
        state,
        ids,
        lambda label: ORIGINAL.maskgit(state, ids.tolist(), label, heads=config.heads),
        {"heads": config.heads},
        (min(3, config.classes - 1), -1),
        prefix="module.",
    )


def _halton(model: str, **sizes: int) -> Case:
    config = halton.HaltonConfig(**sizes)
    state = filled(halton.to_published(halton.Halton(config).state_dict()))
    state["head.weight"] = state["tok_emb.weight"].clone()
    ids = toks(config.length, config.codebook, config.codebook).numpy()
    return Case(
        model,
        state,
        ids.reshape(config.grid, config.grid),
        lambda label: ORIGINAL.halton(state, ids.tolist(), label, heads=config.heads),
        {"heads": config.heads},
        (min(3, config.classes - 1), -1),
        prefix="_orig_mod.module.",
    )


def _jax(**sizes: int) -> Case:
    config = maskgit_jax.MaskGITJaxConfig(**sizes)
    state = JAX.synthetic_state(config)
    ids = toks(config.length, config.codebook, -1).numpy()
    return Case(
        "maskgit-jax-256",
        state,
        ids,
        lambda label: JAX.original(state, ids.tolist(), config.codebook + label)[
            :, : config.codebook
        ],
        {},
        (0, config.classes - 1),
    )


def _mage(**sizes: int) -> Case:
    config = replace(mage.PUBLISHED["mage-base"], **sizes)
    state = filled(mage.to_published(mage.MAGE(config).state_dict()))
    ids = toks(config.length, config.codebook, config.mask).numpy()
    heads = {"heads": config.heads, "decoder_heads": config.decoder_heads}
    return Case(
        "mage-base",
        state,
        ids,
        lambda _: ORIGINAL.mage(state, ids.tolist(), config.codebook + 76, **heads)[
            1:, : config.codebook
        ],
        heads,
        (),
    )


def _titok(model: str, skips: bool, **sizes: int) -> Case:
    config = titok.TiTokConfig(skips=skips, **sizes)
    state = filled(titok_checkpoint.to_published(titok.TiTok(config).state_dict()))
    ids = toks(config.length, config.codebook, config.codebook).numpy()
    run = ORIGINAL.uvit if skips else ORIGINAL.bert

    def original(label: int) -> Tensor:
        row = config.codebook + 1 + (config.classes if label < 0 else label)
        return cast(Tensor, run(state, ids.tolist(), row, heads=config.heads)[1:])

    labels = min(3, config.classes - 1), -1
    return Case(model, state, ids, original, {"heads": config.heads}, labels)


def _maskbit(**sizes: int) -> Case:
    config = maskbit.MaskBitConfig(**sizes)
    state = filled(maskbit.to_published(maskbit.MaskBit(config).state_dict()))
    low = toks(config.rows, config.codebook, config.codebook)
    ids = np.stack([low.numpy(), toks(config.rows, config.codebook).numpy()], 1)
    return Case(
        "maskbit-10bit",
        state,
        ids,
        lambda label: ORIGINAL.maskbit(state, ids.tolist(), label, heads=config.heads)[:-1],
        {"heads": config.heads},
        (min(3, config.classes - 1), -1),
    )


def _mdlm(conditioning: int, frequencies: int, **sizes: int) -> Case:
    config = MDLMConfig(length=1024, **sizes)
    state = filled(DIT(config, conditioning, frequencies).state_dict())
    ids = toks(16, config.codebook, config.codebook).numpy()
    run = ORIGINAL.mdlm
    return Case(
        "mdlm-owt",
        state,
        ids,
        lambda _: run(state, ids.tolist(), heads=config.heads),
        {"heads": config.heads},
        (),
        prefix="backbone.",
    )


def _llama(run: str, length: int = 16, **sizes: Any) -> Case:
    config = llama.LlamaConfig(length=2048, **sizes)
    state = filled(llama.to_published(llama.Llama(config).state_dict(), config.layout))
    ids = toks(length, min(32, config.codebook), config.mask).numpy()
    return Case(
        "smdm-170m",
        state,
        ids,
        lambda _: getattr(ORIGINAL, run)(state, ids.tolist(), heads=config.heads),
        {"heads": config.heads},
        (),
    )


_IMAGE = {"grid": 4, "codebook": 32, "classes": 10, "width": 64, "depth": 2, "heads": 4}
_LINE = {"length": 8, "codebook": 32, "classes": 10, "width": 64, "heads": 4, "hidden": 128}
_TEXT = {"width": 64, "depth": 2, "heads": 4, "hidden": 96}
_ODD = {"grid": 3, "codebook": 7, "classes": 2, "width": 30, "depth": 3, "hidden": 11}
_BITS = {"grid": 4, "bits": 6, "classes": 10, "width": 64, "depth": 2, "heads": 4, "hidden": 128}
_DECODER = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4, "decoder_hidden": 256}
_SMALL_MAGE = {"width": 64, "depth": 2, "heads": 4, "hidden": 256, **_DECODER}
_ODD_DECODER = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "decoder_hidden": 50}

CASES: dict[str, Callable[[], Case]] = {
    "maskgit": lambda: _maskgit(**_IMAGE, hidden=128),
    "maskgit odd": lambda: _maskgit(**_ODD, heads=5),
    "halton": lambda: _halton("halton-base-256", **_IMAGE, hidden=256),
    "halton of 6 heads": lambda: _halton("halton-base-256", **{**_IMAGE, "heads": 6}, hidden=256),
    "halton odd": lambda: _halton("halton-tiny-256", **{**_ODD, "width": 96}, heads=7),
    "jax odd": lambda: _jax(**_ODD, heads=5),
    "jax": lambda: _jax(**_IMAGE, hidden=128),
    "mage": lambda: _mage(**_SMALL_MAGE),
    "mage odd": lambda: _mage(**{**_ODD, "classes": 80}, heads=5, **_ODD_DECODER),
    "titok": lambda: _titok("titok-l32", False, depth=2, **_LINE),
    "titok odd": lambda: _titok("titok-b64", False, **{**_LINE, "length": 3, "heads": 2}, depth=5),
    "uvit": lambda: _titok("titok-s128", True, depth=3, **_LINE),
    "uvit odd": lambda: _titok("titok-s128", True, **{**_LINE, "width": 24}, depth=7),
    "maskbit": lambda: _maskbit(**_BITS),
    "maskbit odd": lambda: _maskbit(**{**_BITS, "grid": 3, "bits": 2, "width": 30, "heads": 5}),
    "mdlm": lambda: _mdlm(16, 256, codebook=32, **{**_TEXT, "hidden": 256}),
    "mdlm odd": lambda: _mdlm(5, 30, codebook=99, **{**_TEXT, "width": 24, "depth": 11}),
    "llada": lambda: _llama("llada", vocabulary=40, scored=40, mask=39, layout=LLADA, **_TEXT),
    "llada with ids behind its mask": lambda: _llama(
        "llada", vocabulary=40, scored=40, mask=5, layout=LLADA, **_TEXT
    ),
    "smdm": lambda: _llama("smdm", vocabulary=41, scored=40, mask=40, **_TEXT),
    "smdm odd": lambda: _llama(
        "smdm", 9, vocabulary=8, scored=7, mask=7, width=30, depth=11, heads=3, hidden=17
    ),
}

GOLDEN: dict[str, list[tuple[float, float, float, list[float]]]] = {
    "maskgit": [
        (-0.005184, 0.347767, 150.8832, [0.481115, 0.097782, -0.466382, 0.535112, 0.057649]),
        (-0.001775, 0.348267, 151.2119, [0.487257, 0.093331, -0.459194, 0.543537, 0.060125]),
    ],
    "halton": [
        (0.050090, 0.564522, 204.8436, [-0.618196, 0.102011, -0.434313, 0.692035, 2.188651]),
        (0.049583, 0.565116, 205.2077, [-0.626480, 0.108656, -0.437554, 0.679058, 2.206680]),
    ],
    "halton of 6 heads": [
        (0.044570, 0.565946, 206.1787, [-0.643378, 0.135095, -0.416917, 0.721153, 2.165494]),
        (0.046120, 0.566316, 206.6066, [-0.641417, 0.114929, -0.408727, 0.699736, 2.171957]),
    ],
    "mage": [
        (0.004026, 0.397742, 83014.9454, [-0.235343, -0.042778, 0.148649, 0.127279, -0.686994])
    ],
    "titok": [
        (-0.030646, 0.389157, 76.8002, [0.307153, -0.267800, 0.220010, 0.311891, -0.693027]),
        (-0.029475, 0.388771, 76.7171, [0.310817, -0.255259, 0.229051, 0.313325, -0.683238]),
    ],
    "uvit": [
        (-0.027801, 0.397105, 83.9834, [0.031822, 0.232669, -0.040528, -0.580585, -0.610623]),
        (0.022490, 0.411033, 88.7810, [0.156362, 0.194554, -0.082724, -0.425476, -0.554126]),
    ],
    "maskbit": [
        (-0.073362, 0.430772, 86.9271, [-0.109316, 0.284732, -0.055172, 0.311899, -0.817082]),
        (-0.072495, 0.430764, 86.8422, [-0.113005, 0.288075, -0.059765, 0.306295, -0.813464]),
    ],
    "mdlm": [(-0.017071, 0.429196, 181.8874, [0.207203, 0.260528, 0.165977, -0.159946, -0.168959])],
    "llada": [
        (-0.050878, 0.344723, 176.4275, [-0.359240, -0.122597, -0.018497, -0.121776, -0.487771])
    ],
}
"""Published reference values: of each label the mean, the standard deviation, the sum of absolute
values, and the values at 0, 1, 2, 3 and 5 fifths of all."""
