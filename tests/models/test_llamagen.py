"""LlamaGen's tokenizers: their names, and the search of their codebook by direction."""

import pytest
import torch
from torch import nn

from mdzoo.conv import ConvConfig
from mdzoo.llamagen import STYLE, VQ8, VQ16, LlamaGenVQ, to_published
from mdzoo.synthetic import golden_weights, toks

SMALL = ConvConfig((32, 64), 32, 1, 16, 8, 12, style=STYLE)


@pytest.fixture(scope="module")
def small() -> LlamaGenVQ:
    codec = LlamaGenVQ(SMALL).eval().requires_grad_(False)
    golden_weights(codec)
    return codec


@pytest.mark.parametrize(("config", "factor"), [(VQ16, 16), (VQ8, 8)])
def test_names_and_shapes_of_the_published_files(config: ConvConfig, factor: int) -> None:
    with torch.device("meta"):
        codec = LlamaGenVQ(config)
    state, levels = to_published(codec.state_dict()), len(config.widths)
    assert (codec.factor, codec.codebook, codec.pixels) == (factor, 16384, (-1.0, 1.0))
    assert state["quantize.embedding.weight"].shape == (16384, 8)
    assert state["quant_conv.weight"].shape == (8, 256, 1, 1)
    assert state["post_quant_conv.weight"].shape == (256, 8, 1, 1)
    for half, lowest, blocks in (("encoder", levels - 1, 2), ("decoder", 0, 3)):
        attention = {key.split(".")[2] for key in state if key.startswith(half) and ".attn." in key}
        assert attention == {str(lowest)}
        assert f"{half}.conv_blocks.{lowest}.attn.{blocks - 1}.proj_out.bias" in state
        assert f"{half}.conv_blocks.{lowest}.res.{blocks}.conv1.weight" not in state
        assert f"{half}.mid.1.q.weight" in state
    sampling = {key.split(".")[2] for key in state if ".upsample." in key}
    assert sampling == {str(i) for i in range(levels - 1)}
    if factor == 16:
        assert len(state) == 343  # and quantize.codebook_used
        numbers = sum(tensor.numel() for tensor in state.values()) + 65536
        assert round(numbers / 1e6, 2) == 71.95


def test_only_the_direction_of_entries_and_latents_counts(small: LlamaGenVQ) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weight = small.get_parameter("quantize.embedding.weight")
    table = weight.double()
    points = small.latents(images).double().flatten(2).transpose(1, 2)
    cosines = nn.functional.cosine_similarity(points[:, :, None], table, dim=-1)
    tokens, decoded = small.encode(images), small.decode(toks(4, 12)[None])
    assert tokens.tolist() == cosines.argmax(dim=-1).tolist()
    assert tokens.tolist() != torch.cdist(points, table).argmin(dim=-1).tolist()
    lengths = torch.linspace(0.5, 2, 12)[:, None]
    weight.mul_(lengths)
    torch.testing.assert_close(small.decode(toks(4, 12)[None]), decoded)
    assert torch.equal(small.encode(images), tokens)
    weight.div_(lengths)
