"""The original forward passes, written out over the published names of their tensors.

They share no code with the ports: float64 throughout, one sample after the other, heads split by
hand. With weights by the golden rule they give the published reference values.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]
Ids = Sequence[int]

tanh_gelu = partial(functional.gelu, approximate="tanh")


class Tensors:
    """A state dict with the maps that all architectures have."""

    def __init__(self, state: State) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def depth(self, name: str) -> int:
        """Return how many blocks there are, from a name with braces for their number."""
        return next(i for i in range(99) if name.format(i) not in self.state)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def layer_norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        y = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        y = y * self[f"{name}.weight"]
        return y + self[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        return rms(x) * self[f"{name}.weight"]

    def torch_attention(self, x: Tensor, name: str, heads: int) -> Tensor:
        """Do what ``nn.MultiheadAttention`` does."""
        packed = x @ self[f"{name}.in_proj_weight"].T + self[f"{name}.in_proj_bias"]
        return self.linear(attend(packed.chunk(3, -1), heads), f"{name}.out_proj")

    def timm_block(self, x: Tensor, name: str, heads: int, eps: float) -> Tensor:
        packed = self.linear(self.layer_norm(x, f"{name}.norm1", eps), f"{name}.attn.qkv")
        x = x + self.linear(attend(packed.chunk(3, -1), heads), f"{name}.attn.proj")
        y = functional.gelu(
            self.linear(self.layer_norm(x, f"{name}.norm2", eps), f"{name}.mlp.fc1")
        )
        return x + self.linear(y, f"{name}.mlp.fc2")


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, True) + 1e-5).sqrt()


def attend(projections: Sequence[Tensor], heads: int) -> Tensor:
    """Attend from rows (n, heads * size) to rows, head by head."""
    query, key, value = projections
    size = query.shape[-1] // heads
    parts = [slice(size * head, size * head + size) for head in range(heads)]
    return torch.cat(
        [(query[:, p] @ key[:, p].T / math.sqrt(size)).softmax(-1) @ value[:, p] for p in parts],
        -1,
    )


def rotated(x: Tensor, heads: int, base: float) -> Tensor:
    """Rotate rows (n, heads * size) by their place; the halves of a head are the two axes."""
    half = x.shape[-1] // heads // 2
    angle = torch.arange(len(x)).double()[:, None] * base ** (-torch.arange(half).double() / half)
    first, second = torch.unflatten(x, -1, (heads, 2, half)).unbind(2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], 2)
    return pairs.flatten(1)


def maskgit(state: State, ids: Ids, label: int, *, heads: int) -> Tensor:
    """Logits (length, codebook + 1) of valeoai's MaskGIT; a label of -1 is the dropped class."""
    t, codebook = Tensors(state), max(ids)
    last = len(t["tok_emb.weight"]) - 1
    sequence = [*ids, last if label < 0 else codebook + 1 + label]
    x = t["tok_emb.weight"][sequence] + t["pos_emb"][0]
    x = functional.gelu(t.linear(t.layer_norm(x, "first_layer.0", 1e-12), "first_layer.2"))
    x = t.linear(t.layer_norm(x, "first_layer.4", 1e-12), "first_layer.6")
    for i in range(t.depth("transformer.layers.{}.0.norm.weight")):
        name = f"transformer.layers.{i}"
        x = x + t.torch_attention(t.layer_norm(x, f"{name}.0.norm"), f"{name}.0.fn.mha", heads)
        y = functional.gelu(t.linear(t.layer_norm(x, f"{name}.1.norm"), f"{name}.1.fn.net.0"))
        x = x + t.linear(y, f"{name}.1.fn.net.3")
    x = functional.gelu(t.linear(t.layer_norm(x, "last_layer.0", 1e-12), "last_layer.2"))
    x = t.layer_norm(x, "last_layer.4", 1e-12)
    return (x @ t["tok_emb.weight"].T + t["bias"])[:-1, : codebook + 1]


def halton(state: State, ids: Ids, label: int, *, heads: int) -> Tensor:
    """Logits (length, codebook + 1) of Halton-MaskGIT."""
    t = Tensors(state)
    x = t["tok_emb.weight"][list(ids)] + t["pos_emb.weight"]
    x = torch.cat([x, t["reg_tokens.weight"]])
    y = functional.silu(t["cls_emb.weight"][label])  # -1 is the dropped class, which comes last
    for i in range(t.depth("transformer.layers.{}.ln1.weight")):
        name = f"transformer.layers.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = t.linear(y, f"{name}.mlp.1").chunk(6)
        h = t.rms_norm(x, f"{name}.ln1") * (1 + scale1) + shift1
        query, key, value = (t.linear(h, f"{name}.attn.{part}") for part in ("wq", "wk", "wv"))
        mixed = attend((rms(query), rms(key), value), heads)
        x = x + gate1 * t.linear(mixed, f"{name}.attn.wo")
        h = t.rms_norm(x, f"{name}.ln2") * (1 + scale2) + shift2
        h = functional.silu(t.linear(h, f"{name}.ff.w1")) * t.linear(h, f"{name}.ff.w3")
        x = x + gate2 * t.linear(h, f"{name}.ff.w2")
    shift, scale = t.linear(y, "last_norm.mlp.1").chunk(2)
    x = t.rms_norm(x, "last_norm.norm_final") + t["last_norm.norm_final.bias"]
    return t.linear(x * (1 + scale) + shift, "head")[:-1]


def mage(state: State, ids: Ids, fake: int, *, heads: int, decoder_heads: int) -> Tensor:
    """Logits (1 + length, rows of the table) of MAGE, whose first row has the id ``fake``."""
    t = Tensors(state)
    table = t["token_emb.word_embeddings.weight"]
    hidden = torch.tensor([False, *(token == len(table) - 1 for token in ids)])[:, None]
    x = table[[fake, *ids]] + t["token_emb.position_embeddings.weight"]
    x = t.layer_norm(x, "token_emb.LayerNorm", 1e-6)
    for i in range(t.depth("blocks.{}.norm1.weight")):
        x = t.timm_block(x, f"blocks.{i}", heads, 1e-6)
    x = t.linear(t.layer_norm(x, "norm", 1e-6), "decoder_embed")
    x = torch.where(hidden, x[:1], x) + t["decoder_pos_embed_learned"][0]
    for i in range(t.depth("decoder_blocks.{}.norm1.weight")):
        x = t.timm_block(x, f"decoder_blocks.{i}", decoder_heads, 1e-6)
    x = functional.gelu(t.linear(t.layer_norm(x, "decoder_norm", 1e-6), "mlm_layer.fc"))
    return t.layer_norm(x, "mlm_layer.ln") @ table.T + t["mlm_layer.bias"].flatten()


def bert(state: State, ids: Ids, token_of_class: int, *, heads: int) -> Tensor:
    """Logits (1 + length, codebook) of TiTok's generators L-32 and B-64."""
    t = Tensors({name.removeprefix("model."): tensor for name, tensor in state.items()})
    x = t["embeddings.word_embeddings.weight"][[token_of_class, *ids]]
    x = x + t["embeddings.position_embeddings.weight"]
    x = x + t["embeddings.token_type_embeddings.weight"][0]
    x = t.layer_norm(x, "embeddings.LayerNorm", 1e-12)
    for i in range(t.depth("encoder.layer.{}.output.dense.weight")):
        name = f"encoder.layer.{i}"
        parts = [t.linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value")]
        mixed = t.linear(attend(parts, heads), f"{name}.attention.output.dense")
        x = t.layer_norm(x + mixed, f"{name}.attention.output.LayerNorm", 1e-12)
        y = t.linear(
            functional.gelu(t.linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense"
        )
        x = t.layer_norm(x + y, f"{name}.output.LayerNorm", 1e-12)
    return t.linear(x, "lm_head")


def uvit(state: State, ids: Ids, token_of_class: int, *, heads: int) -> Tensor:
    """Logits (1 + length, codebook) of TiTok's generator S-128."""
    t, kept = Tensors(state), list[Tensor]()
    x = t["embeddings.weight"][[token_of_class, *ids]] + t["pos_embed"][0]
    half = t.depth("in_blocks.{}.norm1.weight")
    for i in range(half):
        x = t.timm_block(x, f"in_blocks.{i}", heads, 1e-5)
        kept.append(x)
    x = t.timm_block(x, "mid_block", heads, 1e-5)
    for i in range(half):
        x = t.linear(torch.cat([x, kept.pop()], -1), f"out_blocks.{i}.skip_linear")
        x = t.timm_block(x, f"out_blocks.{i}", heads, 1e-5)
    return t.linear(t.layer_norm(x, "norm"), "lm_head")


def maskbit(state: State, pairs: Sequence[Ids], label: int, *, heads: int) -> Tensor:
    """Logits (1 + rows, 2, codebook) of MaskBit over pairs of tokens; the class row is the last."""
    t = Tensors(state)
    half = t["input_proj.weight"].shape[1] // 2
    signs = [[2 * (token >> bit & 1) - 1 for bit in range(half)] for token in range(2**half)]
    signs.append([0] * half)
    bits = torch.tensor([signs[low] + signs[high] for low, high in pairs]).double()
    x = torch.cat([t.linear(bits, "input_proj"), t["class_emb.weight"][label][None]])
    x = t.layer_norm(x + t["pos_emb"][0], "first_layer.0", 1e-12)
    for i in range(t.depth("transformer.layers.{}.0.norm.weight")):
        name = f"transformer.layers.{i}"
        mixed = t.torch_attention(x, f"{name}.0.mha", heads)
        x = t.layer_norm(x + mixed, f"{name}.0.norm", 1e-12)
        y = t.linear(functional.gelu(t.linear(x, f"{name}.1.net.0")), f"{name}.1.net.2")
        x = t.layer_norm(x + y, f"{name}.1.norm", 1e-12)
    x = t.layer_norm(functional.gelu(t.linear(x, "last_layer.0")), "last_layer.2", 1e-12)
    return torch.unflatten(t.linear(x, "prediction_layer"), -1, (2, -1))


def mdlm(state: State, ids: Ids, sigma: float = 0.0, *, heads: int) -> Tensor:
    """Logits (length, vocabulary) of MDLM's network at a noise level."""
    t = Tensors(state)
    half = t["sigma_map.mlp.0.weight"].shape[1] // 2
    angle = sigma * 10_000 ** (-torch.arange(half).double() / half)
    c = t.linear(torch.cat([angle.cos(), angle.sin()]), "sigma_map.mlp.0")
    c = functional.silu(t.linear(functional.silu(c), "sigma_map.mlp.2"))
    x = t["vocab_embed.embedding"][list(ids)]
    for i in range(t.depth("blocks.{}.norm1.weight")):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = t.linear(
            c, f"{name}.adaLN_modulation"
        ).chunk(6)
        h = t.layer_norm(x, f"{name}.norm1") * (1 + scale1) + shift1
        query, key, value = t.linear(h, f"{name}.attn_qkv").chunk(3, -1)
        query, key = rotated(query, heads, 1e4), rotated(key, heads, 1e4)
        x = x + gate1 * t.linear(attend((query, key, value), heads), f"{name}.attn_out")
        h = t.layer_norm(x, f"{name}.norm2") * (1 + scale2) + shift2
        x = x + gate2 * t.linear(tanh_gelu(t.linear(h, f"{name}.mlp.0")), f"{name}.mlp.2")
    shift, scale = t.linear(c, "output_layer.adaLN_modulation").chunk(2)
    x = t.layer_norm(x, "output_layer.norm_final") * (1 + scale) + shift
    return t.linear(x, "output_layer.linear")


def llada(state: State, ids: Ids, *, heads: int, base: float = 5e5) -> Tensor:
    """Logits (length, vocabulary) of LLaDA."""
    t = Tensors({name.removeprefix("model."): tensor for name, tensor in state.items()})
    x = t["transformer.wte.weight"][list(ids)]
    for i in range(t.depth("transformer.blocks.{}.attn_norm.weight")):
        name = f"transformer.blocks.{i}"
        h = t.rms_norm(x, f"{name}.attn_norm")
        query, key, value = (t.linear(h, f"{name}.{part}_proj") for part in "qkv")
        query, key = rotated(query, heads, base), rotated(key, heads, base)
        x = x + t.linear(attend((query, key, value), heads), f"{name}.attn_out")
        h = t.rms_norm(x, f"{name}.ff_norm")
        h = functional.silu(t.linear(h, f"{name}.ff_proj")) * t.linear(h, f"{name}.up_proj")
        x = x + t.linear(h, f"{name}.ff_out")
    return t.linear(t.rms_norm(x, "transformer.ln_f"), "transformer.ff_out")


def smdm(state: State, ids: Ids, *, heads: int) -> Tensor:
    """Logits (length, vocabulary) of SMDM, whose projections stand head by head."""
    t = Tensors(state)
    x = t["transformer.wte.weight"][list(ids)]
    for i in range(t.depth("transformer.h.{}.norm_1.weight")):
        name = f"transformer.h.{i}"
        packed = t.linear(t.rms_norm(x, f"{name}.norm_1"), f"{name}.attn.attn")
        parts = torch.unflatten(packed, -1, (heads, 3, -1)).unbind(2)
        query, key, value = (part.flatten(1) for part in parts)
        query, key = rotated(query, heads, 1e4), rotated(key, heads, 1e4)
        x = x + t.linear(attend((query, key, value), heads), f"{name}.attn.proj")
        h, mlp = t.rms_norm(x, f"{name}.norm_2"), f"{name}.mlp.swiglu"
        x = x + t.linear(
            functional.silu(t.linear(h, f"{mlp}.w1")) * t.linear(h, f"{mlp}.w2"), f"{mlp}.w3"
        )
    return t.linear(t.rms_norm(x, "transformer.ln_f"), "lm_head")
