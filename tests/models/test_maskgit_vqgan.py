"""google's tokenizer under all of its published names, against its rules transcribed for flax.

The transcription numbers layers as flax does, by the order of their use, and works on kernels in
flax's own order of axes.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdzoo.checkpoint import CheckpointError
from mdzoo.conv import ConvConfig
from mdzoo.maskgit_vqgan import PUBLISHED, STYLE, MaskGITVQGAN, load, to_published
from mdzoo.synthetic import toks

LEVELS = (32, 64, 96)  # channels
SMALL = ConvConfig(LEVELS, stem=32, latent=16, embedding=16, codebook=12, style=STYLE)
BLOCKS = 2


class Tree:
    """A flax tree that names layers as they are used, and makes their weights if it has none."""

    def __init__(self, half: str, tensors: dict[str, Tensor] | None = None) -> None:
        self.half = half
        self.tensors = {} if tensors is None else tensors
        self.used: Counter[str] = Counter()
        self.random = np.random.RandomState(5)

    def name(self, kind: str) -> str:
        self.used[kind] += 1
        return f"{self.half}/{kind}_{self.used[kind] - 1}"

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            centre = float(name.endswith("scale"))
            values = self.random.standard_normal(shape) * 0.2 + centre
            self.tensors[name] = torch.from_numpy(values.astype(np.float32))
        return self.tensors[name]

    def conv(self, x: Tensor, width: int, size: int = 3, *, bias: bool = True) -> Tensor:
        name = self.name("Conv")
        kernel = self.tensor(f"{name}/kernel", size, size, x.shape[1], width)
        y = nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), padding=size // 2)
        return y + self.tensor(f"{name}/bias", width)[:, None, None] if bias else y

    def activated(self, x: Tensor) -> Tensor:
        name, width = self.name("GroupNorm"), x.shape[1]
        groups = x.reshape(len(x), 32, -1)
        groups = groups - groups.mean(dim=2, keepdim=True)
        y = groups / (groups.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
        scale = self.tensor(f"{name}/scale", width)[:, None, None]
        y = y.reshape(x.shape) * scale + self.tensor(f"{name}/bias", width)[:, None, None]
        return y * torch.sigmoid(y)

    def block(self, x: Tensor, width: int) -> Tensor:
        inside = Tree(self.name("ResBlock"), self.tensors)
        inside.random = self.random
        y = inside.conv(inside.activated(x), width, bias=False)
        y = inside.conv(inside.activated(y), width, bias=False)
        if x.shape[1] == width:
            return x + y
        return y + inside.conv(y, width, size=1, bias=False)


def reference_latents(tree: Tree, images: Tensor) -> Tensor:
    x = tree.conv(images, LEVELS[0], bias=False)
    for level, width in enumerate(LEVELS):
        for _ in range(BLOCKS):
            x = tree.block(x, width)
        if level < len(LEVELS) - 1:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    for _ in range(BLOCKS):
        x = tree.block(x, LEVELS[-1])
    return tree.conv(tree.activated(x), 16, size=1)


def reference_images(tree: Tree, vectors: Tensor) -> Tensor:
    x = tree.conv(vectors, LEVELS[-1])
    for _ in range(BLOCKS):
        x = tree.block(x, LEVELS[-1])
    for level in reversed(range(len(LEVELS))):
        for _ in range(BLOCKS):
            x = tree.block(x, LEVELS[level])
        if level > 0:
            x = tree.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), LEVELS[level])
    return tree.conv(tree.activated(x), 3)


@pytest.fixture(scope="module")
def flax() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    reference_latents(Tree("encoder", tensors), torch.zeros(1, 3, 8, 8))
    reference_images(Tree("decoder", tensors), torch.zeros(1, 16, 2, 2))
    Tree("", tensors).tensor("quantizer/codebook", 12, 16)
    return tensors


@pytest.fixture(scope="module")
def codec(flax: Mapping[str, Tensor]) -> MaskGITVQGAN:
    return load(flax, source="tokenizer").requires_grad_(False)


def test_flax_weights_encode_and_decode_by_the_original_rules(
    flax: dict[str, Tensor], codec: MaskGITVQGAN
) -> None:
    assert codec.config == SMALL
    assert codec.pixels == (0.0, 1.0)
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    latents = reference_latents(Tree("encoder", flax), images)
    torch.testing.assert_close(codec.latents(images), latents, atol=1e-4, rtol=1e-4)
    distances = torch.cdist(latents.flatten(2).transpose(1, 2), flax["quantizer/codebook"])
    assert torch.equal(codec.encode(images), distances.argmin(dim=-1))
    tokens = toks(12, 12).reshape(2, 2, 3)
    vectors = flax["quantizer/codebook"][tokens].permute(0, 3, 1, 2)
    decoded = reference_images(Tree("decoder", flax), vectors)
    torch.testing.assert_close(codec.decode(tokens), decoded, atol=1e-4, rtol=1e-4)


def prefixed(state: Mapping[str, Tensor], **prefixes: str) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        half, _, rest = key.partition(".")
        if half in prefixes:
            renamed[f"{prefixes[half]}.{rest}"] = tensor
    return renamed


def test_all_published_names_give_the_same_tokenizer(codec: MaskGITVQGAN) -> None:
    state = codec.state_dict()
    mage = {f"vqgan.{key}": tensor for key, tensor in state.items()}
    muse = to_published(state)
    noise = {"decoder.norm.weight": torch.zeros(3), "quantize.embedding.weight": torch.zeros(9, 4)}
    titok = prefixed(muse, decoder="pixel_decoder", quantize="pixel_quantize")
    for spelled in (state, mage | noise, muse, titok | noise):
        again = load(spelled, source="again")
        assert (again.encoder is None) == (spelled.keys() == (titok | noise).keys())
        for key, tensor in again.state_dict().items():
            assert torch.equal(tensor, state[key])


def test_names_and_shapes_of_the_published_files() -> None:
    with torch.device("meta"):
        state = MaskGITVQGAN(PUBLISHED).state_dict()
    assert len(state) == 168
    assert state["decoder.up.1.block.0.nin_shortcut.weight"].shape == (128, 128, 1, 1)
    assert state["decoder.up.3.block.0.nin_shortcut.weight"].shape == (256, 256, 1, 1)
    assert state["encoder.conv_out.weight"].shape == (256, 512, 1, 1)
    assert "encoder.conv_in.bias" not in state
    muse = to_published(state)
    assert len(muse) == 168
    assert muse["decoder.mid.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert muse["decoder.up.4.upsample_conv.weight"].shape == (512, 512, 3, 3)
    decoder = [tensor.numel() for key, tensor in state.items() if key.startswith("decoder.")]
    assert round(sum(decoder) / 1e6, 1) == 30.5


def test_a_flax_tree_of_another_architecture_is_refused(flax: dict[str, Tensor]) -> None:
    other = {**flax, "decoder/Attention_0/query/kernel": torch.zeros(4, 4, 4, 4)}
    with pytest.raises(CheckpointError, match="1 unexpected"):
        load(other, source="other")
    with pytest.raises(CheckpointError, match="must hold 'decoder"):
        load({"decoder/Dense_0/kernel": torch.zeros(3, 3)}, source="other")
