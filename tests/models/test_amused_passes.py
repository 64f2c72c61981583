"""Passes of aMUSEd against caches: what they equal, what they need, what half precision does."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from mdzoo.amused import FAMILY, PUBLISHED, Amused, AmusedConfig
from mdzoo.amused_layers import Layer
from mdzoo.clip import ClipConfig
from mdzoo.layers import take_rows
from mdzoo.synthetic import toks
from mdzoo.uvit2d import UVit2D
from mdzoo.uvit2d_config import UVitConfig

WholePass = Callable[..., Tensor]

PLAIN = UVitConfig(
    size=4,
    vocabulary=40,
    codebook=32,
    embedding=24,
    channels=32,
    blocks=2,
    block_heads=2,
    width=64,
    depth=2,
    heads=4,
    hidden=96,
    text=48,
    pooled=20,
    micro=8,
)
PATCHES = replace(PLAIN, size=6, patch=2)
TEXT = ClipConfig(
    vocabulary=50, positions=9, width=48, depth=2, heads=4, hidden=64, projection=20, end=49
)
PROMPTS = torch.tensor([[48, 3, 4, 17, 49, 49, 49, 49, 49], [48, 49, 49, 49, 49, 49, 49, 49, 49]])

PREPARED = ("text", "text_norm", "summary", "modulation", "kv")
"""Parts of the transformer that see nothing but the prompt, by a part of their names."""


def random_model(config: UVitConfig) -> Amused:
    """Return a model in which all parts matter, also those that begin at zero or one."""
    torch.manual_seed(0)
    model = Amused(AmusedConfig(config, TEXT))
    for name, parameter in model.named_parameters():
        scale = parameter.ndim == 1 and name.endswith(".weight")
        nn.init.normal_(parameter, mean=1.0 if scale else 0.0, std=0.1)
    return model.eval()


def tokens_of(config: UVitConfig, shift: int = 0) -> Tensor:
    tokens = toks(config.size**2, config.codebook, config.vocabulary - 1)
    return torch.stack([tokens.roll(shift), tokens.roll(shift + 1)])


def rows_of(config: UVitConfig, tokens: Tensor) -> Tensor:
    """Return (batch, canvas, slots) as the runtime lays tokens out."""
    patch, (height, width) = config.patch, config.grid
    cells = tokens.reshape(-1, height, patch, width, patch).transpose(2, 3)
    return cells.reshape(len(tokens), height * width, patch**2)


def is_prepared(name: str) -> bool:
    return any(part in PREPARED for part in name.split("."))


@pytest.mark.parametrize("config", [PLAIN, PATCHES])
def test_a_pass_over_all_rows_equals_the_forward_pass(
    config: UVitConfig, whole_pass: WholePass
) -> None:
    model = random_model(config)
    tokens = tokens_of(config)
    with torch.no_grad():
        plain = model(tokens, PROMPTS)
    passed = whole_pass(model, tokens, PROMPTS)
    torch.testing.assert_close(passed, plain, atol=1e-5, rtol=0)
    assert (plain[0] - plain[1]).abs().max() > 0.1


def expected_partial(model: UVit2D, old: Tensor, new: Tensor, changed: Tensor) -> Tensor:
    """Return the logits of a partial pass of one layer, computed without any cache.

    Args:
        model: with one layer.
        old: ids (batch, canvas, slots) that the last pass over all rows saw.
        new: ids now.
        changed: bool (canvas,), the rows that this pass recomputes.
    """
    with torch.no_grad():
        prepared = model.prepare(torch.ones(2, 7, 48), torch.ones(2, 20), torch.ones(2, 5))
        first, last = [
            (prepared["stage_modulation"][:, i], prepared["stage_text"][:, i]) for i in (0, 1)
        ]
        layer = cast(Layer, model.layers[0])
        part = prepared["modulation"][:, 0], prepared["text"][:, 0]
        grid = model.config.grid

        def entered(ids: Tensor) -> Tensor:
            return model.enter(model.enter_norm(model.down(model.embed(ids), grid, first)))

        def left(x: Tensor) -> Tensor:
            return model.leave(model.leave_norm(layer(x, part)))

        where = changed[None, :, None]
        before, after = entered(old), entered(torch.where(where, new, old))
        mixed = torch.where(where, left(torch.where(where, after, before)), left(before))
        return model.head(model.up(mixed, grid, last))


@pytest.mark.parametrize("config", [PLAIN, PATCHES])
def test_a_partial_pass_sees_fresh_stages_and_the_layers_last_keys(config: UVitConfig) -> None:
    model = random_model(replace(config, depth=1)).transformer
    old, new = (rows_of(config, tokens_of(config, shift)) for shift in (0, 2))
    canvas = old.shape[1]
    everything = torch.arange(canvas).int().repeat(2, 1)
    chosen = torch.tensor([5, 0, 3, 5]).int().repeat(2, 1)  # out of order, one of them twice
    changed = torch.zeros(canvas, dtype=torch.bool)
    changed[chosen[0].long()] = True
    columns = torch.tensor([2, 0]).int().repeat(2, 1)  # rows 3 and 5
    with torch.no_grad():
        prepared = model.prepare(torch.ones(2, 7, 48), torch.ones(2, 20), torch.ones(2, 5))
        empty = list(model.empty_caches(2, canvas).values())
        _, caches = model.step(old.flatten(1), everything, everything, empty, prepared)
        ids = take_rows(new, chosen).flatten(1)
        logits, refreshed = model.step(ids, chosen, columns, caches, prepared)
        again, _ = model.step(ids, chosen, columns, refreshed, prepared)
    expected = expected_partial(model, old, new, changed)
    expected = torch.unflatten(expected, 1, (canvas, -1))[:, [3, 5]].flatten(1, 2)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(again, logits)
    assert not torch.equal(old, new)


def test_what_only_the_prompt_decides_leaves_the_passes(
    whole_pass: WholePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(PLAIN)
    tokens = tokens_of(PLAIN)
    expected, prepared = whole_pass(model, tokens, PROMPTS), model.condition(PROMPTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("text_encoder.") or is_prepared(name):
                parameter.fill_(float("nan"))
    monkeypatch.setattr(model, "condition", lambda _: dict(prepared))
    assert torch.equal(whole_pass(model, tokens, PROMPTS), expected)
    with torch.device("meta"):
        full = Amused(PUBLISHED["amused-256"]).transformer
    moved = sum(value.numel() for name, value in full.named_parameters() if is_prepared(name))
    assert 210e6 < moved < 220e6


def test_canvas_caches_and_context_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        model = Amused(PUBLISHED["amused-512"])
        caches = model.empty_caches(2, model.spec.canvas)
    spec = model.spec
    assert (spec.length, spec.canvas, spec.grid, spec.patch) == (1024, 256, (32, 32), (2, 2))
    assert (spec.codebook, spec.mask_token, spec.classes, spec.context) == (8192, 8255, 0, ())
    assert len(caches) == 46
    assert caches["21.value"].shape == (2, 16, 256, 64)
    assert caches["embedded"].shape == caches["left"].shape == (2, 256, 768)


@pytest.mark.parametrize("config", [PLAIN, PATCHES])
def test_half_precision_stays_close_and_gives_float32(
    config: UVitConfig, whole_pass: WholePass
) -> None:
    model = random_model(config)
    half = copy.deepcopy(model).half()
    tokens = tokens_of(config)
    with torch.no_grad():
        full, forward = model(tokens, PROMPTS), half(tokens, PROMPTS)
    passed = whole_pass(half, tokens, PROMPTS)
    assert {value.dtype for value in half.condition(PROMPTS).values()} == {torch.float16}
    assert {value.dtype for value in half.empty_caches(1, 16).values()} == {torch.float16}
    for logits in (forward, passed):
        assert logits.dtype == torch.float32
        assert 0 < (logits - full).abs().max() < 2e-2


def test_half_precision_survives_strong_channels() -> None:
    from mdzoo.amused_layers import GlobalResponseNorm

    norm = GlobalResponseNorm(8)
    x = torch.linspace(-3000, 3000, 2048).reshape(1, 256, 8)  # whose squares overflow float16
    with torch.no_grad():
        norm.gamma.fill_(0.5)
        half = copy.deepcopy(norm).half()(x.half())
    strength = x.norm(dim=1) / x.norm(dim=1).mean()
    torch.testing.assert_close(half.float(), x * (1 + 0.5 * strength), rtol=2e-3, atol=2)


def test_random_weights_give_finite_logits() -> None:
    torch.manual_seed(0)
    model = Amused(AmusedConfig(PATCHES, TEXT))
    FAMILY.initialise(model)
    with torch.no_grad():
        logits = model(tokens_of(PATCHES), PROMPTS)
    assert logits.isfinite().all()
    assert logits.std() > 0.01
