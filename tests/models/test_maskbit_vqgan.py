"""MaskBit's tokenizer against its rules transcribed, on tensors under its published names."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from mdzoo.checkpoint import CheckpointError
from mdzoo.conv import ConvConfig
from mdzoo.maskbit_vqgan import STYLE, MaskBitVQ, join, load, published, split, to_published
from mdzoo.synthetic import golden_weights

BITS = 6
SMALL = ConvConfig((32, 64, 96), 32, 2, BITS, BITS, 2**BITS, style=STYLE)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    with torch.device("meta"):
        hollow = to_published(MaskBitVQ(SMALL).state_dict())
    state = {key: torch.empty(tensor.shape) for key, tensor in hollow.items()}
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


@pytest.fixture(scope="module")
def codec(state: Mapping[str, Tensor]) -> MaskBitVQ:
    powers = 2 ** torch.arange(BITS)
    buffers = {
        "quantize.bits_to_indices": powers.int(),
        "quantize.codebook": (torch.arange(2**BITS)[:, None] & powers != 0) * 2.0 - 1,
    }
    return load({**state, **buffers}, source="maskbit").requires_grad_(False)


class Rules:
    """The original networks as functions of the published tensors."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        # "Same" padding: what is missing, the smaller half of it before the first pixel.
        lacking = max(weight.shape[2] - stride, 0) if x.shape[2] % stride == 0 else 0
        before, after = lacking // 2, lacking - lacking // 2
        return nn.functional.conv2d(
            nn.functional.pad(x, (before, after, before, after)), weight, bias, stride
        )

    def activated(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return nn.functional.silu(nn.functional.group_norm(x, 32, weight, bias, eps=1e-6))

    def stage(self, x: Tensor, name: str) -> Tensor:
        for block in (f"{name}.res_blocks.0", f"{name}.res_blocks.1"):
            y = self.conv(self.activated(x, f"{block}.norm1"), f"{block}.conv1")
            y = self.conv(self.activated(y, f"{block}.norm2"), f"{block}.conv2")
            projects = f"{block}.nin_shortcut.weight" in self.state
            x = y + (self.conv(y, f"{block}.nin_shortcut") if projects else x)
        return x

    def latents(self, images: Tensor) -> Tensor:
        x = self.conv(images, "encoder.conv_in")
        for level in range(3):
            x = self.stage(x, f"encoder.down.{level}")
            x = self.conv(x, f"encoder.down.{level}.down_conv", 2) if level < 2 else x
        x = self.activated(self.stage(x, "encoder.mid"), "encoder.norm_out")
        return self.conv(x, "encoder.conv_out")

    def images(self, signs: Tensor) -> Tensor:
        x = self.stage(self.conv(signs, "decoder.conv_in"), "decoder.mid")
        for level in range(3):
            x = self.stage(x, f"decoder.up.{level}")
            if level < 2:
                x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(x, f"decoder.up.{level}.upsample_conv")
        return self.conv(self.activated(x, "decoder.norm_out"), "decoder.conv_out")


def test_encodes_by_the_original_rules(state: Mapping[str, Tensor], codec: MaskBitVQ) -> None:
    images = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(4))
    latents = Rules(state).latents(images)
    torch.testing.assert_close(codec.latents(images), latents, atol=1e-5, rtol=1e-4)
    expected = []
    for bits in (latents > 0).permute(0, 2, 3, 1).reshape(-1, BITS).tolist():
        code = sum(1 << i for i, bit in enumerate(bits) if bit)
        expected += [code & 7, code >> 3]
    assert len(set(expected)) > 1
    assert codec.encode(images).flatten().tolist() == expected


def test_decodes_by_the_original_rules(state: Mapping[str, Tensor], codec: MaskBitVQ) -> None:
    tokens = torch.randint(8, (2, 8), generator=torch.Generator().manual_seed(4))
    signs = torch.tensor(
        [
            [1.0 if (low + (high << 3)) >> bit & 1 else -1.0 for bit in range(BITS)]
            for low, high in tokens.reshape(-1, 2).tolist()
        ]
    )
    expected = Rules(state).images(signs.reshape(2, 2, 2, BITS).permute(0, 3, 1, 2))
    assert codec.pixels == (0.0, 1.0)
    torch.testing.assert_close(codec.decode(tokens), expected, atol=1e-5, rtol=1e-4)


def test_tokens_are_the_lower_and_the_upper_half_of_a_code() -> None:
    codes = torch.arange(2**14).reshape(4, -1)
    tokens = split(codes, 14)
    assert tokens.shape == (4, 2 * 2**12)
    assert tokens[1, 2:4].tolist() == [(2**12 + 1) % 128, (2**12 + 1) // 128]
    assert torch.equal(join(tokens, 14), codes)
    assert torch.equal(tokens[:, ::2] + (tokens[:, 1::2] << 7), codes)


@pytest.mark.parametrize("bits", [10, 12, 14, 16, 18])
def test_sizes_of_the_published_files(bits: int) -> None:
    with torch.device("meta"):
        codec = MaskBitVQ(published(bits))
    state = to_published(codec.state_dict())
    assert (codec.factor, codec.codebook) == (16, 2 ** (bits // 2))
    assert state["decoder.conv_in.weight"].shape == (512, bits, 3, 3)
    assert state["decoder.up.3.res_blocks.0.nin_shortcut.weight"].shape == (128, 128, 1, 1)
    assert state["encoder.down.0.down_conv.bias"].shape == (128,)
    assert not any("codebook" in key or "embedding" in key for key in state)
    decoder = [tensor.numel() for key, tensor in state.items() if key.startswith("decoder.")]
    assert bits != 14 or round(sum(decoder) / 1e6, 1) == 29.4


def test_codes_that_do_not_split_are_refused() -> None:
    with pytest.raises(CheckpointError, match="must split in 2 groups, got 7 bits"):
        MaskBitVQ(published(7))
