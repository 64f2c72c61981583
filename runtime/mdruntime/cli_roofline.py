"""What ``mdruntime bench`` says of passes against the machine's best, and of their operators."""

from collections.abc import Iterable, Sequence
from textwrap import wrap

from mdruntime.bench import PassTime
from mdruntime.ceiling import Ceiling
from mdruntime.roofline import Operator, PassProfile, PassWork, Roofline

__all__ = ["count_of_rows", "operator_lines", "pass_name", "roofline_lines"]

_SHOWN = 0.01  # share of a pass below which operators share a line
_WIDTH = 80
_NAMED = 4  # operators that the summary names


def pass_name(rows: int, most: int) -> str:
    """Return what to call a pass over so many rows where a full one has the most."""
    kind = "full" if rows == most else "partial"
    return f"{kind}, {count_of_rows(rows)}"


def count_of_rows(rows: int) -> str:
    """Return a number of rows in words."""
    return f"{rows} row{'s' if rows != 1 else ''}"


def roofline_lines(found: Roofline, passes: Sequence[PassTime]) -> Iterable[str]:
    """Yield each pass size's arithmetic, its speed, and what reading its weights would take."""
    ceiling = found.ceiling
    times = {each.rows: each.ms for each in passes if not each.guided}
    heads = ("GFLOP", "GFLOP/s", "of peak", "weights, MB", "reading")
    yield f"{'unguided passes of the batch':28} " + " ".join(f"{head:>9}" for head in heads)
    for work in found.passes:
        if times.get(work.rows, 0) > 0:
            yield _work_line(work, times[work.rows], found.passes[0].rows, ceiling)
    speed, memory = f"{ceiling.gigaflops:.0f} GFLOP/s", f"{ceiling.gigabytes:.1f} GB/s"
    yield f"of peak: NumPy's float32 products at {speed}; reading: the weights once"
    yield f"at {memory}, of the pass ({_threads(ceiling)}, the better of before and after)"
    missing = sorted({name for work in found.passes for name in work.uncounted})
    if missing:
        yield f"not counted, as their shapes are not known: {', '.join(missing)}"


def _work_line(work: PassWork, ms: float, most: int, ceiling: Ceiling) -> str:
    speed = 1000 * work.gigaflop / ms
    reading = work.weight_mb / ceiling.gigabytes / ms
    return (
        f"{pass_name(work.rows, most):28} {work.gigaflop:9.3f} {speed:9.1f} "
        f"{speed / ceiling.gigaflops:9.0%} {work.weight_mb:11.1f} {reading:9.0%}"
    )


def operator_lines(
    ceiling: Ceiling, found: PassProfile, passes: Sequence[PassTime]
) -> Iterable[str]:
    """Yield the operators of a pass, the slowest first, and where its time goes."""
    heads = ("ms", "share", "GFLOP/s", "of peak")
    title = f"operators, {count_of_rows(found.rows)}"
    yield f"{title:28} {'calls':>5} " + " ".join(f"{head:>9}" for head in heads)
    shown = [each for each in found.operators if each.ms >= _SHOWN * found.ms]
    for each in shown:
        yield _operator_line(each, found.ms, ceiling)
    rest = found.operators[len(shown) :]
    if rest:
        title = f"{len(rest)} more kind{'s' if len(rest) != 1 else ''}"
        ms = sum(each.ms for each in rest)
        yield _operator_line(
            Operator(title, sum(each.calls for each in rest), ms, 0.0, False), found.ms, ceiling
        )
    between_ms = found.between_ms
    yield f"{'between operators':28} {'':5} {between_ms:9.2f} {between_ms / found.ms:9.1%}"
    yield from _summary(ceiling, found)
    for plain in passes:
        if plain.rows == found.rows and not plain.guided:
            yield f"(profiling included; without it the pass takes {plain.ms:.2f} ms)"


def _operator_line(each: Operator, whole_ms: float, ceiling: Ceiling) -> str:
    line = f"{each.name:28} {each.calls:5} {each.ms:9.2f} {each.ms / whole_ms:9.1%}"
    if each.gigaflop and each.ms:
        speed = 1000 * each.gigaflop / each.ms
        line += f" {speed:9.1f} {speed / ceiling.gigaflops:9.0%}"
    return line


def _summary(ceiling: Ceiling, found: PassProfile) -> Iterable[str]:
    """Yield how much of a pass are products, and what keeps it from the peak."""
    products = [each for each in found.operators if each.product]
    others = [each for each in found.operators if not each.product]
    product_ms, other_ms = (sum(each.ms for each in some) for some in (products, others))
    least_ms = 1000 * sum(each.gigaflop for each in products) / ceiling.gigaflops
    peak = f", at {least_ms / product_ms:.0%} of the peak" if product_ms else ""
    named = ", ".join(f"{each.name} {each.ms / found.ms:.1%}" for each in others[:_NAMED])
    yield from wrap(
        f"products are {product_ms / found.ms:.0%} of the {found.ms:.2f} ms{peak}; then {named}",
        _WIDTH,
    )
    yield from wrap(
        f"gap to the peak ({least_ms:.2f} ms): products {product_ms - least_ms:+.2f}, "
        f"others {other_ms:+.2f}, between {found.between_ms:+.2f} ms",
        _WIDTH,
    )


def _threads(ceiling: Ceiling) -> str:
    return f"{ceiling.threads} thread{'s' if ceiling.threads != 1 else ''}"
