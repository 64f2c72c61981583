"""TiTok's tokenizers against published reference values, and their rule written out."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mdexport.trace import trace_decoder, trace_encoder
from mdruntime.manifest import ImageSpec
from mdzoo import checkpoint, maskgit_vqgan
from mdzoo.checkpoint import CheckpointError
from mdzoo.conv import ConvConfig
from mdzoo.decoder import Images, Tokens
from mdzoo.synthetic import golden_weights, toks
from mdzoo.titok_tokenizer import (
    PUBLISHED,
    TiTokTokenizer,
    TokenizerConfig,
    TowerConfig,
    load,
    to_published,
)

PAINTER = ConvConfig(
    widths=(32, 64), stem=32, blocks=1, latent=8, embedding=8, codebook=24, encodes=False,
    style=maskgit_vqgan.STYLE,
)  # fmt: skip
SMALL = TokenizerConfig(
    length=6,
    encoder=TowerConfig(width=48, depth=1, heads=3, hidden=64),
    decoder=TowerConfig(width=32, depth=2, heads=2, hidden=72),
    grid=3,
    patch=2,
    embedding=5,
    codebook=40,
    painter=PAINTER,
)
HEAD_SIZE = 16


def synthetic_state(config: TokenizerConfig) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    with torch.device("meta"):
        hollow = to_published(TiTokTokenizer(config).state_dict())
    state = {key: torch.empty(tensor.shape) for key, tensor in hollow.items()}
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def small() -> TiTokTokenizer:
    return load(synthetic_state(SMALL), source="a test", head_size=HEAD_SIZE)


def uniform(config: TokenizerConfig) -> Tensor:
    side = config.grid * config.patch
    images = np.random.RandomState(7).uniform(0, 1, (1, 3, side, side))  # as the reference did
    return torch.from_numpy(images.astype(np.float32))


def compare(
    found: Tensor, summary: tuple[float, float, float], values: Mapping[int, float]
) -> None:
    flat = found.numpy().ravel()
    mean, std, total = summary
    assert flat.mean() == pytest.approx(mean, abs=1e-4)
    assert flat.std() == pytest.approx(std, abs=1e-4)
    assert np.abs(flat).sum() == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(flat[list(values)], list(values.values()), atol=1e-4)


@pytest.mark.slow
def test_images_and_latents_are_those_of_the_original_code(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_titok_s128.bin"
    torch.save(synthetic_state(PUBLISHED["titok-s128"]), path)
    codec = load(checkpoint.read(path), source=path.name)
    assert codec.config == PUBLISHED["titok-s128"]
    with torch.no_grad():
        images = codec.decode(toks(128, 4096)[None])
        latents = codec.latents(uniform(codec.config))
    assert images.shape == (1, 3, 256, 256)
    assert latents.shape == (1, 12, 1, 128)
    expected = [0.012163, 0.659819, 0.833936, 0.405998, 0.509858, -0.344285]
    places = [0, 39321, 78642, 117964, 157285, 196607]
    compare(images, (0.201659, 0.768620, 121190.4718), dict(zip(places, expected, strict=True)))
    expected = [0.977104, 0.561288, -0.844134, -0.818742, -0.079898, -0.856481]
    places = [0, 307, 614, 921, 1228, 1535]
    compare(latents, (-0.013841, 1.110367, 1306.6971), dict(zip(places, expected, strict=True)))


class Rule:
    """The towers by their published names, each operation written out."""

    def __init__(self, state: Mapping[str, Tensor], half: str, heads: int) -> None:
        self.state = {
            key.removeprefix(half): tensor for key, tensor in state.items() if key.startswith(half)
        }
        self.heads = heads

    def normed(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.linear(x, weight.flatten(1), bias)

    def block(self, x: Tensor, name: str) -> Tensor:
        attention = nn.MultiheadAttention(x.shape[-1], self.heads, batch_first=True)
        prefix = f"{name}.attn."
        attention.load_state_dict(
            {k.removeprefix(prefix): w for k, w in self.state.items() if k.startswith(prefix)}
        )
        y = self.normed(x, f"{name}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = functional.gelu(self.linear(self.normed(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        return x + self.linear(y, f"{name}.mlp.c_proj")

    def tower(self, patches: Tensor, latents: Tensor, depth: int) -> Tensor:
        """Transform (patches, width) and (length, width) of one image."""
        x = torch.cat([self.state["class_embedding"], patches])
        x = x + self.state["positional_embedding"]
        x = torch.cat([x, latents + self.state["latent_token_positional_embedding"]])[None]
        x = self.normed(x, "ln_pre")
        for index in range(depth):
            x = self.block(x, f"transformer.{index}")
        return x[0]


def test_the_decoder_paints_a_mixture_of_entries_at_every_mask_row() -> None:
    state, codec, tokens = synthetic_state(SMALL), small(), toks(6, 40)
    rule = Rule(state, "decoder.", heads=2)
    entries = functional.normalize(state["quantize.embedding.weight"][tokens], dim=-1)
    masks = rule.state["mask_token"][0].repeat(9, 1)
    with torch.no_grad():
        x = rule.tower(masks, rule.linear(entries, "decoder_embed"), depth=2)
        x = rule.linear(rule.normed(x[1:10], "ln_post"), "ffn.0").tanh()
        shares = rule.linear(x, "ffn.2").softmax(-1)
        mixture = shares @ state["pixel_quantize.embedding.weight"]
        painter = maskgit_vqgan.load(state, source="a test")
        expected = painter.decoder(mixture.T.reshape(1, 8, 3, 3))
        found = codec.decode(tokens[None])
    assert found.shape == (1, 3, 6, 6)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_encoder_mixes_axes_as_the_published_weights_were_trained_to() -> None:
    state, codec, images = synthetic_state(SMALL), small(), uniform(SMALL)
    rule = Rule(state, "encoder.", heads=3)
    squares = images[0].reshape(3, 3, 2, 3, 2).permute(1, 3, 0, 2, 4).reshape(9, 12)
    with torch.no_grad():
        patches = rule.linear(squares, "patch_embed")
        x = rule.tower(patches, state["latent_tokens"], depth=1)[10:]
        x = rule.normed(x, "ln_post").flatten().reshape(48, 6)
        expected = rule.linear(x.T, "conv_out")
        found = codec.latents(images)
        tokens = codec.encode(images)
    torch.testing.assert_close(found[0, :, 0].T, expected, atol=1e-5, rtol=0)
    entries = functional.normalize(state["quantize.embedding.weight"], dim=-1)
    distances = torch.cdist(functional.normalize(expected, dim=-1), entries)
    assert tokens.tolist() == [distances.argmin(1).tolist()]


@pytest.mark.parametrize(
    ("name", "millions", "tensors"),
    [("titok-l32", 306.8, 692), ("titok-b64", 88.1, 404), ("titok-s128", 27.0, 308)],
)
def test_published_sizes_give_the_published_tensors(
    name: str, millions: float, tensors: int
) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        state = to_published(TiTokTokenizer(config).state_dict())
    sizes = {
        part: round(sum(w.numel() for key, w in state.items() if key.startswith(part)) / 1e6, 1)
        for part in ("decoder.", "pixel_decoder.")
    }
    width = config.decoder.width
    assert sizes == {"decoder.": millions, "pixel_decoder.": 30.5}
    assert len(state) == tensors
    assert state["latent_tokens"].shape == (int(name[-3:].strip("bl")), width)
    assert state["encoder.conv_out.weight"].shape == (12, width, 1, 1)
    assert state["decoder.ffn.2.weight"].shape == (1024, 2 * width, 1, 1)
    assert state["pixel_decoder.up.4.upsample_conv.weight"].shape == (512, 512, 3, 3)
    assert TokenizerConfig.from_state(state, config.painter, 64) == config


def test_sizes_come_from_the_checkpoint_and_names_round_trip() -> None:
    state, codec = synthetic_state(SMALL), small()
    assert codec.config == SMALL
    assert (codec.side, codec.factor, codec.codebook) == (6, 0, 40)
    assert codec.pixels == (0.0, 1.0)
    back = to_published(codec.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_precision_stays_close() -> None:
    codec, tokens, images = small(), toks(6, 40)[None], uniform(SMALL)
    with torch.no_grad():
        full, latents = codec.decode(tokens), codec.latents(images)
        codec.half()
        torch.testing.assert_close(codec.decode(tokens).float(), full, atol=2e-2, rtol=0)
        torch.testing.assert_close(codec.latents(images).float(), latents, atol=2e-2, rtol=0)


@pytest.mark.slow
def test_exported_graphs_compute_what_the_modules_do() -> None:
    codec = small()
    painter = trace_decoder(Images(codec), length=6)
    reader = trace_encoder(Tokens(codec), ImageSpec(6, 6, factor=0))
    for batch in (1, 3):
        tokens = torch.stack([toks(6, 40).roll(i) for i in range(batch)]).int()
        images = Images(codec)(tokens).numpy()
        assert images.shape == (batch, 6, 6, 3)
        found = run(painter, {"tokens": tokens.numpy()})
        assert np.abs(found.astype(int) - images.astype(int)).max() <= 1
        read = Tokens(codec)(torch.from_numpy(images))
        assert run(reader, {"images": images}).tolist() == read.tolist()


def run(model: ir.Model, inputs: dict[str, Any]) -> Any:
    graph = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def test_damaged_and_foreign_checkpoints_are_refused() -> None:
    state = synthetic_state(SMALL)
    later = {key: w for key, w in state.items() if not key.startswith("pixel_")}
    with pytest.raises(CheckpointError, match=r"must hold 'pixel_quantize.embedding.weight'"):
        load(later, source="later.bin")
    with pytest.raises(CheckpointError, match="encoder must be a multiple of its head size 64"):
        load(state, source="small.bin")
    wrong = {**state, "encoder.positional_embedding": torch.zeros(11, 48)}
    with pytest.raises(CheckpointError, match=r"must cover a square image .* got 11 rows"):
        load(wrong, source="wrong.bin", head_size=HEAD_SIZE)
    del state["encoder.ln_post.bias"]
    state["decoder.conv_out.weight"] = torch.zeros(3)
    message = r"damaged.bin .* 1 missing \(encoder.ln_post.bias\); 1 unexpected \(decoder.conv_out"
    with pytest.raises(CheckpointError, match=message):
        load(state, source="damaged.bin", head_size=HEAD_SIZE)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have 6 x 6 pixels, got 8 x 6; crop or resize"):
        small().encode(torch.zeros(1, 3, 8, 6))
