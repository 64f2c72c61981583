"""Command-line flags of the sampler, one for each field of ``Sampling``, and their checks."""

import argparse
from collections.abc import Callable
from typing import Any

from mdruntime.errors import SamplingError
from mdruntime.guidance import GUIDANCE_SCHEDULES
from mdruntime.images import check_folder, check_target
from mdruntime.order import HYBRID, ORDERS
from mdruntime.schedule import SCHEDULES

__all__ = [
    "add_sampling_flags",
    "check_images",
    "check_numbers",
    "check_texts",
    "columns",
    "labels",
    "sampling_changes",
]

_MOST_LABELS = 1_000_000  # more are a slip of the keyboard, and would fill the memory


def _share(text: str) -> tuple[float, float]:
    """Read ``0.5`` or ``1:0``."""
    first, _, last = text.partition(":")
    try:
        return float(first), float(last or first)
    except ValueError:
        message = f"must be one number or two, such as 0.5 or 1:0, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


_Parser = Callable[[str], Any]
_FLAGS: tuple[tuple[str, _Parser, str, str], ...] = (
    ("rounds", int, "N", "rounds of the unmasking schedule, each with one full pass"),
    ("schedule", str, "NAME", f"unmasking schedule: {', '.join(SCHEDULES)}"),
    ("entropy_bound", float, "NATS", "reveal as many positions a round as this bound allows (EB)"),
    ("order", str, "NAME", f"positions first: {', '.join([*ORDERS, HYBRID])}"),
    ("exploitation_order", str, "NAME", "the hybrid's order of confident positions"),
    ("exploration_order", str, "NAME", "the hybrid's order of spread-out positions"),
    ("exploration", _share, "A[:B]", "the hybrid's exploring share, from first to last round"),
    ("alpha", float, "A", "choice temperature; tokens get temperature A / (1 + A)"),
    ("annealing", str, "HOW", "how alpha falls over the rounds: linear, linear-full, none"),
    ("temperature", float, "T", "softmax temperature of the denoiser"),
    ("temperature_decay", float, "F", "factor of the temperature in the last round"),
    ("tokens", str, "LAW", "draw tokens plain, tempered, or as the order has it: order"),
    ("substeps", int, "N", "partial caching: parts into which a round's positions are split"),
    ("refresh", str, "ROWS", "rows a partial pass recomputes: chosen, recent"),
    ("refresh_interval", int, "N", "rounds that share one full pass"),
    ("guidance", float, "W", "classifier-free guidance, (1 + W) conditional - W unconditional"),
    ("guidance_schedule", str, "NAME", f"how W changes: {', '.join(GUIDANCE_SCHEDULES)}"),
    ("guidance_power", float, "P", "exponent of the power-cosine guidance schedule"),
    ("guidance_interval", _share, "A:B", "part of the trajectory (0 to 1) under guidance"),
)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of ``Sampling``; what is not given stays as the preset has it."""
    group = parser.add_argument_group("sampling (defaults come from the bundle's preset)")
    group.add_argument("--preset", default="default", metavar="NAME", help="a set of options")
    group.add_argument("--no-tuned", action="store_true", help="ignore what tune chose here")
    for name, read, metavar, text in _FLAGS:
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=read, metavar=metavar, help=text.replace("%", "%%"))


def sampling_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``Sampling`` that were given."""
    given = {name: getattr(options, name) for name, *_ in _FLAGS}
    return {name: value for name, value in given.items() if value is not None}


def labels(text: str) -> list[int]:
    """Read ``207``, ``207,88`` or ``0-9``."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            some = range(int(first), int(last) + 1) if dash and first else [int(part)]
            if not 0 < len(some) <= _MOST_LABELS:
                raise ValueError
            found += some
    except (ValueError, OverflowError):
        message = f"must be numbers such as 207 or 0-9,12, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return found


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse counts out of range.

    Raises:
        SamplingError: naming the flag, its range and what was found.
    """
    for name, low, high in (
        ("count", 1, _MOST_LABELS),
        ("batch_size", 1, _MOST_LABELS),
        ("columns", 0, _MOST_LABELS),
        ("scale", 0, 256),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            raise SamplingError(f"{name} must be between {low} and {high}, got {value}")


def check_images(options: argparse.Namespace) -> None:
    """Refuse what could only fail after the images are made.

    Raises:
        SamplingError: nothing to write, the same file twice, or flags of text models.
    """
    if options.infill is not None or options.length or options.stream or options.gap is not None:
        raise SamplingError(
            "this bundle makes images; leave --infill, --gap, --length and --stream out"
        )
    if options.output is None and options.animate is None:
        raise SamplingError("nothing to write: pass -o FILE.png, or --animate FILE.gif")
    if options.output == options.animate:
        raise SamplingError(f"--output and --animate must differ, got {str(options.output)!r}")
    for path, moving in ((options.output, False), (options.animate, True)):
        if path is not None:
            check_target(path, moving=moving)


def check_texts(options: argparse.Namespace) -> None:
    """Refuse what could only fail after the texts are written.

    Raises:
        SamplingError: flags of image models or that rule each other out, or no such folder.
    """
    others = (options.negative_prompt, options.animate, options.columns, options.scale)
    if options.labels is not None or any(others):
        raise SamplingError(
            "this bundle makes text; leave --labels, --negative-prompt, --animate, --columns and "
            "--scale out"
        )
    if options.infill is None and options.gap is not None:
        raise SamplingError("--gap is the size of gaps; pass a text that has some: --infill TEXT")
    if options.infill is not None and (options.prompt or options.length):
        raise SamplingError("--infill says the whole text; leave --prompt and --length out")
    if options.output is not None:
        check_folder(options.output)


def columns(options: argparse.Namespace) -> int:
    """Return images in a row; each label has a row of its own where it has several images."""
    return options.columns or (options.count if options.count > 1 and options.labels else 0)
