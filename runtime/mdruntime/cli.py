"""The command line of the device: ``mdruntime generate | edit | tune | build | bench | ...``."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mdruntime import __version__, cli_bench, cli_build, cli_edit, cli_generate, cli_tune
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.doctor import examine
from mdruntime.errors import MdruntimeError, ProviderError, SamplingError, VerificationError
from mdruntime.first import FIRST_PASS_MB
from mdruntime.manifest import Manifest
from mdruntime.records import to_json
from mdruntime.session import INT8, PROVIDERS, spelling_of
from mdruntime.tuned import read_tuned
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
    cli_generate.add_flags(_command(commands, "generate", "make images or texts from a bundle"))
    cli_edit.add_flags(_command(commands, "edit", "inpaint, outpaint or vary an image"))
    cli_tune.add_flags(_command(commands, "tune", "choose the sampler for this device", kept=0))
    bench = _command(commands, "bench", "measure times on this device", optional=True, kept=0)
    cli_bench.add_flags(bench)
    build = commands.add_parser("build", help="build TensorRT engines for this device")
    _add_bundle(build)
    cli_build.add_flags(build)
    check = commands.add_parser("verify", help="compare this device with the recorded model")
    _add_bundle(check, provider=True)
    _add_bundle(commands.add_parser("info", help="say what a bundle is"))
    doctor = commands.add_parser("doctor", help="say what this machine offers and lacks")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _command(
    commands: Any,
    name: str,
    summary: str,
    *,
    optional: bool = False,
    kept: float = FIRST_PASS_MB,
) -> argparse.ArgumentParser:
    """Add a command that runs a bundle.

    Measurements keep no answers of first passes unless told to: what they time is a new request.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary)
    _add_bundle(parser, provider=True, optional=optional)
    reduced = "keep one large graph in memory at a time"
    parser.add_argument("--reduce-memory", action="store_true", help=reduced)
    answers = f"megabytes for answers of first passes, to be used again  [{kept:g}]"
    parser.add_argument("--first-pass-mb", type=float, default=kept, metavar="MB", help=answers)
    return parser


def _add_bundle(
    parser: argparse.ArgumentParser, *, provider: bool = False, optional: bool = False
) -> None:
    count: dict[str, Any] = {"nargs": "?"} if optional else {}
    parser.add_argument("bundle", type=Path, help="folder made by mdexport build", **count)
    parser.add_argument("--json", action="store_true", help="print JSON")
    if provider:
        parser.add_argument("--provider", default="cpu", help=f"one of {', '.join(PROVIDERS)}")
        parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads")
        parser.add_argument("--precision", default="", help="int8, where it was exported")


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
    commands = {
        "generate": cli_generate.run,
        "edit": cli_edit.run,
        "tune": cli_tune.run,
        "bench": cli_bench.run,
        "build": cli_build.run,
        "verify": _verify,
        "info": _info,
        "doctor": _doctor,
    }
    return commands[options.command](options)


def _verify(options: argparse.Namespace) -> int:
    bundle = open_bundle(options.bundle)
    began = time.perf_counter()
    spelling = spelling_of(bundle, options.provider, options.precision)
    result = verify(bundle, options.provider, spelling=spelling, threads=options.threads)
    seconds = time.perf_counter() - began
    if options.json:
        print(json.dumps({**to_json(result), "ok": bool(result), "provider": options.provider}))
    else:
        _say_identity(bundle)
        for name, limit in result.limits.items():
            print(f"  {name:18} {result.measured[name]:<12.6g} limit {limit:g}")
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
    tuned = read_tuned(bundle)
    if options.json:
        print(json.dumps({**to_json(manifest), "tuned": to_json(tuned)}))
        return 0
    _say_identity(bundle)
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    rows = {
        "task": _task(manifest),
        "denoiser": f"{manifest.weights.parameters / 1e6:.2f} M parameters, {spec.layers} layers",
        "canvas": f"{' x '.join(map(str, spec.grid))} tokens, codebook {spec.codebook}",
        "classes": f"0 to {spec.classes - 1}" if spec.classes else "none",
        "size": f"{size:.1f} MB in {len(manifest.files)} files, all hashes correct",
        "graphs": ", ".join(manifest.graphs),
        "precision": ", ".join([manifest.precision, *_spelled(manifest)]),
        **_tokenizer(manifest),
        "presets": ", ".join(manifest.presets),
        "tuned": "no; see 'mdruntime tune'" if tuned is None else tuned.summary,
        "verified": ", ".join(f"{k} {v:.4g}" for k, v in manifest.verification.measured.items()),
        "made with": ", ".join(f"{k} {v}" for k, v in manifest.toolchain.items()),
    }
    for name, text in rows.items():
        print(f"  {name:10} {text}")
    return 0


def _spelled(manifest: Manifest) -> list[str]:
    """Return the precisions besides its own that a bundle was exported in."""
    spellings = manifest.graphs["denoiser"].spellings
    return [name for name in (INT8, f"tensorrt-{INT8}") if name in spellings]


def _tokenizer(manifest: Manifest) -> dict[str, str]:
    """Return what reads the texts of a bundle, if it takes any."""
    spec = manifest.text or manifest.prompt
    return {} if spec is None else {"tokenizer": spec.tokenizer}


def _task(manifest: Manifest) -> str:
    if manifest.image is None:
        return f"{manifest.task}, up to {manifest.denoiser.length} tokens"
    return f"{manifest.task}, {manifest.image.width} x {manifest.image.height} pixels"


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
