"""Published names and ours, for families whose tensors are fused or split on the way.

Templates hold numbers in braces, such as ``layers.{i}.attn{j}.``, and stand for all names that
begin with them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Names"]


class Names(NamedTuple):
    """How a state dict is read from its published names, and written under them."""

    renamed: tuple[tuple[str, str], ...]
    """Published template, ours; the first that fits counts."""
    joined: tuple[tuple[tuple[str, ...], str], ...] = ()
    """Published templates of whole names whose tensors lie on top of each other in one here, and
    what stands for it in ``renamed``."""
    divided: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """The reverse: one published tensor that is several here."""

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state dict under our names; what fits no rule keeps its name."""
        state = dict(state)
        for parts, whole in self.joined:
            _join(state, parts, whole)
        for whole, parts in self.divided:
            _divide(state, whole, parts)
        return {_rename(name, self.renamed): tensor for name, tensor in state.items()}

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of ours under its published names."""
        renames = [(ours, published) for published, ours in self.renamed]
        found = {_rename(name, renames): tensor for name, tensor in state.items()}
        for parts, whole in self.joined:
            _divide(found, whole, parts)
        for whole, parts in self.divided:
            _join(found, parts, whole)
        return found


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template)), re.ASCII)


def _rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for before, after in renames:
        if found := _pattern(before).match(name):
            return after.format(**found.groupdict()) + name[found.end() :]
    return name


def _join(state: dict[str, Tensor], parts: Sequence[str], whole: str) -> None:
    """Put tensors on top of each other; misfits stay as they are, for ``fit`` to name."""
    for found in filter(None, map(_pattern(parts[0]).fullmatch, list(state))):
        names = [part.format(**found.groupdict()) for part in parts]
        tensors = [state[name] for name in names if name in state]
        if len(tensors) == len(parts) and len({tensor.shape for tensor in tensors}) == 1:
            for name in names:
                del state[name]
            state[whole.format(**found.groupdict())] = torch.cat(tensors)


def _divide(state: dict[str, Tensor], whole: str, parts: Sequence[str]) -> None:
    """Take a tensor apart into equal ones; a misfit stays as it is, for ``fit`` to name."""
    for found in filter(None, map(_pattern(whole).fullmatch, list(state))):
        tensor = state[found.string]
        if tensor.ndim and tensor.shape[0] % len(parts) == 0:
            del state[found.string]
            pieces = tensor.chunk(len(parts))
            for part, piece in zip(parts, pieces, strict=True):
                state[part.format(**found.groupdict())] = piece
