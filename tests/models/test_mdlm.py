"""The MDLM port against published reference values, through the published file formats."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.dit import DIT
from mdzoo.mdlm import FAMILY, MDLM, PUBLISHED, MDLMConfig, from_published, infer, to_published
from mdzoo.synthetic import golden_weights, toks

WholePass = Callable[..., Tensor]

SMALL = MDLMConfig(length=1024, codebook=32, width=64, depth=2, heads=4, hidden=256)
ONE = MDLMConfig(length=1024, codebook=32, width=64, depth=1, heads=4, hidden=256)
ODD = [
    (MDLMConfig(length=1024, codebook=7, width=20, depth=1, heads=5, hidden=33), 128, 256),
    (MDLMConfig(length=1024, codebook=99, width=24, depth=11, heads=1, hidden=8), 5, 30),
]
INDICES = [0, 105, 210, 316, 421, 527]
NOBODY = torch.tensor([-1])

# Raw logits of the original code with synthetic weights: noise level, mean, standard deviation,
# sum of absolute values, and the values at INDICES.
CLEAN = [0.207203, 0.260528, 0.165977, -0.159946, 0.413787, -0.168959]
NOISY = [0.209545, 0.262132, 0.165131, -0.161129, 0.416286, -0.170808]
GOLDEN = [
    (0.0, -0.017071, 0.429196, 181.8874, CLEAN),
    (0.5, -0.017178, 0.429224, 181.9494, NOISY),
]


def published_model(
    config: MDLMConfig, conditioning: int = 16, frequencies: int = 256, *, seed: int = -1
) -> DIT:
    """Return the published model with golden weights, or other ones that follow from a seed."""
    model = DIT(config, conditioning, frequencies)
    golden_weights(model)
    if seed >= 0:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save(path: Path, model: DIT, prefix: str = "backbone.") -> Path:
    """Write a file as on the hub, buffers and all."""
    state = {prefix + key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file({**state, f"{prefix}rotary_emb.inv_freq": torch.ones(8)}, path)
    return path


def load(path: Path, *, ema: bool = False, name: str = "mdlm-owt", **settings: int) -> MDLM:
    state = checkpoint.read(path, strip=FAMILY.prefixes, ema=ema)
    model = MDLM(infer(state, PUBLISHED[name], settings))
    checkpoint.fit(model, from_published(state), source=path.name)
    return model.eval()


def folded(config: MDLMConfig) -> MDLM:
    model = MDLM(config)
    model.load_state_dict(from_published(published_model(config).state_dict()))
    return model.eval()


def tokens_of(config: MDLMConfig, length: int = 16) -> Tensor:
    return toks(length, config.codebook, config.codebook)[None]


def assert_golden(
    logits: Tensor, mean: float, std: float, total: float, values: list[float]
) -> None:
    found = logits.detach().numpy()
    assert found.shape == (1, 16, 33)
    assert found.mean() == pytest.approx(mean, abs=1e-4)
    assert found.std() == pytest.approx(std, abs=1e-4)
    assert np.abs(found).sum() == pytest.approx(total, abs=1e-3)
    np.testing.assert_allclose(found.ravel()[INDICES], values, atol=1e-4)


@pytest.mark.parametrize(("sigma", "mean", "std", "total", "values"), GOLDEN)
def test_logits_of_the_published_model_are_those_of_the_original_code(
    sigma: float, mean: float, std: float, total: float, values: list[float]
) -> None:
    logits = published_model(SMALL)(tokens_of(SMALL), torch.tensor([sigma]))
    assert_golden(logits, mean, std, total, values)


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.backbone.", "module.backbone."])
def test_logits_of_the_exported_model_are_those_at_noise_level_zero(
    prefix: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "model.safetensors", published_model(SMALL), prefix)
    logits = load(path, heads=4)(tokens_of(SMALL), NOBODY)
    assert_golden(logits, *GOLDEN[0][1:])


@pytest.mark.parametrize(
    ("config", "conditioning", "frequencies"), [(SMALL, 16, 256), (SMALL, 128, 256), *ODD]
)
def test_folding_changes_nothing_and_sizes_come_from_the_file(
    config: MDLMConfig, conditioning: int, frequencies: int, tmp_path: Path
) -> None:
    published = published_model(config, conditioning, frequencies, seed=1)
    model = load(save(tmp_path / "odd.safetensors", published), heads=config.heads)
    assert model.config == config
    tokens = torch.cat([tokens_of(config, 40), torch.zeros(1, 40, dtype=torch.int64)])
    with torch.no_grad():
        expected = published(tokens, torch.zeros(2))
        found = model(tokens, NOBODY)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folded_weights_are_rounded_once(dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in published_model(SMALL).state_dict().items()}
    exact = DIT(SMALL, 16).double()
    exact.load_state_dict(state)
    start = torch.cat([torch.ones(128), torch.zeros(128)]).double()
    c = torch.nn.functional.silu(exact.sigma_map["mlp"](start))
    parts = exact.get_submodule("blocks.1.adaLN_modulation")(c).chunk(6)
    whole = {key: value.double() for key, value in state.items()}
    found = from_published(state)
    expected = {
        "norm1.weight": whole["blocks.1.norm1.weight"] * (1 + parts[1]),
        "norm1.bias": parts[0],
        "attention.out.weight": whole["blocks.1.attn_out.weight"] * parts[2][:, None],
        "norm2.bias": parts[3],
        "mlp.down.weight": whole["blocks.1.mlp.2.weight"] * parts[5][:, None],
        "mlp.down.bias": whole["blocks.1.mlp.2.bias"] * parts[5],
    }
    for name, value in expected.items():
        assert torch.equal(found[f"blocks.1.{name}"], value.float()), name


def test_averages_come_in_the_order_of_the_published_parameters(tmp_path: Path) -> None:
    trained, average = published_model(SMALL), published_model(SMALL, seed=2)
    state = {f"backbone.{key}": tensor for key, tensor in trained.state_dict().items()}
    shadow = [parameter.detach().clone() for parameter in average.parameters()]
    path = tmp_path / "mdlm.ckpt"
    torch.save(
        {
            "epoch": 3,
            "state_dict": {**state, "backbone.rotary_emb.inv_freq": torch.ones(8)},
            "ema": {"decay": 0.9999, "num_updates": 1000000, "shadow_params": shadow},
        },
        path,
    )
    for ema, source in ((False, trained), (True, average)):
        found = load(path, ema=ema, heads=4)(tokens_of(SMALL), NOBODY)
        expected = source(tokens_of(SMALL), torch.zeros(1))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "tensors", "millions"),
    [
        ("mdlm-owt", 130, 169.6),
        ("sdtt-small", 130, 169.6),
        ("sdtt-medium", 250, 424.5),
        ("sdtt-large", 250, 863.2),
    ],
)
def test_published_sizes_give_the_published_tensors(
    name: str, tensors: int, millions: float
) -> None:
    with torch.device("meta"):
        state = to_published(MDLM(PUBLISHED[name]).state_dict())
        assert {key: value.shape for key, value in DIT(PUBLISHED[name]).state_dict().items()} == {
            key: value.shape for key, value in state.items()
        }
    assert len(state) == tensors  # and the buffer of the rotations
    assert round(sum(value.numel() for value in state.values()) / 1e6, 1) == millions
    width = PUBLISHED[name].width
    assert state["vocab_embed.embedding"].shape == (50258, width)
    assert state["blocks.11.adaLN_modulation.weight"].shape == (6 * width, 128)
    assert state["sigma_map.mlp.0.weight"].shape == (128, 256)
    assert infer(state, PUBLISHED["mdlm-owt"], {}) == PUBLISHED[name]


@pytest.mark.parametrize("length", [1, 16, 50])
def test_a_pass_over_all_rows_equals_the_forward_pass(whole_pass: WholePass, length: int) -> None:
    model = folded(SMALL)
    tokens = torch.cat([tokens_of(SMALL, length), tokens_of(SMALL, length).flip(1)])
    with torch.no_grad():
        plain = model(tokens, NOBODY)[..., :32]
    cached = whole_pass(model, tokens, NOBODY.repeat(2))
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=0)


def test_a_pass_over_changed_rows_of_one_layer_is_exact() -> None:
    model = folded(ONE)
    before, after = tokens_of(ONE), tokens_of(ONE).clone()
    after[0, [3, 9]] = torch.tensor([5, 6])
    whole = torch.arange(16)[None]
    rows, columns = torch.tensor([[9, 3, 12, 3]]), torch.tensor([[2, 0, 0]])
    empty = list(model.empty_caches(1, 16).values())
    with torch.no_grad():
        _, caches = model.step(before, whole, whole[:, :1], empty, {})
        logits, _ = model.step(after.gather(1, rows), rows, columns, caches, {})
        expected = model(after, NOBODY)[:, [12, 9, 9], :32]
    assert logits.shape == (1, 3, 32)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_half_precision_keeps_norms_softmax_and_head_in_float32(whole_pass: WholePass) -> None:
    model = folded(SMALL)
    full = whole_pass(model, tokens_of(SMALL), NOBODY)
    half = whole_pass(model.half(), tokens_of(SMALL), NOBODY)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 5e-3


def test_names_round_trip() -> None:
    state = folded(SMALL).state_dict()
    back = from_published(to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_spec_describes_a_text_of_any_length_without_classes() -> None:
    spec = MDLM(SMALL).spec
    assert (spec.codebook, spec.mask_token, spec.classes, spec.context) == (32, 32, 0, ())
    assert (spec.length, spec.canvas, spec.grid, spec.flexible) == (1024, 1024, (1024,), True)
    assert spec.layers == 2
    assert MDLM(SMALL).condition(NOBODY) == {}


Damage = Mapping[str, Tensor | None]
DAMAGES: list[tuple[Damage, str]] = [
    ({"blocks.1.attn_out.weight": None}, "must hold 'blocks.1.attn_out.weight', found 29 other"),
    ({"sigma_map.mlp.2.bias": None}, r"must hold 'sigma_map.mlp.2.bias', found"),
    (
        {"blocks.0.adaLN_modulation.bias": torch.zeros(320)},
        r"'blocks.0.adaLN_modulation.bias' must be of shape \(384,\) .*, got \(320,\)",
    ),
    ({"blocks.7.norm1.weight": torch.ones(64)}, "must hold 'blocks.2.norm1.weight'"),
    ({"blocks.1.norm3.weight": torch.ones(64)}, r"1 unexpected \(blocks.1.norm3.weight\)"),
    ({"output_layer.linear.bias": torch.zeros(33) / 0}, r"NaN or infinity .*\(head.bias\)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: Damage, message: str, tmp_path: Path
) -> None:
    state = {**published_model(SMALL).state_dict(), **damage}
    path = tmp_path / "damaged.pth"
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        load(path, heads=4)


def test_what_no_shape_tells_must_be_told(tmp_path: Path) -> None:
    path = save(tmp_path / "small.safetensors", published_model(SMALL))
    with pytest.raises(CheckpointError, match=r"width 64 .* pass --set heads=N"):
        load(path)
    with pytest.raises(CheckpointError, match=r"heads must divide the width 64 .* got 5"):
        load(path, heads=5)
    with pytest.raises(CheckpointError, match=r"length must be positive, got 0"):
        load(path, heads=4, length=0)
    assert load(path, heads=4, length=128).spec.length == 128


def test_another_architecture_is_named_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}, path)
    message = r"'vocab_embed.embedding', found 2 other tensors \(conv1.weight"
    with pytest.raises(CheckpointError, match=message):
        load(path)
