"""Plans of a study: which samplers are compared.

Samplers differ in order, rounds, alpha and caching. Everything else (schedule, guidance,
temperature) is the published sampler's, so that a comparison is fair.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mdruntime.errors import SamplingError
from mdruntime.manifest import Manifest
from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL

__all__ = ["default_plans", "read_plans"]

Plans = dict[str, Sampling]

_IMAGE_ROUNDS = (4, 8, 16, 32)
_TEXT_ROUNDS = (8, 16, 32, 64, 128)
_PAIRS = ("exploration", "guidance_interval")  # tuples, which JSON spells as lists


def default_plans(manifest: Manifest) -> Plans:
    """Return the grid that is measured where a user names no plans.

    ``maskgit``, ``moment`` and, of image models, ``hybrid`` with the same rounds and the same three
    alphas: half, once and twice the published one. Then partial caching, known orders whose rounds
    share full passes, plain tokens at random positions, and the published sampler itself. Names
    read as rounds, ``x`` parts of a round, ``/`` rounds that share a full pass.

    Args:
        manifest: of the bundle; its presets say how the authors sample.
    """
    presets = manifest.presets
    published = presets.get("published", presets["default"])
    base = published.but(
        entropy_bound=0, tokens="order", substeps=1, refresh="chosen", refresh_interval=1
    )
    grid = _images if manifest.text is None else _texts
    return _unlike([*grid(manifest, base), ("published", published)])


def _images(manifest: Manifest, base: Sampling) -> Iterator[tuple[str, Sampling]]:
    spread = "halton" if len(manifest.denoiser.grid) == 2 else "halton-1d"
    hybrid = base.but(order="hybrid", exploration_order=spread, exploration=(1.0, 0.0), substeps=2)
    for rounds in _rounds(_IMAGE_ROUNDS, manifest):
        yield from _tempered(base, rounds)
        for alpha in _alphas(base):
            yield f"hybrid {rounds} x 2, alpha {alpha:g}", hybrid.but(rounds=rounds, alpha=alpha)
        yield f"hybrid {rounds} x 4", hybrid.but(rounds=rounds, substeps=4)
        yield f"moment {rounds} x 2", base.but(order="moment", rounds=rounds, substeps=2)
        yield from _shared(spread, base.but(order=spread, rounds=rounds), 2)
        yield f"vanilla {rounds}", base.but(order="vanilla", rounds=rounds)


def _texts(manifest: Manifest, base: Sampling) -> Iterator[tuple[str, Sampling]]:
    # Rounds that each reveal the same number: an ancestral schedule belongs to random positions.
    line = base.but(schedule="linear")
    hybrid = line.but(order="hybrid", exploitation_order="u-moment", exploration_order="halton-1d")
    hybrid = hybrid.but(exploration=(1.0, 0.0), substeps=2)
    for rounds in _rounds(_TEXT_ROUNDS, manifest):
        ancestral = base.but(order="vanilla", schedule=ANCESTRAL, rounds=rounds)
        yield from _shared("ancestral", ancestral, 2, 4)
        yield f"vanilla {rounds}", line.but(order="vanilla", rounds=rounds)
        yield from _shared("halton-1d", line.but(order="halton-1d", rounds=rounds), 2)
        yield from _tempered(line, rounds)
        yield f"u-moment {rounds}", line.but(order="u-moment", rounds=rounds)
        yield f"hybrid {rounds} x 2", hybrid.but(rounds=rounds)


def _tempered(base: Sampling, rounds: int) -> Iterator[tuple[str, Sampling]]:
    """Yield MaskGIT and the moment sampler, whose alpha sets the temperature of tokens."""
    for order in ("maskgit", "moment"):
        for alpha in _alphas(base):
            changed = base.but(order=order, rounds=rounds, alpha=alpha)
            yield f"{order} {rounds}, alpha {alpha:g}", changed


def _shared(name: str, base: Sampling, *intervals: int) -> Iterator[tuple[str, Sampling]]:
    """Yield a known order alone, and with rounds that share a full pass."""
    yield f"{name} {base.rounds}", base
    for interval in intervals:
        shared = base.but(refresh="recent", refresh_interval=interval)
        yield f"{name} {base.rounds} / {interval}", shared


def _alphas(base: Sampling) -> tuple[float, ...]:
    alpha = base.alpha or Sampling().alpha
    return alpha / 2, alpha, 2 * alpha


def _rounds(wished: tuple[int, ...], manifest: Manifest) -> list[int]:
    """Return numbers of rounds that reveal two tokens or more each; one where none does."""
    length = manifest.denoiser.length
    return [rounds for rounds in wished if rounds <= length // 2] or [1]


def _unlike(plans: list[tuple[str, Sampling]]) -> Plans:
    """Return plans without those that repeat an earlier sampler."""
    names: dict[Sampling, str] = {}
    for name, sampling in plans:
        names.setdefault(sampling, name)
    return {name: sampling for sampling, name in names.items()}


def read_plans(path: Path, manifest: Manifest) -> Plans:
    """Read plans from a JSON file.

    Args:
        path: ``{name: {option: value}}``; the options change the preset ``default``, or the one
            that the option ``preset`` names.
        manifest: of the bundle, for its presets.

    Raises:
        SamplingError: no such file, not of this form, or an option that cannot be sampled.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise SamplingError(f"the plans {str(path)!r} cannot be read ({error})") from None
    if not isinstance(data, dict) or not data:
        raise SamplingError(
            f'{path} must hold plans by name, such as {{"moment 8": {{"order": "moment"}}}}'
        )
    return {name: _plan(name, options, manifest.presets) for name, options in data.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is there twice")
    return dict(pairs)


def _plan(name: str, options: Any, presets: Mapping[str, Sampling]) -> Sampling:
    if not isinstance(options, dict):
        raise SamplingError(f"plan {name!r} must be options and values, got {options!r}")
    changes = dict(options)
    preset = changes.pop("preset", "default")
    if preset not in list(presets):
        known = ", ".join(presets)
        raise SamplingError(f"plan {name!r}: preset must be one of {known}, got {preset!r}")
    for pair in _PAIRS:
        if pair in changes:
            changes[pair] = _pair(name, pair, changes[pair])
    try:
        return presets[preset].but(**changes)
    except SamplingError as error:
        raise SamplingError(f"plan {name!r}: {error}") from None


def _pair(plan: str, name: str, value: Any) -> tuple[Any, ...]:
    numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    if not numbers:
        raise SamplingError(f"plan {plan!r}: {name} must be two numbers in a list, got {value!r}")
    return tuple(value)
