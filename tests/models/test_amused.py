"""aMUSEd against published reference values and diffusers, through the published folder."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdzoo import amused, checkpoint, clip, uvit2d_config
from mdzoo.amused import FAMILY, PUBLISHED, Amused, load_folder
from mdzoo.checkpoint import CheckpointError
from mdzoo.clip import ClipConfig
from mdzoo.synthetic import golden_weights, toks
from mdzoo.uvit2d import UVit2D, load
from mdzoo.uvit2d_config import UVitConfig

TRANSFORMER: dict[str, Any] = {
    "hidden_size": 64,
    "cond_embed_dim": 32,
    "micro_cond_encode_dim": 8,
    "micro_cond_embed_dim": 40,
    "encoder_hidden_size": 48,
    "vocab_size": 40,
    "codebook_size": 32,
    "in_channels": 32,
    "block_out_channels": 32,
    "num_res_blocks": 1,
    "block_num_heads": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "sample_size": 4,
}
# No two sizes are the same, and heads do not fill the widths.
ODD = TRANSFORMER | {
    "hidden_size": 33,
    "in_channels": 20,
    "block_out_channels": 26,
    "num_res_blocks": 2,
    "block_num_heads": 3,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "sample_size": 6,
    "downsample": True,
    "upsample": True,
}
EQUAL = TRANSFORMER | {"block_out_channels": 64, "sample_size": 3}  # text needs no map in stages
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 72,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
    "hidden_act": "gelu",
    "bos_token_id": 48,
    "eos_token_id": 49,
}
VQVAE = {"block_out_channels": [32, 32, 64]}  # 4 pixels on the side of a token
PROMPTS = torch.tensor([[48, 3, 4, 17, 49, 49, 49, 49, 49], [48, 49, 49, 49, 49, 49, 49, 49, 49]])

# Logits of the original code with synthetic weights: whether tokens share rows, mean, standard
# deviation, sum of absolute values, and the values at INDICES.
INDICES = [0, 102, 204, 306, 408, 511]
PLAIN = [0.238302, 0.219641, -0.113532, 0.197294, -0.292688, -0.243944]
PATCHES = [-0.133622, 0.449515, -0.635816, -0.352473, -0.188070, 0.069409]
GOLDEN = [
    (False, -0.006025, 0.359623, 144.9544, PLAIN),
    (True, 0.009649, 0.328531, 133.2562, PATCHES),
]


def golden_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the published rule, which goes by the published names."""
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def write_part(folder: Path, file: str, state: Mapping[str, Tensor], config: object) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(state), folder / file)


def write_folder(
    folder: Path, transformer: Mapping[str, Any], *, variant: str = "", prefix: str = ""
) -> dict[str, dict[str, Tensor]]:
    """Write synthetic weights as diffusers saves them, and return them part by part."""
    text = clip.to_published(clip.ClipText(ClipConfig.from_json(TEXT)).state_dict())
    uvit = UVit2D(UVitConfig.from_json(transformer)).state_dict()
    states = {
        "transformer": golden_state(uvit2d_config.to_published(uvit)),
        "text_encoder": golden_state(text),
    }
    files = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}
    configs = {"transformer": transformer, "text_encoder": TEXT}
    for part, state in states.items():
        named = {prefix + name: tensor for name, tensor in state.items()}
        file = f"{files[part]}{variant}.safetensors"
        write_part(folder / part, file, named, configs[part])
    (folder / "vqvae").mkdir(exist_ok=True)
    (folder / "vqvae" / "config.json").write_text(json.dumps(VQVAE))
    return states


def tokens_of(model: Amused, batch: int = 2) -> Tensor:
    spec = model.spec
    return torch.stack(
        [toks(spec.length, spec.codebook, spec.mask_token).roll(i) for i in range(batch)]
    )


@pytest.mark.parametrize(("patches", "mean", "std", "total", "values"), GOLDEN)
def test_logits_are_those_of_the_original_code(
    patches: bool, mean: float, std: float, total: float, values: list[float], tmp_path: Path
) -> None:
    config = TRANSFORMER | {"downsample": patches, "upsample": patches}
    write_folder(tmp_path, config)
    folder = tmp_path / "transformer"
    model = load(checkpoint.read(folder), config, source="transformer")
    random = np.random.RandomState
    text = torch.from_numpy(random(1).standard_normal((1, 7, 48))).float()
    pooled = torch.from_numpy(random(2).standard_normal((1, 32))).float()
    micro = torch.tensor([[256.0, 256, 0, 0, 6]])
    with torch.no_grad():
        logits = model(toks(16, 32, 39).reshape(1, 4, 4), text, pooled, micro).numpy()
    assert logits.shape == (1, 32, 4, 4)
    assert logits.mean() == pytest.approx(mean, abs=1e-4)
    assert logits.std() == pytest.approx(std, abs=1e-4)
    assert np.abs(logits).sum() == pytest.approx(total, abs=1e-3)
    np.testing.assert_allclose(logits.ravel()[INDICES], values, atol=1e-4)


def original(folder: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return diffusers' own transformer behind transformers' own text encoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        transformers = pytest.importorskip("transformers")
        transformer = diffusers.UVit2DModel.from_pretrained(folder / "transformer").eval()
        text = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")

    def run(ids: Tensor, prompts: Tensor, micro: Tensor) -> Tensor:
        read = text.eval()(prompts, output_hidden_states=True)
        micro = micro.repeat(len(prompts), 1)
        return transformer(ids, read.hidden_states[-2], read.text_embeds, micro)

    return run


@pytest.mark.parametrize("config", [TRANSFORMER, ODD, EQUAL])
def test_a_prompt_is_read_as_the_published_pipeline_reads_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    write_folder(tmp_path, config)
    reference, model = original(tmp_path), load_folder(tmp_path)
    tokens, size = tokens_of(model), config["sample_size"]
    with torch.no_grad():
        micro = torch.tensor([[4.0 * size, 4.0 * size, 0, 0, 6]])
        expected = reference(tokens.reshape(2, size, size), PROMPTS, micro)
        logits = model(tokens, PROMPTS)
    torch.testing.assert_close(logits, expected.flatten(2).mT, atol=1e-5, rtol=0)
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "tensors", "million"), [("256", 474, 603.538), ("512", 478, 608.258)]
)
def test_published_sizes_give_the_published_tensors(
    name: str, tensors: int, million: float
) -> None:
    config = PUBLISHED[f"amused-{name}"]
    with torch.device("meta"):
        state = amused.to_published(Amused(config).state_dict())
    part = {key: tensor for key, tensor in state.items() if key.startswith("transformer.")}
    assert len(part) == tensors
    assert round(sum(tensor.numel() for tensor in part.values()) / 1e6, 3) == million
    assert len(state) - len(part) == 197
    layer = "transformer.transformer_layers.21."
    assert state[layer + "ff.net.0.proj.weight"].shape == (5632, 1024)
    assert state[layer + "norm3.linear.weight"].shape == (2048, 1024)
    assert state["transformer.cond_embed.linear_1.weight"].shape == (1024, 2048)
    norm = "transformer.down_block.res_blocks.2.channelwise_norm.gamma"
    assert state[norm].shape == (1, 1, 1, 3072)
    if name == "512":
        assert state["transformer.up_block.upsample.conv.weight"].shape == (768, 768, 2, 2)
    for published in PUBLISHED.values():
        assert FAMILY.infer(state, published, {}) == config


@pytest.mark.parametrize("config", [TRANSFORMER, ODD])
def test_sizes_come_from_the_checkpoint(config: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path, config)
    state, stated = amused.read_folder(tmp_path)
    settings = {
        "size": stated.transformer.size,
        "heads": stated.transformer.heads,
        "block_heads": stated.transformer.block_heads,
        "text_heads": stated.text.heads,
    }
    found = FAMILY.infer(state, PUBLISHED["amused-256"], settings)
    assert found.transformer == stated.transformer
    assert found.text == stated.text
    assert (stated.factor, stated.transformer.slots) == (4, 4 if "downsample" in config else 1)


def test_names_round_trip(tmp_path: Path) -> None:
    write_folder(tmp_path, ODD)
    state = load_folder(tmp_path).state_dict()
    back = amused.from_published(amused.to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_prefixes_variants_and_older_names_make_no_difference(tmp_path: Path) -> None:
    states = write_folder(tmp_path / "plain", ODD)
    write_folder(tmp_path / "other", ODD, variant=".fp16", prefix="module.")
    older = {
        name.replace("downsample.conv.", "downsample.Conv2d_0."): tensor
        for name, tensor in states["transformer"].items()
    }
    file = "diffusion_pytorch_model.fp16.safetensors"
    write_part(tmp_path / "older" / "transformer", file, older, ODD)
    (tmp_path / "older" / "text_encoder").symlink_to(tmp_path / "plain" / "text_encoder")
    (tmp_path / "older" / "vqvae").symlink_to(tmp_path / "plain" / "vqvae")
    plain = load_folder(tmp_path / "plain")
    for name in ("other", "older"):
        other = load_folder(tmp_path / name)
        assert other.config == plain.config
        expected = plain.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "found transformer depth 2 instead of 3; download both again"),
        ({"codebook_size": 36}, "found transformer codebook 32 instead of 36"),
        ({"use_bias": True}, "use_bias must be False, found True in its config"),
        ({"upsample": True}, "downsample and upsample, or neither"),
        ({"num_attention_heads": 0}, "heads must lie between 1 and the width 64, got 0"),
        ({"encoder_hidden_size": 768}, r"reads texts of widths \(768, 32\).*writes \(48, 32\)"),
        ({"micro_cond_encode_dim": 7}, "micro must be even, half of it cosines, got 7"),
        ({"sample_size": 0}, "size must be a multiple of 1, .* got 0: pass --set size=N"),
        ({"num_res_blocks": 0}, "stages and transformer must have a block each, got 0 and 2"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, TRANSFORMER)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(TRANSFORMER | change))
    with pytest.raises(CheckpointError, match=message):
        load_folder(tmp_path)


def test_a_mask_token_in_another_place_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, TRANSFORMER)
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"mask_token_id": 39}))
    assert load_folder(tmp_path).spec.mask_token == 39
    path.write_text(json.dumps({"mask_token_id": 32}))
    with pytest.raises(CheckpointError, match=r"last id of its vocabulary, 39.*found 32"):
        load_folder(tmp_path)


def test_missing_parts_and_tensors_are_named(tmp_path: Path) -> None:
    states = write_folder(tmp_path, TRANSFORMER)
    state = dict(states["transformer"])
    del state["transformer_layers.1.attn1.to_k.weight"]
    state["adapter.weight"] = torch.zeros(2)
    file = "diffusion_pytorch_model.safetensors"
    write_part(tmp_path / "transformer", file, state, TRANSFORMER)
    with pytest.raises(CheckpointError, match=r"1 missing \(transformer.layers.1.attention.qkv"):
        load_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"transformer\.adapter\.weight"):
        load_folder(tmp_path)
    (tmp_path / "text_encoder" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_folder(tmp_path)


def test_sizes_that_must_be_told_are_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, TRANSFORMER)
    state, published = amused.read_folder(tmp_path)[0], PUBLISHED["amused-256"]
    settings: dict[str, int] = {}
    for name in ("text_heads", "block_heads", "heads"):
        with pytest.raises(CheckpointError, match=f"pass --set {name}=N"):
            FAMILY.infer(state, published, settings)
        settings[name] = 2
    assert FAMILY.infer(state, published, settings).transformer.size == 16
    alone = {name: tensor for name, tensor in state.items() if name.startswith("transformer.")}
    with pytest.raises(CheckpointError, match="found no text_encoder; name the folder"):
        FAMILY.infer(alone, published, settings)
    other = {f"text_encoder.{name}": tensor for name, tensor in state.items()} | alone
    with pytest.raises(CheckpointError, match=r"must hold 'text_model.embeddings"):
        FAMILY.infer(other, published, settings)
