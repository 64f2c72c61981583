"""A new bundle against the PyTorch model: every spelling of its graphs, replayed."""

from dataclasses import replace

from mdexport.graphs import CHECK, TENSORRT, write_check
from mdexport.int8 import INT8, int8_for
from mdexport.precision import LIMITS, LOW, limits_int8, of_images
from mdruntime.bundle import Bundle, file_spec
from mdruntime.errors import VerificationError
from mdruntime.manifest import SpellingRecord, VerificationRecord
from mdruntime.session import INT8 as CPU_INT8
from mdruntime.verify import Verification, verify

__all__ = ["verified", "wanted"]

_AS_BUILT = "the files themselves, in ONNX Runtime on the CPU"
_ROUNDED = (
    "copies of the files, in ONNX Runtime on the CPU, which has no arithmetic in {0}: every "
    "{0} operator computed in float32, and its result was rounded to {0}"
)


def wanted(precision: str, *, int8: bool, origin: str) -> VerificationRecord:
    """Return what will be asked of a bundle, before anything is measured.

    Args:
        precision: of its graphs.
        int8: whether it has the denoiser in int8 too.
        origin: of the weights, as the manifest has it.
    """
    limits, low = LIMITS[precision], LOW.get(precision)
    checked = _AS_BUILT if low is None else _ROUNDED.format(low.name.lower())
    spellings = {TENSORRT: SpellingRecord(checked, limits, {})}
    if int8:
        spellings[int8_for(precision)] = SpellingRecord(checked, limits_int8(origin), {})
    return VerificationRecord("PyTorch float32, teacher forced", limits, {}, spellings)


def verified(bundle: Bundle) -> VerificationRecord:
    """Replay the recorded passes in all spellings and return what was measured.

    Args:
        bundle: complete but for its measurements; its manifest says what is wanted.

    Raises:
        VerificationError: a graph does not compute what the model computes.
    """
    record = bundle.manifest.verification
    lower = bundle.manifest.precision in LOW
    result = verify(bundle)
    failures, records = [*result.failures], {}
    for name, spelled in record.spellings.items():
        found = _rounded(bundle, name) if lower else verify(bundle, spelling=name)
        records[name] = replace(spelled, limits=found.limits, measured=found.measured)
        failures += [f"{_TITLES[name]}: {failure}" for failure in found.failures]
    if failures:
        only = all(failure.startswith(_REFUSED) for failure in failures)
        hint = "; build it without --int8" if only else ""
        raise VerificationError(
            f"verification failed: {'; '.join(failures)}; nothing was written. "
            f"The reference is the PyTorch model in float32{hint}"
        )
    return replace(record, limits=result.limits, measured=result.measured, spellings=records)


_IMAGES = ("decoder", "encoder")
_REFUSED = "int8 does not hold"
_TITLES = {TENSORRT: "TensorRT spelling", INT8: _REFUSED, CPU_INT8: _REFUSED}


def _rounded(bundle: Bundle, name: str) -> Verification:
    """Verify a spelling of lower precision by copies that compute what a GPU would."""
    manifest = bundle.manifest
    low, images = LOW[manifest.precision], LOW[of_images(manifest.precision)]
    types = {graph: images if graph in _IMAGES else low for graph in manifest.graphs}
    graphs = write_check(bundle.folder, manifest.graphs, name, types)
    try:
        records = {CHECK: manifest.verification.spellings[name]}
        verification = replace(manifest.verification, spellings=records)
        made = {path.name: file_spec(path) for path in bundle.folder.glob(f"*.{CHECK}.onnx")}
        files = {**manifest.files, **made}
        copy = replace(manifest, graphs=graphs, files=files, verification=verification)
        return verify(replace(bundle, manifest=copy), spelling=CHECK)
    finally:
        for path in bundle.folder.glob(f"*.{CHECK}.onnx"):
            path.unlink()
