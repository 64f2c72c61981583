"""How far a graph's answers are from the reference's, pass by pass."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.head import log_softmax

__all__ = ["CLOSE", "compare", "faults_of"]

Arrays = Mapping[str, NDArray[Any]]

CLOSE = 0.02
"""By how much a uniform may move for a draw to count as close: see ``close_agreement``."""


def faults_of(where: str, found: Arrays) -> Iterator[str]:
    """Yield a sentence for every output that holds NaN or an infinity.

    Args:
        where: such as ``pass 3``.
        found: outputs by name.
    """
    for name, array in found.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = array.size - int(np.isfinite(array).sum())
            kind = "NaN" if np.isnan(array).any() else "an infinity"
            yield f"{where}: {name} holds {kind} ({bad} of {array.size} values are not finite)"


def compare(pairs: Iterable[tuple[Arrays, Arrays]]) -> dict[str, float]:
    """Return how far the answers to recorded passes are from the recorded ones.

    Args:
        pairs: of each pass what was recorded, and the outputs found: all of ``Draws``, and perhaps
            ``logits``.

    Returns:
        ``score``, ``token_shift`` and, where logits were found, ``log_prob``: largest differences.
        ``mean_log_prob``: mean difference of the log-probability of a drawn token, where both drew
        the same. ``token_agreement``: share of equal tokens; ``close_agreement``: share of tokens
        that the reference draws too if its uniform may move by ``CLOSE``, which does not depend
        on how large a codebook is and how flat the distributions are.
    """
    worst = {"score": 0.0, "token_shift": 0.0}
    same, drawn, shifts = list[NDArray[Any]](), list[NDArray[Any]](), list[NDArray[Any]]()
    for expected, found in pairs:
        equal = found["sampled"] == expected["sampled"]
        same.append(equal.ravel())
        drawn.append(np.abs(found["log_prob"] - expected["log_prob"])[equal])
        shifts.append(_shifts(expected, found["sampled"][:, expected["shown"]]).ravel())
        _take(worst, "score", drawn[-1], *_scores(expected, found))
        _take(worst, "token_shift", shifts[-1])
        if "logits" in found:
            shown = log_softmax(found["logits"][:, expected["shown"]])
            _take(worst, "log_prob", shown - log_softmax(expected["logits"]))
    close = np.concatenate(shifts) <= CLOSE
    return {
        **worst,
        "mean_log_prob": float(np.concatenate(drawn).mean()) if np.concatenate(same).any() else 0.0,
        "token_agreement": float(np.concatenate(same).mean()),
        "close_agreement": float(close.mean()),
    }


def _scores(expected: Arrays, found: Arrays) -> Iterator[NDArray[np.floating]]:
    # An error of the logits enters the log-moment times beta.
    yield (found["log_moment"] - expected["log_moment"]) / expected["beta"][:, None]
    for name in ("entropy", "top", "margin"):
        yield found[name] - expected[name]


def _take(worst: dict[str, float], name: str, *differences: NDArray[np.floating]) -> None:
    """Keep the largest absolute value; NaN wins over every number."""
    largest = (np.abs(each).max(initial=0) for each in differences)
    worst[name] = float(np.max([worst.get(name, 0.0), *largest]))


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
