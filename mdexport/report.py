"""``report.md``: what was built and what was measured, for people."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mdexport.ranges import LARGEST, MARGIN
from mdruntime.manifest import Manifest
from mdruntime.measures import CLOSE
from mdruntime.session import INT8

__all__ = ["summary", "write_report"]

_MEANING = {
    "log_prob": "largest difference of a log-probability, nats",
    "score": "largest difference of a moment, entropy, probability or margin",
    "mean_log_prob": "mean difference of the log-probability of a drawn token, nats",
    "token_shift": "largest change of a uniform under which PyTorch draws the same token",
    "token_agreement": "share of drawn tokens that are equal",
    "close_agreement": f"share of drawn tokens whose shift is at most {CLOSE:g}",
    "head_agreement": "share of the draws from kept logits that are equal, bit by bit",
    "encoder_agreement": "share of the encoder's tokens that are equal",
    "psnr_db": "decoder's peak signal-to-noise ratio, dB (200: all pixels are equal)",
}


def summary(measured: Mapping[str, float]) -> str:
    """Return what was measured, as far as one line holds it."""
    text = f"tokens {measured['token_agreement']:.2%} equal, "
    text += f"log-probabilities within {measured['log_prob']:.1e}"
    if "psnr_db" in measured:
        text += f", decoder {_decibels(measured['psnr_db'])}"
    if "encoder_agreement" in measured:
        text += f", encoder {measured['encoder_agreement']:.2%}"
    return text


def _decibels(value: float) -> str:
    return "exact" if value >= 200 else f"{value:.0f} dB"


def write_report(folder: Path, manifest: Manifest) -> None:
    """Write ``report.md`` into a bundle's folder."""
    (folder / "report.md").write_text(_text(manifest), encoding="utf-8")


def _text(manifest: Manifest) -> str:
    verification = manifest.verification
    files = [
        (name, f"{spec.bytes / 1e6:.2f}", spec.sha256[:16]) for name, spec in manifest.files.items()
    ]
    spec = manifest.denoiser
    facts = [
        ("model", f"{manifest.name} ({manifest.family}), {manifest.precision}"),
        ("weights", manifest.weights.summary),
        ("parameters", f"{manifest.weights.parameters / 1e6:.2f} M in the denoiser"),
        ("canvas", f"{' x '.join(map(str, spec.grid))} tokens of {spec.codebook} codes"),
        ("caches", f"{len(manifest.graphs['denoiser'].caches)} of {spec.canvas} rows"),
        ("toolchain", ", ".join(f"{name} {number}" for name, number in manifest.toolchain.items())),
    ]
    return "\n".join(
        [
            f"# {manifest.name}, {manifest.precision}",
            "",
            _table(("what", "found"), facts),
            "## Verification",
            "",
            f"Reference: {verification.reference}. Every pass of the recorded trajectories was "
            "replayed in ONNX Runtime on the CPU; `mdruntime verify` repeats it on any device.",
            "",
            _measures(verification.limits, verification.measured),
            *_spellings(manifest),
            *_islands(manifest),
            "## Files",
            "",
            _table(("file", "MB", "SHA-256"), files),
        ]
    )


def _measures(limits: Mapping[str, float], measured: Mapping[str, float]) -> str:
    rows = [
        (f"`{name}`", _MEANING[name], f"{value:.6g}", _limit(limits, name))
        for name, value in measured.items()
    ]
    return _table(("measure", "meaning", "measured", "limit"), rows)


def _spellings(manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.verification.spellings.items():
        files = [
            spec.spellings[name] for spec in manifest.graphs.values() if name in spec.spellings
        ]
        yield f"### {name}: {', '.join(files)}"
        yield ""
        there = "" if name == INT8 else " Nothing here has run in TensorRT itself."
        yield f"Checked: {record.checked}.{there}"
        yield ""
        yield _measures(record.limits, record.measured)


def _islands(manifest: Manifest) -> Iterator[str]:
    rows = [
        (graph, f"`{island.name}`", f"{island.largest:.4g}")
        for graph, spec in manifest.graphs.items()
        for island in spec.float32_islands
    ]
    if rows:
        yield "## Float32 islands"
        yield ""
        yield f"What stays in float32 because float16 ends at {LARGEST:g}; a margin of {MARGIN:g}."
        yield ""
        yield _table(("graph", "module", "largest magnitude"), rows)


def _limit(limits: Mapping[str, float], name: str) -> str:
    return f"{limits[name]:g}" if name in limits else "none"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
