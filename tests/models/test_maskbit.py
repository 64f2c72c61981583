"""MaskBit's generators against published reference values, through the published file format."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdruntime.layout import Layout
from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.maskbit import (
    FAMILY,
    PUBLISHED,
    MaskBit,
    MaskBitConfig,
    from_published,
    infer,
    to_published,
)
from mdzoo.synthetic import golden_weights, toks

SMALL = MaskBitConfig(grid=4, bits=6, classes=10, width=64, depth=2, heads=4, hidden=128)
ODD = [
    MaskBitConfig(grid=3, bits=2, classes=2, width=30, depth=1, heads=5, hidden=11),
    MaskBitConfig(grid=1, bits=8, classes=40, width=8, depth=12, heads=1, hidden=64),
]
INDICES = [0, 51, 102, 153, 204, 255]

# Logits of the original code with synthetic weights: class, mean, standard deviation, sum of
# absolute values, and the values at INDICES.
CONDITIONAL = [-0.109316, 0.284732, -0.055172, 0.311899, 0.112682, -0.817082]
UNCONDITIONAL = [-0.113005, 0.288075, -0.059765, 0.306295, 0.109079, -0.813464]
GOLDEN = [
    (3, -0.073362, 0.430772, 86.9271, CONDITIONAL),
    (-1, -0.072495, 0.430764, 86.8422, UNCONDITIONAL),
]


def synthetic_state(config: MaskBitConfig) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    state = to_published(MaskBit(config).state_dict())
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def synthetic_model(config: MaskBitConfig) -> MaskBit:
    model = MaskBit(config)
    model.load_state_dict(from_published(synthetic_state(config)))
    return model.eval()


def save(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> Path:
    """Write a file as the authors do, with the table that follows from the number of bits."""
    buffers = {"bits_to_indices": 2 ** torch.arange(3)}
    torch.save({prefix + key: tensor for key, tensor in {**buffers, **state}.items()}, path)
    return path


def load(path: Path, **settings: int) -> MaskBit:
    state = checkpoint.read(path)
    model = FAMILY.build(FAMILY.infer(state, PUBLISHED["maskbit-14bit"], settings))
    checkpoint.fit(model, FAMILY.from_published(state), source=path.name)
    return cast(MaskBit, model.eval())


def tokens_of(config: MaskBitConfig, batch: int = 1) -> Tensor:
    """Return tokens of which the first group of every third position is hidden."""
    count, codebook = config.grid**2, config.codebook
    groups = [toks(count, codebook, codebook), toks(count, codebook)]
    return torch.stack(groups, dim=1).flatten().repeat(batch, 1)


@pytest.mark.parametrize("projection", ["input_proj", "token_emb"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.module."])
@pytest.mark.parametrize(("label", "mean", "std", "total", "values"), GOLDEN)
def test_logits_are_those_of_the_original_code(
    label: int,
    mean: float,
    std: float,
    total: float,
    values: list[float],
    prefix: str,
    projection: str,
    tmp_path: Path,
) -> None:
    state = synthetic_state(SMALL)
    for part in ("weight", "bias"):
        state[f"{projection}.{part}"] = state.pop(f"input_proj.{part}")
    model = load(save(tmp_path / "small.bin", state, prefix), heads=4)
    with torch.no_grad():
        logits = model(tokens_of(SMALL), torch.tensor([label])).numpy()
    assert logits.shape == (1, 32, 8)
    assert logits.mean() == pytest.approx(mean, abs=1e-4)
    assert logits.std() == pytest.approx(std, abs=1e-4)
    assert np.abs(logits).sum() == pytest.approx(total, abs=1e-3)
    np.testing.assert_allclose(logits.ravel()[INDICES], values, atol=1e-4)


@pytest.mark.parametrize(("bits", "millions"), [(10, 304.7), (18, 305.7)])
def test_published_sizes_give_the_published_tensors(bits: int, millions: float) -> None:
    config = PUBLISHED[f"maskbit-{bits}bit"]
    with torch.device("meta"):
        state = to_published(MaskBit(config).state_dict())
    assert len(state) == 300  # and one buffer
    assert state["pos_emb"].shape == (1, 257, 1024)
    assert state["class_emb.weight"].shape == (1001, 1024)
    assert state["input_proj.weight"].shape == (1024, bits)
    assert state["prediction_layer.weight"].shape == (2 * 2 ** (bits // 2), 1024)
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 1) == millions
    assert infer(state, PUBLISHED["maskbit-16bit"], {}) == config


def test_the_two_tokens_of_a_position_stand_side_by_side() -> None:
    spec = MaskBit(SMALL).spec
    layout = Layout(spec, spec.length)
    assert (spec.length, spec.canvas, spec.mask_token) == (32, 17, 8)
    assert layout.tokens_of_row.tolist() == [[2 * row, 2 * row + 1] for row in range(16)]


@pytest.mark.parametrize("config", ODD)
def test_sizes_come_from_the_checkpoint(config: MaskBitConfig, tmp_path: Path) -> None:
    path = save(tmp_path / "odd.bin", synthetic_state(config))
    assert load(path, heads=config.heads).config == config


@pytest.mark.parametrize("config", [SMALL, *ODD])
def test_a_pass_over_all_rows_equals_the_forward_pass(
    config: MaskBitConfig, whole_pass: Callable[..., Tensor]
) -> None:
    model, tokens = synthetic_model(config), tokens_of(config, 3)
    # The id of the last class is beyond all tokens in one of the configurations.
    labels = torch.tensor([1, config.classes - 1, -1])
    with torch.no_grad():
        plain = model(tokens, labels)
    assert plain[0].ne(plain[2]).any()
    torch.testing.assert_close(whole_pass(model, tokens, labels), plain, atol=1e-5, rtol=0)


def test_one_layer_is_exact_when_only_the_changed_rows_are_recomputed() -> None:
    model, before = synthetic_model(replace(SMALL, depth=1)), tokens_of(SMALL)
    after = before.clone()
    after[0, [3, 12, 13]] = torch.tensor([5, 8, 2])  # rows 1 and 6
    ids = torch.cat([before, torch.tensor([[2, 0]])], 1)
    everywhere = torch.arange(17)[None]
    with torch.no_grad():
        caches = list(model.empty_caches(1, 17).values())
        _, caches = model.step(ids, everywhere, everywhere[:, :1], caches, {})
        rows = torch.tensor([[6, 1, 6]])  # a repeated row is harmless
        changed = after[:, [12, 13, 2, 3, 12, 13]]
        found, _ = model.step(changed, rows, everywhere[:, :2], caches, {})
        expected = model(after, torch.tensor([2]))
    torch.testing.assert_close(found, expected[:, [12, 13, 2, 3]], atol=1e-6, rtol=0)


def test_hidden_tokens_are_zeros_and_others_are_signs_of_their_bits() -> None:
    model = MaskBit(replace(SMALL, width=8, heads=1))
    with torch.no_grad():
        model.bits.weight.copy_(torch.eye(8, 6))
        model.bits.bias.zero_()
        embedded = model._bits(torch.tensor([[4, 8, 1, 6]]))[0, :, :6]
    assert embedded.tolist() == [[-1, -1, 1, 0, 0, 0], [1, -1, -1, -1, 1, 1]]


def test_names_round_trip() -> None:
    state = MaskBit(SMALL).state_dict()
    back = from_published(to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_precision_keeps_norms_softmax_and_head_in_float32() -> None:
    model = synthetic_model(SMALL)
    with torch.no_grad():
        full = model(tokens_of(SMALL), torch.tensor([3]))
        half = model.half()(tokens_of(SMALL), torch.tensor([3]))
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 1e-2


def test_random_weights_begin_with_small_embeddings() -> None:
    torch.manual_seed(0)
    model = MaskBit(SMALL)
    FAMILY.initialise(model)
    assert model.classes.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.1)


def test_ambiguous_heads_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "small.bin", synthetic_state(SMALL))
    with pytest.raises(CheckpointError, match=r"width 64 .* pass --set heads=N"):
        load(path)
    with pytest.raises(CheckpointError, match="heads must divide the width 64, got 5"):
        load(path, heads=5)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    state = synthetic_state(SMALL)
    wrong = {
        "pos_emb": (torch.zeros(1, 18, 64), "must cover a square image and one class row, got 18"),
        "input_proj.weight": (torch.zeros(64, 7), "must split in 2 groups, got 7 bits"),
    }
    for key, (tensor, message) in wrong.items():
        path = save(tmp_path / "wrong.bin", {**state, key: tensor})
        with pytest.raises(CheckpointError, match=message):
            load(path, heads=4)
    path = save(tmp_path / "resnet.bin", {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    with pytest.raises(CheckpointError, match=r"'pos_emb', found 1 other tensors \(conv1.weight"):
        load(path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = synthetic_state(SMALL)
    del state["last_layer.2.bias"]
    state["prediction_layer.bias"] = torch.zeros(32)
    state["transformer.layers.0.1.net.1.weight"] = torch.zeros(2)
    message = (
        r"1 missing \(last.2.bias\); 1 unexpected \(transformer.layers.0.1.net.1.weight\)"
        r".*head.bias: expected float \(16,\), found float \(32,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load(save(tmp_path / "damaged.bin", state), heads=4)
