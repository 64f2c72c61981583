"""Models by name on the command line: finding, listing, and where their files are."""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import mdzoo
from mdexport.recording import Recording
from mdruntime.manifest import DenoiserSpec
from mdzoo import folder

__all__ = [
    "find",
    "list_command",
    "model_table",
    "precision_of",
    "prompts_of",
    "recorded",
    "resolved",
    "sources",
    "told",
    "wish",
]

_BYTES = {"fp32": 4, "fp16": 2}  # bfloat16 has the size of float16

_STATED = (
    ("heads", ("n_heads", "num_attention_heads")),
    ("length", ("model_length", "max_sequence_length")),
    ("mask", ("mask_token_id",)),
)
"""Sizes that no tensor tells, and how the config.json of MDLM, LLaDA and TiTok calls them."""
_GENERATOR = ("model", "generator")  # TiTok's is in two others


def find(name: str) -> mdzoo.Entry:
    """Return a model of the catalogue."""
    if name in mdzoo.CATALOGUE:
        return mdzoo.CATALOGUE[name]
    near = difflib.get_close_matches(name, mdzoo.CATALOGUE, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(mdzoo.CATALOGUE)}"
    raise click.UsageError(f"unknown model {name!r}; {hint} ('mdexport list' shows all)")


def precision_of(options: Mapping[str, Any]) -> str:
    """Return the precision that was asked for, by name or by a flag of that name."""
    flags = [name for name in ("fp16", "bf16") if options[name]]
    named = options["precision"]
    if len({*flags, *([named] if named else [])}) > 1:
        asked = [f"--{name}" for name in flags] + ([f"--precision {named}"] if named else [])
        raise click.UsageError(f"choose one precision, not {' and '.join(asked)}")
    return flags[0] if flags else named or "fp32"


def sources(entry: mdzoo.Entry, options: dict[str, Any]) -> mdzoo.Sources:
    """Return where the weights come from, or say which files to get."""
    given = {"--checkpoint": options["checkpoint"], "--tokenizer": options["tokenizer"]}
    if options["random_weights"] is None:
        absent = [name for name in entry.files if given[name] is None]
        if absent:
            wanted = "".join(f"\n  {name} FILE   {where}" for name, where in entry.files.items())
            raise click.UsageError(
                f"{entry.name} needs {' and '.join(absent)}. Its files are published at{wanted}\n"
                "Without files: --random-weights 0 builds all of it, to measure and to test."
            )
    elif given["--checkpoint"] or (given["--tokenizer"] and entry.text is None):
        raise click.UsageError(
            "--random-weights takes no weights; leave --checkpoint and --tokenizer out"
        )
    checkpoint = resolved(options["checkpoint"])
    return mdzoo.Sources(
        checkpoint=checkpoint,
        tokenizer=resolved(options["tokenizer"]),
        random_seed=options["random_weights"],
        settings=told(entry, checkpoint, dict(options["settings"])),
    )


def resolved(text: str | None) -> Path | None:
    """Return the path of a checkpoint, after fetching it where it is on the hub."""
    return None if text is None else mdzoo.resolve(text)


def wish(entry: mdzoo.Entry) -> str:
    """Return flags that make the runtime show what a model does."""
    if entry.text is not None:
        return "--length 128"
    image = f"-o {entry.name}.png"
    if entry.task == "text to image":
        return f'--prompt "a red boat on a lake" {image}'
    classes = entry.spec.classes
    return f"--labels {min(207, classes - 1)} {image}" if classes else image


def told(entry: mdzoo.Entry, checkpoint: Path | None, given: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes that shapes cannot tell: a user's, or of a config.json beside the weights.

    Raises:
        CheckpointError: a user names a size that the model does not have.
    """
    known = entry.family.settings
    for name in given:
        if name not in known:
            names = f"one of {', '.join(known)}" if known else "nothing for this model"
            raise mdzoo.CheckpointError(f"--set must name {names}, got {name!r}")
    beside = {} if checkpoint is None or entry.family.folder else _stated(checkpoint)
    return {name: beside[name] for name in known if name in beside} | dict(given)


def _stated(checkpoint: Path) -> dict[str, int]:
    """Return the sizes in a config.json beside the weights, where there is one."""
    place = folder.weight_file(checkpoint).parent
    if not (place / "config.json").is_file():
        return {}
    found: Any = folder.read_json(place, "config.json")
    for part in _GENERATOR:
        found = found.get(part, found) if isinstance(found, dict) else {}
    names = {size: next((name for name in theirs if name in found), "") for size, theirs in _STATED}
    return {size: found[name] for size, name in names.items() if type(found.get(name)) is int}


def recorded(entry: mdzoo.Entry, recording: Recording) -> dict[str, int]:
    """Return the sizes that shapes cannot tell, but a recording can.

    It may hold them as single numbers. Its logits tell codes from classes, and what the ids of a
    text are; its tokens the size of an image whose model has no table of positions, and what was
    read off a text how wide that is.
    """
    family, spec = entry.family, entry.spec
    largest, columns = int(recording.tokens.max()), recording.columns
    found: dict[str, int] = {}
    if "codebook" in family.settings:
        found = _codebook(spec, columns, largest)
    if "mask" in family.settings and recording.tokens.min() >= 0:  # of no consequence for logits
        found = {"mask": max(min(largest, columns), columns - 1)}
    if recording.direct:
        *_, side = recording.tokens.shape
        found = {"size": side if recording.tokens.ndim > 2 else math.isqrt(side)}
        found["pooled"] = recording.direct["pooled_text_emb"].shape[-1]
    if "length" in family.settings and recording.tokens.shape[-1] > spec.length:
        found["length"] = recording.tokens.shape[-1]
    return found | {name: n for name, n in recording.numbers.items() if name in family.settings}


def prompts_of(model: Any) -> tuple[int, int] | None:
    """Return how many ids prompts have, and how many a prompt holds; nothing without prompts."""
    text = getattr(getattr(model, "config", None), "text", None)
    return None if text is None else (text.vocabulary, text.positions)


def _codebook(spec: DenoiserSpec, columns: int, largest: int) -> dict[str, int]:
    rows = max(spec.mask_token, *(row.dropped for row in spec.context)) + 1
    if columns <= largest:
        return {"codebook": columns}
    if columns in (spec.codebook, spec.codebook + 1):
        return {"codebook": spec.codebook}
    if columns == rows or not spec.classes:
        return {}
    return {"codebook": columns - 1 if spec.mask_token == spec.codebook else columns}


def _sizes(entry: mdzoo.Entry) -> str:
    """Return the size of a denoiser's weights in each precision."""
    count = entry.parameters
    return ", ".join(f"{name} {count * size / 1e6:.0f} MB" for name, size in _BYTES.items())


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


def _facts(entry: mdzoo.Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "family": entry.family.name,
        "task": entry.task,
        "summary": entry.summary,
        "parameters": entry.parameters,
        "bytes": {name: entry.parameters * size for name, size in _BYTES.items()},
        "files": dict(entry.files),
        "licence": entry.licence,
        "presets": list(entry.presets),
        "samplers": entry.samplers,
    }


@click.command("list")
@click.argument("names", nargs=-1)
@click.option("--long", "-l", is_flag=True, help="all there is to know of every model")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.option("--markdown", is_flag=True, help="print the README's table")
def list_command(names: tuple[str, ...], long: bool, as_json: bool, markdown: bool) -> None:
    """Show the models, or those named, their sizes, and the files they need."""
    if markdown:
        click.echo(model_table(), nl=False)
        return
    for entry in map(find, names) if names else mdzoo.CATALOGUE.values():
        if as_json:
            click.echo(json.dumps(_facts(entry)))
        elif names or long:
            _describe(entry)
        else:
            click.echo(f"{entry.name:18} {entry.parameters / 1e6:6.1f} M  {entry.summary}")
    if not (as_json or names or long):
        click.echo(
            "Sizes, files, licence and samplers: mdexport list NAME, or mdexport list --long"
        )


def _describe(entry: mdzoo.Entry) -> None:
    """Print all there is to know about a model."""
    rows = [
        (entry.name, entry.summary),
        ("family", f"{entry.family.name}; {entry.task}"),
        ("denoiser", f"{entry.parameters / 1e6:.1f} M parameters: {_sizes(entry)}"),
        *((option, where) for option, where in entry.files.items()),
        ("licence", entry.licence),
        ("samplers", entry.samplers),
        ("presets", ", ".join(entry.presets)),
    ]
    for name, text in rows:
        click.echo(f"{name:17} {text}")
    if not entry.files:
        click.echo(f"{'files':17} weights are included")
