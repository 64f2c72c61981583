"""``report.md``: what was built and what was measured, for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mdruntime.manifest import Manifest

__all__ = ["summary", "write_report"]

_MEANING = {
    "log_prob": "largest difference of a log-probability, nats",
    "score": "largest difference of a moment, entropy, probability or margin",
    "token_shift": "largest change of a uniform under which PyTorch draws the same token",
    "token_agreement": "share of drawn tokens that are equal",
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
    checks = [
        (f"`{name}`", _MEANING[name], f"{value:.6g}", _limit(verification.limits, name))
        for name, value in verification.measured.items()
    ]
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
            "replayed in ONNX Runtime on the CPU, in both spellings of the graph; "
            "`mdruntime verify` repeats it on any device.",
            "",
            _table(("measure", "meaning", "measured", "limit"), checks),
            "## Files",
            "",
            _table(("file", "MB", "SHA-256"), files),
        ]
    )


def _limit(limits: Mapping[str, float], name: str) -> str:
    return f"{limits[name]:g}" if name in limits else "none"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
