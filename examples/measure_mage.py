"""What does MAGE's exact saving in the last encoder layer bring?

Command   python examples/measure_mage.py
Time      about a minute on one CPU core
Result    of mage-base on an AMD EPYC core, torch 2.13, 257 rows, float32, saving off -> on:
          256 hidden tokens   1.152 -> 1.090 s   73.8 -> 70.7 GFLOP
          128 hidden tokens   0.975 -> 0.959 s   73.8 -> 72.2 GFLOP
            0 hidden tokens   1.062 -> 1.076 s   73.8 -> 73.8 GFLOP
          The saving is 4 % at most; single runs differ by about as much.

The encoder's output at hidden rows is thrown away, so its last layer computes attention,
MLP and final norm of the others alone (``mdzoo.mage``). Measured is a pass over all rows of one
canvas, random weights, once with the visible columns and once with all columns given as visible.
Times are medians of the process's CPU seconds on one thread; GFLOP count the linear maps, not
the products of attention.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mdzoo.mage import FAMILY, MAGE, PUBLISHED


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one pass."""

    seconds: float  # median
    gflop: float  # of all linear maps


def one_pass(model: MAGE, hidden: int, *, saving: bool) -> Tensor:
    """Return the logits (1, length, codebook) of a pass over all rows of one canvas.

    Args:
        model: of any size.
        hidden: how many tokens hold the mask, the last ones.
        saving: whether the model is told which rows are visible, or that all are.
    """
    config = model.config
    ids = torch.arange(config.length + 1)[None] % config.codebook
    ids[:, 0] = config.fake
    ids[:, config.length + 1 - hidden :] = config.mask
    canvas = torch.arange(config.length + 1)[None]
    visible = canvas[:, : config.length + 1 - hidden] if saving else canvas
    caches = list(model.empty_caches(1, config.length + 1).values())
    with torch.inference_mode():
        return model.step(ids, canvas, canvas[:, 1:], caches, {"visible": visible})[0]


def measure(model: MAGE, hidden: int, repeats: int) -> tuple[Cost, Cost]:
    """Return the cost of a pass with all columns visible, and with the saving."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):  # in turn, so that both meet the same machine
        for saving in (False, True):
            start = time.process_time()
            one_pass(model, hidden, saving=saving)
            seconds[saving].append(time.process_time() - start)
    gflop = []
    for saving in (False, True):
        with FlopCounterMode(display=False) as counter:
            one_pass(model, hidden, saving=saving)
        gflop.append(counter.get_total_flops() / 1e9)
    plain, saved = (statistics.median(times[1:]) for times in seconds)
    return Cost(plain, gflop[0]), Cost(saved, gflop[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=PUBLISHED, default="mage-base")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = MAGE(PUBLISHED[given.model]).eval()
    FAMILY.initialise(model)
    length = model.config.length
    print("hidden   seconds            GFLOP")
    for hidden in (length, length // 2, 0):
        plain, saved = measure(model, hidden, given.repeats)
        seconds = f"{plain.seconds:.3f} -> {saved.seconds:.3f}"
        print(f"{hidden:6}   {seconds:16}   {plain.gflop:.1f} -> {saved.gflop:.1f}")


if __name__ == "__main__":
    main()
