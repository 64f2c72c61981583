"""The bidirectional Llamas (SMDM, LLaDA) against outside references, through published files."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.llama import (
    FAMILY,
    HEADS,
    PUBLISHED,
    Llama,
    LlamaConfig,
    from_published,
    infer,
    to_published,
)
from mdzoo.llama_names import LLADA, SMDM, Layout
from mdzoo.synthetic import golden_weights, toks

WholePass = Callable[..., Tensor]

NOBODY = torch.tensor([-1])
INDICES = [0, 127, 255, 383, 511, 639]
VALUES = [-0.359240, -0.122597, -0.018497, -0.121776, 0.377109, -0.487771]

SMALL = LlamaConfig(
    length=2048, vocabulary=41, scored=40, mask=40, width=64, depth=2, heads=4, hidden=96
)
LLADA_SMALL = replace(SMALL, vocabulary=40, mask=39, layout=LLADA)
INNER = replace(LLADA_SMALL, mask=5)  # as in LLaDA-8B, with tokens behind the mask
ODD = LlamaConfig(
    length=2048, vocabulary=8, scored=7, mask=7, width=30, depth=11, heads=3, hidden=17
)
CONFIGS = [SMALL, LLADA_SMALL, INNER, ODD]


def synthetic_state(config: LlamaConfig) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    state = to_published(Llama(config).state_dict(), config.layout)
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def synthetic_model(config: LlamaConfig) -> Llama:
    model = Llama(config)
    model.load_state_dict(from_published(synthetic_state(config)))
    return model.eval()


def save(path: Path, state: Mapping[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def load(path: Path, name: str = "smdm-170m", **settings: int) -> Llama:
    state = checkpoint.read(path, strip=FAMILY.prefixes)
    model = Llama(infer(state, PUBLISHED[name], settings))
    checkpoint.fit(model, from_published(state), source=path.name)
    return model.eval()


def tokens_of(config: LlamaConfig, length: int = 16) -> Tensor:
    return toks(length, min(32, config.codebook), config.mask)[None]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_logits_of_llada_are_those_of_the_original_code(prefix: str, tmp_path: Path) -> None:
    state = {prefix + key: tensor for key, tensor in synthetic_state(LLADA_SMALL).items()}
    assert f"{prefix}model.transformer.blocks.1.q_proj.weight" in state
    model = load(save(tmp_path / "small.safetensors", state), heads=4, mask=39)
    with torch.no_grad():
        logits = model(toks(16, 32, 39)[None], NOBODY).numpy()
    assert logits.shape == (1, 16, 40)
    assert logits.mean() == pytest.approx(-0.050878, abs=1e-4)
    assert logits.std() == pytest.approx(0.344723, abs=1e-4)
    assert np.abs(logits).sum() == pytest.approx(176.4275, abs=1e-3)
    np.testing.assert_allclose(logits.ravel()[INDICES], VALUES, atol=1e-4)


# Part of a name: in transformers, in SMDM, in LLaDA.
NAMES = [
    ("model.embed_tokens.", "transformer.wte.", "model.transformer.wte."),
    ("model.norm.", "transformer.ln_f.", "model.transformer.ln_f."),
    ("lm_head.", "lm_head.", "model.transformer.ff_out."),
    ("model.layers.", "transformer.h.", "model.transformer.blocks."),
    ("input_layernorm", "norm_1", "attn_norm"),
    ("post_attention_layernorm", "norm_2", "ff_norm"),
    ("self_attn.o_proj", "attn.proj", "attn_out"),
    ("self_attn.", "", ""),
    ("mlp.gate_proj", "mlp.swiglu.w1", "ff_proj"),
    ("mlp.up_proj", "mlp.swiglu.w2", "up_proj"),
    ("mlp.down_proj", "mlp.swiglu.w3", "ff_out"),
]


def hugging_face_model(base: float) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=41,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    golden_weights(model)
    return model


def as_published(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Write a Llama of transformers (4 heads of 16) as the authors of SMDM or LLaDA do."""
    published = {}
    for key, tensor in state.items():
        name = key
        for theirs, smdm, llada in NAMES:
            name = name.replace(theirs, smdm if layout == SMDM else llada)
        published[name] = tensor.clone()
    if layout == SMDM:
        for index in range(2):
            stem = f"transformer.h.{index}."
            parts = [published.pop(f"{stem}{part}_proj.weight") for part in "qkv"]
            rows = [part[16 * head : 16 * head + 16] for head in range(4) for part in parts]
            published[f"{stem}attn.attn.weight"] = torch.cat(rows)
        published["lm_head.weight"] = published["lm_head.weight"][:40]  # none for the mask
    return published


@pytest.mark.parametrize(("layout", "base"), [(SMDM, 10_000.0), (LLADA, 500_000.0)])
def test_logits_are_those_of_the_llama_of_transformers_without_its_causal_mask(
    layout: Layout, base: float, tmp_path: Path
) -> None:
    original = hugging_face_model(base)
    path = save(tmp_path / "model.safetensors", as_published(original.state_dict(), layout))
    model = load(path, heads=4, mask=40)
    tokens = toks(50, 40, 40)[None]
    with torch.no_grad():
        expected = original(input_ids=tokens, attention_mask=torch.zeros(1, 1, 50, 50)).logits
        found = model(tokens, NOBODY)
    scored = 40 if layout == SMDM else 41
    torch.testing.assert_close(found, expected[..., :scored], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("smdm-170m", 129, 219_050_496), ("smdm-1028m", 143, 1_142_367_744)],
)
def test_published_sizes_give_the_published_tensors(
    name: str, tensors: int, parameters: int
) -> None:
    with torch.device("meta"):
        state = to_published(Llama(PUBLISHED[name]).state_dict())
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    width = PUBLISHED[name].width
    assert state["transformer.wte.weight"].shape == (32001, width)
    assert state["lm_head.weight"].shape == (32000, width)
    assert state["transformer.h.17.attn.attn.weight"].shape == (3 * width, width)
    assert state["transformer.h.17.mlp.swiglu.w3.weight"].shape == (width, 4 * width)
    assert infer(state, PUBLISHED["smdm-170m"], {}) == PUBLISHED[name]


def test_llada_8b_is_recognised_by_its_shapes() -> None:
    config = LlamaConfig(2048, 126464, 126464, 126336, 4096, 32, 32, 12288, LLADA)
    with torch.device("meta"):
        state = to_published(Llama(config).state_dict(), LLADA)
    assert len(state) == 291
    assert sum(tensor.numel() for tensor in state.values()) == 8_015_581_184
    assert infer(state, PUBLISHED["smdm-170m"], {}) == config


def test_the_published_sizes_of_smdm_have_their_heads() -> None:
    sizes = {256: 4, 384: 6, 768: 12, 1024: 16, 1280: 10, 1408: 11, 1536: 12, 2048: 16, 2176: 17}
    assert all(HEADS[width, 4 * width] == heads for width, heads in sizes.items())
    assert (HEADS[640, 2560], HEADS[640, 1600]) == (10, 8)


@pytest.mark.parametrize("config", CONFIGS)
def test_sizes_come_from_the_checkpoint(config: LlamaConfig, tmp_path: Path) -> None:
    path = save(tmp_path / "odd.safetensors", synthetic_state(config))
    assert load(path, heads=config.heads, mask=config.mask).config == config
    if config.layout == SMDM:
        assert load(path, heads=config.heads).config == config


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [1, 50])
def test_a_pass_over_all_rows_equals_the_forward_pass(
    whole_pass: WholePass, config: LlamaConfig, length: int
) -> None:
    model = synthetic_model(config)
    tokens = torch.cat([tokens_of(config, length), tokens_of(config, length).flip(1)])
    with torch.no_grad():
        plain = model(tokens, NOBODY)[..., : config.codebook]
    cached = whole_pass(model, tokens, NOBODY.repeat(2))
    if config == INNER:
        assert (cached[..., 5] == -1e30).all()
        cached[..., 5] = plain[..., 5]
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=0)


def test_the_mask_token_is_never_drawn() -> None:
    assert (SMALL.codebook, LLADA_SMALL.codebook, INNER.codebook) == (40, 39, 40)
    assert replace(LLADA_SMALL, vocabulary=48, mask=45).codebook == 40
    assert Llama(INNER).spec.mask_token == 5
    guided = 3 * torch.tensor(-1e30) - 2 * torch.tensor(-1e30)
    assert torch.softmax(torch.stack([guided, torch.tensor(-50.0)]), 0).tolist() == [0, 1]


@pytest.mark.parametrize("config", [SMALL, LLADA_SMALL])
def test_a_pass_over_changed_rows_of_one_layer_is_exact(config: LlamaConfig) -> None:
    model = synthetic_model(replace(config, depth=1))
    before, after = tokens_of(config), tokens_of(config).clone()
    after[0, [3, 9]] = torch.tensor([5, 6])
    whole = torch.arange(16)[None]
    rows, columns = torch.tensor([[9, 3, 12, 3]]), torch.tensor([[2, 0, 0]])
    empty = list(model.empty_caches(1, 16).values())
    with torch.no_grad():
        _, caches = model.step(before, whole, whole[:, :1], empty, {})
        logits, _ = model.step(after.gather(1, rows), rows, columns, caches, {})
        expected = model(after, NOBODY)[:, [12, 9, 9], : config.codebook]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [SMALL, LLADA_SMALL])
def test_half_precision_keeps_norms_softmax_and_head_in_float32(
    whole_pass: WholePass, config: LlamaConfig
) -> None:
    model = synthetic_model(config)
    full = whole_pass(model, tokens_of(config), NOBODY)
    half = whole_pass(model.half(), tokens_of(config), NOBODY)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 5e-3


@pytest.mark.parametrize("config", CONFIGS)
def test_names_round_trip(config: LlamaConfig) -> None:
    state = synthetic_model(config).state_dict()
    back = from_published(to_published(state, config.layout))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_spec_describes_a_text_of_any_length_without_classes() -> None:
    spec = Llama(SMALL).spec
    assert (spec.codebook, spec.mask_token, spec.classes, spec.context) == (40, 40, 0, ())
    assert (spec.length, spec.canvas, spec.grid, spec.flexible) == (2048, 2048, (2048,), True)
    assert spec.layers == 2


@pytest.mark.parametrize(
    ("config", "damage", "message"),
    [
        (SMALL, {"transformer.ln_f.weight": None}, r"1 missing \(norm.weight\)"),
        (SMALL, {"lm_head.weight": None}, "must hold 'lm_head.weight', found 16 other"),
        (SMALL, {"lm_head.bias": torch.zeros(40)}, r"1 unexpected \(head.bias\)"),
        (SMALL, {"lm_head.weight": torch.zeros(42, 64)}, "41 embedding rows, found 42 rows"),
        (
            LLADA_SMALL,
            {"model.transformer.blocks.1.k_proj.weight": torch.zeros(16, 64)},
            r"blocks.1.attention.qkv.weight: expected float \(192, 64\), found float \(144, 64\)",
        ),
        (
            LLADA_SMALL,
            {"model.transformer.blocks.0.v_proj.weight": None},
            r"1 missing \(blocks.0.attention.qkv.weight\); 2 unexpected \(blocks.0.q_proj",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    config: LlamaConfig, damage: Mapping[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {**synthetic_state(config), **damage}
    path = tmp_path / "damaged.pth"
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        load(path, heads=4, mask=config.mask)


def test_what_no_shape_tells_must_be_told(tmp_path: Path) -> None:
    path = save(tmp_path / "small.safetensors", synthetic_state(LLADA_SMALL))
    with pytest.raises(CheckpointError, match=r"40 embedding rows .* pass --set mask=N"):
        load(path, heads=4)
    with pytest.raises(CheckpointError, match=r"width 64 and an MLP of 96.* --set heads=N"):
        load(path, mask=39)
    with pytest.raises(CheckpointError, match=r"heads must divide the width 64 .* got 5"):
        load(path, mask=39, heads=5)
    with pytest.raises(CheckpointError, match="one of 40 embedding rows, got 40: pass --set mask"):
        load(path, mask=40, heads=4)
    with pytest.raises(CheckpointError, match="length must be positive, got 0"):
        load(path, mask=39, heads=4, length=0)
    assert load(path, mask=39, heads=4, length=128).spec.length == 128


def test_another_architecture_is_named_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}, path)
    message = r"'transformer.wte.weight', found 2 other tensors \(conv1.weight"
    with pytest.raises(CheckpointError, match=message):
        load(path)
