"""What is exportable, and the module that is actually traced."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from mdexport import head
from mdruntime.manifest import DenoiserSpec

__all__ = ["Decoder", "Denoiser", "DenoiserGraph"]

Caches = Sequence[tuple[Tensor, Tensor]]  # (key, value) per layer, (rows, heads, canvas, head_size)


class Denoiser(Protocol):
    """A masked diffusion denoiser: any ``torch.nn.Module`` of this shape can be exported."""

    @property
    def spec(self) -> DenoiserSpec:
        """The canvas; it is written into the manifest unchanged."""

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return logits (batch, length, at least codebook), computed without any cache.

        Args:
            tokens: int (batch, length).
            labels: int (batch,), -1 for none.
        """

    def step(self, tokens: Tensor, positions: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        """Recompute some rows of the canvas against the K/V caches.

        Args:
            tokens: int32 (rows, m), ids of these rows, context rows included.
            positions: int32 (rows, m).
            caches: (key, value) of every layer, (rows, heads, canvas, head_size) each.

        Returns:
            Logits float32 (rows, m, codebook) and the refreshed caches.
        """


class Decoder(Protocol):
    """From tokens to pixels."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return uint8 images (batch, height, width, 3) of int32 tokens (batch, length)."""


class DenoiserGraph(nn.Module):
    """The graph of a pass: denoiser, guidance and sampler head, with flat inputs and outputs."""

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(  # noqa: PLR0913 - the inputs of the graph are its interface
        self,
        tokens: Tensor,
        positions: Tensor,
        conditional: Tensor,
        unconditional: Tensor,
        guidance: Tensor,
        temperature: Tensor,
        beta: Tensor,
        token_beta: Tensor,
        uniforms: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return the head's outputs, the refreshed caches and the guided logits, in this order.

        ``caches`` holds key and value of layer 0, key and value of layer 1, and so on.
        """
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        logits, refreshed = self.denoiser.step(tokens, positions, pairs)
        logits = head.guided(logits, conditional, unconditional, guidance)
        controls = {"temperature": temperature, "beta": beta, "token_beta": token_beta}
        draws = head.draw(logits, controls, uniforms)
        flat = [tensor for pair in refreshed for tensor in pair]
        return (*(draws[name] for name in head.OUTPUTS), *flat, logits)
