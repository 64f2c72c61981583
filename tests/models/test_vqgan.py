"""The VQGAN of taming-transformers against values computed with the original classes."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.conv import Decoder, Encoder, Style
from mdzoo.synthetic import golden_weights, toks
from mdzoo.vqgan import VQGAN, VQGANConfig, load

SMALL = VQGANConfig(widths=(32, 64), stem=32, blocks=1, latent=16, embedding=8, codebook=12)

# Synthetic weights through the original classes, float32 on a CPU: mean, population standard
# deviation, sum of magnitudes, and the values at some flat indices.
GOLDEN_DECODE = {
    "statistics": (0.132571, 0.914425, 8805.0158),
    "values": {
        0: -0.224052,
        2457: 0.795870,
        4914: 0.372123,
        7372: 1.207230,
        9829: -0.644254,
        12287: -0.049598,
    },
}
GOLDEN_LATENTS = {
    "statistics": (-0.001039, 1.101349, 900.1997),
    "values": {
        0: -2.255953,
        204: -0.491595,
        409: 0.529834,
        613: 0.123512,
        818: -1.926037,
        1023: 1.222218,
    },
}


def hollow(config: VQGANConfig) -> VQGAN:
    """Return a model without the seconds that its random weights would take."""
    with torch.device("meta"):
        model = VQGAN(config)
    return model.to_empty(device="cpu").eval().requires_grad_(False)


def build(config: VQGANConfig) -> VQGAN:
    model = hollow(config)
    golden_weights(model)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on small tensors wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small() -> VQGAN:
    return build(SMALL)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


class ModelCheckpoint:
    def __init__(self) -> None:
        self.monitor = "val/rec_loss"


class AttributeDict(dict[str, object]):
    pass


@contextmanager
def lightning() -> Iterator[dict[str, Any]]:
    """What a Lightning trainer keeps beside weights, of classes that exist inside only."""
    module = ModuleType("pytorch_lightning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        for kind in (ModelCheckpoint, AttributeDict):
            patch.setattr(kind, "__module__", module.__name__)
            setattr(module, kind.__name__, kind)
        yield {
            "epoch": 12,
            "global_step": 10_000,
            "pytorch-lightning_version": "1.0.8",
            "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
            "loops": [ModelCheckpoint()],
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            "hyper_parameters": AttributeDict(
                base=argparse.Namespace(path=Path("configs/model.yaml")),
                lossconfig=defaultdict(list, target=["vqperceptual"]),
            ),
        }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> VQGAN:
    """The published sizes, synthetic weights, through a file like the published one."""
    path = tmp_path_factory.mktemp("vqgan") / "last.ckpt"
    state = build(VQGANConfig()).state_dict()
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    state["loss.discriminator.main.0.bias"] = torch.zeros(64)
    with lightning() as objects:
        torch.save({**objects, "state_dict": state}, path)
    model = load(checkpoint.read(path), source=path.name)
    path.unlink()  # 0.3 GB
    return model.requires_grad_(False)


def assert_golden(found: Tensor, golden: dict[str, Any]) -> None:
    flat = found.numpy().ravel().astype(np.float64)
    mean, deviation, magnitude = golden["statistics"]
    assert flat.mean() == pytest.approx(mean, abs=1e-4)
    assert flat.std() == pytest.approx(deviation, abs=1e-4)
    assert np.abs(flat).sum() == pytest.approx(magnitude, abs=1e-4 * flat.size)
    for index, value in golden["values"].items():
        assert flat[index] == pytest.approx(value, abs=1e-4)


def test_sizes_of_the_published_file_are_recognised(published: VQGAN) -> None:
    assert published.config == VQGANConfig()
    assert published.config.factor == 16


def test_decodes_as_the_original(published: VQGAN) -> None:
    images = published.decode(toks(16, 1024)[None])
    assert images.shape == (1, 3, 64, 64)
    assert_golden(images, GOLDEN_DECODE)


def test_encodes_as_the_original(published: VQGAN) -> None:
    noise = np.random.RandomState(7).uniform(-1, 1, (1, 3, 32, 32))
    images = torch.from_numpy(noise.astype(np.float32))
    latents = published.latents(images)
    assert latents.shape == (1, 256, 2, 2)
    assert_golden(latents, GOLDEN_LATENTS)
    assert published.encode(images).tolist() == [[769, 684, 665, 860]]


def test_names_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = VQGAN(VQGANConfig()).state_dict()
    both = ("weight", "bias")
    block = [f"{layer}.{p}" for layer in ("norm1", "conv1", "norm2", "conv2") for p in both]
    attention = [f"{layer}.{p}" for layer in ("norm", "q", "k", "v", "proj_out") for p in both]
    expected = {"quantize.embedding.weight"}
    expected |= {f"{layer}.{p}" for layer in ("quant_conv", "post_quant_conv") for p in both}
    for half, levels, blocks, sampling, shortcuts in (
        ("encoder", "down", 2, [f"down.{i}.downsample" for i in range(4)], ("2", "4")),
        ("decoder", "up", 3, [f"up.{i}.upsample" for i in range(1, 5)], ("1", "3")),
    ):
        names = [f"{layer}.{p}" for layer in ("conv_in", "norm_out", "conv_out") for p in both]
        names += [f"{layer}.conv.{p}" for layer in sampling for p in both]
        names += [f"mid.{layer}.{key}" for layer in ("block_1", "block_2") for key in block]
        names += [f"mid.attn_1.{key}" for key in attention]
        for j in range(blocks):
            names += [f"{levels}.{i}.block.{j}.{key}" for i in range(5) for key in block]
            names += [f"{levels}.4.attn.{j}.{key}" for key in attention]
        names += [f"{levels}.{i}.block.0.nin_shortcut.{p}" for i in shortcuts for p in both]
        expected |= {f"{half}.{name}" for name in names}
    assert set(state) == expected
    assert state["decoder.up.1.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert state["decoder.up.3.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    assert sum(tensor.numel() for tensor in state.values()) == 72_141_699


@pytest.mark.parametrize(
    "config",
    [
        VQGANConfig(),
        SMALL,
        VQGANConfig(widths=(64,), stem=64, blocks=3, latent=5, embedding=7, codebook=2),
        VQGANConfig(widths=(96, 32, 64), stem=32, blocks=1, latent=4, embedding=6),
        VQGANConfig(widths=(32, 64, 64, 128, 128, 256), codebook=16384),
    ],
)
def test_sizes_follow_from_shapes(config: VQGANConfig) -> None:
    with torch.device("meta"):
        assert VQGANConfig.from_state(VQGAN(config).state_dict(), Style()) == config


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 1)])
def test_any_grid_is_decoded(small: VQGAN, grid: tuple[int, int]) -> None:
    height, width = grid
    tokens = toks(2 * height * width, 12).reshape(2, height, width)
    images = small.decode(tokens)
    assert images.shape == (2, 3, 2 * height, 2 * width)
    torch.testing.assert_close(small.decode(tokens.int()), images)


def test_a_square_grid_is_recognised(small: VQGAN) -> None:
    tokens = toks(18, 12)
    flat, grid = tokens.reshape(2, 9), tokens.reshape(2, 3, 3)
    torch.testing.assert_close(small.decode(flat), small.decode(grid))


def test_tokens_of_no_square_are_refused(small: VQGAN) -> None:
    with pytest.raises(ValueError, match="must form a square grid, got 15 of them; pass other"):
        small.decode(toks(15, 12)[None])


def test_images_between_two_grids_are_refused(small: VQGAN) -> None:
    with pytest.raises(ValueError, match="multiples of 2 pixels, got 8 x 13; crop or resize"):
        small.encode(torch.zeros(1, 3, 8, 13))


def test_tokens_are_the_nearest_entries(small: VQGAN, images: Tensor) -> None:
    tokens = small.encode(images)
    points = small.latents(images).permute(0, 2, 3, 1).double()
    table = small.get_parameter("quantize.embedding.weight").double()
    distances = (points[..., None, :] - table).square().sum(dim=-1)
    assert tokens.dtype == torch.int64
    assert len(set(tokens.flatten().tolist())) > 2
    torch.testing.assert_close(tokens, distances.argmin(dim=-1).flatten(1))


def test_encoder_and_decoder_stand_alone(small: VQGAN, images: Tensor) -> None:
    halves: dict[str, nn.Module] = {"encoder.": Encoder(SMALL), "decoder.": Decoder(SMALL)}
    for prefix, half in halves.items():
        state = small.state_dict()
        own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        checkpoint.fit(half.requires_grad_(False), own, source="half")
    latents = small.quant_conv(halves["encoder."](images))
    torch.testing.assert_close(latents, small.latents(images))
    tokens = toks(6, 12).reshape(1, 2, 3)
    decoded = halves["decoder."](small.post_quant_conv(small.quantize(tokens)))
    torch.testing.assert_close(decoded, small.decode(tokens))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision_is_close(
    small: VQGAN, images: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    half = build(SMALL).to(dtype)
    tokens = toks(32, 12).reshape(2, 16)
    decoded = half.decode(tokens)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded.float(), small.decode(tokens), rtol=0, atol=tolerance)
    latents = half.latents(images)
    assert latents.dtype == dtype
    torch.testing.assert_close(latents.float(), small.latents(images), rtol=0, atol=tolerance)
    assert half.encode(images).dtype == torch.int64


def test_norms_and_attention_survive_activations_whose_squares_overflow(small: VQGAN) -> None:
    half = build(SMALL).half()
    x = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(2)) * 3000
    for name in ("decoder.mid.block_1", "decoder.mid.attn_1"):
        expected = small.get_submodule(name)(x)
        found = half.get_submodule(name)(x.half())
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.conv_in.weight": None}, "must hold 'encoder.conv_in.weight', found .* other"),
        ({"quantize.embedding.weight": (3,)}, r"must have 2 dimensions.* got shape \(3,\)"),
        ({"encoder.conv_in.weight": (0, 3, 3, 3)}, r"none of them 0, got shape \(0, 3, 3, 3\)"),
        ({"encoder.conv_in.weight": (24, 3, 3, 3)}, "multiples of 32, got levels .* after 24"),
        ({"encoder.conv_in.weight": (32, 1, 3, 3)}, r"found float \(32, 1, 3, 3\)"),
    ],
)
def test_other_architectures_are_refused(
    small: VQGAN, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    state = dict(small.state_dict())
    for key, shape in change.items():
        del state[key]
        if shape is not None:
            state[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=message):
        load(state, source="last.ckpt")


def test_sizes_of_nothing_are_refused(small: VQGAN) -> None:
    state = {key: value for key, value in small.state_dict().items() if ".up." not in key}
    with pytest.raises(CheckpointError, match=r"must hold 'decoder\.up\.0.* another architecture"):
        load(state, source="last.ckpt")
    with pytest.raises(CheckpointError, match=r"must have levels.* got levels of \(\) channels"):
        VQGANConfig(widths=())
