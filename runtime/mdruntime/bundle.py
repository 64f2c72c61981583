"""The bundle: a folder with a manifest, graphs, weights and test vectors."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mdruntime.errors import BundleError
from mdruntime.manifest import FileSpec, Manifest, parse

__all__ = ["MANIFEST", "Bundle", "file_spec", "open_bundle"]

MANIFEST = "manifest.json"
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose manifest was read and whose files were checked."""

    folder: Path
    manifest: Manifest

    def path(self, graph: str, spelling: str = "") -> Path:
        """Return the file of a graph, in the spelling of a backend where there is one.

        Raises:
            BundleError: the bundle has no such graph.
        """
        if graph not in self.manifest.graphs:
            known = ", ".join(self.manifest.graphs)
            raise BundleError(f"the bundle has no graph {graph!r}, only {known}")
        spec = self.manifest.graphs[graph]
        return self.folder / spec.spellings.get(spelling, spec.file)


def open_bundle(folder: str | Path, *, check: bool = True) -> Bundle:
    """Open a bundle and compare its files with the manifest.

    Args:
        folder: the bundle.
        check: compare SHA-256 sums (about a second per gigabyte) and refuse a build that was
            never finished; sizes are always compared.

    Raises:
        BundleError: no bundle, an incomplete or an altered one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise BundleError(f"a bundle is a folder with a {MANIFEST}, but {str(folder)!r} {what}")
    if not (folder / MANIFEST).is_file():
        hint = " (it is an unfinished build)" if folder.name.endswith(".partial") else ""
        raise BundleError(f"{str(folder)!r} holds no {MANIFEST}, so it is not a bundle{hint}")
    from concurrent.futures import ThreadPoolExecutor  # a tenth of the package's import time

    manifest = parse((folder / MANIFEST).read_bytes())
    if check and (folder.name.endswith(".partial") or not manifest.verification.measured):
        raise BundleError(f"{str(folder)!r} is an unfinished, unverified build; export it again")
    with ThreadPoolExecutor() as pool:
        names, specs = manifest.files.keys(), manifest.files.values()
        list(pool.map(lambda name, spec: _compare(folder, name, spec, check), names, specs))
    return Bundle(folder, manifest)


def _compare(folder: Path, name: str, spec: FileSpec, check: bool) -> None:
    path = folder / name
    if not _is_inside(path, folder):
        raise BundleError(f"{name} is a link that leaves the bundle; copy the file itself")
    if not path.is_file():
        raise BundleError(f"{name} is missing from the bundle; copy or export it again")
    size = path.stat().st_size
    if size != spec.bytes:
        raise BundleError(
            f"{name} does not match {MANIFEST}: expected {spec.bytes} bytes, found {size}; "
            "copy or export the bundle again"
        )
    if check and _sha256(path) != spec.sha256:
        raise BundleError(
            f"{name} does not match {MANIFEST} (its SHA-256 differs); "
            "copy or export the bundle again"
        )


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def file_spec(path: Path) -> FileSpec:
    """Return the identity of a file, for a manifest."""
    return FileSpec(_sha256(path), path.stat().st_size)
