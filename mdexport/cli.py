"""The command line of the workstation: ``mdexport build | verify | list | doctor``."""

import contextlib
import difflib
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click

import mdruntime
import mdzoo
from mdexport.against import Recording, compare, read_recording
from mdexport.build import Options, Progress, build
from mdexport.precision import PRECISIONS
from mdruntime import cli as device
from mdruntime.doctor import examine
from mdruntime.errors import ProviderError, VerificationError
from mdruntime.ort import import_onnxruntime
from mdruntime.records import to_json

__all__ = ["main"]

USAGE = 2


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


def _find(name: str) -> mdzoo.Entry:
    """Return a model of the catalogue."""
    if name in mdzoo.CATALOGUE:
        return mdzoo.CATALOGUE[name]
    near = difflib.get_close_matches(name, mdzoo.CATALOGUE, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(mdzoo.CATALOGUE)}"
    raise click.UsageError(f"unknown model {name!r}; {hint} ('mdexport list' shows all)")


_MODEL = click.option("-m", "--model", required=True, metavar="NAME", help="see: mdexport list")
_CHECKPOINT = click.option("--checkpoint", type=click.Path(path_type=Path), help="weights")
_SET = click.option(
    "--set",
    "settings",
    type=_Settings(),
    multiple=True,
    help="what a checkpoint's shapes cannot tell: heads, classes, codebook",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88})
@click.version_option(mdruntime.__version__, prog_name="mdexport")
def cli() -> None:
    """Export masked diffusion models from PyTorch checkpoints to verified bundles."""


@cli.command("build")
@_MODEL
@_CHECKPOINT
@click.option("--vqgan", type=click.Path(path_type=Path), help="weights of the image decoder")
@click.option(
    "--random-weights", type=click.IntRange(0), metavar="SEED", help="build without files"
)
@_SET
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder  [MODEL-PRECISION]")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("--fp16", "--half", "half", is_flag=True, help="the same as --precision fp16")
@click.option("--logits", is_flag=True, help="let the TensorRT spelling return logits too")
@click.option("--force", is_flag=True, help="replace an existing folder")
@click.option("--json", "as_json", is_flag=True, help="print JSON lines")
def build_command(**options: Any) -> None:
    """Export a model, verify it, and write a bundle."""
    entry = _find(options["model"])
    precision = "fp16" if options["half"] else options["precision"]
    folder: Path = options["output"] or Path(f"{entry.name}-{precision}")
    sources = _sources(entry, options)
    import_onnxruntime()  # verification needs it: say so now rather than minutes later
    say = _json_line if options["as_json"] else _step_line
    model = mdzoo.load(entry, sources)
    if not options["as_json"]:
        click.echo(f"{entry.name}, {precision}: {model.weights.summary}")
    made = Options(precision=precision, logits=options["logits"], force=options["force"])
    with contextlib.closing(build(model, folder, made)) as steps:
        for progress in steps:
            say(progress)
    _say_done(entry, folder, options["as_json"])


def _sources(entry: mdzoo.Entry, options: dict[str, Any]) -> mdzoo.Sources:
    """Return where the weights come from, or say which files to get."""
    given = {"--checkpoint": options["checkpoint"], "--vqgan": options["vqgan"]}
    if options["random_weights"] is None:
        absent = [name for name in entry.files if given[name] is None]
        if absent:
            wanted = "".join(f"\n  {name} FILE   {where}" for name, where in entry.files.items())
            raise click.UsageError(
                f"{entry.name} needs {' and '.join(absent)}. Its files are published at{wanted}\n"
                "Without files: --random-weights 0 builds all of it, to measure and to test."
            )
    elif any(given.values()):
        raise click.UsageError(
            "--random-weights takes no files; leave --checkpoint and --vqgan out"
        )
    return mdzoo.Sources(
        checkpoint=options["checkpoint"],
        vqgan=options["vqgan"],
        random_seed=options["random_weights"],
        settings=dict(options["settings"]),
    )


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


def _say_done(entry: mdzoo.Entry, folder: Path, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if as_json:
        click.echo(json.dumps({"bundle": str(folder), "bytes": size}))
        return
    label = min(207, entry.config.classes - 1)
    target = shlex.quote(str(folder))
    click.echo(f"verified: {folder} ({size / 1e6:.1f} MB). Next:")
    click.echo(f"  mdruntime generate {target} --labels {label} --seed 0 -o {entry.name}.png")


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

    The npz file holds tokens [batch, length], labels [batch] (-1: none), logits
    [batch, length, codebook] and optionally tolerance, a largest absolute difference.
    """
    if bundle is not None:
        if any(options[name] for name in ("model", "against", "checkpoint", "settings")):
            raise click.UsageError("pass either a BUNDLE, or --model with --against")
        arguments = ["verify", str(bundle), *(["--json"] if options["as_json"] else [])]
        return device.run(device.parse_args(arguments))
    if options["model"] is None or options["against"] is None:
        raise click.UsageError("pass a BUNDLE, or --model NAME --checkpoint FILE --against FILE")
    entry = _find(options["model"])
    if entry.files and options["checkpoint"] is None:
        raise click.UsageError(f"{entry.name} needs --checkpoint FILE ('mdexport list' says where)")
    recording = read_recording(options["against"])
    settings = {**_codebook(entry, recording), **dict(options["settings"])}
    sources = mdzoo.Sources(checkpoint=options["checkpoint"], settings=settings)
    result = compare(mdzoo.load_denoiser(entry, sources), recording)
    if options["as_json"]:
        click.echo(json.dumps({**to_json(result), "ok": bool(result)}))
    else:
        click.echo(
            f"{entry.name}: largest difference {result.largest:.3g} of {result.count} logits, "
            f"at sample, position, token {result.where}; tolerance {result.tolerance:g}"
        )
    if not result:
        raise VerificationError("the port does not compute what the original computes")
    return 0


def _codebook(entry: mdzoo.Entry, recording: Recording) -> dict[str, int]:
    """Return a setting that shapes cannot tell, but recorded logits can: codes, not classes."""
    columns, largest = recording.logits.shape[-1], int(recording.tokens.max(initial=0))
    if largest < columns in (entry.config.codebook, entry.config.codebook + 1):
        return {}
    return {"codebook": columns if largest == columns else columns - 1}


def model_table() -> str:
    """Return the catalogue as the README's Markdown table."""
    rows = [
        ("name", "task", "denoiser", "files", "licence"),
        ("---", "---", "---", "---", "---"),
        *(
            (
                f"`{entry.name}`",
                f"{entry.task}: {entry.summary}",
                f"{entry.parameters / 1e6:.1f} M",
                "<br>".join(f"`{option}` {where}" for option, where in entry.files.items())
                or "included",
                entry.licence,
            )
            for entry in mdzoo.CATALOGUE.values()
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@cli.command("list")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.option("--markdown", is_flag=True, help="print the README's table")
def list_command(as_json: bool, markdown: bool) -> None:
    """Show the models, their sizes, and the files they need."""
    if markdown:
        click.echo(model_table(), nl=False)
        return
    for entry in mdzoo.CATALOGUE.values():
        parameters = entry.parameters
        if as_json:
            facts = {"name": entry.name, "task": entry.task, "parameters": parameters}
            click.echo(json.dumps({**facts, "files": dict(entry.files), "licence": entry.licence}))
            continue
        click.echo(f"{entry.name:12} {entry.summary}")
        click.echo(f"{'':12} {entry.task}; {parameters / 1e6:.1f} M parameters; {entry.licence}")
        for option, where in entry.files.items():
            click.echo(f"{'':12} {option:12} {where}")
        if not entry.files:
            click.echo(f"{'':12} weights are included")


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
    signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated build cleans up too
    sys.exit(_run(arguments))


def _interrupt(number: int, frame: object) -> None:
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
