"""TiTok's generators against published values, transformers' BERT, and their rule written out."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.synthetic import golden_weights, toks
from mdzoo.titok import FAMILY, PUBLISHED, TiTok, TiTokConfig, infer
from mdzoo.titok_checkpoint import from_published, to_published

BERT = TiTokConfig(
    length=8, codebook=32, classes=10, width=64, depth=2, heads=4, hidden=128, skips=False
)
UVIT = replace(BERT, depth=3, skips=True)
ODD = [
    replace(BERT, length=3, codebook=7, classes=2, width=30, depth=1, heads=5, hidden=11),
    replace(UVIT, length=5, codebook=100, classes=1, width=8, depth=7, heads=1, hidden=64),
    replace(UVIT, depth=1),
]
INDICES = [0, 51, 102, 153, 204, 255]

# Logits of the original code with synthetic weights: class, mean, standard deviation, sum of
# absolute values, and the values at INDICES.
GOLDEN = [
    (
        (BERT, 3, -0.030646, 0.389157, 76.8002),
        [0.307153, -0.267800, 0.220010, 0.311891, -0.582166, -0.693027],
    ),
    (
        (BERT, -1, -0.029475, 0.388771, 76.7171),
        [0.310817, -0.255259, 0.229051, 0.313325, -0.573669, -0.683238],
    ),
    (
        (UVIT, 3, -0.027801, 0.397105, 83.9834),
        [0.031822, 0.232669, -0.040528, -0.580585, 0.080592, -0.610623],
    ),
    (
        (UVIT, -1, 0.022490, 0.411033, 88.7810),
        [0.156362, 0.194554, -0.082724, -0.425476, 0.141194, -0.554126],
    ),
]


def synthetic_state(config: TiTokConfig) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    state = {key: w.clone() for key, w in to_published(TiTok(config).state_dict()).items()}
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def synthetic_model(config: TiTokConfig) -> TiTok:
    model = TiTok(config)
    model.load_state_dict(from_published(synthetic_state(config)))
    return model.eval()


def save(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write either of the published formats."""
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        torch.save(dict(state), path)
    return path


def load(path: Path, published: str = "titok-l32", **settings: int) -> TiTok:
    state = checkpoint.read(path, strip=FAMILY.prefixes)
    model = FAMILY.build(FAMILY.infer(state, PUBLISHED[published], settings))
    checkpoint.fit(model, FAMILY.from_published(state), source=path.name)
    return cast(TiTok, model.eval())


def tokens_of(config: TiTokConfig, batch: int = 1) -> Tensor:
    return toks(config.length, config.codebook, config.codebook).repeat(batch, 1)


@pytest.mark.parametrize("name", ["model.safetensors", "generator.bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.model."])
@pytest.mark.parametrize(("golden", "values"), GOLDEN)
def test_logits_are_those_of_the_original_code(
    golden: tuple[TiTokConfig, int, float, float, float],
    values: list[float],
    prefix: str,
    name: str,
    tmp_path: Path,
) -> None:
    config, label, mean, std, total = golden
    state = {prefix + key: tensor for key, tensor in synthetic_state(config).items()}
    if not config.skips:
        state[prefix + "model.embeddings.position_ids"] = torch.arange(9)[None]
    model = load(save(tmp_path / name, state), heads=4)
    with torch.no_grad():
        logits = model(tokens_of(config), torch.tensor([label])).numpy()
    assert logits.shape == (1, 8, 32)
    assert logits.mean() == pytest.approx(mean, abs=1e-4)
    assert logits.std() == pytest.approx(std, abs=1e-4)
    assert np.abs(logits).sum() == pytest.approx(total, abs=1e-3)
    np.testing.assert_allclose(logits.ravel()[INDICES], values, atol=1e-4)


def test_the_short_models_are_the_bert_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(BERT, width=48, depth=3, heads=6, hidden=80)
    torch.manual_seed(0)
    sizes = transformers.BertConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        max_position_embeddings=config.length + 1,
    )
    bert = transformers.BertModel(sizes, add_pooling_layer=False).eval()
    for parameter in bert.parameters():
        nn.init.normal_(parameter, std=0.3)
    bert.lm_head = nn.Linear(config.width, config.codebook)
    model = TiTok(config).eval()
    state = {f"model.{key}": tensor for key, tensor in bert.state_dict().items()}
    checkpoint.fit(model, from_published(state), source="transformers")
    tokens = tokens_of(config, 2)
    ids = torch.cat([torch.tensor([[config.codebook + 1 + 7], [config.vocabulary - 1]]), tokens], 1)
    with torch.no_grad():
        expected = bert.lm_head(bert(ids).last_hidden_state)[:, 1:]
        found = model(tokens, torch.tensor([7, -1]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def uvit_by_rule(state: Mapping[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """Compute the logits of all rows by the published names, each operation written out."""

    def normed(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def block(x: Tensor, name: str) -> Tensor:
        projected = linear(normed(x, f"{name}.norm1"), f"{name}.attn.qkv")
        query, key, value = (
            torch.stack(part.chunk(heads, -1), 1) for part in projected.chunk(3, -1)
        )
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        x = x + linear(torch.cat((weights @ value).unbind(1), -1), f"{name}.attn.proj")
        y = functional.gelu(linear(normed(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + linear(y, f"{name}.mlp.fc2")

    x = state["embeddings.weight"][ids] + state["pos_embed"]
    first = block(x, "in_blocks.0")
    second = block(first, "in_blocks.1")
    x = block(second, "mid_block")
    x = block(linear(torch.cat([x, second], -1), "out_blocks.0.skip_linear"), "out_blocks.0")
    x = block(linear(torch.cat([x, first], -1), "out_blocks.1.skip_linear"), "out_blocks.1")
    return linear(normed(x, "norm"), "lm_head")


def test_long_skips_join_the_last_blocks_with_the_first_in_reverse() -> None:
    config = replace(UVIT, depth=5)
    tokens = tokens_of(config)
    ids = torch.cat([torch.tensor([[config.codebook + 1 + 4]]), tokens], 1)
    with torch.no_grad():
        expected = uvit_by_rule(synthetic_state(config), ids, config.heads)[:, 1:]
        found = synthetic_model(config)(tokens, torch.tensor([4]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "tensors", "millions"),
    [("titok-l32", 391, 177.2), ("titok-b64", 391, 177.2), ("titok-s128", 257, 295.0)],
)
def test_published_sizes_give_the_published_tensors(
    name: str, tensors: int, millions: float
) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        state = to_published(TiTok(config).state_dict())
    assert len(state) == tensors
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 1) == millions
    assert infer(state, config, {}) == config
    assert config.length == int(name[-3:].strip("bl"))
    if config.skips:
        assert state["pos_embed"].shape == (1, 129, 1024)
        assert state["embeddings.weight"].shape == (5098, 1024)
        assert state["out_blocks.9.skip_linear.weight"].shape == (1024, 2048)
        assert "in_blocks.9.attn.qkv.bias" not in state
    else:
        assert state["model.embeddings.word_embeddings.weight"].shape == (5098, 768)
        assert state["model.encoder.layer.23.intermediate.dense.weight"].shape == (3072, 768)
        assert state["model.lm_head.weight"].shape == (4096, 768)


@pytest.mark.parametrize("config", ODD)
def test_sizes_come_from_the_checkpoint(config: TiTokConfig, tmp_path: Path) -> None:
    path = save(tmp_path / "odd.safetensors", synthetic_state(config))
    assert load(path, heads=config.heads).config == config


@pytest.mark.parametrize("config", [BERT, UVIT, *ODD])
def test_a_pass_over_all_rows_equals_the_forward_pass(
    config: TiTokConfig, whole_pass: Callable[..., Tensor]
) -> None:
    model, tokens = synthetic_model(config), tokens_of(config, 2)
    labels = torch.tensor([1 % config.classes, -1])
    with torch.no_grad():
        plain = model(tokens, labels)
    assert plain[0].ne(plain[1]).any()
    torch.testing.assert_close(whole_pass(model, tokens, labels), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [replace(BERT, depth=1), replace(UVIT, depth=1)])
def test_one_layer_is_exact_when_only_the_changed_rows_are_recomputed(config: TiTokConfig) -> None:
    model, before, label = synthetic_model(config), tokens_of(config), torch.tensor([2])
    after = before.clone()
    after[0, [1, 6]] = torch.tensor([5, config.codebook])
    canvas = config.length + 1
    ids = torch.cat([torch.tensor([[config.codebook + 1 + 2]]), before], 1)
    everywhere = torch.arange(canvas)[None]
    with torch.no_grad():
        caches = list(model.empty_caches(1, canvas).values())
        _, caches = model.step(ids, everywhere, everywhere[:, :1], caches, {})
        rows = torch.tensor([[7, 2, 7]])  # a repeated row is harmless
        found, _ = model.step(after.gather(1, rows - 1), rows, everywhere[:, :2], caches, {})
        expected = model(after, label)
    torch.testing.assert_close(found, expected[:, [6, 1]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [BERT, UVIT])
def test_names_round_trip(config: TiTokConfig) -> None:
    state = TiTok(config).state_dict()
    back = from_published(to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("config", [BERT, UVIT])
def test_half_precision_keeps_norms_softmax_and_head_in_float32(config: TiTokConfig) -> None:
    model = synthetic_model(config)
    with torch.no_grad():
        full = model(tokens_of(config), torch.tensor([3]))
        half = model.half()(tokens_of(config), torch.tensor([3]))
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 1e-2


@pytest.mark.parametrize("config", [BERT, UVIT])
def test_random_weights_begin_with_small_embeddings(config: TiTokConfig) -> None:
    torch.manual_seed(0)
    model = TiTok(config)
    FAMILY.initialise(model)
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.1)


def test_heads_are_taken_from_the_published_model_of_the_same_width_only(tmp_path: Path) -> None:
    wide = replace(BERT, width=768, depth=1, heads=16)
    path = save(tmp_path / "wide.bin", synthetic_state(wide))
    assert load(path, "titok-b64").config == wide
    message = r"a BERT of width 768 where .* a U-ViT of width 1024, .* pass --set heads=N"
    with pytest.raises(CheckpointError, match=message):
        load(path, "titok-s128")
    with pytest.raises(CheckpointError, match="heads must divide the width 768, got 7"):
        load(path, heads=7)


def test_another_architecture_is_named_by_its_keys(tmp_path: Path) -> None:
    path = save(tmp_path / "resnet.bin", {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    message = r"'embeddings.word_embeddings.weight', found 1 other tensors \(conv1.weight"
    with pytest.raises(CheckpointError, match=message):
        load(path)
    state = synthetic_state(UVIT)
    state["lm_head.weight"] = torch.zeros(42, 64)
    with pytest.raises(CheckpointError, match=r"must have tokens, classes and blocks.*classes=0"):
        load(save(tmp_path / "model.bin", state), heads=4)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = synthetic_state(BERT)
    del state["model.encoder.layer.1.attention.self.key.weight"]
    state["model.pooler.dense.bias"] = torch.zeros(64)
    state["model.lm_head.bias"] = torch.zeros(31)
    message = (
        r"1 missing \(blocks.1.attention.qkv.weight\); 3 unexpected "
        r"\(encoder.layer.1.attention.self.query.weight, .*, pooler.dense.bias\)"
        r".*head.bias: expected float \(32,\), found float \(31,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load(save(tmp_path / "damaged.bin", state), heads=4)
    del state["model.embeddings.token_type_embeddings.weight"]
    with pytest.raises(CheckpointError, match=r"must hold 'embeddings.token_type_embeddings.wei"):
        load(save(tmp_path / "damaged.bin", state), heads=4)
