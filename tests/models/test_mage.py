"""The MAGE port against published reference values, through the published file format."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mdruntime.manifest import ContextRow
from mdzoo.checkpoint import CheckpointError, fit, read
from mdzoo.mage import FAMILY, MAGE, PUBLISHED, MAGEConfig, from_published, infer, to_published
from mdzoo.synthetic import golden_weights, toks

SMALL = replace(
    PUBLISHED["mage-base"],
    width=64,
    depth=2,
    heads=4,
    hidden=256,
    decoder_width=64,
    decoder_depth=2,
    decoder_heads=4,
    decoder_hidden=256,
)
ODD = MAGEConfig(
    grid=3,
    codebook=7,
    classes=80,
    width=30,
    depth=3,
    heads=5,
    hidden=11,
    decoder_width=24,
    decoder_depth=1,
    decoder_heads=2,
    decoder_hidden=50,
)
HEADS = {"heads": 4, "decoder_heads": 4}
NONE = torch.tensor([-1])

# Of the original code with synthetic weights: mean, standard deviation, sum of absolute values,
# and values at flat indices that divide the whole by five.
ENCODED = (-0.003892, 1.002782, 13231.7295)
ENCODED_AT = [1.965690, 0.096375, 1.494267, 1.041942, -0.874226, -0.219995]
LOGITS = (0.004026, 0.397742, 83014.9454)
LOGITS_AT = [-0.235343, -0.042778, 0.148649, 0.127279, -0.171245, -0.686994]


def synthetic_state(config: MAGEConfig) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    state = to_published(MAGE(config).state_dict())
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def unused(config: MAGEConfig) -> dict[str, Tensor]:
    """Return what a published file holds beside the model and its image tokenizer."""
    width, inner, canvas = config.width, config.decoder_width, config.length + 1
    return {
        "cls_token": torch.zeros(1, 1, width),
        "pos_embed": torch.zeros(1, canvas, width),
        "mask_token": torch.zeros(1, 1, inner),
        "decoder_pos_embed": torch.zeros(1, canvas, inner),
        "token_emb.position_ids": torch.arange(canvas)[None],
        "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.zeros(width),
        "decoder_pred.weight": torch.zeros(768, inner),
        "decoder_pred.bias": torch.zeros(768),
    }


def save(path: Path, config: MAGEConfig, state: Mapping[str, Tensor], prefix: str = "") -> Path:
    """Write a file as the authors' trainer does: the image tokenizer inside, settings beside."""
    table = {"vqgan.quantize.embedding.weight": torch.zeros(config.codebook, 4)}
    everything = {**unused(config), **table, **state}
    torch.save(
        {
            "model": {prefix + key: tensor for key, tensor in everything.items()},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
            "epoch": 1599,
            "scaler": {"scale": 65536.0},
            "args": argparse.Namespace(blr=1.5e-4, output_dir="out"),
        },
        path,
    )
    return path


def load(path: Path, settings: Mapping[str, int], name: str = "mage-base") -> MAGE:
    state = read(path, strip=FAMILY.prefixes)
    model = cast(MAGE, FAMILY.build(FAMILY.infer(state, PUBLISHED[name], settings)))
    fit(model, FAMILY.from_published(state), source=path.name)
    return model.eval()


def synthetic_model(config: MAGEConfig) -> MAGE:
    model = MAGE(config)
    fit(model, from_published(synthetic_state(config)), source="synthetic weights")
    return model.eval()


def tokens_of(config: MAGEConfig) -> Tensor:
    return toks(config.length, config.codebook, config.mask)[None]


def assert_golden(found: Tensor, totals: tuple[float, float, float], values: list[float]) -> None:
    array = found.numpy().astype(np.float64)
    assert [array.mean(), array.std()] == pytest.approx(totals[:2], abs=1e-4)
    assert np.abs(array).sum() == pytest.approx(totals[2], rel=1e-6)
    places = [part * (array.size - 1) // 5 for part in range(6)]
    np.testing.assert_allclose(array.ravel()[places], values, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_encoder_and_logits_are_those_of_the_original_code(prefix: str, tmp_path: Path) -> None:
    model = load(save(tmp_path / "small.pth", SMALL, synthetic_state(SMALL), prefix), HEADS)
    with torch.no_grad():
        encoded, logits = model.encode(tokens_of(SMALL)), model(tokens_of(SMALL), NONE)
    assert encoded.shape == (1, 257, 64)
    assert_golden(encoded, ENCODED, ENCODED_AT)
    assert logits.shape == (1, 256, 1024)
    assert_golden(logits, LOGITS, LOGITS_AT)


def test_a_pass_over_all_rows_gives_the_logits_of_the_original_code(whole_pass: Any) -> None:
    assert_golden(whole_pass(synthetic_model(SMALL), tokens_of(SMALL), NONE), LOGITS, LOGITS_AT)


@pytest.mark.parametrize(
    ("name", "tensors", "millions", "heads"),
    [("mage-base", 265, 146.5, 12), ("mage-large", 409, 409.9, 16)],
)
def test_published_sizes_give_the_published_tensors(
    name: str, tensors: int, millions: float, heads: int
) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        state = to_published(MAGE(config).state_dict()) | unused(config)
    assert len(state) == tensors
    count = sum(tensor.numel() for key, tensor in state.items() if "position_ids" not in key)
    assert round(count / 1e6, 1) == millions
    assert state["mlm_layer.bias"].shape == (1, 1, 2025)
    assert state["decoder_pos_embed_learned"].shape == (1, 257, config.decoder_width)
    assert state["decoder_blocks.7.attn.qkv.weight"].shape == (3 * config.width, config.width)
    assert (config.heads, config.decoder_heads) == (heads, 16)
    assert infer(state, PUBLISHED["mage-base"], {}) == config


def test_sizes_come_from_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "odd.pth", ODD, synthetic_state(ODD))
    assert load(path, {"heads": 5, "decoder_heads": 2}).config == ODD


def test_the_codebook_is_what_the_authors_leave_beside_1000_classes() -> None:
    state = synthetic_state(SMALL)
    assert infer(state, PUBLISHED["mage-base"], HEADS) == SMALL
    told = infer(state, PUBLISHED["mage-base"], {**HEADS, "codebook": 512})
    assert told == replace(SMALL, codebook=512, classes=1512)


def test_the_canvas_begins_with_the_fake_class() -> None:
    spec = MAGE(SMALL).spec
    assert spec.context == (ContextRow(position=0, offset=-1, dropped=1100),)
    assert (spec.first, spec.canvas, spec.mask_token, spec.layers) == (1, 257, 2024, 4)
    assert spec.visible
    assert spec.refresh_context


def shown(count: int, config: MAGEConfig) -> Tensor:
    """Return tokens of two samples of which ``count`` are not hidden, others for either."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.full((2, config.length), config.mask)
    for row in tokens:
        places = torch.randperm(config.length, generator=generator)[:count]
        row[places] = torch.randint(config.codebook, (count,), generator=generator)
    return tokens


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_a_pass_over_all_rows_equals_the_forward_pass(count: int, whole_pass: Any) -> None:
    model, tokens = synthetic_model(ODD), shown(count, ODD)
    with torch.no_grad():
        plain = model(tokens, NONE.repeat(2))
    cached = whole_pass(model, tokens, NONE.repeat(2))
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=0)


def ids_of(config: MAGEConfig, tokens: Tensor) -> Tensor:
    return torch.cat([torch.full((len(tokens), 1), config.fake), tokens], 1)


def whole(model: MAGE, tokens: Tensor, visible: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return what a pass over all rows of one canvas returns, in order."""
    canvas = torch.arange(model.config.length + 1)[None]
    caches = list(model.empty_caches(1, canvas.numel()).values())
    ids, extras = ids_of(model.config, tokens), {"visible": visible}
    with torch.no_grad():
        return model.step(ids, canvas, canvas[:, 1:], caches, extras)


def visible_in(config: MAGEConfig, tokens: Tensor) -> Tensor:
    return torch.nonzero(ids_of(config, tokens)[0] != config.mask).T


def test_the_last_encoder_layer_saves_the_work_of_hidden_rows_and_nothing_else() -> None:
    model, tokens, hidden = synthetic_model(ODD), shown(4, ODD)[:1], 5
    work, logits = [], []
    for visible in (visible_in(ODD, tokens), torch.arange(10)[None]):
        with FlopCounterMode(display=False) as counter:
            logits.append(whole(model, tokens, visible)[0])
        work.append(counter.get_total_flops())
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    row = 30 * 30 + 2 * 30 * 11 + 30 * 24  # output projection, MLP, bridge to the decoder
    assert work[1] - work[0] == 2 * hidden * row


def test_rows_of_an_unchanged_canvas_keep_their_logits() -> None:
    model, tokens = synthetic_model(ODD), tokens_of(ODD)
    logits, caches = whole(model, tokens, visible_in(ODD, tokens))
    rows = torch.tensor([[4, 9, 0, 2, 7, 4]])  # of which 4 and 7 are hidden
    ids, columns = ids_of(ODD, tokens).gather(1, rows), torch.tensor([[4, 1, 3, 0]])
    extras = {"visible": torch.tensor([[2, 1, 3, 2]]).int()}
    with torch.no_grad():
        part, kept = model.step(ids.int(), rows.int(), columns.int(), caches, extras)
    torch.testing.assert_close(part, logits[:, [6, 8, 1, 3]], atol=1e-5, rtol=0)
    for before, after in zip(caches, kept, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_one_encoder_layer_is_exact_over_the_changed_rows_alone() -> None:
    config = replace(ODD, depth=1)
    model, tokens, changed = synthetic_model(config), tokens_of(config), tokens_of(config)
    changed[0, 3] = 5  # row 4 of the canvas, hidden before
    caches = whole(model, tokens, visible_in(config, tokens))[1]
    rows = torch.tensor([[0, 4]])
    ids, extras = ids_of(config, changed).gather(1, rows), {"visible": torch.tensor([[0, 1]])}
    with torch.no_grad():
        part = model.step(ids, rows, rows[:, :1], caches, extras)[1]
    fresh = whole(model, changed, visible_in(config, changed))[1]
    names = list(model.empty_caches(1, 10))
    assert names == ["encoder.0.key", "encoder.0.value", "decoder.0.key", "decoder.0.value"]
    for name, ours, theirs in zip(names, part, fresh, strict=True):
        places = rows[0] if name.startswith("decoder") else torch.arange(10)
        torch.testing.assert_close(ours[:, :, places], theirs[:, :, places], atol=1e-6, rtol=0)


def test_half_precision_keeps_norms_softmax_and_head_in_float32(whole_pass: Any) -> None:
    model = synthetic_model(SMALL)
    full = whole_pass(model, tokens_of(SMALL), NONE)
    half = whole_pass(model.half(), tokens_of(SMALL), NONE)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 5e-3


def test_names_round_trip() -> None:
    state = MAGE(ODD).state_dict()
    back = from_published(to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_ambiguous_sizes_are_refused() -> None:
    state, published = synthetic_state(ODD), PUBLISHED["mage-base"]
    with pytest.raises(CheckpointError, match=r"width 30 where .* 768 and 1024.* --set heads=N"):
        infer(state, published, {"codebook": 7})
    with pytest.raises(CheckpointError, match=r"width 24 .* pass --set decoder_heads=N"):
        infer(state, published, {"codebook": 7, "heads": 5})
    with pytest.raises(CheckpointError, match=r"decoder_heads must divide the width 24, got 5"):
        infer(state, published, {"codebook": 7, "heads": 5, "decoder_heads": 5})
    with pytest.raises(CheckpointError, match=r"got -913 codes .* pass --set codebook=N"):
        infer(state, published, {"heads": 5, "decoder_heads": 2})
    state["token_emb.position_embeddings.weight"] = torch.zeros(9, 30)
    with pytest.raises(CheckpointError, match="a square image, got 9 positions"):
        infer(state, published, {"codebook": 7, "heads": 5, "decoder_heads": 2})


def test_other_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'token_emb.word_embeddings.weight', found 1 other"):
        infer({"fc.weight": torch.zeros(2, 2)}, PUBLISHED["mage-base"], {})
    state = synthetic_state(ODD)
    state["fc_norm.weight"] = state.pop("norm.weight")  # as in the authors' classifiers
    path = save(tmp_path / "damaged.pth", ODD, state)
    message = r"1 missing \(encoder_norm.weight\); 1 unexpected \(fc_norm.weight\)"
    with pytest.raises(CheckpointError, match=message):
        load(path, {"heads": 5, "decoder_heads": 2})


def test_random_weights_begin_small() -> None:
    torch.manual_seed(0)
    model = MAGE(ODD)
    FAMILY.initialise(model)
    for name in ("tokens.weight", "positions", "decoder_positions"):
        assert 0.01 < model.get_parameter(name).std() < 0.03
