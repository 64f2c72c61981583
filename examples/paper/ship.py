"""Keep the quality tables of the shipped models with their weights.

Command   python examples/paper/ship.py
Time      seconds for what the other scripts measured, half an hour for digits on 2 CPU cores
Result    models/mdzoo/weights/NAME.study.json, from which the presets of a model follow

The samplers are those of all scripts (``grids.grid_of``). Bundles that are built afterwards have
the table in their manifest; ``mdruntime tune`` and the presets use it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grids import grid_of, label
from lab import ROOT, Lab, options_of
from mdexport.study import Store
from mdexport.study_store import replace_file
from mdruntime import MdruntimeError, open_bundle
from mdruntime.records import to_json
from mdruntime.study import Study, chosen

MODELS = ("digits", "glyphs", "prose")
WEIGHTS = ROOT / "models" / "mdzoo" / "weights"


def study_of(lab: Lab, model: str) -> Study:
    """Return the quality table of a model; only what was never measured is run."""
    plans = grid_of(lab.scale(model), lab.base(model))
    lab.run(model, plans)
    manifest = open_bundle(lab.bundle(model), check=False).manifest
    path = lab.results / f"{model}.json"
    store = Store(path, manifest, lab.judge(model).measure, lab.samples(model))
    return store.study({label(plan): plan for plan in plans})


def keep(study: Study, path: Path) -> None:
    """Write a quality table."""
    text = json.dumps(to_json(study), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(path, (text + "\n").encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Keep the tables of the models that are named, all by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--models" not in arguments:
        arguments += ["--models", *MODELS]
    options = options_of(__doc__, arguments)
    lab = Lab(options)
    for model in options.models:
        try:
            study = study_of(lab, model)
        except MdruntimeError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        path = (lab.results if lab.short else WEIGHTS) / f"{model}.study.json"
        keep(study, path)
        presets = ", ".join(f"{name}: {row.name}" for name, row in chosen(study.rows).items())
        print(f"{path.name}: {len(study.rows)} samplers; {presets}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
