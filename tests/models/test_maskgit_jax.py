"""The port of the original MaskGIT against its forward pass written out over flax's tree."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.maskgit_jax import (
    FAMILY,
    PUBLISHED,
    MaskGITJax,
    MaskGITJaxConfig,
    from_published,
    to_published,
)
from mdzoo.synthetic import golden_weights, toks

WholePass = Callable[..., Tensor]
Array = NDArray[np.float64]

SMALL = MaskGITJaxConfig(grid=4, codebook=32, classes=10, width=64, depth=2, heads=4, hidden=128)
ODD = [
    MaskGITJaxConfig(grid=3, codebook=7, classes=2, width=30, depth=1, heads=5, hidden=11),
    MaskGITJaxConfig(grid=2, codebook=100, classes=1, width=8, depth=12, heads=1, hidden=64),
]
BASE = PUBLISHED["maskgit-jax-256"]


def synthetic_state(config: MaskGITJaxConfig) -> dict[str, Tensor]:
    """Return weights by the golden rule under flax's paths; scales are centred on one."""
    published = to_published(MaskGITJax(config).state_dict(), config.heads)
    state = {path: tensor.clone() for path, tensor in published.items()}
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return {path: state[path] + path.endswith("/scale") for path in state}


def synthetic_model(config: MaskGITJaxConfig) -> MaskGITJax:
    model = MaskGITJax(config)
    model.load_state_dict(from_published(synthetic_state(config)))
    return model.eval()


def pack(value: Any) -> bytes:
    """Return MessagePack as flax writes it: arrays are extensions of kind 1."""
    match value:
        case dict():
            parts = [pack(key) + pack(entry) for key, entry in value.items()]
            return b"\xdf" + len(parts).to_bytes(4, "big") + b"".join(parts)
        case list():
            return b"\xdd" + len(value).to_bytes(4, "big") + b"".join(map(pack, value))
        case str():
            return b"\xdb" + len(value.encode()).to_bytes(4, "big") + value.encode()
        case bytes():
            return b"\xc6" + len(value).to_bytes(4, "big") + value
        case int():
            return b"\xce" + value.to_bytes(4, "big")
    content = pack([list(value.shape), value.dtype.name, value.tobytes()])
    return b"\xc9" + len(content).to_bytes(4, "big") + b"\x01" + content


def save(path: Path, state: Mapping[str, Tensor]) -> Path:
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *folders, leaf = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[leaf] = tensor.numpy()
    path.write_bytes(pack({"params": tree}))
    return path


def load(path: Path, **settings: int) -> MaskGITJax:
    state = checkpoint.read(path)
    model = FAMILY.build(FAMILY.infer(state, BASE, settings))
    checkpoint.fit(model, FAMILY.from_published(state), source=path.name)
    return cast(MaskGITJax, model.eval())


def normalised(x: Array, tree: Mapping[str, Array], path: str) -> Array:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return y * tree[f"{path}/scale"] + tree[f"{path}/bias"]


def dense(x: Array, tree: Mapping[str, Array], path: str) -> Array:
    return x @ tree[f"{path}/kernel"] + tree[f"{path}/bias"]


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x: Array, tree: Mapping[str, Array], path: str) -> Array:
    query, key, value = (
        np.einsum("nd,dhk->hnk", x, tree[f"{path}/{part}/kernel"])
        + tree[f"{path}/{part}/bias"][:, None]
        for part in ("query", "key", "value")
    )
    weights = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1]))
    mixed = weights / weights.sum(-1, keepdims=True) @ value
    return np.einsum("hnk,hkd->nd", mixed, tree[f"{path}/out/kernel"]) + tree[f"{path}/out/bias"]


def original(state: Mapping[str, Tensor], tokens: list[int], token_of_class: int) -> Array:
    """Return the logits of the original forward pass, which writes the mask as -1."""
    tree = {path: tensor.double().numpy() for path, tensor in state.items()}
    words = tree["Embed_0/word_embeddings/embedding"]
    positions = tree["Embed_0/position_embeddings/embedding"]
    x = normalised(words[[token_of_class, *tokens]] + positions, tree, "Embed_0/embeddings_ln")
    for index in range(sum(path.endswith("/layer_output/kernel") for path in tree)):
        layer = f"TransformerLayer_{index}"
        mixed = attention(x, tree, f"{layer}/Attention_0/self_attention")
        x = normalised(x + mixed, tree, f"{layer}/Attention_0/attention_output_ln")
        hidden = gelu(dense(x, tree, f"{layer}/Mlp_0/intermediate_output"))
        y = x + dense(hidden, tree, f"{layer}/Mlp_0/layer_output")
        x = normalised(y, tree, f"{layer}/Mlp_0/layer_output_ln")
    x = normalised(gelu(dense(x, tree, "MlmLayer_0/mlm_dense")), tree, "MlmLayer_0/mlm_ln")
    return (x @ words.T + tree["MlmLayer_0/mlm_bias/bias"])[1:]


def tokens_of(config: MaskGITJaxConfig) -> Tensor:
    return toks(config.length, config.codebook, config.vocabulary - 1)[None]


def logits_of(model: MaskGITJax, tokens: Tensor, *labels: int) -> Tensor:
    with torch.no_grad():
        return model(tokens, torch.tensor(labels))


@pytest.mark.parametrize("label", [0, 3, 9])
def test_logits_are_those_of_the_original_forward_pass(label: int, tmp_path: Path) -> None:
    state = synthetic_state(SMALL)
    model = load(save(tmp_path / "checkpoint", state), classes=10)
    tokens = toks(16, 32, -1)
    expected = original(state, tokens.tolist(), 32 + label)
    tokens[tokens < 0] = model.spec.mask_token
    logits = logits_of(model, tokens[None], label)
    assert logits.shape == (1, 16, 43)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", ODD)
def test_sizes_come_from_the_checkpoint(config: MaskGITJaxConfig, tmp_path: Path) -> None:
    state = synthetic_state(config)
    model = load(save(tmp_path / "odd", state), codebook=config.codebook)
    assert model.config == config
    tokens = tokens_of(config)
    expected = original(state, tokens[0].tolist(), config.codebook)
    np.testing.assert_allclose(logits_of(model, tokens, 0)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pixels", [256, 512])
def test_published_sizes_give_the_published_tensors(pixels: int) -> None:
    config = PUBLISHED[f"maskgit-jax-{pixels}"]
    with torch.device("meta"):
        state = to_published(MaskGITJax(config).state_dict(), 16)
    shapes = {path: tuple(tensor.shape) for path, tensor in state.items()}
    layer = "TransformerLayer_23"
    expected = {
        "Embed_0/word_embeddings/embedding": (2025, 768),
        "Embed_0/position_embeddings/embedding": ({256: 257, 512: 1025}[pixels], 768),
        "Embed_0/embeddings_ln/scale": (768,),
        f"{layer}/Attention_0/self_attention/query/kernel": (768, 16, 48),
        f"{layer}/Attention_0/self_attention/value/bias": (16, 48),
        f"{layer}/Attention_0/self_attention/out/kernel": (16, 48, 768),
        f"{layer}/Attention_0/self_attention/out/bias": (768,),
        f"{layer}/Attention_0/attention_output_ln/scale": (768,),
        f"{layer}/Mlp_0/intermediate_output/kernel": (768, 3072),
        f"{layer}/Mlp_0/layer_output/kernel": (3072, 768),
        f"{layer}/Mlp_0/layer_output_ln/bias": (768,),
        "MlmLayer_0/mlm_dense/kernel": (768, 768),
        "MlmLayer_0/mlm_ln/scale": (768,),
        "MlmLayer_0/mlm_bias/bias": (2025,),
    }
    assert {path: shapes[path] for path in expected} == expected
    assert len(shapes) == 24 * 16 + 9
    assert FAMILY.infer(state, config, {}) == config


@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("config", [SMALL, *ODD])
def test_a_pass_over_all_rows_equals_the_forward_pass(
    config: MaskGITJaxConfig, label: int, whole_pass: WholePass
) -> None:
    model, tokens = synthetic_model(config), tokens_of(config)
    label = label % config.classes if label > 0 else label
    plain = logits_of(model, tokens, label)[..., : config.codebook]
    cached = whole_pass(model, tokens, torch.tensor([label]))
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=0)


def test_a_missing_class_is_none_the_model_knows() -> None:
    model = synthetic_model(SMALL)
    assert not model.spec.unconditional
    first, none = logits_of(model, tokens_of(SMALL).repeat(2, 1), 0, -1)
    assert torch.equal(first, none)


def test_one_layer_recomputes_only_the_rows_that_changed() -> None:
    config = replace(SMALL, depth=1)
    model, before = synthetic_model(config), tokens_of(config)
    after, changed = before.clone(), torch.tensor([2, 9, 11])
    after[0, changed] = torch.tensor([5, 6, 7])
    rows, label = torch.arange(config.length + 1)[None], torch.tensor([[config.codebook + 3]])
    with torch.no_grad():
        empty = list(model.empty_caches(1, config.length + 1).values())
        _, caches = model.step(torch.cat([label, before], 1), rows, rows[:, :1], empty, {})
        columns = torch.tensor([[2, 0]])
        logits, _ = model.step(after[:, changed], changed[None] + 1, columns, caches, {})
    expected = logits_of(model, after, 3)[:, [11, 2], : config.codebook]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_paths_round_trip() -> None:
    state = MaskGITJax(SMALL).state_dict()
    back = from_published(to_published(state, SMALL.heads))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_precision_keeps_norms_softmax_and_head_in_float32() -> None:
    model = synthetic_model(SMALL)
    full = logits_of(model, tokens_of(SMALL), 3)
    half = logits_of(model.half(), tokens_of(SMALL), 3)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 1e-2


def test_a_vocabulary_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "small", synthetic_state(SMALL))
    with pytest.raises(CheckpointError, match=r"43 embedding rows .* pass --set classes=N"):
        load(path)
    with pytest.raises(CheckpointError, match=r"got -1 and 43: pass another --set classes=N"):
        load(path, classes=43)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = synthetic_state(SMALL)
    del state["TransformerLayer_1/Attention_0/self_attention/key/bias"]
    state["MlmLayer_0/mlm_bias/bias"] = torch.zeros(42)
    state["Pooler_0/kernel"] = torch.zeros(64)
    message = (
        r"1 missing \(blocks.1.attention.qkv.bias\); 3 unexpected .*Pooler_0/kernel.*"
        r"bias: expected float \(43,\), found float \(42,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load(save(tmp_path / "damaged", state), classes=10)


def test_another_architecture_is_named_by_its_keys(tmp_path: Path) -> None:
    path = save(tmp_path / "other", {"Conv_0/kernel": torch.zeros(3, 3, 3, 64)})
    with pytest.raises(CheckpointError, match=r"word_embeddings.* other tensors \(Conv_0/kernel"):
        load(path)
