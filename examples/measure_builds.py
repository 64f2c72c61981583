"""Builds one model of every family at its published size with random weights, and measures it.

Command   python examples/measure_builds.py                 (or: ... NAME NAME)
Time      about an hour on 2 CPU cores; at most 12 GB of memory, 3 GB of disk at a time
Result    a table: time and peak memory of the verified build, size of the bundle, parity, and
          time of one result with the default preset; random weights say nothing of quality
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = (
    "maskgit256",
    "maskgit512",
    "halton-small-256",
    "halton-base-384",
    "mdlm-owt",
    "titok-b64",
    "titok-s128",
    "mage-base",
    "maskbit-14bit",
    "maskgit-jax-256",
    "amused-256",
    "smdm-170m",
)
HEAD = ("model", "build", "memory", "bundle", "log p within", "tokens equal", "one result")


def build(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Build a model in a process of its own and return what was measured."""
    command = [sys.executable, "-m", "mdexport", "build", "--model", name, "--random-weights", "0"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--precision", precision, "-o", str(folder)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the build of {name} failed")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return {
        "name": name,
        "build_s": time.perf_counter() - began,
        "peak_gb": usage.ru_maxrss / 1e6,  # Linux counts in KiB
        "bundle_mb": sum(file["bytes"] for file in manifest["files"].values()) / 1e6,
        "measured": manifest["verification"]["measured"],
        "classes": manifest["denoiser"]["classes"],
        "prompted": manifest["prompt"] is not None,
        "text": manifest["text"] is not None,
    }


def one_result(facts: dict[str, Any], folder: Path) -> float:
    """Return the seconds that the runtime takes for one image, or for 128 tokens of text."""
    wish = ["--length", "128", "--rounds", "32"] if facts["text"] else ["-o", f"{folder}.png"]
    if facts["classes"]:
        wish += ["--labels", "1"]
    if facts["prompted"]:
        wish += ["--prompt", "5 17 99"]
    command = [sys.executable, "-m", "mdruntime", "generate", str(folder), "--json", *wish]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["generate_s"])


def row(facts: dict[str, Any]) -> str:
    """Return a line of the table."""
    measured = facts["measured"]
    cells = (
        f"`{facts['name']}`",
        f"{facts['build_s']:.0f} s",
        f"{facts['peak_gb']:.1f} GB",
        f"{facts['bundle_mb']:.0f} MB",
        f"{measured['log_prob']:.1e}",
        f"{measured['token_agreement']:.2%}",
        f"{facts['result_s']:.1f} s",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure the models that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--keep", type=Path, help="folder for the bundles, which go otherwise")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in options.names:
            folder = (options.keep or Path(place)) / name
            facts = build(name, options.precision, folder)
            facts["result_s"] = one_result(facts, folder)
            rows.append(row(facts))
            print(rows[-1], flush=True)
            if options.keep is None:
                shutil.rmtree(folder)
    print(f"\n| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
