"""Judges of samples: their measures against outside oracles, and their verdicts on known sets."""

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import import_module
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from mdexport.judge import Judge, load_judge, scores_of
from mdruntime.errors import SamplingError

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))
import cache
import glyphs
import judges
import prose
from classifier import Classifier, fit
from image_measures import ImageJudge, Labelled, frechet, grey, nearest, precision_and_coverage
from ngram import learnt, windows
from text_measures import TextJudge, alternate, distinct, entropy, openings, words
from train_digits import split

JUDGES = Path(__file__).parents[2] / "examples" / "paper" / "judges.py"
TINY = ["abracadabra", "a banana\nand a cabana", "", "bab"]


@pytest.fixture(scope="module")
def documents() -> list[prose.Document]:
    return list(islice(prose.docstrings(), 200))


@pytest.fixture(scope="module")
def text_judge(documents: list[prose.Document]) -> TextJudge:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prose, "docstrings", lambda: iter(documents))
        return judges.prose(partial=True)


@pytest.fixture(scope="module")
def digits_judge() -> ImageJudge:
    judge = load_judge(f"{JUDGES}:digits")
    assert isinstance(judge, Judge)
    assert isinstance(judge, ImageJudge)
    return judge


@pytest.fixture(scope="module")
def held_out() -> Labelled:
    *_, images, labels = split()
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Labelled(torch.from_numpy(pixels), torch.from_numpy(labels))


# n-grams


def kneser_ney(texts: Sequence[str], length: int, gram: bytes) -> float:
    """Interpolated Kneser-Ney smoothing by dictionaries, straight from its definition."""
    met: Counter[bytes] = Counter()
    for text in texts:
        padded = (bytes(length) + b"\n")[-(length - 1) :] + text.encode()
        met.update(padded[end - length : end] for end in range(length, len(padded) + 1))
    levels = {length: met}
    for shorter in range(length - 1, 0, -1):
        before: dict[bytes, set[bytes]] = defaultdict(set)
        for longer in levels[shorter + 1]:
            before[longer[1:]].add(longer[:1])
        levels[shorter] = Counter({some: len(left) for some, left in before.items()})
    probability = 1 / 256
    for size in range(1, length + 1):
        counts, some = levels[size], gram[len(gram) - size :]
        once, twice = (sum(count == number for count in counts.values()) for number in (1, 2))
        discount = min(0.95, max(0.1, once / max(1, once + 2 * twice)))
        beside = {other: count for other, count in counts.items() if other[:-1] == some[:-1]}
        if total := sum(beside.values()):
            kept = max(0.0, beside.get(some, 0) - discount)
            probability = (kept + discount * len(beside) * probability) / total
    return probability


def number(gram: bytes) -> int:
    return int.from_bytes(gram, "big")


def test_probabilities_are_those_of_the_definition() -> None:
    model = learnt(TINY, 3)
    grams = [bytes(some) for some in product(b"\n abcrxz", repeat=3)]
    found = model.probabilities(np.array([number(gram) for gram in grams], np.uint64))
    expected = [kneser_ney(TINY, 3, gram) for gram in grams]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_probabilities_of_all_bytes_sum_to_one(length: int) -> None:
    model = learnt(TINY, length)
    contexts = [*windows([*TINY, "never met: zzz"], length), np.uint64(256**length - 1)]
    ends = np.arange(256, dtype=np.uint64)
    grams = (np.array(contexts, np.uint64)[:, None] & ~np.uint64(255)) | ends
    sums = model.probabilities(grams.ravel()).reshape(grams.shape).sum(axis=1)
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def test_a_text_begins_after_a_newline() -> None:
    found = [int(gram).to_bytes(4, "big") for gram in windows(["ab", "", "c"], 4)]
    assert found == [b"\0\0\na", b"\0\nab", b"\0\0\nc"]


def test_bits_are_the_mean_over_bytes() -> None:
    model = learnt(TINY, 4)
    grams = windows(["cab", "ban"], 4)
    expected = -np.log2(model.probabilities(grams)).mean()
    assert model.bits(["cab", "ban"]) == pytest.approx(expected, rel=1e-12)


def test_n_grams_refuse_what_has_no_bytes() -> None:
    with pytest.raises(ValueError, match="1 to 8 bytes, got 9"):
        learnt(["a"], 9)
    with pytest.raises(ValueError, match="at least a byte"):
        learnt(["", ""])
    with pytest.raises(ValueError, match="at least a byte"):
        learnt(["a"]).bits([])


# Texts


def test_words_entropy_and_distinct_runs() -> None:
    assert words("It's a test, a Test of wor") == ["it", "s", "a", "test", "a", "test", "of"]
    assert entropy("aabbccdd") == pytest.approx(2)
    assert entropy([]) == 0
    assert distinct([["a", "b", "a", "b"], ["a", "b"]], 2) == pytest.approx(2 / 4)
    assert distinct([["a"]], 3) == 0


def test_openings_begin_with_paragraphs_and_do_not_overlap() -> None:
    document = "one two\nthree\nfour five\nsix"
    assert openings([document], 7) == ["one two", "three\nf"]
    assert openings([document], 5) == ["one t", "three", "four "]
    assert openings(["short"], 9) == []
    assert alternate([document, "x"], 0) == ["one two\nfour five", "x"]
    assert alternate([document, "x"], 1) == ["three\nsix"]


def test_nonsense_is_less_likely_than_shuffled_words_than_sentences(text_judge: TextJudge) -> None:
    rng = random.Random(0)
    real = text_judge.real("held-out", 24, 250)
    shuffled = [" ".join(rng.sample(parts := text.split(" "), len(parts))) for text in real]
    letters = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=250)) for _ in real]
    scores = [text_judge.score(texts) for texts in (real, shuffled, letters)]
    for measure in ("nll", "excess"):
        values = [score[measure] for score in scores]
        assert values == sorted(values), measure
        assert values[2] > values[1] + 1, measure
        assert values[1] > values[0] + 0.2, measure
    assert scores[0]["words"] > 0.9 > 0.3 > scores[2]["words"]


def test_a_repeated_sentence_is_likely_but_loses(text_judge: TextJudge) -> None:
    real = text_judge.real("held-out", 24, 250)
    sentence = text_judge.real("train", 1, 250)
    one, many = (text_judge.score(texts) for texts in (sentence * 24, real))
    assert one["nll"] < many["nll"]
    assert one["excess"] > many["excess"] + 1
    assert one["reverse"] > many["reverse"] + 1
    assert one["entropy"] < many["entropy"]
    assert one["distinct_2"] < 0.1 < many["distinct_2"]


def test_a_text_judge_refuses_images_and_silence(text_judge: TextJudge) -> None:
    assert isinstance(text_judge, Judge)
    with pytest.raises(SamplingError, match="must be of a text model"):
        scores_of(text_judge, np.zeros((2, 8, 8, 3), np.uint8), [0, 1])
    with pytest.raises(ValueError, match="at least a byte"):
        text_judge.score(["", ""])
    with pytest.raises(ValueError, match=r"no held-out document has \d+ characters"):
        text_judge.real("held-out", 1, 10**7)


def test_real_texts_stand_beside_the_written_ones(text_judge: TextJudge) -> None:
    script = import_module("measure_prose")
    columns = script.table(text_judge, ["Return the value of the given item. " * 6] * 8)
    assert list(columns) == ["held-out", "training", "generated"]
    assert {scores["texts"] for scores in columns.values()} == {8}
    # Copies of the training documents are likelier than any new text can be.
    assert columns["training"]["nll"] < columns["held-out"]["nll"]
    assert columns["training"]["words"] == 1


# Images


def features(count: int, seed: int, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, len(scale))) @ np.diag(scale)


def test_frechet_of_mixed_features_is_that_of_scipy() -> None:
    mixing = np.random.default_rng(2).normal(size=(6, 6))
    one = features(200, 0, np.linspace(0.2, 2, 6)) @ mixing
    other = features(50, 1, np.ones(6)) + 0.5
    first, second = (np.cov(some, rowvar=False) for some in (one, other))
    spread = np.trace(first + second - 2 * sqrtm(first @ second).real)
    expected = ((one.mean(axis=0) - other.mean(axis=0)) ** 2).sum() + spread
    assert frechet(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet(one, other) == pytest.approx(frechet(other, one), rel=1e-9)


def test_frechet_of_independent_features_is_the_closed_form() -> None:
    # Signs in all combinations: mean 0, no correlation, and variance 16/15 by cov's denominator.
    signs = np.array(list(product((-1.0, 1.0), repeat=4)))
    scale, shift = np.array([1.0, 2.0, 0.5, 3.0]), np.array([0.0, 1.0, 2.0, -1.0])
    expected = (shift**2).sum() + 16 / 15 * ((1 - scale) ** 2).sum()
    assert frechet(signs, signs * scale + shift) == pytest.approx(expected, rel=1e-9)


def test_precision_and_coverage_of_known_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(100, 4, generator=generator)
    real = torch.cat([near, near + 1000])
    assert precision_and_coverage(real, real) == (1, 1)
    assert precision_and_coverage(real, real + 500) == (0, 0)
    assert precision_and_coverage(real, near) == (1, 0.5)
    precision, coverage = precision_and_coverage(real, near[:1].expand(200, 4))
    assert precision == 1
    assert 0 < coverage < 0.2
    half = torch.cat([near, near + 500])
    assert precision_and_coverage(real, half) == (0.5, 0.5)


def test_nearest_images_are_those_of_the_same_class() -> None:
    generator = torch.Generator().manual_seed(0)
    # Mostly paper, as letters are: sums of squares are large beside what is to be told apart.
    images = torch.randint(200, 256, (40, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(40) % 4
    others = Labelled(images[20:], labels[20:])
    distance = nearest(images, labels, others)
    assert (distance[20:] == 0).all()
    for index in range(20):
        own = images[20:][labels[20:] == labels[index]].double()
        squares = ((own - images[index].double()) ** 2).mean(dim=(1, 2))
        assert distance[index] == pytest.approx(float(squares.min().sqrt()), rel=1e-5)
    moved = images[20:].clone()
    moved[:, 0, 0] ^= 1  # the smallest change is no copy
    assert nearest(moved, labels[20:], others) == pytest.approx(np.full(20, 1 / 32))


def test_grey_images_are_means_over_colours_and_squares() -> None:
    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    pixels[0, :2, :2] = (0, 90, 210)
    assert grey(pixels, 2).tolist() == [[[100, 0], [0, 0]]]
    assert grey(pixels, 4)[0, :2, :2].tolist() == [[100, 100], [100, 100]]


def test_digits_are_judged_real_before_collapsed_before_noise(
    digits_judge: ImageJudge, held_out: Labelled
) -> None:
    count = len(held_out.images)
    first = {int(label): held_out.images[held_out.labels == label][0] for label in range(10)}
    collapsed = torch.stack([first[int(label)] for label in held_out.labels])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 8, 8), dtype=torch.uint8, generator=generator)
    real, one_each, random_ones = (
        digits_judge.compare(Labelled(images, held_out.labels))
        for images in (held_out.images, collapsed, noise)
    )
    assert real["frechet"] * 5 < one_each["frechet"] < random_ones["frechet"]
    assert real["accuracy"] > 0.95
    assert random_ones["accuracy"] < 0.3
    assert real["coverage"] > 0.9 > 0.3 > one_each["coverage"]
    assert random_ones["novelty"] > 2 * real["novelty"]
    assert real["copies"] == 0


def test_copies_of_training_images_are_counted(digits_judge: ImageJudge) -> None:
    images, labels = digits_judge.trained.images[:60], digits_judge.trained.labels[:60]
    pixels = images[..., None].repeat(1, 1, 1, 3).numpy()
    scores = scores_of(digits_judge, pixels, labels.tolist())
    assert scores["novelty"] == 0
    assert scores["copies"] == 60
    assert scores["accuracy"] > 0.9


def test_an_image_judge_refuses_texts_and_missing_labels(digits_judge: ImageJudge) -> None:
    with pytest.raises(SamplingError, match="must be of an image model"):
        scores_of(digits_judge, ["text"], None)
    with pytest.raises(SamplingError, match="2 images must come with a label each, got none"):
        scores_of(digits_judge, np.zeros((2, 8, 8, 3), np.uint8), None)
    with pytest.raises(ValueError, match="got 1"):
        digits_judge.score(np.zeros((2, 8, 8, 3), np.uint8), [0])


def test_a_classifier_depends_on_its_seed_alone(held_out: Labelled) -> None:
    state = torch.get_rng_state()
    models = []
    for seed in (1, 1, 2):
        torch.rand(3)
        model = Classifier(8, classes=10, widths=(4, 8), paper=0)
        before = torch.get_rng_state()
        models.append(fit(model, held_out.images, held_out.labels, 1, seed).head.weight)
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_glyphs_are_drawn_and_learnt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="its fonts are what a bare machine has")
    faces = dict(islice(glyphs.installed("train", partial=True).items(), 12))
    monkeypatch.setattr(glyphs, "installed", lambda use, partial: faces)
    monkeypatch.setattr(judges, "TRAINED_VARIANTS", 1)
    judge = judges.glyphs(tmp_path / "kept.npz", partial=True)
    monkeypatch.setattr(judges, "dataset", None)  # nothing is drawn any more
    again = judges.glyphs(tmp_path / "kept.npz", partial=True)
    chosen = slice(None, None, 7)
    own = Labelled(judge.trained.images[chosen], judge.trained.labels[chosen])
    assert judge.compare(own) == again.compare(own)
    assert judge.compare(own)["copies"] == len(own.images)
    noise = Labelled(own.images.flatten().roll(500).reshape(own.images.shape), own.labels)
    assert judge.compare(own)["frechet"] < judge.compare(noise)["frechet"]


# What is kept


def test_arrays_are_made_once_for_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[int] = []

    def make() -> cache.Arrays:
        made.append(len(made))
        return {"count": np.array(len(made))}

    path = tmp_path / "folder" / "some.npz"
    counts = [int(cache.kept(path, key, make, "making")["count"]) for key in ("a", "a", "b", "b")]
    assert counts == [1, 1, 2, 2]
    path.write_bytes(path.read_bytes()[:200])  # cut off
    assert int(cache.kept(path, "b", make, "making")["count"]) == 3
    assert [each.name for each in path.parent.iterdir()] == ["some.npz"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count(f"making; kept in {path}") == 3


def test_what_cannot_be_kept_is_made_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arrays = cache.kept(tmp_path / "file" / "x.npz", "a", lambda: {"one": np.ones(1)}, "making")
    assert arrays["one"] == 1
    assert "set MDEXPORT_CACHE to a folder that can be written" in capsys.readouterr().err


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MDEXPORT_CACHE", raising=False)
    assert cache.folder() == tmp_path / "mdexport"
    monkeypatch.setenv("MDEXPORT_CACHE", str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"
