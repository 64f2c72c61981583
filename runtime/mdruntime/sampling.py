"""The options of a sampler: one record, spelled alike in Python, manifest and command line."""

from dataclasses import dataclass, fields, replace
from typing import Any

from mdruntime.errors import SamplingError
from mdruntime.guidance import GUIDANCE_SCHEDULES
from mdruntime.order import HYBRID, ORDERS, find_order
from mdruntime.schedule import SCHEDULES

__all__ = ["Sampling"]

_RANGES: tuple[tuple[str, type, float, float], ...] = (  # field, kind, smallest, largest
    ("rounds", int, 1, 4096),
    ("substeps", int, 1, 4096),
    ("refresh_interval", int, 1, 4096),
    ("alpha", float, 0, 1000),
    ("entropy_bound", float, 0, 1e6),
    ("temperature", float, 0.01, 100),
    ("temperature_decay", float, 0.01, 100),
    ("guidance", float, 0, 100),
    ("guidance_power", float, 0, 100),
)
_CHOICES = (  # field, values
    ("schedule", SCHEDULES),
    ("order", (*ORDERS, HYBRID)),
    ("exploitation_order", tuple(ORDERS)),
    ("exploration_order", tuple(name for name, order in ORDERS.items() if order.known)),
    ("guidance_schedule", GUIDANCE_SCHEDULES),
    ("refresh", ("chosen", "recent")),
    ("tokens", ("order", "plain", "tempered")),
    ("annealing", ("linear", "linear-full", "none")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a canvas is unmasked. Sections refer to Hayakawa et al. 2025 (arXiv 2510.04525)."""

    rounds: int = 8
    """Rounds of the unmasking schedule; each starts with a full pass."""
    schedule: str = "cosine"
    """Unmasking schedule, one of ``SCHEDULES``."""
    entropy_bound: float = 0.0
    """If positive, reveal as many positions a round as this bound in nats allows (EB-Sampler,
    Ben-Hamu et al. 2025), instead of following the schedule."""
    order: str = "moment"
    """Which positions first: one of ``ORDERS`` or ``hybrid``."""
    exploitation_order: str = "moment"
    """The hybrid's order of confident positions, which also decides the law of its tokens."""
    exploration_order: str = "halton"
    """The hybrid's order of spread-out positions."""
    exploration: tuple[float, float] = (0.5, 0.5)
    """Share of the hybrid's positions that explore, in the first and in the last round."""
    alpha: float = 4.5
    """MaskGIT's choice temperature; token temperature is alpha / (1 + alpha) (section 3)."""
    annealing: str = "linear"
    """How alpha falls to 0 in the last round: ``linear``, in n steps, so that the first round has
    alpha (n - 1) / n (Chang et al. 2022); ``linear-full``, from all of alpha in the first round
    (valeoai, aMUSEd); or ``none``, alpha stays."""
    temperature: float = 1.0
    """Softmax temperature of the denoiser itself, before anything else."""
    temperature_decay: float = 1.0
    """Factor that the softmax temperature has reached in the last round, linearly."""
    tokens: str = "order"
    """Tokens from ``plain`` p, from ``tempered`` p^(1 + 1/alpha), or as the ``order`` has it."""
    substeps: int = 1
    """Partial caching: parts into which a round's positions are split (section 4.1)."""
    refresh: str = "chosen"
    """Rows a partial pass recomputes: all ``chosen`` in the round, or the ``recent`` ones, those
    just revealed and those about to be."""
    refresh_interval: int = 1
    """Rounds of the schedule that share one full pass."""
    guidance: float = 0.0
    """Weight w of classifier-free guidance, ``(1 + w) conditional - w unconditional``."""
    guidance_schedule: str = "constant"
    """How w changes over the rounds, one of ``GUIDANCE_SCHEDULES``."""
    guidance_power: float = 3.0
    """Exponent of the ``power-cosine`` guidance schedule."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the trajectory that runs under guidance; 0 is the first round, 1 the last."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, naming the field, its range and the value found."""
        for name, kind, low, high in _RANGES:
            self._check_number(name, kind, low, high)
        for name in ("exploration", "guidance_interval"):
            self._check_pair(name)
        for name, choices in _CHOICES:
            if getattr(self, name) not in choices:
                raise SamplingError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        self._check_order()

    def _check_number(self, name: str, kind: type, low: float, high: float) -> None:
        value = getattr(self, name)
        kinds = int if kind is int else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            what = "a whole number" if kind is int else "a number"
            raise SamplingError(f"{name} must be {what}, got {value!r}")
        if not low <= value <= high:
            raise SamplingError(f"{name} must be between {low:g} and {high:g}, got {value:g}")

    def _check_pair(self, name: str) -> None:
        pair = getattr(self, name)
        if len(pair) != 2:
            raise SamplingError(f"{name} must be two numbers, first and last, got {pair!r}")
        if not all(0 <= share <= 1 for share in pair):
            raise SamplingError(f"{name} must be between 0 and 1, got {pair[0]}:{pair[1]}")
        if name == "guidance_interval" and pair[0] > pair[1]:
            raise SamplingError(f"guidance_interval must rise, got {pair[0]}:{pair[1]}")

    def _check_order(self) -> None:
        parents = [find_order(name) for name in self.parents]
        shared = self.substeps > 1 or self.refresh_interval > 1
        if any(order.draws_first for order in parents) and (
            shared or self.order == HYBRID or self.entropy_bound
        ):
            raise SamplingError(
                f"order {self.parents[0]!r} draws tokens before it chooses positions, which rules "
                "out partial caching, hybrids and entropy bounds; use 'maskgit-exact' (MaskGIT's "
                "law) or 'moment'"
            )
        if self.exact and self.tokens != "order":
            raise SamplingError(
                "order 'maskgit-exact' has a token law of its own; leave tokens out"
            )

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the orders in use: one, or the hybrid's exploitation and exploration."""
        if self.order == HYBRID:
            return self.exploitation_order, self.exploration_order
        return (self.order,)

    @property
    def law(self) -> str:
        """Law of the tokens: ``plain`` p, ``tempered`` p^beta or ``annealed`` p^(1/alpha)."""
        return find_order(self.parents[0]).law if self.tokens == "order" else self.tokens

    @property
    def known(self) -> bool:
        """Whether positions can be chosen before the denoiser has run."""
        return all(find_order(name).known for name in self.parents) and not self.entropy_bound

    @property
    def exact(self) -> bool:
        """Whether tokens follow MaskGIT's exact choose-then-sample law."""
        return self.parents[0] == "maskgit-exact"

    def but(self, **changes: Any) -> "Sampling":
        """Return a copy with some fields changed.

        Raises:
            SamplingError: a field that does not exist, or a value out of range.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise SamplingError(f"no sampling option {name!r}; there are {', '.join(known)}")
        return replace(self, **changes)
