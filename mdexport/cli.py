"""The command line of the workstation: ``mdexport build | verify | study | list | doctor``."""

import contextlib
import json
import os
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click

import mdruntime
import mdzoo
from mdexport.against import compare, read_recording
from mdexport.build import Options, Progress, build
from mdexport.cli_bench import bench_command
from mdexport.cli_models import (
    find,
    list_command,
    precision_of,
    prompts_of,
    recorded,
    resolved,
    sources,
    told,
    wish,
)
from mdexport.cli_study import study_command
from mdexport.int8 import INT8, int8_for
from mdexport.precision import PRECISIONS
from mdruntime import cli as device
from mdruntime.cli_build import build_here
from mdruntime.doctor import examine
from mdruntime.errors import ProviderError, VerificationError
from mdruntime.ort import import_onnxruntime
from mdruntime.records import to_json
from mdruntime.trt.identity import BuildOptions

__all__ = ["main"]

USAGE = 2

_INTERRUPTED = threading.Event()
"""Set by a signal: Python drops an exception that is raised within a weak reference's callback, of
which the tracer has many."""


class _Settings(click.ParamType[tuple[str, int]]):
    """``heads=4``."""

    name = "NAME=N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        name, _, number = str(value).partition("=")
        if not name or not number.isdecimal() or len(number) > 9:
            self.fail(f"{value!r} must have the form name=number, such as heads=4", param, ctx)
        return name, int(number)


_MODEL = click.option("-m", "--model", required=True, metavar="NAME", help="see: mdexport list")
_CHECKPOINT = click.option(
    "--checkpoint", metavar="PATH", help="weights: a file, a folder, or hub:owner/name[/file]"
)
_SET = click.option(
    "--set",
    "settings",
    type=_Settings(),
    multiple=True,
    help="what a checkpoint's shapes cannot tell, such as heads",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88})
@click.version_option(mdruntime.__version__, prog_name="mdexport")
def cli() -> None:
    """Export masked diffusion models from PyTorch checkpoints to verified bundles."""


@cli.command("build")
@_MODEL
@_CHECKPOINT
@click.option(
    "--tokenizer",
    "--vqgan",
    metavar="PATH",
    help="weights of the image tokenizer, or tokenizer.json of a text model",
)
@click.option(
    "--random-weights", type=click.IntRange(0), metavar="SEED", help="build without files"
)
@_SET
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder  [MODEL-PRECISION]")
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: fp32]")
@click.option("--fp16", "--half", "fp16", is_flag=True, help="the same as --precision fp16")
@click.option("--bf16", is_flag=True, help="the same as --precision bf16")
@click.option("--int8", is_flag=True, help="add int8: for CPUs (fp32) or TensorRT")
@click.option("--logits", is_flag=True, help="let the TensorRT spelling return logits too")
@click.option("--no-encoder", is_flag=True, help="leave the image encoder out: no editing")
@click.option("--no-engines", is_flag=True, help="build no TensorRT engines afterwards")
@click.option("--force", is_flag=True, help="replace an existing folder")
@click.option("--json", "as_json", is_flag=True, help="print JSON lines")
def build_command(**options: Any) -> None:
    """Export a model, verify it, and write a bundle."""
    entry = find(options["model"])
    precision = precision_of(options)
    folder: Path = options["output"] or Path(f"{entry.name}-{precision}")
    given = sources(entry, options)
    import_onnxruntime()  # verification needs it: say so now rather than minutes later
    say = _json_line if options["as_json"] else _step_line
    model = mdzoo.load(entry, given)
    if not options["as_json"]:
        click.echo(f"{entry.name}, {precision}: {model.weights.summary}")
    same = {name: options[name] for name in ("int8", "logits", "force")}
    made = Options(precision=precision, encoder=not options["no_encoder"], **same)
    with contextlib.closing(build(model, folder, made)) as steps:
        for progress in steps:
            if _INTERRUPTED.is_set():
                raise KeyboardInterrupt
            say(progress)
    _say_done(folder, options["as_json"])
    built = not options["no_engines"] and _build_engines(
        folder, int8=made.int8 and int8_for(precision) == INT8, as_json=options["as_json"]
    )
    if not options["as_json"]:
        provider = " --provider tensorrt" if built else ""
        click.echo("Next:")
        click.echo(
            f"  mdruntime generate {shlex.quote(str(folder))} {wish(entry)} --seed 0{provider}"
        )


def _build_engines(folder: Path, *, int8: bool, as_json: bool) -> bool:
    """Go on with engines for this machine, or say in one line why there are none."""
    reason = build_here(folder, BuildOptions(int8=int8), as_json=as_json)
    if reason and as_json:
        click.echo(json.dumps({"engines": None, "reason": reason}))
    elif reason:
        click.echo(f"no engines: {reason}; 'mdruntime build' makes them on the device")
    return not reason


def _step_line(progress: Progress) -> None:
    head = f"[{progress.step}/{progress.steps}] {progress.name}"
    if progress.seconds is None:
        if sys.stdout.isatty():
            click.echo(f"{head} ...", nl=False)
        return
    start = "\r\033[K" if sys.stdout.isatty() else ""
    click.echo(f"{start}{head:15} {progress.seconds:6.1f} s  {progress.detail}")


def _json_line(progress: Progress) -> None:
    if progress.seconds is not None:
        facts = {"step": progress.name, "s": round(progress.seconds, 3), "detail": progress.detail}
        click.echo(json.dumps(facts))


def _say_done(folder: Path, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if as_json:
        click.echo(json.dumps({"bundle": str(folder), "bytes": size}))
        return
    click.echo(f"verified: {folder} ({size / 1e6:.1f} MB)")


@cli.command("verify")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("-m", "--model", metavar="NAME", help="check our port of this model")
@_CHECKPOINT
@_SET
@click.option(
    "--against", type=click.Path(path_type=Path), help="logits of the original code (npz)"
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def verify_command(bundle: Path | None, **options: Any) -> int:
    """Check a BUNDLE on this machine, or our port of a model against the original's logits.

    The npz file holds tokens [batch, length], logits [batch, length, codebook], labels [batch]
    (-1: dropped; left out where a model has none) and optionally tolerance, a largest absolute
    difference, and numbers that shapes cannot tell, such as heads. Tokens may form a grid and be -1
    where hidden. For aMUSEd: encoder_hidden_states, pooled_text_emb and micro_conds, or prompts'
    token ids as labels [batch, 77].
    """
    if bundle is not None:
        if any(options[name] for name in ("model", "against", "checkpoint", "settings")):
            raise click.UsageError("pass either a BUNDLE, or --model with --against")
        arguments = ["verify", str(bundle), *(["--json"] if options["as_json"] else [])]
        return device.run(device.parse_args(arguments))
    if options["model"] is None or options["against"] is None:
        raise click.UsageError("pass a BUNDLE, or --model NAME --checkpoint FILE --against FILE")
    entry = find(options["model"])
    if entry.files and options["checkpoint"] is None:
        raise click.UsageError(f"{entry.name} needs --checkpoint FILE ('mdexport list' says where)")
    return _against(entry, options)


def _against(entry: mdzoo.Entry, options: dict[str, Any]) -> int:
    """Compare our port of a model with a recording."""
    recording = read_recording(options["against"])
    checkpoint = resolved(options["checkpoint"])
    settings = recorded(entry, recording) | told(entry, checkpoint, dict(options["settings"]))
    read = mdzoo.load_direct if recording.direct else mdzoo.load_denoiser
    if entry.family.folder is not None and not recording.direct:
        settings = dict(options["settings"])  # its folder states all sizes
    given = mdzoo.Sources(checkpoint=checkpoint, settings=settings, extra_tensors=True)
    model = read(entry, given)
    if unused := mdzoo.unused_tensors(model):  # the logits decide whether they matter
        click.echo(
            f"{len(unused)} tensors of the file are not used: {', '.join(unused[:4])}", err=True
        )
    result = compare(model, recording, prompts_of(model))
    if options["as_json"]:
        click.echo(json.dumps({**to_json(result), "ok": bool(result)}))
    else:
        click.echo(
            f"{entry.name}: largest difference {result.largest:.3g} of {result.count} logits, "
            f"at sample, position, token {result.where}; tolerance {result.tolerance:g}"
        )
    if not result:
        sizes = ", ".join(f"{name}={number}" for name, number in settings.items())
        others = ", ".join(recording.unread)
        raise VerificationError(
            "the port does not compute what the original computes"
            + (f"; not told by shapes: {sizes}" if sizes else "")
            + (f"; not read: {others}" if others else "")
        )
    return 0


cli.add_command(list_command)
cli.add_command(bench_command)
cli.add_command(study_command)


@cli.command("doctor")
def doctor_command() -> int:
    """Say what this machine offers, and what is missing with the command that mends it."""
    for package in ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "click"):
        click.echo(f"{package:18} {version(package)}")
    findings = list(examine())
    for finding in findings:
        click.echo(f"{finding.name:18} {finding.value}")
        if finding.cure:
            click.echo(f"{'':18} -> {finding.cure}")
    return ProviderError.exit_code if any(finding.fatal for finding in findings) else 0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminated build cleans up too
        signal.signal(number, _interrupt)
    try:
        code = _run(arguments)
    except KeyboardInterrupt:  # while an earlier one was being dealt with
        code = device.INTERRUPTED
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    _INTERRUPTED.set()
    raise KeyboardInterrupt


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return cli.main(arguments, prog_name="mdexport", standalone_mode=False) or 0
    except click.ClickException as error:
        text = error.format_message()  # without arguments it is the whole of --help
        click.echo(text if text.startswith("Usage:") else f"mdexport: {text}", err=True)
        return USAGE
    except (Exception, KeyboardInterrupt, click.Abort) as error:
        code = device.report("mdexport", *_explain(error))
        if os.environ.get("MDEXPORT_TRACEBACK"):
            raise
        return code


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, click.Abort):
        error = KeyboardInterrupt()
    if isinstance(error, FileExistsError):
        return USAGE, str(error)
    if isinstance(error, mdzoo.CheckpointError):
        return 1, " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):
        return device.RESOURCES, f"out of memory on this {platform.machine()} machine: {error}"
    code, text = device.explain(error)
    return code, text.replace("MDRUNTIME_TRACEBACK", "MDEXPORT_TRACEBACK")


if __name__ == "__main__":
    main()
