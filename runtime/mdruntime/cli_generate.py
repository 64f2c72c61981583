"""``mdruntime generate``: images or texts, whichever the bundle makes."""

import argparse
import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mdruntime.bundle import open_bundle
from mdruntime.cli_tuned import closed, open_runner, say_tuned, tuned_facts
from mdruntime.denoiser import HEADS
from mdruntime.images import enlarge, save_animation, save_image, sheet
from mdruntime.machine import peak_mb
from mdruntime.options import (
    add_sampling_flags,
    check_images,
    check_numbers,
    check_texts,
    columns,
    labels,
    sampling_changes,
)
from mdruntime.pipeline import Images, Pipeline
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.sampler import Step, Tokens
from mdruntime.text import TextPipeline, TextStep

__all__ = ["add_flags", "facts_of", "run", "say_random", "with_bar"]

_State = TypeVar("_State")
_GAP = 16
_SEPARATOR = "\n---\n"  # between texts, which may have several lines


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("-l", "--labels", type=labels, metavar="L", help="classes: 207 or 0-9,12")
    add("-p", "--prompt", action="append", metavar="TEXT", help="what to draw, or how to begin")
    add("--negative-prompt", default="", metavar="TEXT", help="what an image should not show")
    add("--infill", metavar="TEXT", help="text with gaps (___) to be filled in")
    add("--gap", type=int, metavar="N", help=f"tokens that fill a gap; {_GAP} if not given")
    add("--length", type=int, default=0, metavar="N", help="tokens of a text, prompt included")
    add("-n", "--count", type=int, default=1, metavar="N", help="results per label or prompt")
    add("--seed", type=int, default=0, metavar="S", help="seed of all randomness")
    add("--first-index", type=int, default=0, metavar="I", help="index of sample 1")
    add("--batch-size", type=int, default=16, metavar="N", help="samples at a time")
    add("--head", default="graph", help=f"sampler head: {', '.join(HEADS)}")
    add("-o", "--output", type=Path, metavar="FILE", help="image or text file to write")
    add("--animate", type=Path, metavar="FILE", help="GIF of the unmasking")
    add("--stream", action="store_true", help="show the texts after every pass")
    add("--columns", type=int, default=0, metavar="N", help="images in a row")
    add("--scale", type=int, default=0, metavar="N", help="enlarge every pixel")
    add("-q", "--quiet", action="store_true", help="print nothing but errors and texts")
    add_sampling_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    check_numbers(options)
    began = time.perf_counter()
    bundle = open_bundle(options.bundle)
    makes_text = bundle.manifest.text is not None
    (check_texts if makes_text else check_images)(options)
    # No pass comes after the decoder here: the denoiser makes room for it at no cost.
    options.reduce_memory |= options.provider == "cpu" and options.animate is None
    runner = open_runner(bundle, options)
    with closed(runner):
        say_tuned(runner, options)
        loaded = time.perf_counter()
        facts = {**facts_of(runner, options), "load_s": round(loaded - began, 3)}
        make = _texts if makes_text else _sheet
        make(runner, options, facts)
    return 0


def facts_of(runner: Runner, options: argparse.Namespace) -> dict[str, Any]:
    """Return what there is to know about a result, for files and machines."""
    manifest = runner.manifest
    sampling = runner.sampling(options.preset, sampling_changes(options))
    return {
        "model": manifest.name,
        "precision": manifest.precision,
        "weights": manifest.weights.origin,
        "provider": runner.provider,
        "labels": options.labels,
        "prompt": options.prompt,
        "seed": options.seed,
        "first_index": options.first_index,
        "sampling": to_json(sampling),
        "tuned": tuned_facts(runner, options.preset),
    }


def _request(options: argparse.Namespace) -> dict[str, Any]:
    return {"preset": options.preset, "seed": options.seed, **sampling_changes(options)}


def _sheet(runner: Runner, options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Make images and write the files that were asked for."""
    began = time.perf_counter()
    images, passes = _images(Pipeline(runner), options)
    seconds = time.perf_counter() - began
    facts |= {"images": len(images), "passes": passes, "generate_s": round(seconds, 3)}
    facts["peak_mb"] = round(peak_mb())
    if options.output is not None:
        page = sheet(enlarge(images, options.scale), columns(options))
        save_image(options.output, page, facts)
    if options.json:
        print(json.dumps(facts))
    elif not options.quiet:
        _say_written(options, facts)


def _images(pipeline: Pipeline, options: argparse.Namespace) -> tuple[Images, int]:
    """Generate all images, batch by batch; write the animation of them on the way."""
    chosen, prompts = _repeated(options.labels, options), _repeated(options.prompt, options)
    total = len(chosen or prompts or range(options.count))
    size = total if options.animate is not None else options.batch_size
    canvases, frames, passes = [], [], 0
    for start in range(0, total, size):
        part = slice(start, start + size)
        steps = pipeline.steps(
            chosen[part] if chosen else None,
            prompts=prompts[part] if prompts else None,
            negative_prompt=options.negative_prompt,
            count=min(size, total - start),
            first_index=options.first_index + start,
            **_request(options),
        )
        for step in with_bar(steps, options, start, total, lambda step: step):
            if options.animate is not None:
                frames.append(pipeline.preview(step.tokens))
        passes += step.passes
        canvases.append(step.tokens)
    images = pipeline.decode(np.concatenate(canvases))
    if options.animate is not None:
        pages = [sheet(enlarge(frame, options.scale), columns(options)) for frame in frames]
        save_animation(options.animate, pages)
    return images, passes


def _repeated(given: list[Any] | None, options: argparse.Namespace) -> list[Any]:
    return [item for item in given or () for _ in range(options.count)]


def with_bar(
    states: Iterator[_State],
    options: argparse.Namespace,
    start: int,
    total: int,
    step_of: Callable[[_State], Step],
) -> Iterator[_State]:
    """Pass states on, drawing a bar that counts revealed tokens where somebody looks."""
    if not sys.stderr.isatty() or options.quiet or options.json or options.stream:
        yield from states
        return
    began = time.perf_counter()
    try:
        for state in states:
            step = step_of(state)
            batch, length = step.tokens.shape
            done = (start * length + batch * length - step.hidden) / (total * length)
            bar = ("#" * round(30 * done)).ljust(30, ".")
            seconds = time.perf_counter() - began
            line = f"\r[{bar}] {done:4.0%}  pass {step.passes}  {seconds:.1f} s "
            print(line, end="", file=sys.stderr, flush=True)
            yield state
    finally:  # an error's line stands alone, too
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _say_written(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    written = [str(path) for path in (options.output, options.animate) if path is not None]
    per_image = 1000 * facts["generate_s"] / facts["images"]
    print(
        f"wrote {' and '.join(written)}: {facts['images']} image(s) in {facts['generate_s']:.2f} s "
        f"({per_image:.0f} ms each, {facts['passes']} passes, {facts['provider']}), "
        f"loaded in {facts['load_s']:.2f} s"
    )
    say_random(facts)


def say_random(facts: dict[str, Any]) -> None:
    """Never let the output of random weights pass for a picture or a text."""
    if facts["weights"] == "random":
        print("the weights are random: what you see is noise", file=sys.stderr)


def _texts(runner: Runner, options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Write texts, to the terminal or a file."""
    pipeline = TextPipeline(runner)
    began = time.perf_counter()
    canvas = _canvas(pipeline, options)
    texts, passes, total = [], 0, len(canvas)
    for start in range(0, total, options.batch_size):
        part = canvas[start : start + options.batch_size]
        states = pipeline.steps(part, first_index=options.first_index + start, **_request(options))
        for state in with_bar(states, options, start, total, lambda state: state.step):
            if options.stream:
                _say_step(state)
        texts += state.texts
        passes += state.step.passes
    seconds = time.perf_counter() - began
    facts |= {"infill": options.infill, "length": canvas.shape[1], "texts": texts}
    facts |= {"passes": passes, "generate_s": round(seconds, 3), "peak_mb": round(peak_mb())}
    _say_texts(options, facts)


def _canvas(pipeline: TextPipeline, options: argparse.Namespace) -> Tokens:
    if options.infill is None:
        prompts = _repeated(options.prompt, options) or None
        return pipeline.canvas(prompts, count=options.count, length=options.length)
    gap = _GAP if options.gap is None else options.gap
    return pipeline.gaps(options.infill, gap).repeat(options.count, axis=0)


def _say_step(state: TextStep) -> None:
    """Show the texts of a pass on stderr: stdout is for those that are finished."""
    print(f"--- pass {state.step.passes}, {state.step.hidden} tokens hidden", file=sys.stderr)
    print(*map(_harmless, state.texts), sep=_SEPARATOR, file=sys.stderr, flush=True)


def _harmless(text: str) -> str:
    """Return a text without the characters that would control a terminal."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )


def _print_texts(texts: list[str]) -> None:
    """Print texts as they are, or as a terminal can bear them."""
    page = _SEPARATOR.join(map(_harmless, texts) if sys.stdout.isatty() else texts)
    encoding = sys.stdout.encoding or "utf-8"
    print(page.encode(encoding, errors="replace").decode(encoding))


def _say_texts(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    texts: list[str] = facts["texts"]
    if options.output is not None:
        options.output.write_text(f"{_SEPARATOR.join(texts)}\n", encoding="utf-8")
    if options.json:
        print(json.dumps(facts))
        return
    if options.output is None:
        _print_texts(texts)
    if not options.quiet:
        per_text = 1000 * facts["generate_s"] / len(texts)
        wrote = "" if options.output is None else f"wrote {options.output}: "
        print(
            f"{wrote}{len(texts)} text(s) in {facts['generate_s']:.2f} s ({per_text:.0f} ms each, "
            f"{facts['passes']} passes, {facts['provider']}), loaded in {facts['load_s']:.2f} s",
            file=sys.stderr,
        )
        say_random(facts)
