"""Verification: replay recorded passes and compare with the reference model's outputs.

``verify/denoiser.npz`` holds the feeds of whole trajectories (full and partial passes, guided, at
several mask ratios) and what the original PyTorch model answered. The feeds are replayed *teacher
forced*: every pass gets the reference's tokens, whatever the graph drew before, because one token
that flips would change all that follows. The K/V caches, however, are the graph's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.denoiser import CONDITION, Condition, conditioner
from mdruntime.errors import BundleError
from mdruntime.head import Draws, log_softmax
from mdruntime.session import Outputs, Session, open_session

__all__ = [
    "CONDITIONED",
    "DECODER_VECTORS",
    "DENOISER_VECTORS",
    "ENCODER_VECTORS",
    "Verification",
    "verify",
    "write_passes",
]

DENOISER_VECTORS = "verify/denoiser.npz"
DECODER_VECTORS = "verify/decoder.npz"
ENCODER_VECTORS = "verify/encoder.npz"
CONDITIONED = "conditioned"
"""Among a pass's arrays: the input of the condition graph, row by row."""

_EXACT_DB = 200.0  # reported for images that are equal, whose PSNR is infinite

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was measured and what is allowed; true when all of it holds.

    Keys: ``log_prob`` and ``score`` (moments divided by beta, entropies, probabilities) are largest
    absolute differences and must not exceed their limit; neither must ``token_shift``, the largest
    change of a uniform number under which the reference draws the same token. ``psnr_db`` and
    ``encoder_agreement`` must reach theirs. ``token_agreement``, the share of equal tokens, has no
    limit: with a large codebook and flat distributions a rounding moves many a draw over an edge.
    """

    measured: dict[str, float]
    limits: dict[str, float]
    passes: int

    def __bool__(self) -> bool:
        """Return whether every measure is within its limit."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """Sentences about the measures that are outside their limits."""
        found = []
        for name, limit in self.limits.items():
            value = self.measured[name]
            # Written so that NaN fails.
            good = value >= limit if name in _AT_LEAST else value <= limit
            if not good:
                bound = "at least" if name in _AT_LEAST else "at most"
                found.append(f"{name} {value:.6g} ({bound} {limit:g})")
        return found


_AT_LEAST = ("psnr_db", "encoder_agreement")


def write_passes(path: Path, passes: Sequence[Arrays]) -> None:
    """Write recorded passes: of each its feeds, the head's outputs, and some logits.

    ``shown`` (n,) says which of the wanted tokens the ``logits`` (batch, n, codebook) belong to;
    ``canvas`` is the number of canvas rows where a pass starts on a new canvas, and 0 elsewhere.
    """
    arrays = {
        f"{i:03d}.{name}": array for i, one in enumerate(passes) for name, array in one.items()
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def _read_passes(path: Path, names: Sequence[str]) -> list[dict[str, NDArray[Any]]]:
    passes: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in _read_arrays(path).items():
        number, _, name = key.partition(".")
        passes.setdefault(number, {})[name] = array
    wanted = {*names, *Draws._fields, "canvas", "shown", "logits"}
    if not passes or any(wanted - set(one) for one in passes.values()):
        raise BundleError(f"{path.name} holds no whole passes; export the bundle again")
    return [passes[number] for number in sorted(passes)]


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        # Opened here, because NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a damaged file may raise anything
        raise BundleError(f"{path.name} cannot be read ({error}); export it again") from None


def verify(
    bundle: Bundle, provider: str = "cpu", *, spelling: str = "", threads: int = 0
) -> Verification:
    """Replay the bundle's test vectors on this machine.

    Args:
        bundle: an opened bundle.
        provider: the execution provider.
        spelling: run the graph as it is spelled for another backend.
        threads: CPU threads; 0 takes as many as the process may use.
    """
    names, condition = _feeds(bundle), None
    passes = _read_passes(bundle.folder / DENOISER_VECTORS, names)
    if "condition" in bundle.manifest.graphs:
        opened = open_session(bundle, "condition", provider, threads=threads)
        condition = conditioner(opened, bundle.manifest.graphs["condition"])
    session = open_session(bundle, "denoiser", provider, threads=threads, spelling=spelling)
    replay = _Replay(session, condition, names)
    measured = _compare_passes(replay, passes, logits=not spelling)
    session.close()
    limits = dict(bundle.manifest.verification.limits)
    if not spelling:
        measured |= _verify_images(bundle, provider, threads)
    return Verification(
        measured, {name: limit for name, limit in limits.items() if name in measured}, len(passes)
    )


def _feeds(bundle: Bundle) -> list[str]:
    """Return the denoiser's inputs that a recording holds: neither caches nor conditions."""
    graph = bundle.manifest.graphs["denoiser"]
    caches = {name for name, _ in graph.caches}
    recorded = [
        tensor.name
        for tensor in graph.inputs
        if tensor.name not in caches and not tensor.name.startswith(CONDITION)
    ]
    return recorded + ([CONDITIONED] if "condition" in bundle.manifest.graphs else [])


@dataclass(frozen=True, slots=True)
class _Replay:
    """Recorded passes go in, the graph's answers come out."""

    session: Session
    condition: Condition | None
    names: list[str]

    def __call__(self, expected: Arrays, fetch: Sequence[str]) -> Outputs:
        feeds = {name: expected[name] for name in self.names if name != CONDITIONED}
        if self.condition is not None:
            found = self.condition(expected[CONDITIONED])
            feeds |= {CONDITION + name: values for name, values in found.items()}
        if expected["canvas"]:
            self.session.start(int(expected["canvas"]))
        return self.session.run(feeds, fetch)


def _compare_passes(
    replay: _Replay, passes: list[dict[str, Any]], *, logits: bool
) -> dict[str, float]:
    log_prob = score = shift = equal = total = 0.0
    for expected in passes:
        found = replay(expected, [*Draws._fields, *(["logits"] if logits else [])])
        same = found["sampled"] == expected["sampled"]
        equal += float(same.sum())
        total += same.size
        # An error of the logits enters the log-moment times beta.
        beta = expected["beta"][:, None]
        score = _worst(score, (found["log_moment"] - expected["log_moment"]) / beta)
        score = _worst(score, *(found[n] - expected[n] for n in ("entropy", "top", "margin")))
        score = _worst(score, (found["log_prob"] - expected["log_prob"])[same])
        shift = _worst(shift, _shifts(expected, found["sampled"][:, expected["shown"]]))
        if logits:
            shown = log_softmax(found["logits"][:, expected["shown"]])
            log_prob = _worst(log_prob, shown - log_softmax(expected["logits"]))
    result = {"score": score, "token_shift": shift, "token_agreement": equal / total}
    return {"log_prob": log_prob, **result} if logits else result


def _shifts(expected: Arrays, tokens: NDArray[np.int32]) -> NDArray[np.floating]:
    """Return how far each uniform lies outside the interval of the token that was drawn with it.

    Args:
        expected: a recorded pass; its logits decide where the intervals are.
        tokens: what was drawn at the positions whose logits are known, (batch, n).
    """
    log_p = log_softmax(expected["logits"].astype(np.float64) / _wide(expected["temperature"]))
    exponent = _wide(expected["token_beta"]) * log_p
    weights = np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    above = np.cumsum(weights, axis=-1)
    above /= above[..., -1:]
    share = weights / weights.sum(axis=-1, keepdims=True)
    index = tokens[..., None].astype(np.int64)
    high = np.take_along_axis(above, index, axis=-1)[..., 0]
    low = high - np.take_along_axis(share, index, axis=-1)[..., 0]
    uniforms = expected["uniforms"][:, expected["shown"]]
    return np.maximum(np.maximum(low - uniforms, uniforms - high), 0)


def _wide(numbers: NDArray[np.floating]) -> NDArray[np.floating]:
    return numbers.astype(np.float64)[:, None, None]


def _worst(before: float, *differences: NDArray[np.floating]) -> float:
    """Return the largest absolute value; NaN wins over every number."""
    return float(np.max([before, *(np.abs(d).max(initial=0) for d in differences)]))


def _verify_images(bundle: Bundle, provider: str, threads: int) -> dict[str, float]:
    """Compare decoder and encoder, as far as the bundle has them."""
    measured = {}
    if "decoder" in bundle.manifest.graphs:
        session = open_session(bundle, "decoder", provider, threads=threads)
        measured["psnr_db"] = _compare_images(session, bundle.folder / DECODER_VECTORS)
        session.close()
    if "encoder" in bundle.manifest.graphs:
        session = open_session(bundle, "encoder", provider, threads=threads)
        measured["encoder_agreement"] = _compare_tokens(session, bundle.folder / ENCODER_VECTORS)
        session.close()
    return measured


def _compare_tokens(session: Session, path: Path) -> float:
    """Return the share of an encoder's tokens that are the reference's."""
    arrays = _read_arrays(path)
    if not {"tokens", "images"} <= set(arrays):
        raise BundleError(f"{path.name} lacks tokens or images; export the bundle again")
    found = session.run({"images": arrays["images"]}, ["tokens"])["tokens"]
    return float((found == arrays["tokens"]).mean())


def _compare_images(session: Session, path: Path) -> float:
    arrays = _read_arrays(path)
    if not {"tokens", "images"} <= set(arrays):
        raise BundleError(f"{path.name} lacks tokens or images; export the bundle again")
    tokens, expected = arrays["tokens"], arrays["images"]
    found = session.run({"tokens": tokens}, ["images"])["images"]
    if found.shape != expected.shape:
        raise BundleError(f"the decoder returned {found.shape}, expected {expected.shape}")
    error = np.mean((found.astype(np.float64) - expected) ** 2)
    return _EXACT_DB if error == 0 else float(10 * np.log10(255**2 / error))
