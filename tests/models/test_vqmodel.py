"""aMUSEd's tokenizer: values of diffusers' VQModel, its config, and its precision."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdzoo.checkpoint import CheckpointError
from mdzoo.decoder import Images
from mdzoo.synthetic import golden_weights, toks
from mdzoo.vqmodel import PUBLISHED, VQModel, load, read_config, to_published

CONFIG: Mapping[str, Any] = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 64, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "latent_channels": 16,
    "layers_per_block": 2,
    "lookup_from_codebook": True,
    "mid_block_add_attention": False,
    "num_vq_embeddings": 64,
    "vq_embed_dim": None,
}

# diffusers 0.42 with synthetic weights, float32 on a CPU, of RandomState(7).uniform(0, 1) pixels.
LATENTS = {
    0: -0.367591,
    51: -0.223187,
    102: -0.324990,
    153: -0.084039,
    204: -0.200433,
    255: 0.06181,
}
TOKENS = [41, 35, 36, 35, 47, 17, 21, 35, 61, 3, 31, 35, 36, 21, 36, 11]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    with torch.device("meta"):
        hollow = to_published(VQModel(read_config(CONFIG)).state_dict())
    state = {key: torch.empty(tensor.shape) for key, tensor in hollow.items()}
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


@pytest.fixture
def codec(state: Mapping[str, Tensor]) -> VQModel:
    return load(state, source="vqvae", config=CONFIG).requires_grad_(False)


def test_encodes_as_diffusers(codec: VQModel) -> None:
    noise = np.random.RandomState(7).uniform(0, 1, (1, 3, 64, 64)).astype(np.float32)
    latents = codec.latents(torch.from_numpy(noise))
    assert latents.shape == (1, 16, 4, 4)
    assert float(latents.abs().sum()) == pytest.approx(35.2369, abs=1e-3)
    for index, value in LATENTS.items():
        assert float(latents.flatten()[index]) == pytest.approx(value, abs=1e-4)
    assert codec.encode(torch.from_numpy(noise)).tolist() == [TOKENS]


def test_names_and_shapes_of_the_published_file() -> None:
    with torch.device("meta"):
        state = to_published(VQModel(PUBLISHED).state_dict())
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 1) == 146.2
    shortcuts = [key for key in state if "decoder" in key and key.endswith("conv_shortcut.weight")]
    blocks = [f"decoder.up_blocks.{i}.resnets.0.conv_shortcut.weight" for i in (1, 2, 4)]
    assert sorted(shortcuts) == blocks
    assert state["decoder.conv_in.weight"].shape == (768, 64, 3, 3)
    assert state["decoder.up_blocks.0.resnets.2.conv2.weight"].shape == (768, 768, 3, 3)
    assert state["decoder.up_blocks.3.upsamplers.0.conv.bias"].shape == (256,)
    assert state["encoder.down_blocks.0.downsamplers.0.conv.bias"].shape == (128,)
    assert state["decoder.mid_block.resnets.1.norm2.weight"].shape == (768,)
    assert state["decoder.conv_norm_out.weight"].shape == (128,)
    assert state["post_quant_conv.weight"].shape == (64, 64, 1, 1)


def test_weights_stay_in_float32_when_cast(codec: VQModel, state: Mapping[str, Tensor]) -> None:
    tokens = toks(32, 64).reshape(2, 16)
    expected = codec.decode(tokens)
    for cast_down in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        images = Images(codec)
        cast_down(images)
        assert {tensor.dtype for tensor in images.parameters()} == {torch.float32}
        assert torch.equal(images.codec.decode(tokens), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu', found 'gelu' in its config"),
        ({"norm_num_groups": 16}, "norm_num_groups must be 32, found 16"),
        ({"mid_block_add_attention": None}, "mid_block_add_attention must be False, found None"),
        ({"norm_type": "spatial"}, "norm_type must be 'group', found 'spatial'"),
        ({"latent_channels": 8}, r"vqvae must hold the tokenizer of its config, .*latent=8"),
    ],
)
def test_configs_of_other_tokenizers_are_refused(
    state: Mapping[str, Tensor], change: Mapping[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(state, source="vqvae", config={**CONFIG, **change})


def test_attention_is_what_diffusers_builds_by_default() -> None:
    config = {key: CONFIG[key] for key in CONFIG if key != "mid_block_add_attention"}
    with pytest.raises(CheckpointError, match="mid_block_add_attention must be False, found True"):
        read_config(config)
