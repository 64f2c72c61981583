"""All convolutional tokenizers: published reference values, export, and what they share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mdexport.trace import OPSET, trace_decoder
from mdzoo import checkpoint, llamagen, maskbit_vqgan, maskgit_vqgan, vqgan, vqmodel
from mdzoo.checkpoint import CheckpointError
from mdzoo.codec import ConvCodec
from mdzoo.conv import ConvConfig, Style
from mdzoo.decoder import Images, Tokens
from mdzoo.synthetic import golden_weights, toks

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    build: Callable[[ConvConfig], ConvCodec]
    load: Callable[..., ConvCodec]
    style: Style
    write: Callable[[State], dict[str, Tensor]] = dict

    def state(self, config: ConvConfig, *prefixes: tuple[str, str]) -> dict[str, Tensor]:
        """Return weights by the published rule, which goes by the published names."""
        with torch.device("meta"):
            hollow = self.write(self.build(config).state_dict())
        state = {}
        for key, tensor in hollow.items():
            for before, after in prefixes:
                if key.startswith(before):
                    state[after + key.removeprefix(before)] = torch.empty(tensor.shape)
        golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
        return state

    def small(self, **sizes: Any) -> ConvConfig:
        latent = sizes.get("latent", 8)
        codebook = 2**latent if self.style.signs else 12
        embedding = 8 if self.style.projected else latent
        common = {"widths": (32, 64), "stem": 32, "blocks": 1, "latent": latent}
        return ConvConfig(
            **{**common, "embedding": embedding, "codebook": codebook, **sizes}, style=self.style
        )

    def codec(self, config: ConvConfig) -> ConvCodec:
        return self.load(self.state(config, ("", "")), source="a test")


FAMILIES = {
    "taming": Family(vqgan.VQGAN, vqgan.load, Style()),
    "llamagen": Family(llamagen.LlamaGenVQ, llamagen.load, llamagen.STYLE, llamagen.to_published),
    "google": Family(
        maskgit_vqgan.MaskGITVQGAN,
        maskgit_vqgan.load,
        maskgit_vqgan.STYLE,
        maskgit_vqgan.to_published,
    ),
    "mage": Family(maskgit_vqgan.MaskGITVQGAN, maskgit_vqgan.load, maskgit_vqgan.STYLE),
    "maskbit": Family(
        maskbit_vqgan.MaskBitVQ,
        maskbit_vqgan.load,
        maskbit_vqgan.STYLE,
        maskbit_vqgan.to_published,
    ),
    "amused": Family(vqmodel.VQModel, vqmodel.load, vqmodel.STYLE, vqmodel.to_published),
}


EXPORTED = [name for name in FAMILIES if name != "mage"]  # the modules of google's


@dataclass(frozen=True)
class Golden:
    """What the original code decodes with synthetic weights, float32 on a CPU."""

    family: str
    config: ConvConfig
    shape: tuple[int, ...]
    mean: float
    deviation: float
    magnitude: float  # sum over all values
    values: tuple[float, ...]  # at six indices from the first to the last
    prefixes: tuple[tuple[str, str], ...] = (("", ""),)
    others: tuple[str, ...] = ()  # what else is in the published file


GOLDEN = {
    "llamagen-f16": Golden(
        "llamagen", llamagen.VQ16, (1, 3, 64, 64), -0.129055, 1.343164, 11867.0283,
        (-0.220764, -3.814783, 0.387565, 0.153525, -1.292118, 0.267119),
        others=("quantize.codebook_used",),
    ),
    "llamagen-f8": Golden(
        "llamagen", llamagen.VQ8, (1, 3, 32, 32), 0.109164, 0.945370, 2253.3999,
        (-0.110716, 1.632718, 0.169469, 0.029372, 0.483967, 0.365234),
        others=("quantize.codebook_used",),
    ),
    "mage": Golden(
        "mage", maskgit_vqgan.PUBLISHED, (1, 3, 64, 64), 0.118306, 0.848383, 7744.0985,
        (0.189250, 0.173701, -0.091974, -0.498796, 1.670989, 0.052832),
        prefixes=(("", "vqgan."),), others=("mask_token", "decoder_embed.weight", "norm.bias"),
    ),
    "titok": Golden(
        "google", maskgit_vqgan.PUBLISHED, (1, 3, 64, 64), 0.118552, 0.955043, 8557.8045,
        (-0.210579, 2.673837, -0.117467, -1.789177, 1.747540, -0.219700),
        prefixes=(("decoder.", "pixel_decoder."), ("quantize.", "pixel_quantize.")),
        others=("encoder.ln_pre.weight", "decoder.ln_post.bias", "quantize.embedding.weight"),
    ),
    "amused-small": Golden(
        "amused", ConvConfig((32, 32, 64, 64, 96), 32, 2, 16, 16, 64, style=vqmodel.STYLE),
        (1, 3, 64, 64), -0.059041, 0.542658, 5098.6914,
        (0.060814, 0.417504, 0.552358, 0.582668, 0.874166, 0.052473),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Two threads on small tensors wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def tokens_of(codec: ConvCodec, positions: int, batch: int = 1) -> Tensor:
    groups = 2 if isinstance(codec, maskbit_vqgan.MaskBitVQ) else 1
    return toks(batch * groups * positions, codec.codebook).reshape(batch, -1)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", GOLDEN)
def test_decodes_as_the_original_from_a_published_file(name: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    family, path = FAMILIES[golden.family], tmp_path / "model.pt"
    weights = family.state(golden.config, *golden.prefixes)
    torch.save({"model": {**weights, **dict.fromkeys(golden.others, torch.zeros(3))}}, path)
    del weights
    codec = family.load(checkpoint.read(path), source=path.name)
    path.unlink()  # up to 0.3 GB
    assert codec.config == replace(golden.config, encodes=name != "titok")
    images = codec.decode(toks(16, codec.codebook)[None])
    assert tuple(images.shape) == golden.shape
    flat = images.double().flatten()
    assert float(flat.mean()) == pytest.approx(golden.mean, abs=1e-4)
    assert float(flat.std(correction=0)) == pytest.approx(golden.deviation, abs=1e-4)
    assert float(flat.abs().sum()) == pytest.approx(golden.magnitude, abs=1e-6 * flat.numel())
    indices = [(len(flat) - 1) * i // 5 for i in range(6)]
    np.testing.assert_allclose(flat[indices], golden.values, rtol=0, atol=1e-4)


SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"widths": (96, 32, 64), "stem": 64, "blocks": 2, "latent": 6},
    {"widths": (32,), "blocks": 3, "latent": 2},
    {"widths": (32, 64, 64, 128, 128, 32), "latent": 4},
)


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_and_weights_come_from_the_file(
    family: Family, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config = family.small(**sizes)
    torch.manual_seed(3)
    original, path = family.build(config).eval(), tmp_path / "odd.pt"
    torch.save({"state_dict": family.write(original.state_dict())}, path)
    codec = family.load(checkpoint.read(path), source=path.name)
    assert codec.config == config
    assert codec.factor == 2 ** (len(config.widths) - 1)
    assert not codec.training
    for key, tensor in original.state_dict().items():
        assert torch.equal(codec.state_dict()[key], tensor), key
    tokens = tokens_of(codec, 4)
    torch.testing.assert_close(codec.decode(tokens), original.decode(tokens))


def test_entries_of_the_codebook_are_nearest_to_themselves(family: Family) -> None:
    codec = family.codec(family.small())
    grid = toks(12, codec.config.codebook).reshape(1, 3, 4)
    vectors = codec.quantize(grid)
    assert vectors.shape == (1, codec.config.embedding, 3, 4)
    assert codec.quantize.nearest(vectors).tolist() == grid.flatten(1).tolist()


@pytest.mark.filterwarnings("ignore")  # the exporter of torch warns about itself
@pytest.mark.parametrize("name", EXPORTED)
def test_tokens_of_images_are_those_of_the_exported_encoder(name: str) -> None:
    family = FAMILIES[name]
    codec = family.codec(family.small())
    images = (noise(3, 8, 8, 3) * 255).to(torch.uint8)
    black, white = codec.pixels
    pixels = images.permute(0, 3, 1, 2) / 255 * (white - black) + black
    expected = codec.encode(pixels)
    assert len(set(expected.flatten().tolist())) > 1
    assert codec.decode(expected).shape == pixels.shape
    session = exported(Tokens(codec), {"images": images[:2]})
    (found,) = session.run(None, {"images": images.numpy()})
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in EXPORTED),
        ("llamagen", torch.float16),
    ],
)
def test_images_of_tokens_are_those_of_the_exported_decoder(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    codec = family.codec(family.small())
    tokens = tokens_of(codec, 16, batch=3).int()
    expected = Images(codec)(tokens).numpy()
    assert expected.shape == (3, 8, 8, 3)
    assert len(np.unique(expected)) > 9
    model = trace_decoder(Images(codec).to(dtype), tokens.shape[1])
    found = session_of(model).run(None, {"tokens": tokens.numpy()})[0]
    assert found.dtype == np.uint8
    limit = {torch.float32: 1, torch.float16: 4}[dtype]
    assert np.abs(found.astype(int) - expected).max() <= limit


def exported(module: nn.Module, inputs: dict[str, Tensor]) -> onnxruntime.InferenceSession:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(
        module.eval(),
        kwargs=inputs,
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
        dynamic_shapes={name: {0: batch} for name in inputs},
    )
    assert program is not None
    return session_of(program.model)


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    graph = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def test_half_precision_is_close(family: Family) -> None:
    config = family.small()
    full, half = family.codec(config), family.codec(config).half()
    tokens, pixels = tokens_of(full, 16), noise(1, 3, 8, 8)
    decoded, latents = half.decode(tokens), half.latents(pixels)
    torch.testing.assert_close(decoded.float(), full.decode(tokens), rtol=0, atol=0.02)
    torch.testing.assert_close(latents.float(), full.latents(pixels), rtol=0, atol=0.02)
    assert half.encode(pixels).dtype == torch.int64


def test_a_file_without_encoder_decodes_only(family: Family) -> None:
    config = family.small()
    state = family.state(config, ("decoder.", "decoder."), *(
        (name, name) for name in ("quantize.", "post_quant_conv.")
    ))  # fmt: skip
    codec = family.load(state, source="a decoder")
    tokens = tokens_of(codec, 4)
    assert codec.encoder is None
    torch.testing.assert_close(codec.decode(tokens), family.codec(config).decode(tokens))
    with pytest.raises(CheckpointError, match="must have an encoder to make tokens of images"):
        codec.encode(noise(1, 3, 8, 8))


def test_files_with_holes_and_of_others_are_refused(family: Family) -> None:
    state = family.state(family.small(), ("", ""))
    cut = {key: state[key] for key in state if not key.startswith("decoder.norm")}
    cut = {key: cut[key] for key in cut if not key.startswith("decoder.conv_norm")}
    with pytest.raises(CheckpointError, match=r"cut\.pt does not fit .*2 missing \(decoder.norm"):
        family.load(cut, source="cut.pt")
    with pytest.raises(CheckpointError, match=r"must hold 'decoder\.up.*other architecture|anoth"):
        family.load({"fc.weight": torch.zeros(3, 3)}, source="resnet.pt")
