"""The presets of all models: names, costs, and that each of them can be run."""

import numpy as np
import pytest

from mdruntime.head import Draws
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, Pass, Result, unmask
from mdzoo import presets

ALL = {
    "digits": presets.digits(),
    "maskgit": presets.maskgit(8, 3.0, 4.5),
    "jax-256": presets.maskgit_jax(256),
    "jax-512": presets.maskgit_jax(512),
    "mage": presets.mage(),
    "amused": presets.amused(),
    "mdlm": presets.mdlm(),
    "sdtt": presets.sdtt(),
    "smdm": presets.smdm(),
    **{f"halton-{size}": presets.halton(f"halton-{size}-256") for size in ("tiny", "base")},
    **{f"titok-{size}": presets.titok(f"titok-{size}") for size in ("l32", "b64", "s128")},
    **{f"maskbit-{bits}": presets.maskbit(bits) for bits in (10, 12, 14, 16, 18)},
}


@pytest.mark.parametrize("name", [name for name in ALL if name != "digits"])
def test_every_model_has_the_four_presets_and_defaults_to_the_balanced_one(name: str) -> None:
    found = ALL[name]
    assert {"published", "fast", "balanced", "best"} <= set(found)
    assert found["default"] == found["balanced"]


@pytest.mark.parametrize("name", [name for name in ALL if name != "digits"])
def test_presets_cost_more_full_passes_the_better_they_promise_to_be(name: str) -> None:
    found = ALL[name]
    cost = [
        found[preset].rounds / found[preset].refresh_interval
        for preset in ("fast", "balanced", "best")
    ]
    assert cost == sorted(cost)
    assert cost[0] < cost[1]
    guided = {preset.guidance > 0 for preset in found.values()}
    assert len(guided) == 1


GRIDS = {  # of the models that are not 16 x 16 tokens
    "digits": (8, 8),
    "titok-l32": (32,),
    "titok-b64": (64,),
    "titok-s128": (128,),
    "mdlm": (1024,),
    "sdtt": (1024,),
    "smdm": (2048,),
    **{f"maskbit-{bits}": (16, 32) for bits in (10, 12, 14, 16, 18)},
}


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in ALL for preset in ALL[name]]
)
def test_every_preset_reveals_its_whole_canvas(name: str, preset: str) -> None:
    grid, sampling = GRIDS.get(name, (16, 16)), ALL[name][preset]
    length = int(np.prod(grid))
    passes = 0

    def denoise(request: Pass) -> Result:
        nonlocal passes
        passes += request.positions is None
        zeros = np.zeros(request.wanted.shape, np.float32)
        return Result(Draws(zeros.astype(np.int32), *[zeros] * 6))

    blank = np.full((1, length), 9, np.int32)
    revealed = np.zeros(length, int)
    for step in unmask(denoise, blank, Canvas(length, grid, 9), sampling, Randomness(0, [0])):
        revealed += step.revealed[0]
    assert (revealed == 1).all()
    assert passes <= -(-sampling.rounds // sampling.refresh_interval)
