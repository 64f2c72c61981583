"""Are the written texts likely, varied and well spelt?

Command   python examples/measure_prose.py BUNDLE --weights models/mdzoo/weights/prose.safetensors
Time      two minutes on a CPU core; without --weights, one
Result    a table of numbers, and the model's own bound; BUNDLE is of the prose model

Texts are scored by n-gram models of bytes, beside as many real texts of the same size: those of
held-out documents, and those of the documents that the model was trained on, which show what a
copy would score (paper/text_measures.py). With --weights, the model's own bound on the bits a byte
of held-out documents is printed too, beside those of the n-gram model.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import mdruntime
import mdzoo
from mdzoo.mdlm import MDLM

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
sys.path.insert(0, str(Path(__file__).parent / "paper"))
from judges import prose as judge_of_prose
from prose import CorpusError, corpus
from text_measures import TextJudge
from train_prose import bits_per_byte, held_out_bound, tokenised

REPEATS = 4  # maskings of every held-out text


def written(bundle: Path, count: int, seed: int, **options: Any) -> list[str]:
    """Write texts."""
    with mdruntime.load_text(bundle) as pipeline:
        return pipeline.generate(count=count, seed=seed, **options)


def table(judge: TextJudge, texts: list[str]) -> dict[str, dict[str, float]]:
    """Return the scores of texts, and of real ones of the same number and size."""
    size = round(sum(map(len, texts)) / len(texts))
    columns = {
        "held-out": judge.real("held-out", len(texts), size),
        # Another seed than those of the training texts that the judge compares with.
        "training": judge.real("train", len(texts), size, seed=100),
        "generated": texts,
    }
    return {name: {"texts": len(some), **judge.score(some)} for name, some in columns.items()}


def bound(bundle: Path, weights: Path, *, partial: bool) -> float:
    """Return the model's bound on -log2 p of held-out documents, in bits a byte.

    Args:
        bundle: brings the tokenizer.
        weights: of the same model, in PyTorch.
        partial: do with the docstrings of the standard library.
    """
    model = mdzoo.load_denoiser(mdzoo.CATALOGUE["prose"], mdzoo.Sources(checkpoint=weights))
    if not isinstance(model, MDLM):
        raise SystemExit(f"measure_prose: {weights} must hold an MDLM, got {type(model).__name__}")
    with mdruntime.load_text(bundle) as pipeline:
        text = pipeline.manifest.text
        assert text is not None  # load_text() has seen to it
        tokenizer = Tokenizer.from_file(str(bundle / text.tokenizer))
    test = tokenised(corpus("held-out", partial=partial), tokenizer, model.config.length)
    return bits_per_byte(held_out_bound(model, test, REPEATS), test)


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--weights", type=Path, help="of the bundle's model: prints its own bound")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="texts to print")
    parser.add_argument("--partial", action="store_true", help="do with the docstrings")
    given = parser.parse_args()
    try:
        judge = judge_of_prose(partial=given.partial)
    except CorpusError as error:
        raise SystemExit(f"measure_prose: {error}; or pass --partial") from None
    texts = written(given.bundle, given.texts, given.seed, preset=given.preset, **given.options)
    columns = table(judge, texts)
    print(" " * 12 + "".join(f"{name:>12}" for name in columns))
    for field in columns["generated"]:
        print(f"{field:12}" + "".join(f"{scores[field]:12.4g}" for scores in columns.values()))
    if given.weights is not None:
        with torch.inference_mode():
            bits = bound(given.bundle, given.weights, partial=given.partial)
        print(f"bound of the model: {bits:.4f} bits a byte of held-out documents")
    for text in texts[: given.show]:
        print(f"\n{text}")


if __name__ == "__main__":
    main()
