"""Train the ``prose`` model: sentences about Python, written by masked diffusion.

Command   OMP_WAIT_POLICY=passive python models/train_prose.py
Time      two hours on one CPU core; stops and resumes (--work holds the checkpoint)
Result    models/mdzoo/weights/prose.safetensors (float16) and prose-tokenizer.json

The data are those of models/prose.py. Texts become tokens by byte-pair encoding, learnt from them
too; the denoiser is MDLM (Sahoo et al. 2024, arXiv 2406.07524) without time, and the loss is its
bound on the likelihood. What comes out depends on the machine's speed, since the clock ends it.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

import prose
import training
from mdzoo.mdlm import MDLM, MDLMConfig, initialise, to_published
from training import Every, Run

WEIGHTS = Path(__file__).parent / "mdzoo" / "weights"
WEIGHT_DECAY = 0.05
AVERAGING = 0.999
SHORT = 0.2  # of the time is spent on short windows
FIRST_SHARE = 0.3  # of the tokens may be hidden at first
INTERVAL = 300  # seconds between checkpoints
TEST_TEXTS = 256  # held-out texts that reports are made of
ALPHABET = [chr(code) for code in range(32, 127)]


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes of the data and of the model."""

    codebook: int
    length: int  # tokens of a text
    width: int
    depth: int
    batch: int
    rate: float  # learning rate at its peak

    @property
    def denoiser(self) -> MDLMConfig:
        """Sizes of the denoiser."""
        width = self.width
        return MDLMConfig(
            self.length, self.codebook, width, self.depth, heads=width // 32, hidden=4 * width
        )


SETTINGS: Mapping[str, Setting] = {
    "cpu": Setting(1024, 128, width=128, depth=5, batch=8, rate=2e-3),
    "gpu": Setting(2048, 256, width=384, depth=10, batch=256, rate=1e-3),
}


def learn_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Return a byte-pair encoding of ``size`` entries, learnt from texts in ASCII."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    initial = [_spelt(char) for char in ["\n", *ALPHABET]]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=initial, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _spelt(char: str) -> str:
    """Return how byte-level encodings spell a character of ASCII."""
    return char if char > " " else chr(ord(char) + 256)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The tokens of all documents in a row, and where texts may begin."""

    tokens: Tensor  # int64 (count,)
    starts: Tensor  # int64 (texts,): first tokens of paragraphs, with room for a text
    length: int
    bytes: int  # of the documents

    def texts(self, chosen: Tensor) -> Tensor:
        """Return texts int64 (batch, length), by their indices (batch,)."""
        rows = self.starts[chosen, None] + torch.arange(self.length, device=self.starts.device)
        return self.tokens[rows]


def tokenised(documents: tuple[prose.Document, ...], tokenizer: Tokenizer, length: int) -> Corpus:
    """Return the tokens of documents; texts begin with a paragraph and stay in one document."""
    tokens: list[int] = []
    starts: list[int] = []
    newline = tokenizer.token_to_id(_spelt("\n"))
    for encoding in tokenizer.encode_batch([some.text + "\n" for some in documents]):
        ids = np.array(encoding.ids)
        begins = np.append(0, np.flatnonzero(ids[:-1] == newline) + 1)
        starts += (begins[begins + length <= len(ids)] + len(tokens)).tolist()
        tokens += encoding.ids
    size = sum(len(some.text) + 1 for some in documents)
    return Corpus(torch.tensor(tokens), torch.tensor(starts), length, size)


def hide(
    tokens: Tensor, mask: int, generator: torch.Generator, largest: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Hide a random number of each text's tokens, all numbers equally likely.

    Args:
        tokens: int64 (batch, length).
        mask: the token to put in place of the hidden ones.
        generator: on the device of the tokens.
        largest: share of the tokens that may be hidden.

    Returns:
        The masked tokens and where they are hidden, both (batch, length).
    """
    (batch, length), device = tokens.shape, tokens.device
    # Spread over the batch, numbers vary less from batch to batch than independent ones.
    start = torch.rand(1, generator=generator, device=device)
    share = (start + torch.arange(batch, device=device) / batch) % 1 * largest
    count = 1 + (share * length).long().clamp(max=length - 1)
    return training.hide(tokens, count[:, None], mask, generator)


def bound(model: MDLM, tokens: Tensor, generator: torch.Generator, largest: float = 1.0) -> Tensor:
    """Estimate the bound on -log p of texts (batch, length), in nats a token.

    The mean over all numbers of hidden tokens of their mean cross-entropy is the negative evidence
    lower bound of masked diffusion (Ou et al. 2024, arXiv 2406.03736, equation 3.7).
    """
    codebook = model.config.codebook
    masked, hidden = hide(tokens, codebook, generator, largest)
    labels = tokens.new_full((len(tokens),), -1)
    logits = model(masked, labels)[..., :codebook]
    losses = F.cross_entropy(logits[hidden].float(), tokens[hidden], reduction="none")
    weights = (1 / hidden.sum(dim=1, keepdim=True)).expand_as(hidden)[hidden]
    return (losses * weights).sum() / len(tokens)


def window(progress: float, length: int) -> int:
    """Return the tokens of the windows that texts are cut into at some progress of the training.

    What a word has to do with its neighbours is learnt sooner where there are few of them.
    """
    return length // 4 if progress < SHORT else length


def largest_share(progress: float) -> float:
    """Return the share of tokens that may be hidden at some progress of the training.

    Words are learnt from their neighbours: with most of these hidden there is little to learn
    early. From half of the time on all shares are equally likely, as the bound wants it.
    """
    return min(1.0, FIRST_SHARE + 2 * (1 - FIRST_SHARE) * progress)


@torch.no_grad()
def held_out_bound(model: MDLM, test: Corpus, repeats: int = 1) -> float:
    """Return the bound over the same texts and maskings each time, in nats a token."""
    device = test.tokens.device
    generator = torch.Generator(device).manual_seed(1)
    count = min(TEST_TEXTS, len(test.starts))
    chosen = torch.linspace(0, len(test.starts) - 1, count, device=device).long()
    values = [
        float(bound(model, test.texts(some), generator)) * len(some)
        for _ in range(repeats)
        for some in torch.split(chosen, 64)
    ]
    return sum(values) / (repeats * count)


def bits_per_byte(nats: float, corpus: Corpus) -> float:
    """Return bits a byte of text for nats a token."""
    return nats / math.log(2) * len(corpus.tokens) / corpus.bytes


def train(
    setting: Setting, data: Corpus, test: Corpus, *, minutes: float, seed: int, checkpoint: Path
) -> MDLM:
    """Train and return the averaged denoiser.

    Args:
        setting: its sizes.
        data: to train on.
        test: held out.
        minutes: of wall time.
        seed: of weights, batches and maskings.
        checkpoint: file that is written every few minutes, and that a rerun resumes.
    """
    torch.manual_seed(seed)
    model = MDLM(setting.denoiser)
    initialise(model)
    run = Run(
        model.to(data.tokens.device),
        minutes=minutes,
        rate=setting.rate,
        decay=WEIGHT_DECAY,
        averaging=AVERAGING,
        seed=seed,
    )
    run.resume(checkpoint)
    due, device, recent = Every(INTERVAL), data.tokens.device.type, []
    while run.progress < 1:
        texts = data.texts(run.draw(len(data.starts), setting.batch))
        texts = texts.reshape(-1, window(run.progress, setting.length))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = bound(run.model, texts, run.generator, largest_share(run.progress))
        run.update(loss)
        recent.append(float(loss.detach()))
        if due() or run.progress == 1:
            nats = held_out_bound(run.average, test)
            print(
                f"denoiser {run.step}  {run.seconds:.0f} s  train {np.mean(recent):.4f}  "
                f"held-out {nats:.4f} nats a token, {bits_per_byte(nats, test):.4f} bits a byte",
                flush=True,
            )
            run.save(checkpoint)
            recent.clear()
    return run.average


def main() -> None:
    """Train with the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--partial", action="store_true", help="do with the docstrings")
    parser.add_argument("--work", type=Path, default=Path("prose-training"))
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder of the weights")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    setting = SETTINGS[options.setting]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_on, held_out = (
        prose.corpus(use, partial=options.partial) for use in ("train", "held-out")
    )
    tokenizer = learn_tokenizer([some.text for some in train_on], setting.codebook)
    path = options.output / "prose-tokenizer.json"
    tokenizer.save(str(path), pretty=False)
    data, test = (
        tokenised(documents, tokenizer, setting.length) for documents in (train_on, held_out)
    )
    print(
        f"{len(data.tokens)} tokens, {data.bytes / len(data.tokens):.2f} bytes each, "
        f"{len(test.tokens)} held out, {tokenizer.get_vocab_size()} entries, {device}",
        flush=True,
    )
    data, test = (_moved(some, device) for some in (data, test))
    denoiser = train(
        setting,
        data,
        test,
        minutes=options.minutes,
        seed=options.seed,
        checkpoint=options.work / "denoiser.pt",
    )
    state = to_published(denoiser.cpu().state_dict())
    path = options.output / "prose.safetensors"
    training.write(path, state, seed=str(options.seed), corpus=prose.digest(train_on))


def _moved(corpus: Corpus, device: torch.device) -> Corpus:
    tokens, starts = corpus.tokens.to(device), corpus.starts.to(device)
    return Corpus(tokens, starts, corpus.length, corpus.bytes)


if __name__ == "__main__":
    main()
