"""The lines of a doctor's report."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

__all__ = ["Finding", "installed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report; ``cure`` is empty where all is well."""

    name: str
    value: str
    cure: str = ""
    fatal: bool = False  # nothing can be generated before it is cured


def installed(package: str) -> str:
    """Return the version of an installed package, "" for none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
