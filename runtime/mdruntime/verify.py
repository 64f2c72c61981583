"""Verification: replay recorded passes and compare with the reference model's outputs.

``verify/denoiser.npz`` holds the feeds of whole trajectories (full and partial passes, guided, at
several mask ratios) and what the original PyTorch model answered. The feeds are replayed *teacher
forced*: every pass gets the reference's tokens, whatever the graph drew before, because one token
that flips would change all that follows. The K/V caches, however, are the graph's own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.denoiser import CONDITION, Condition, conditioner
from mdruntime.errors import BundleError
from mdruntime.first import HEAD, HEAD_INPUTS
from mdruntime.head import Draws
from mdruntime.measures import compare, faults_of
from mdruntime.session import Outputs, Session, open_session

__all__ = [
    "CONDITIONED",
    "DECODER_VECTORS",
    "DENOISER_VECTORS",
    "ENCODER_VECTORS",
    "Replay",
    "Verification",
    "agreement",
    "psnr",
    "read_passes",
    "recorded_inputs",
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
    absolute differences, ``mean_log_prob`` is a mean one, of the tokens drawn; they must not exceed
    their limit; neither must ``token_shift``, the largest change of a uniform number under which
    the reference draws the same token. ``psnr_db``, ``encoder_agreement`` and ``close_agreement``,
    the share of tokens whose shift is small, must reach theirs. ``token_agreement``, the share of
    equal tokens, has no limit: with a large codebook and flat distributions a rounding moves many
    a draw over an edge.
    """

    measured: dict[str, float]
    limits: dict[str, float]
    passes: int
    faults: tuple[str, ...] = ()
    """Sentences about outputs that hold NaN or an infinity: any fails the verification."""

    def __bool__(self) -> bool:
        """Return whether every measure is within its limit."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """Sentences about faults, and about the measures that are outside their limits."""
        found = [*self.faults[:_TOLD]]
        if len(self.faults) > _TOLD:
            found.append(f"and {len(self.faults) - _TOLD} more outputs that are not finite")
        for name, limit in self.limits.items():
            value = self.measured[name]
            # Written so that NaN fails.
            good = value >= limit if name in _AT_LEAST else value <= limit
            if not good:
                bound = "at least" if name in _AT_LEAST else "at most"
                found.append(f"{name} {value:.6g} ({bound} {limit:g})")
        return found


_AT_LEAST = ("psnr_db", "encoder_agreement", "close_agreement", "head_agreement")
_TOLD = 3  # faults that a message names; one NaN in a cache is in every output that follows


def write_passes(path: Path, passes: Sequence[Arrays]) -> None:
    """Write recorded passes: of each its feeds, the head's outputs, and some logits.

    ``shown`` (n,) says which of the wanted tokens the ``logits`` (batch, n, codebook) belong to;
    ``canvas`` is the number of canvas rows where a pass starts on a new canvas, and 0 elsewhere.
    """
    arrays = {
        f"{i:03d}.{name}": array for i, one in enumerate(passes) for name, array in one.items()
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def read_passes(bundle: Bundle) -> list[dict[str, NDArray[Any]]]:
    """Return the recorded passes of a bundle.

    Raises:
        BundleError: they cannot be read, or lack something.
    """
    path, names = bundle.folder / DENOISER_VECTORS, recorded_inputs(bundle)
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
    bundle: Bundle,
    provider: str = "cpu",
    *,
    spelling: str = "",
    threads: int = 0,
    engines: Path | None = None,
) -> Verification:
    """Replay the bundle's test vectors on this machine.

    Args:
        bundle: an opened bundle.
        provider: the execution provider.
        spelling: run the graphs as they are spelled for another backend: those that are.
        threads: CPU threads; 0 takes as many as the process may use.
        engines: folder with engines of TensorRT that are not published yet.

    Raises:
        BundleError: test vectors are damaged, or the denoiser has no such spelling.
    """
    known = bundle.manifest.graphs["denoiser"].spellings
    if spelling and spelling not in known:
        there = ", ".join(known) or "none"
        raise BundleError(f"the denoiser has no spelling {spelling!r}, only {there}; export again")
    if provider == "tensorrt":  # sample by sample: its engines are built for so many
        from mdruntime.trt.trial import verify_engines

        return verify_engines(bundle, engines)
    names, condition = recorded_inputs(bundle), None
    passes = read_passes(bundle)
    if "condition" in bundle.manifest.graphs:
        opened = open_session(bundle, "condition", provider, threads=threads, spelling=spelling)
        condition = conditioner(opened, bundle.manifest.graphs["condition"])
    session = open_session(bundle, "denoiser", provider, threads=threads, spelling=spelling)
    replay = Replay(session, condition, names)
    fetch = [*Draws._fields, *([] if spelling else ["logits"])]
    answers = replay.over(passes, fetch)
    drawn = None
    if HEAD in bundle.manifest.graphs and not spelling:
        drawn = HeadCheck(open_session(bundle, HEAD, provider, threads=threads))
        answers = drawn.over(passes, answers)
    measured = compare(zip(passes, answers, strict=True))
    measured |= {} if drawn is None else {"head_agreement": drawn.agreement}
    session.close()
    limits = bundle.manifest.verification.limits_of(spelling)
    measured |= _verify_images(bundle, provider, threads, spelling)
    held = {name: limit for name, limit in limits.items() if name in measured}
    return Verification(measured, held, len(passes), tuple(replay.faults))


def recorded_inputs(bundle: Bundle) -> list[str]:
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
class Replay:
    """Recorded passes go in, the graph's answers come out."""

    session: Session
    condition: Condition | None
    names: list[str]
    faults: list[str] = field(default_factory=list)
    """What was found in outputs that can be no number. Caches stay on the device: what is wrong in
    them shows in the outputs of the passes that follow."""

    def over(self, passes: Sequence[Arrays], fetch: Sequence[str]) -> Iterator[Outputs]:
        """Yield the outputs of each pass, all of them checked."""
        for number, expected in enumerate(passes):
            where = f"pass {number}"
            feeds = {name: expected[name] for name in self.names if name != CONDITIONED}
            if self.condition is not None:
                found = self.condition(expected[CONDITIONED])
                self.faults.extend(faults_of(f"{where}, condition", found))
                feeds |= {CONDITION + name: values for name, values in found.items()}
            if expected["canvas"]:
                self.session.start(int(expected["canvas"]))
            outputs = self.session.run(feeds, fetch)
            self.faults.extend(faults_of(where, outputs))
            yield outputs


class HeadCheck:
    """Draws again from the logits of passes, by the head's own graph."""

    def __init__(self, session: Session) -> None:
        """Take the session of the graph ``HEAD``."""
        self._session = session
        self._equal = self._all = 0

    @property
    def agreement(self) -> float:
        """Share of the head's numbers that are the passes' own, bit by bit."""
        return self._equal / max(1, self._all)

    def over(self, passes: Iterable[Arrays], answers: Iterable[Outputs]) -> Iterator[Outputs]:
        """Pass the answers to recorded passes on, each of them checked."""
        for expected, outputs in zip(passes, answers, strict=True):
            given = {**expected, "logits": outputs["logits"]}
            feeds = {name: given[name] for name in HEAD_INPUTS}
            for name, values in self._session.run(feeds, Draws._fields).items():
                self._equal += int((values == outputs[name]).sum())
                self._all += values.size
            yield outputs


def _verify_images(bundle: Bundle, provider: str, threads: int, spelling: str) -> dict[str, float]:
    """Compare decoder and encoder, as far as the bundle has them in this spelling."""
    measured = {}
    for graph, name, measure, file in (
        ("decoder", "psnr_db", psnr, DECODER_VECTORS),
        ("encoder", "encoder_agreement", agreement, ENCODER_VECTORS),
    ):
        spec = bundle.manifest.graphs.get(graph)
        if spec is not None and (not spelling or spelling in spec.spellings):
            session = open_session(bundle, graph, provider, threads=threads, spelling=spelling)
            measured[name] = measure(session, bundle.folder / file)
            session.close()
    return measured


def agreement(session: Session, path: Path) -> float:
    """Return the share of an encoder's tokens that are the reference's."""
    arrays = _read_arrays(path)
    if not {"tokens", "images"} <= set(arrays):
        raise BundleError(f"{path.name} lacks tokens or images; export the bundle again")
    found = session.run({"images": arrays["images"]}, ["tokens"])["tokens"]
    return float((found == arrays["tokens"]).mean())


def psnr(session: Session, path: Path) -> float:
    """Return the peak signal-to-noise ratio of a decoder's images to the reference's, in dB."""
    arrays = _read_arrays(path)
    if not {"tokens", "images"} <= set(arrays):
        raise BundleError(f"{path.name} lacks tokens or images; export the bundle again")
    tokens, expected = arrays["tokens"], arrays["images"]
    found = session.run({"tokens": tokens}, ["images"])["images"]
    if found.shape != expected.shape:
        raise BundleError(f"the decoder returned {found.shape}, expected {expected.shape}")
    error = np.mean((found.astype(np.float64) - expected) ** 2)
    return _EXACT_DB if error == 0 else float(10 * np.log10(255**2 / error))
