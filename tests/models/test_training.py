"""The training scripts of glyphs and prose: seconds of them, stopped and resumed."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import glyphs
import mdzoo
import prose
import train_glyph_tokenizer
import train_glyphs
import train_prose
import training
from mdzoo.mdlm import MDLM

SENTENCES = (
    "The function returns a list of all names that are defined in the module, sorted by name.\n"
    "If the argument is not a string, an exception is raised before anything has been read.\n"
    "A file that is open is closed when the interpreter exits, whatever has happened before it.\n"
)


def steps(output: str, stage: str) -> list[int]:
    """Return the numbers of steps that a stage reported."""
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith(stage)]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of a second passes whenever somebody looks, however busy the machine is."""
    ticks = itertools.count()
    frozen = SimpleNamespace(perf_counter=lambda: next(ticks) / 5)
    monkeypatch.setattr(training, "time", frozen)


def run(monkeypatch: pytest.MonkeyPatch, script: object, folder: Path, *arguments: str) -> None:
    places = ["--work", str(folder / "work"), "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", ["script", "--partial", *places, *arguments])
    script.main()  # type: ignore[attr-defined]


def test_glyphs_are_trained_in_two_stages_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = [face for face in glyphs.table() if face.package == "matplotlib"][::3]
    faces[0] = replace(faces[0], use="held-out")
    monkeypatch.setattr(glyphs, "table", lambda: tuple(faces))
    setting = replace(train_glyphs.SETTINGS["cpu"], variants=1)
    monkeypatch.setattr(train_glyphs, "SETTINGS", {"cpu": setting})
    monkeypatch.setattr(train_glyphs, "BATCH", 4)
    monkeypatch.setattr(train_glyph_tokenizer, "BATCH", 4)
    arguments = ("--minutes-tokenizer", "0.02", "--minutes-denoiser")
    run(monkeypatch, train_glyphs, tmp_path, *arguments, "0.02")
    first = capsys.readouterr().out
    assert steps(first, "tokenizer")[-1] > 0
    run(monkeypatch, train_glyphs, tmp_path, *arguments, "0.04")
    second = capsys.readouterr().out
    assert steps(second, "denoiser")[-1] > steps(first, "denoiser")[-1]
    entry = mdzoo.CATALOGUE["glyphs"]
    files = mdzoo.Sources(
        checkpoint=tmp_path / "glyphs.safetensors",
        tokenizer=tmp_path / "glyphs-tokenizer.safetensors",
    )
    assert mdzoo.load(entry, files).denoiser.config == entry.config


def test_prose_is_trained_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = tuple(prose.Document(str(number), SENTENCES * 10) for number in range(3))
    monkeypatch.setattr(prose, "corpus", lambda use, partial: documents)
    small = train_prose.Setting(96, 32, width=32, depth=1, batch=4, rate=1e-2)
    monkeypatch.setattr(train_prose, "SETTINGS", {"cpu": small})
    run(monkeypatch, train_prose, tmp_path, "--minutes", "0.03")
    first = capsys.readouterr().out
    run(monkeypatch, train_prose, tmp_path, "--minutes", "0.1")
    second = capsys.readouterr().out
    assert steps(second, "denoiser")[-1] > steps(first, "denoiser")[-1]
    losses = [float(text.split("held-out ")[1].split()[0]) for text in (first, second)]
    assert losses[1] < losses[0]


def test_the_bound_of_prose_is_exact_where_every_number_is_hidden_once() -> None:
    """Against the mean over all numbers of hidden tokens of a model that sees none of them."""
    config = train_prose.Setting(16, 8, width=32, depth=1, batch=8, rate=0.1).denoiser
    torch.manual_seed(0)
    model = MDLM(config).eval()
    torch.nn.init.zeros_(model.head.weight)  # then p does not depend on what is visible
    torch.nn.init.normal_(model.head.bias)
    tokens = torch.randint(16, (1, 8)).repeat(8, 1)  # eight numbers of hidden tokens
    log_p = model.head.bias[:16].log_softmax(0)
    generator = torch.Generator().manual_seed(0)
    estimates = [float(train_prose.bound(model, tokens, generator).detach()) for _ in range(400)]
    exact = -float(log_p[tokens[0]].mean().detach())
    assert sum(estimates) / len(estimates) == pytest.approx(exact, abs=0.03)


def test_every_number_of_hidden_tokens_is_as_likely() -> None:
    tokens = torch.zeros(8, 8, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    counts = [train_prose.hide(tokens, 9, generator)[1].sum(1) for _ in range(50)]
    assert torch.stack(counts).sort(dim=1).values.eq(torch.arange(1, 9)).all()


def test_few_tokens_are_hidden_at_first_and_any_number_from_half_time_on() -> None:
    assert train_prose.largest_share(0) == pytest.approx(0.3)
    assert train_prose.largest_share(0.25) == pytest.approx(0.65)
    assert train_prose.largest_share(0.5) == train_prose.largest_share(1) == 1
    assert train_prose.window(0, 128) == 32
    assert train_prose.window(0.5, 128) == 128


MARKUP = """
Title
=====

.. function:: open(name)
   :async:

   Return a :class:`~io.TextIOWrapper` for *name*, which must be the ``str`` of a path, or raise.

   .. note:: short

::

   code = "this is code and must not be taken for a sentence of anything at all."

The following example opens a file and reads all of what it has to say, line by line::

   with open("name") as file: this is code and must not be taken for a sentence, not at all.

======  =====
Column  Other
======  =====

* See `the tutorial <https://example.org>`_ for how files are opened and closed [1]_ in practice.
"""


def test_markup_code_and_tables_are_taken_out_of_the_corpus() -> None:
    assert list(prose.paragraphs(MARKUP)) == [
        "Return a TextIOWrapper for name, which must be the str of a path, or raise.",
        "The following example opens a file and reads all of what it has to say, line by line:",
        "See the tutorial for how files are opened and closed in practice.",
    ]


def test_missing_documentation_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(prose.CorpusError, match=r"apt-get install python3\.11-doc"):
        list(prose.documentation(tmp_path))
