"""What passes a sampler makes: counted while it runs, or foreseen without running the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mdruntime.conditions import Conditions
from mdruntime.denoiser import Denoiser
from mdruntime.errors import SamplingError
from mdruntime.head import Draws
from mdruntime.manifest import Manifest
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, unmask
from mdruntime.sampling import Sampling
from mdruntime.session import Feeds, FunctionSession, Outputs, Session, Wrapper

__all__ = ["Counted", "PassShape", "cost", "foreseen"]


@dataclass(frozen=True, slots=True)
class PassShape:
    """The sizes that the time of a pass depends on."""

    samples: int
    sequences: int  # as many as samples, and as many again under guidance
    rows: int  # of each sequence that are recomputed
    columns: int  # of these that get logits
    canvas: int  # rows of a full pass

    @property
    def full(self) -> bool:
        """Whether all rows are recomputed."""
        return self.rows == self.canvas


class Counted(Wrapper):
    """A session that remembers the sizes of its passes."""

    def __init__(self, session: Session) -> None:
        """Take the session that does the work."""
        super().__init__(session)
        self.shapes: list[PassShape] = []
        self._canvas = 0

    def start(self, canvas: int) -> None:
        """Begin a full pass over canvases of this many rows."""
        self._canvas = canvas
        super().start(canvas)

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run a pass and remember its sizes."""
        (sequences, rows), columns = feeds["positions"].shape, feeds["columns"].shape[1]
        samples = len(feeds["conditional"])
        self.shapes.append(PassShape(samples, sequences, rows, columns, self._canvas))
        return super().run(feeds, fetch)

    def clone(self) -> "Counted":
        """Return a session with a count of its own."""
        return Counted(self.inner.clone())


def cost(shapes: Sequence[PassShape], samples: int) -> float:
    """Return rows computed for a sample, over the rows of a full pass (full-pass equivalents).

    Args:
        shapes: passes of a batch.
        samples: in the batch.
    """
    return sum(shape.sequences * shape.rows / shape.canvas for shape in shapes) / samples


def foreseen(
    manifest: Manifest, sampling: Sampling, *, batch: int = 1, length: int = 0
) -> list[PassShape]:
    """Return the passes that a sampler makes, without running the model.

    Conditional models are given a condition, so that guidance runs where ``sampling`` has it. Where
    tokens share rows (``spec.slots`` > 1) the rows of partial passes are typical, not exact.

    Args:
        manifest: of the bundle.
        sampling: the options.
        batch: samples that run together.
        length: tokens of a canvas; 0 is the model's own length.

    Raises:
        SamplingError: the number of passes depends on what the model says (``entropy_bound``).
    """
    if sampling.entropy_bound:
        raise SamplingError(
            "how many passes an entropy bound takes depends on the model: count them as they run"
        )
    spec = manifest.denoiser
    length = length or spec.length
    session = Counted(FunctionSession(_anything(spec.codebook)))
    denoiser = Denoiser(session, spec, _conditions(manifest, batch))
    grid = spec.grid if length == spec.length else (length,)
    tokens = np.full((batch, length), spec.mask_token, np.int32)
    canvas = Canvas(length, grid, spec.mask_token)
    for _ in unmask(denoiser, tokens, canvas, sampling, Randomness(0, range(batch))):
        pass
    return session.shapes


def _conditions(manifest: Manifest, batch: int) -> Conditions:
    label = 0 if manifest.denoiser.classes else -1
    prompts = None
    if manifest.prompt is not None:
        prompts = np.zeros((batch, manifest.prompt.length), np.int32)
    return Conditions(np.full(batch, label), prompts)


def _anything(codebook: int) -> Callable[[Feeds], Outputs]:
    """Return a denoiser whose answers are of the right shapes, and that is sure of nothing."""

    def answer(feeds: Feeds) -> Outputs:
        shape = len(feeds["conditional"]), feeds["uniforms"].shape[1]
        outputs: Outputs = {name: np.array(feeds["uniforms"][: shape[0]]) for name in Draws._fields}
        outputs["sampled"] = np.zeros(shape, np.int32)
        outputs["logits"] = np.zeros((*shape, codebook), np.float32)
        return outputs

    return answer
