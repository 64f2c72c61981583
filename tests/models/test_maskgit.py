"""The MaskGIT port against published reference values, through the published file format."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mdzoo
from mdzoo.checkpoint import CheckpointError, read
from mdzoo.maskgit import MaskGIT, MaskGITConfig, from_published, to_published
from mdzoo.synthetic import golden_weights, toks

SMALL = MaskGITConfig(grid=4, codebook=32, classes=10, width=64, depth=2, heads=4, hidden=128)
INDICES = [0, 105, 210, 316, 421, 527]

# Logits of the original code with synthetic weights: class, mean, standard deviation, sum of
# absolute values, and the values at INDICES.
CONDITIONAL = [0.481115, 0.097782, -0.466382, 0.535112, -0.507111, 0.057649]
UNCONDITIONAL = [0.487257, 0.093331, -0.459194, 0.543537, -0.506871, 0.060125]
GOLDEN = [
    (3, -0.005184, 0.347767, 150.8832, CONDITIONAL),
    (-1, -0.001775, 0.348267, 151.2119, UNCONDITIONAL),
]


def synthetic_state(config: MaskGITConfig) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    state = to_published(MaskGIT(config).state_dict())
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def synthetic_model(config: MaskGITConfig) -> MaskGIT:
    model = MaskGIT(config)
    model.load_state_dict(from_published(synthetic_state(config)))
    return model.eval()


def save(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> Path:
    """Write a file as the authors' trainer does, optimiser and all."""
    torch.save(
        {
            "iter": 300000,
            "global_epoch": 300,
            "model_state_dict": {prefix + key: tensor for key, tensor in state.items()},
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        },
        path,
    )
    return path


def tokens_of(config: MaskGITConfig) -> Tensor:
    return toks(config.length, config.codebook, config.codebook)[None]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize(("label", "mean", "std", "total", "values"), GOLDEN)
def test_logits_are_those_of_the_original_code(
    label: int,
    mean: float,
    std: float,
    total: float,
    values: list[float],
    prefix: str,
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "small.pth", synthetic_state(SMALL), prefix)
    sources = mdzoo.Sources(checkpoint=path, settings={"heads": 4, "classes": 10})
    model = mdzoo.load_denoiser(mdzoo.CATALOGUE["maskgit256"], sources)
    with torch.no_grad():
        logits = model(tokens_of(SMALL), torch.tensor([label])).numpy()
    assert logits.shape == (1, 16, 33)
    assert logits.mean() == pytest.approx(mean, abs=1e-4)
    assert logits.std() == pytest.approx(std, abs=1e-4)
    assert np.abs(logits).sum() == pytest.approx(total, abs=1e-3)
    np.testing.assert_allclose(logits.ravel()[INDICES], values, atol=1e-4)


@pytest.mark.parametrize("grid", [16, 32])
def test_published_sizes_give_the_published_tensors(grid: int) -> None:
    entry = mdzoo.CATALOGUE[f"maskgit{16 * grid}"]
    with torch.device("meta"):
        state = to_published(MaskGIT(entry.config).state_dict())
    assert len(state) == 305
    assert state["pos_emb"].shape == (1, grid**2 + 1, 768)
    assert state["bias"].shape == (grid**2 + 1, 2026)
    assert state["transformer.layers.23.0.fn.mha.in_proj_weight"].shape == (2304, 768)
    assert state["first_layer.6.weight"].shape == (768, 768)
    assert state["last_layer.4.bias"].shape == (768,)
    assert round(entry.parameters / 1e6, 3) == {16: 174.161, 32: 176.307}[grid]
    assert MaskGITConfig.from_state(state, heads=16, classes=1000) == entry.config


ODD = [
    MaskGITConfig(grid=3, codebook=7, classes=2, width=30, depth=1, heads=5, hidden=11),
    MaskGITConfig(grid=2, codebook=100, classes=1, width=8, depth=12, heads=1, hidden=64),
]


@pytest.mark.parametrize("config", ODD)
def test_sizes_come_from_the_checkpoint(config: MaskGITConfig, tmp_path: Path) -> None:
    path = save(tmp_path / "odd.pth", synthetic_state(config))
    settings = {"heads": config.heads, "codebook": config.codebook}
    sources = mdzoo.Sources(checkpoint=path, settings=settings)
    assert mdzoo.load_denoiser(mdzoo.CATALOGUE["maskgit256"], sources).config == config


@pytest.mark.parametrize("config", [SMALL, *ODD])
@pytest.mark.parametrize("label", [0, -1])
def test_a_pass_over_all_rows_equals_the_forward_pass(
    config: MaskGITConfig, label: int, whole_pass: Callable[..., Tensor]
) -> None:
    model = synthetic_model(config)
    tokens, labels = tokens_of(config), torch.tensor([label])
    with torch.no_grad():
        plain = model(tokens, labels)[..., : config.codebook]
    torch.testing.assert_close(whole_pass(model, tokens, labels), plain, atol=1e-5, rtol=0)


def test_names_round_trip() -> None:
    state = MaskGIT(SMALL).state_dict()
    back = from_published(to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_precision_keeps_norms_softmax_and_head_in_float32() -> None:
    model = synthetic_model(SMALL)
    with torch.no_grad():
        full = model(tokens_of(SMALL), torch.tensor([3]))
        half = model.half()(tokens_of(SMALL), torch.tensor([3]))
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 5e-3


def test_layer_norm_survives_activations_that_overflow_float16_sums() -> None:
    from mdzoo.layers import LayerNorm

    x = torch.linspace(-30000, 30000, 96).half()[None]
    assert LayerNorm(96).half()(x).isfinite().all()


def test_ambiguous_sizes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "small.pth", synthetic_state(SMALL))
    entry = mdzoo.CATALOGUE["maskgit256"]
    with pytest.raises(CheckpointError, match=r"44 embedding rows .* pass --set classes=N"):
        mdzoo.load_denoiser(entry, mdzoo.Sources(checkpoint=path))
    with pytest.raises(CheckpointError, match=r"width 64 .* pass --set heads=N"):
        mdzoo.load_denoiser(entry, mdzoo.Sources(checkpoint=path, settings={"classes": 10}))
    settings = {"classes": 10, "heads": 5}
    with pytest.raises(CheckpointError, match="heads must divide the width 64, got 5"):
        mdzoo.load_denoiser(entry, mdzoo.Sources(checkpoint=path, settings=settings))
    with pytest.raises(CheckpointError, match="one of heads, classes, codebook, got 'depth'"):
        mdzoo.load_denoiser(entry, mdzoo.Sources(checkpoint=path, settings={"depth": 2}))


def test_another_architecture_is_named_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}, path)
    sources = mdzoo.Sources(checkpoint=path)
    with pytest.raises(
        CheckpointError, match=r"'tok_emb.weight', found 2 other tensors \(conv1.weight"
    ):
        mdzoo.load_denoiser(mdzoo.CATALOGUE["maskgit256"], sources)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = synthetic_state(SMALL)
    del state["last_layer.2.bias"]
    state["bias"] = state["bias"][:, :-1]
    path = save(tmp_path / "damaged.pth", state)
    sources = mdzoo.Sources(checkpoint=path, settings={"heads": 4, "classes": 10})
    message = r"1 missing \(last.1.bias\).*bias: expected float \(17, 44\), found float \(17, 43\)"
    with pytest.raises(CheckpointError, match=message):
        mdzoo.load_denoiser(mdzoo.CATALOGUE["maskgit256"], sources)


def test_random_weights_follow_from_their_seed_and_leave_the_global_state_alone() -> None:
    entry = mdzoo.CATALOGUE["digits"]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        cast(MaskGIT, mdzoo.load_denoiser(entry, mdzoo.Sources(random_seed=seed))).tokens.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shipped_weights_load_from_the_package() -> None:
    model = mdzoo.load(mdzoo.CATALOGUE["digits"], mdzoo.Sources())
    assert model.weights.origin == "trained"
    assert model.weights.parameters == mdzoo.CATALOGUE["digits"].parameters
    assert model.decoder is not None
    with torch.no_grad():
        images = model.decoder(torch.arange(17).repeat(1, 4)[:, :64])
    assert images.shape == (1, 8, 8, 3)
    assert images.dtype == torch.uint8
    assert images[0, 0, :, 0].tolist() == [0, 16, 32, 48, 64, 80, 96, 112]


def test_a_checkpoint_is_read_from_any_file_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(synthetic_state(SMALL), buffer)
    path = tmp_path / "weights"
    path.write_bytes(buffer.getvalue())
    assert read(path).keys() == synthetic_state(SMALL).keys()
