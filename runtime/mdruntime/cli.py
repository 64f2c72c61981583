"""The command line of the device: ``mdruntime generate | verify | info | doctor``."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mdruntime import __version__
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.denoiser import HEADS
from mdruntime.doctor import examine
from mdruntime.errors import MdruntimeError, ProviderError, SamplingError, VerificationError
from mdruntime.images import enlarge, save_animation, save_image, sheet
from mdruntime.options import add_sampling_flags, check_request, columns, labels, sampling_changes
from mdruntime.pipeline import Images, Pipeline, load
from mdruntime.records import to_json
from mdruntime.sampler import Step
from mdruntime.session import PROVIDERS
from mdruntime.verify import verify

__all__ = ["explain", "main", "parse_args", "run"]

INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE  # of what was printed, as after: mdruntime info ... | head -1
RESOURCES = 6  # memory or disk


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with the code of usage errors."""
        line = " ".join(message.split())
        self.exit(SamplingError.exit_code, f"{self.prog}: {line} (--help shows the flags)\n")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = _Parser(
        prog="mdruntime", description="Run exported masked diffusion models, without PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"mdruntime {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="generate images from a bundle"))
    check = commands.add_parser("verify", help="compare this device with the recorded model")
    _add_bundle(check, provider=True)
    _add_bundle(commands.add_parser("info", help="say what a bundle is"))
    doctor = commands.add_parser("doctor", help="say what this machine offers and lacks")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _add_bundle(parser: argparse.ArgumentParser, *, provider: bool = False) -> None:
    parser.add_argument("bundle", type=Path, help="folder made by mdexport build")
    parser.add_argument("--json", action="store_true", help="print JSON")
    if provider:
        parser.add_argument("--provider", default="cpu", help=f"one of {', '.join(PROVIDERS)}")
        parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser, provider=True)
    parser.add_argument("-l", "--labels", type=labels, metavar="L", help="classes: 207 or 0-9,12")
    parser.add_argument("-n", "--count", type=int, default=1, metavar="N", help="images per label")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of all randomness")
    parser.add_argument("--first-index", type=int, default=0, metavar="I", help="index of sample 1")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="samples at a time")
    parser.add_argument("--head", default="graph", help=f"sampler head: {', '.join(HEADS)}")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="image to write")
    parser.add_argument("--animate", type=Path, metavar="FILE", help="GIF of the unmasking")
    parser.add_argument("--columns", type=int, default=0, metavar="N", help="images in a row")
    parser.add_argument("--scale", type=int, default=0, metavar="N", help="enlarge every pixel")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_sampling_flags(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parse_args(arguments)
    try:
        code = run(options)
        flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        code = report("mdruntime", *explain(error))
        if os.environ.get("MDRUNTIME_TRACEBACK"):
            raise
        return code


def flush() -> None:
    """Write out what was printed, while a failure can still be reported."""
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at exit, and complain in several lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def report(program: str, code: int, text: str) -> int:
    """Print the one line that stands for an error, and return its exit code."""
    with contextlib.suppress(OSError):
        flush()
    if code != UNREAD:  # then who read the output, as head does, has enough and wants no more
        print(f"{program}: {text}", file=sys.stderr)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the one line that stand for an error."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MdruntimeError):
        return error.exit_code, line
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, MemoryError):
        return RESOURCES, f"out of memory; ask for less at a time, such as --batch-size 1 ({line})"
    if isinstance(error, BrokenPipeError):
        return UNREAD, line
    if isinstance(error, OSError):
        return RESOURCES, line
    return 1, f"unexpected {type(error).__name__}: {line} (MDRUNTIME_TRACEBACK=1 shows where)"


def run(options: argparse.Namespace) -> int:
    """Run the command that was asked for and return the exit code."""
    commands = {"generate": _generate, "verify": _verify, "info": _info, "doctor": _doctor}
    return commands[options.command](options)


def _generate(options: argparse.Namespace) -> int:
    check_request(options)
    began = time.perf_counter()
    with load(
        options.bundle, options.provider, threads=options.threads, head=options.head
    ) as pipeline:
        loaded = time.perf_counter()
        images, passes = _images(pipeline, options)
        facts = {
            **_facts(pipeline, options),
            "images": len(images),
            "passes": passes,
            "load_s": round(loaded - began, 3),
            "generate_s": round(time.perf_counter() - loaded, 3),
        }
    if options.output is not None:
        page = sheet(enlarge(images, options.scale), columns(options))
        save_image(options.output, page, facts)
    if options.json:
        print(json.dumps(facts))
    elif not options.quiet:
        _say_written(options, facts)
    return 0


def _images(pipeline: Pipeline, options: argparse.Namespace) -> tuple[Images, int]:
    """Generate all images, batch by batch; write the animation of them on the way."""
    chosen = options.labels and [label for label in options.labels for _ in range(options.count)]
    total = len(chosen) if chosen else options.count
    size = total if options.animate is not None else options.batch_size
    images, frames, passes = [], [], 0
    shown = sys.stderr.isatty() and not (options.quiet or options.json)
    for start in range(0, total, size):
        steps = pipeline.steps(
            chosen[start : start + size] if chosen else None,
            count=min(size, total - start),
            seed=options.seed,
            first_index=options.first_index + start,
            preset=options.preset,
            **sampling_changes(options),
        )
        for step in _with_bar(steps, start, total) if shown else steps:
            if options.animate is not None:
                frames.append(pipeline.preview(step.tokens))
        passes += step.passes
        images.append(pipeline.decode(step.tokens))
    if options.animate is not None:
        pages = [sheet(enlarge(frame, options.scale), columns(options)) for frame in frames]
        save_animation(options.animate, pages)
    return np.concatenate(images), passes


def _with_bar(steps: Iterator[Step], start: int, total: int) -> Iterator[Step]:
    """Pass steps on, drawing a bar that counts revealed tokens."""
    began = time.perf_counter()
    try:
        for step in steps:
            batch, length = step.tokens.shape
            done = (start * length + batch * length - step.hidden) / (total * length)
            bar = ("#" * round(30 * done)).ljust(30, ".")
            seconds = time.perf_counter() - began
            line = f"\r[{bar}] {done:4.0%}  pass {step.passes}  {seconds:.1f} s "
            print(line, end="", file=sys.stderr, flush=True)
            yield step
    finally:  # an error's line stands alone, too
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _facts(pipeline: Pipeline, options: argparse.Namespace) -> dict[str, Any]:
    manifest = pipeline.manifest
    sampling = pipeline.sampling(options.preset, **sampling_changes(options))
    return {
        "model": manifest.name,
        "precision": manifest.precision,
        "weights": manifest.weights.origin,
        "provider": pipeline.provider,
        "labels": options.labels,
        "seed": options.seed,
        "first_index": options.first_index,
        "sampling": to_json(sampling),
    }


def _say_written(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    written = [str(path) for path in (options.output, options.animate) if path is not None]
    per_image = 1000 * facts["generate_s"] / facts["images"]
    print(
        f"wrote {' and '.join(written)}: {facts['images']} image(s) in {facts['generate_s']:.2f} s "
        f"({per_image:.0f} ms each, {facts['passes']} passes, {facts['provider']}), "
        f"loaded in {facts['load_s']:.2f} s"
    )
    if facts["weights"] == "random":
        print("the weights are random: what you see is noise")


def _verify(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.bundle)
    began = time.perf_counter()
    result = verify(bundle, options.provider, threads=options.threads)
    seconds = time.perf_counter() - began
    if options.json:
        print(json.dumps({**to_json(result), "ok": bool(result), "provider": options.provider}))
    else:
        _say_identity(bundle)
        for name, limit in result.limits.items():
            print(f"  {name:16} {result.measured[name]:<12.6g} limit {limit:g}")
        print(f"  {result.passes} passes on {options.provider} in {seconds:.1f} s")
    if not result:
        raise VerificationError(
            f"verification failed on {options.provider}: {'; '.join(result.failures)}; do not use "
            "this bundle here"
        )
    if not options.json:
        print("verified")
    return 0


def _say_identity(bundle: Bundle) -> None:
    manifest = bundle.manifest
    print(f"{manifest.name}, {manifest.precision}: {manifest.weights.summary}")


def _info(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.bundle)
    manifest, spec = bundle.manifest, bundle.manifest.denoiser
    if options.json:
        print(json.dumps(to_json(manifest)))
        return 0
    _say_identity(bundle)
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    rows = {
        "task": f"{manifest.task}, {manifest.image.width} x {manifest.image.height} pixels",
        "denoiser": f"{manifest.weights.parameters / 1e6:.2f} M parameters, {spec.layers} layers",
        "canvas": f"{' x '.join(map(str, spec.grid))} tokens, codebook {spec.codebook}",
        "classes": f"0 to {spec.classes - 1}" if spec.classes else "none",
        "size": f"{size:.1f} MB in {len(manifest.files)} files, all hashes correct",
        "presets": ", ".join(manifest.presets),
        "verified": ", ".join(f"{k} {v:.4g}" for k, v in manifest.verification.measured.items()),
        "made with": ", ".join(f"{k} {v}" for k, v in manifest.toolchain.items()),
    }
    for name, text in rows.items():
        print(f"  {name:10} {text}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    findings = list(examine())
    if options.json:
        print(json.dumps([to_json(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.name:18} {finding.value}")
            if finding.cure:
                print(f"{'':18} -> {finding.cure}")
    fatal = any(finding.fatal for finding in findings)
    return ProviderError.exit_code if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
