"""What is exportable, and the modules that are actually traced."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from mdexport import head
from mdruntime.denoiser import VISIBLE
from mdruntime.manifest import DenoiserSpec

__all__ = [
    "VISIBLE",
    "ConditionGraph",
    "Decoder",
    "Denoiser",
    "DenoiserGraph",
    "Encoder",
    "HeadGraph",
]


class Denoiser(Protocol):
    """A masked diffusion denoiser: any ``torch.nn.Module`` of this shape can be exported."""

    @property
    def spec(self) -> DenoiserSpec:
        """The canvas; it is written into the manifest unchanged."""

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return logits (batch, length, at least codebook), computed without any cache.

        Args:
            tokens: int (batch, length).
            labels: what the samples are conditioned on: classes int (batch,), -1 for none; or
                prompts int (batch, prompt length).
        """

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Return by name what stays the same over a trajectory, (batch, ...) each.

        It is exported as a graph of its own and computed once; empty where a family has none.
        """

    def empty_caches(self, rows: int, canvas: int) -> dict[str, Tensor]:
        """Return the caches of ``rows`` sequences of ``canvas`` positions by name, all zero."""

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the caches.

        Where the spec says ``visible``, ``extras`` holds under ``VISIBLE`` int (rows, v), the
        columns of the pass (0 to m - 1) that hold a context row or a token that is not hidden;
        some may be repeated.

        Args:
            tokens: int32 (rows, m * slots), ids at these rows, context rows included; the tokens
                that share a row stand side by side.
            positions: int32 (rows, m), which rows of the canvas these are.
            columns: int32 (rows, k), those of the m rows whose logits are wanted.
            caches: the tensors of ``empty_caches``, as the last pass left them.
            extras: the tensors of ``condition``, and ``VISIBLE`` where the spec asks for it.

        Returns:
            Logits float32 (rows, k * slots, codebook) and the refreshed caches.
        """


class Decoder(Protocol):
    """From tokens to pixels."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return uint8 images (batch, height, width, 3) of int32 tokens (batch, length)."""


class Encoder(Protocol):
    """From pixels to tokens."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return int32 tokens (batch, length) of uint8 images (batch, height, width, 3)."""


class ConditionGraph(nn.Module):
    """The graph of what stays the same over a trajectory."""

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of ``Denoiser.condition`` in their order."""
        return tuple(self.denoiser.condition(labels).values())


class HeadGraph(nn.Module):
    """The sampler head alone, for logits that were computed before."""

    def forward(
        self,
        logits: Tensor,
        temperature: Tensor,
        beta: Tensor,
        token_beta: Tensor,
        uniforms: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the head's outputs."""
        controls = {"temperature": temperature, "beta": beta, "token_beta": token_beta}
        draws = head.draw(logits, controls, uniforms)
        return tuple(draws[name] for name in head.OUTPUTS)


class DenoiserGraph(nn.Module):
    """The graph of a pass: denoiser, guidance and sampler head, with flat inputs and outputs."""

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser, extras: Sequence[str]) -> None:
        """Take the denoiser and the names of its extra inputs."""
        super().__init__()
        self.denoiser = denoiser
        self.extras = tuple(extras)

    def forward(  # noqa: PLR0913 - the inputs of the graph are its interface
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        conditional: Tensor,
        unconditional: Tensor,
        guidance: Tensor,
        temperature: Tensor,
        beta: Tensor,
        token_beta: Tensor,
        uniforms: Tensor,
        extras: list[Tensor],
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return the head's outputs, the refreshed caches and the guided logits, in this order."""
        named = dict(zip(self.extras, extras, strict=True))
        logits, refreshed = self.denoiser.step(tokens, positions, columns, caches, named)
        logits = head.guided(logits, conditional, unconditional, guidance)
        controls = {"temperature": temperature, "beta": beta, "token_beta": token_beta}
        draws = head.draw(logits, controls, uniforms)
        return (*(draws[name] for name in head.OUTPUTS), *refreshed, logits)
