"""The sampler: a generator that unmasks a batch of canvases, one pass at a time.

After every pass it yields a ``Step``: progress, animation, early stop and counting passes all
follow from that. Nothing here knows a model; ``denoise`` is a callable.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.choice import Positions, choose
from mdruntime.errors import SamplingError, VerificationError
from mdruntime.head import Controls, Draws, Logits, draw_thinned
from mdruntime.order import View
from mdruntime.plan import Plan, Round, make_plan
from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL, Schedule, draw_schedules
from mdruntime.turn import Clock, Turn

__all__ = [
    "Canvas",
    "Denoise",
    "Pass",
    "Positions",
    "Result",
    "Step",
    "Tokens",
    "padded",
    "unmask",
]

Tokens = NDArray[np.int32]  # (batch, length); the mask token where a position is still hidden

_PASSES = 1 << 16  # more than the passes of any round, so that (round, part) make one number


@dataclass(frozen=True, slots=True)
class Canvas:
    """What the sampler has to know of a denoiser."""

    length: int
    grid: tuple[int, ...]  # (height, width), or (length,)
    mask_token: int


@dataclass(frozen=True, slots=True)
class Pass:
    """A request to the denoiser: recompute some tokens' rows of some samples.

    The samples change only when a full pass begins, so that a partial pass finds the cache rows
    as the full pass before it laid them out.
    """

    samples: Positions  # (active,), indices into the batch
    positions: Positions | None  # (active, m), or None for a full pass over the canvas
    tokens: Tokens  # (active, m), or (active, length)
    wanted: Positions  # (active, k), the positions to draw tokens at; some of those above
    controls: Controls
    uniforms: NDArray[np.float32]  # (active, k)
    logits: bool  # whether the guided logits are wanted too


@dataclass(frozen=True, slots=True)
class Result:
    """The denoiser's answer, aligned with the positions that were wanted."""

    draws: Draws
    logits: Logits | None = None


Denoise = Callable[[Pass], Result]


@dataclass(frozen=True, slots=True)
class Step:
    """The state after one pass."""

    tokens: Tokens  # (batch, length)
    revealed: NDArray[np.bool_]  # (batch, length), by this pass
    round: int
    part: int  # 0 after the full pass of the round
    passes: int  # so far, this one included
    hidden: int  # tokens still hidden in the whole batch


def unmask(
    denoise: Denoise, tokens: Tokens, canvas: Canvas, sampling: Sampling, randomness: Randomness
) -> Iterator[Step]:
    """Reveal the hidden tokens of a batch, yielding a ``Step`` after every pass.

    Args:
        denoise: the denoiser.
        tokens: int32 (batch, length), ``canvas.mask_token`` where hidden; other tokens are kept.
        canvas: the denoiser's canvas.
        sampling: schedule, order, plan and guidance.
        randomness: of the batch's samples.

    Raises:
        SamplingError: more rounds than the canvas has tokens.
        VerificationError: the denoiser returned NaN or infinity.
    """
    if sampling.rounds > canvas.length and sampling.schedule != ANCESTRAL:
        raise SamplingError(
            f"rounds must be at most {canvas.length} (the tokens of the canvas), "
            f"got {sampling.rounds}"
        )
    if tokens.shape != (len(randomness), canvas.length):
        raise SamplingError(
            f"tokens must have shape {(len(randomness), canvas.length)}, got {tokens.shape}"
        )
    return _rounds(denoise, tokens.copy(), canvas, sampling, randomness)


def _rounds(
    denoise: Denoise, tokens: Tokens, canvas: Canvas, sampling: Sampling, randomness: Randomness
) -> Iterator[Step]:
    hidden = tokens == canvas.mask_token
    start = hidden.sum(axis=1)
    schedules = draw_schedules(sampling.schedule, sampling.rounds, start, randomness)
    clock = Clock(sampling, start, schedules)
    plans = [_plan(sampling, *pair) for pair in zip(start.tolist(), schedules, strict=True)]
    index = passes = 0
    while hidden.any():
        active = np.flatnonzero(hidden.any(axis=1))
        # Under an entropy bound there may be more rounds than planned; the plan is not used then.
        counts = [(plans[sample][index:] or [[]])[0] for sample in active]
        source = randomness.take(active.tolist())
        state = _Round(denoise, canvas, sampling, clock, source, active, index)
        for part, revealed in enumerate(_play(state, counts, tokens)):
            passes += 1
            hidden = tokens == canvas.mask_token
            yield Step(tokens.copy(), revealed, index, part, passes, int(hidden.sum()))
        index += 1


def _plan(sampling: Sampling, hidden: int, schedule: Schedule) -> Plan:
    return make_plan(
        hidden, schedule, substeps=sampling.substeps, refresh_interval=sampling.refresh_interval
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """One round: a full pass that chooses positions, and the partial passes after it."""

    denoise: Denoise
    canvas: Canvas
    sampling: Sampling
    clock: Clock
    randomness: Randomness  # of the active samples
    active: Positions  # (active,), indices into the batch
    index: int

    def turn(self, tokens: Tokens) -> Turn:
        """Return the numbers of the next pass."""
        hidden = tokens[self.active] == self.canvas.mask_token
        return self.clock.turn(self.active, hidden.sum(axis=1))

    def view(self, draws: Draws, turn: Turn) -> View:
        """Return what orders may look at; ``draws`` cover the whole canvas."""
        return View(
            draws=draws,
            gumbels=self.randomness.gumbels(self.index, self.canvas.length),
            alpha=turn.alpha,
            grid=self.canvas.grid,
            randomness=self.randomness,
        )

    def run(
        self,
        tokens: Tokens,
        part: int,
        controls: Controls,
        wanted: Positions,
        positions: Positions | None = None,
    ) -> Result:
        """Run one pass over ``positions`` (active, m), or over the whole canvas."""
        uniforms = np.take_along_axis(self.uniforms(Purpose.TOKEN, part), wanted, axis=1)
        rows = tokens[self.active]
        if positions is not None:
            rows = np.take_along_axis(rows, positions, axis=1)
        result = self.denoise(
            Pass(self.active, positions, rows, wanted, controls, uniforms, self.sampling.exact)
        )
        draws = result.draws
        if not np.isfinite([draws.log_moment, draws.entropy]).all():
            raise VerificationError(
                f"the denoiser returned NaN or infinite logits in round {self.index + 1}; "
                "check the bundle with 'mdruntime verify'"
            )
        return result

    def uniforms(self, purpose: Purpose, part: int) -> NDArray[np.float32]:
        """Return float32 (active, length): one number per position and pass."""
        turn = self.index * _PASSES + part
        return self.randomness.uniforms(purpose, turn, self.canvas.length)


def _play(state: _Round, counts: list[Round], tokens: Tokens) -> Iterator[NDArray[np.bool_]]:
    """Run the passes of a round, writing into ``tokens``; yield what each revealed."""
    turn = state.turn(tokens)
    hidden = tokens[state.active] == state.canvas.mask_token
    if state.sampling.known:  # then only the positions to be revealed need a token
        nothing = _on_canvas(None, np.zeros((len(hidden), 0), np.int64), state.canvas.length)
        view = state.view(nothing, turn)
        chosen = choose(state.sampling, counts, turn, view, hidden)
        wanted = padded([parts[0] for parts in chosen])
        result = state.run(tokens, 0, turn.controls, wanted)
    else:
        wanted = padded([np.flatnonzero(row) for row in hidden])
        result = state.run(tokens, 0, turn.controls, wanted)
        view = state.view(_on_canvas(result.draws, wanted, state.canvas.length), turn)
        chosen = choose(state.sampling, counts, turn, view, hidden)
    for part in range(max(map(len, chosen))):
        if part:
            wanted = padded([parts[min(part, len(parts) - 1)] for parts in chosen])
            positions = _refreshed(state.sampling.refresh, chosen, part)
            # The rows of guidance are laid out by the full pass: its weight holds for all of these.
            controls = state.turn(tokens).controls._replace(guidance=turn.controls.guidance)
            result = state.run(tokens, part, controls, wanted, positions)
        drawn = result.draws.sampled
        if state.sampling.exact:
            drawn = _redraw(state, turn, view, result, wanted, part)
        revealed = [parts[part : part + 1] for parts in chosen]
        yield _reveal(tokens, state.active, revealed, _spread(drawn, wanted, state.canvas.length))


def _refreshed(refresh: str, chosen: list[list[Positions]], part: int) -> Positions:
    """Return (active, m): the tokens whose rows a partial pass recomputes.

    A sample that has no part left recomputes what the next full pass will overwrite.
    """
    return padded(
        [
            np.concatenate(
                parts if refresh == "chosen" else parts[part - 1 : part + 1] or parts[-1:]
            )
            for parts in chosen
        ]
    )


def padded(rows: Sequence[Positions]) -> Positions:
    """Return rows of different lengths as one array, each padded by repeating its last number.

    What a pass computes twice is the same, and written twice to the same place.
    """
    width = max(map(len, rows))
    return np.stack([np.append(row, np.repeat(row[-1:], width - len(row))) for row in rows])


def _on_canvas(draws: Draws | None, positions: Positions, length: int) -> Draws:
    """Return draws (active, length) with those given at their positions and zero elsewhere."""
    if draws is None:
        zeros = np.zeros((len(positions), length), np.float32)
        return Draws(zeros.astype(np.int32), *[zeros] * (len(Draws._fields) - 1))
    return Draws(*(_spread(values, positions, length) for values in draws))


def _redraw(
    state: _Round, turn: Turn, view: View, result: Result, positions: Positions, part: int
) -> NDArray[np.int32]:
    """Draw tokens by MaskGIT's exact choose-then-sample law (sampler head, ``draw_thinned``)."""
    if result.logits is None:
        raise SamplingError("order 'maskgit-exact' needs logits, which this graph does not return")
    alpha = np.where(view.alpha > 0, view.alpha, 1)[:, None]
    log_wait = -view.draws.log_prob / alpha - view.gumbels
    return draw_thinned(
        result.logits,
        turn.controls.temperature,  # of the full pass, in which the scores were drawn
        view.alpha,
        np.take_along_axis(log_wait, positions, axis=1),
        np.take_along_axis(state.uniforms(Purpose.REDRAW, part), positions, axis=1),
    )


def _spread(values: NDArray[Any], positions: Positions, length: int) -> NDArray[Any]:
    """Return (active, length) with ``values`` (active, k) at their positions."""
    canvas = np.zeros((len(values), length), values.dtype)
    np.put_along_axis(canvas, positions, values, axis=1)
    return canvas


def _reveal(
    tokens: Tokens, active: Positions, parts: list[list[Positions]], drawn: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Write each sample's part into ``tokens``; return bool (batch, length), what was written."""
    revealed = np.zeros(tokens.shape, bool)
    for row, (sample, part) in enumerate(zip(active, parts, strict=True)):
        for positions in part:
            tokens[sample, positions] = drawn[row, positions]
            revealed[sample, positions] = True
    return revealed
