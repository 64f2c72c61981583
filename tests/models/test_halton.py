"""The Halton-MaskGIT port against published reference values, through the published format."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.halton import FAMILY, PUBLISHED, Halton, HaltonConfig, from_published, to_published
from mdzoo.synthetic import golden_weights, toks

WholePass = Callable[..., Tensor]

FOUR = HaltonConfig(grid=4, codebook=32, classes=10, width=64, depth=2, heads=4, hidden=256)
SIX = replace(FOUR, heads=6)  # heads of 10, which do not fill the width of 64
ODD = [
    HaltonConfig(grid=3, codebook=7, classes=2, width=30, depth=1, heads=7, hidden=11),
    HaltonConfig(grid=2, codebook=100, classes=1, width=8, depth=12, heads=1, hidden=64),
]
BASE = PUBLISHED["halton-base-256"]
INDICES = [0, 105, 210, 316, 421, 527]

# Logits of the original code with synthetic weights: heads, class, mean, standard deviation, sum
# of absolute values, and the values at INDICES.
VALUES = (
    [-0.618196, 0.102011, -0.434313, 0.692035, 0.048221, 2.188651],
    [-0.626480, 0.108656, -0.437554, 0.679058, 0.052378, 2.206680],
    [-0.643378, 0.135095, -0.416917, 0.721153, 0.020617, 2.165494],
    [-0.641417, 0.114929, -0.408727, 0.699736, 0.022447, 2.171957],
)
GOLDEN = [
    (4, 3, 0.050090, 0.564522, 204.8436, VALUES[0]),
    (4, -1, 0.049583, 0.565116, 205.2077, VALUES[1]),
    (6, 3, 0.044570, 0.565946, 206.1787, VALUES[2]),
    (6, -1, 0.046120, 0.566316, 206.6066, VALUES[3]),
]


def synthetic_state(config: HaltonConfig) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    state = {
        key: tensor.clone() for key, tensor in to_published(Halton(config).state_dict()).items()
    }
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return {**state, "head.weight": state["tok_emb.weight"]}


def synthetic_model(config: HaltonConfig) -> Halton:
    model = Halton(config)
    model.load_state_dict(from_published(synthetic_state(config)))
    return model.eval()


def save(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> Path:
    """Write a file as the authors' trainer does, optimiser and all."""
    torch.save(
        {
            "iter": 410000,
            "global_epoch": 400,
            "model_state_dict": {prefix + key: tensor for key, tensor in state.items()},
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        },
        path,
    )
    return path


def load(path: Path, **settings: int) -> Halton:
    state = checkpoint.read(path)
    model = FAMILY.build(FAMILY.infer(state, BASE, settings))
    checkpoint.fit(model, FAMILY.from_published(state), source=path.name)
    return cast(Halton, model.eval())


def tokens_of(config: HaltonConfig) -> Tensor:
    return toks(config.length, config.codebook, config.codebook)[None]


def logits_of(model: Halton, tokens: Tensor, *labels: int) -> Tensor:
    with torch.no_grad():
        return model(tokens, torch.tensor(labels))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize(("heads", "label", "mean", "std", "total", "values"), GOLDEN)
def test_logits_are_those_of_the_original_code(
    heads: int,
    label: int,
    mean: float,
    std: float,
    total: float,
    values: list[float],
    prefix: str,
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "small.pth", synthetic_state(replace(FOUR, heads=heads)), prefix)
    logits = logits_of(load(path, heads=heads), tokens_of(FOUR), label).numpy()
    assert logits.shape == (1, 16, 33)
    assert logits.mean() == pytest.approx(mean, abs=1e-4)
    assert logits.std() == pytest.approx(std, abs=1e-4)
    assert np.abs(logits).sum() == pytest.approx(total, abs=1e-3)
    np.testing.assert_allclose(logits.ravel()[INDICES], values, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count", "millions"),
    [
        ("halton-tiny-256", 76, 23.03),
        ("halton-small-256", 142, 69.34),
        ("halton-base-256", 142, 142.2),
        ("halton-small-384", 142, 69.51),
        ("halton-base-384", 142, 142.5),
        ("halton-large-384", 274, 480.0),
    ],
)
def test_published_sizes_give_the_published_tensors(name: str, count: int, millions: float) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        state = to_published(Halton(config).state_dict())
    assert len(state) == count
    total = sum(tensor.numel() for key, tensor in state.items() if key != "head.weight")
    assert total / 1e6 == pytest.approx(millions, abs=0.05 if millions > 100 else 0.005)
    assert state["pos_emb.weight"].shape == ({"256": 256, "384": 576}[name[-3:]], config.width)
    assert state["cls_emb.weight"].shape == (1001, config.width)
    assert state["head.weight"].shape == state["tok_emb.weight"].shape == (16385, config.width)
    assert FAMILY.infer(state, config, {}) == config


def test_six_heads_at_width_512_have_85_numbers_each() -> None:
    with torch.device("meta"):
        state = to_published(Halton(PUBLISHED["halton-small-256"]).state_dict())
    assert state["transformer.layers.11.attn.wk.weight"].shape == (510, 512)
    assert state["transformer.layers.11.attn.wo.weight"].shape == (512, 510)


@pytest.mark.parametrize("config", ODD)
def test_sizes_come_from_the_checkpoint(config: HaltonConfig, tmp_path: Path) -> None:
    path = save(tmp_path / "odd.pth", synthetic_state(config))
    assert load(path, heads=config.heads).config == config


def test_heads_of_the_published_width_need_not_be_told(tmp_path: Path) -> None:
    config = replace(FOUR, width=BASE.width, depth=1, heads=BASE.heads)
    assert load(save(tmp_path / "wide.pth", synthetic_state(config))).config == config


@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("config", [FOUR, SIX, *ODD])
def test_a_pass_over_all_rows_equals_the_forward_pass(
    config: HaltonConfig, label: int, whole_pass: WholePass
) -> None:
    model, tokens = synthetic_model(config), tokens_of(config)
    label = label % config.classes if label > 0 else label
    plain = logits_of(model, tokens, label)[..., : config.codebook]
    cached = whole_pass(model, tokens, torch.tensor([label]))
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=0)


def test_rows_of_a_pass_have_classes_of_their_own(whole_pass: WholePass) -> None:
    model, tokens, labels = synthetic_model(SIX), tokens_of(SIX).repeat(3, 1), (2, -1, 9)
    together = whole_pass(model, tokens, torch.tensor(labels))
    alone = torch.cat([logits_of(model, tokens_of(SIX), label) for label in labels])[..., :-1]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_one_layer_recomputes_only_the_rows_that_changed() -> None:
    config = replace(SIX, depth=1)
    model, before = synthetic_model(config), tokens_of(config)
    after, changed = before.clone(), torch.tensor([[2, 9, 11, 9]])  # a repeated row is harmless
    after[0, changed] = torch.tensor([[5, 6, 7, 6]])
    extras = model.condition(torch.tensor([3]))
    rows = torch.arange(config.length + 1)[None]
    register = torch.tensor([[model.spec.context[0].dropped]])
    with torch.no_grad():
        empty = list(model.empty_caches(1, config.length + 1).values())
        ids = torch.cat([before, register], 1)
        _, caches = model.step(ids, rows, rows[:, :1], empty, extras)
        logits, _ = model.step(
            after[:, changed[0]], changed, torch.tensor([[2, 0]]), caches, extras
        )
    expected = logits_of(model, after, 3)[:, [11, 2], : config.codebook]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_the_class_takes_no_part_in_the_graph_of_a_pass() -> None:
    model = synthetic_model(FOUR)
    extras = {key: tensor.detach() for key, tensor in model.condition(torch.tensor([3])).items()}
    assert {key: tuple(tensor.shape) for key, tensor in extras.items()} == {
        "modulation": (1, 2, 6, 64),
        "last": (1, 2, 64),
    }
    rows = torch.arange(17)[None]
    empty = list(model.empty_caches(1, 17).values())
    logits, _ = model.step(rows, rows, rows, empty, extras)
    names, parameters = zip(*model.named_parameters(), strict=True)
    used = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    idle = {name.split(".")[0] for name, part in zip(names, used, strict=True) if part is None}
    assert idle == {"classes", "modulations", "last_modulation"}


def test_names_round_trip() -> None:
    state = Halton(SIX).state_dict()
    back = from_published(to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_precision_keeps_norms_softmax_and_head_in_float32() -> None:
    model = synthetic_model(SIX)
    full = logits_of(model, tokens_of(SIX), 3)
    half = logits_of(model.half(), tokens_of(SIX), 3)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 1e-2
    assert model.positions[-1].abs().max() == 0


def test_random_weights_leave_the_register_without_a_position_and_the_gates_open() -> None:
    torch.manual_seed(0)
    model = Halton(SIX)
    FAMILY.initialise(model)
    assert model.positions[-1].abs().max() == 0
    assert model.positions[:-1].std().item() == pytest.approx(0.02, rel=0.1)
    logits = logits_of(model.eval(), tokens_of(SIX).repeat(2, 1), 3, 4)
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_heads_that_no_shape_tells_must_be_told(tmp_path: Path) -> None:
    path = save(tmp_path / "six.pth", synthetic_state(SIX))
    with pytest.raises(CheckpointError, match=r"width 64 .* pass --set heads=N"):
        load(path)
    with pytest.raises(CheckpointError, match=r"4 heads .* of 64 numbers in all, found 60"):
        load(path, heads=4)
    with pytest.raises(CheckpointError, match="heads must be 1 to 64, got 0"):
        load(path, heads=0)


@pytest.mark.parametrize("missing", ["head.weight", "tok_emb.weight"])
def test_one_copy_of_the_tied_table_is_enough(missing: str, tmp_path: Path) -> None:
    state = synthetic_state(FOUR)
    del state[missing]
    model = load(save(tmp_path / "one.pth", state), heads=4)
    expected = logits_of(synthetic_model(FOUR), tokens_of(FOUR), 3)
    assert torch.equal(logits_of(model, tokens_of(FOUR), 3), expected)


def test_two_different_tables_are_refused(tmp_path: Path) -> None:
    state = synthetic_state(FOUR)
    path = save(tmp_path / "untied.pth", {**state, "head.weight": state["head.weight"] + 1e-3})
    with pytest.raises(CheckpointError, match=r"head.weight must be the same .* tok_emb.weight"):
        load(path, heads=4)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = synthetic_state(FOUR)
    del state["transformer.layers.1.attn.wk.weight"], state["last_norm.norm_final.bias"]
    state["in_proj.weight"] = torch.zeros(64, 64, 2, 2)
    state["pos_emb.weight"] = state["pos_emb.weight"][:13]
    message = (
        r"missing \(blocks.1.attention.qkv.weight, last_norm.bias\); 3 unexpected .*"
        r"in_proj.weight\).*positions: expected float \(10, 64\), found float \(14, 64\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load(save(tmp_path / "damaged.pth", state), heads=4)


def test_another_architecture_is_named_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(CheckpointError, match=r"'tok_emb.weight', found 2 other tensors \(conv1"):
        load(path)
