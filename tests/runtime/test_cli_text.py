"""The command line on text bundles: texts on stdout, all else on stderr, errors in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

import mdruntime
from mdruntime.bundle import MANIFEST, file_spec
from mdruntime.cli import main
from mdruntime.manifest import TextSpec, dump
from mdruntime.text import HIDDEN

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(small_bundle: Callable[[str], Path]) -> Path:
    return small_bundle("mdlm")


@pytest.fixture
def with_tokenizer(bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function from the content of tokenizer.json to a bundle that has it."""

    def build(content: str) -> Path:
        folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
        (folder / "tokenizer.json").write_text(content)
        manifest = mdruntime.open_bundle(folder).manifest
        files = {**manifest.files, "tokenizer.json": file_spec(folder / "tokenizer.json")}
        manifest = replace(manifest, text=TextSpec("tokenizer.json"), files=files)
        (folder / MANIFEST).write_bytes(dump(manifest))
        return folder

    return build


def ran(capsys: Capture, *arguments: object) -> tuple[Any, str, str]:
    """Run the command line and return its exit code, stdout and stderr."""
    try:
        code: Any = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_texts_go_to_stdout_and_facts_to_stderr(bundle: Path, capsys: Capture) -> None:
    with mdruntime.load_text(bundle) as writer:
        expected = writer.generate(["Hi", "Hi", "Ho", "Ho"], seed=4, first_index=3)
    common = ("generate", bundle, "-p", "Hi", "-p", "Ho", "-n", 2, "--seed", 4)
    code, out, err = ran(capsys, *common, "--first-index", 3, "--batch-size", 3)
    assert code == 0
    assert out == "\n---\n".join(expected) + "\n"
    facts, warning = err.splitlines()
    assert facts.startswith("4 text(s) in ")
    assert len(facts) <= 80
    assert warning == "the weights are random: what you see is noise"
    code, again, err = ran(capsys, *common, "--first-index", 3, "--quiet")
    assert (code, again, err) == (0, out, "")


def test_json_is_one_object(bundle: Path, capsys: Capture) -> None:
    flags = ("--infill", "a___b___c", "--gap", 2, "--json", "--rounds", 9)
    code, out, err = ran(capsys, "generate", bundle, *flags)
    assert (code, err, out.count("\n")) == (0, "", 1)
    facts = json.loads(out)
    assert facts["infill"] == "a___b___c"
    assert facts["length"] == 7
    assert facts["sampling"]["rounds"] == 9
    assert 0 < facts["passes"] <= 4
    with mdruntime.load_text(bundle) as writer:
        assert facts["texts"] == writer.infill("a___b___c", gap=2, rounds=9)


def test_a_stream_shows_every_pass_on_stderr(bundle: Path, capsys: Capture) -> None:
    flags = ("--stream", "--rounds", 4, "--schedule", "linear", "--length", 12, "-p", "0123", "-q")
    code, out, err = ran(capsys, "generate", bundle, *flags)
    assert code == 0
    assert HIDDEN not in out
    heads = [line for line in err.splitlines() if line.startswith("--- pass")]
    assert heads == [f"--- pass {i}, {8 - 2 * i} tokens hidden" for i in range(1, 5)]
    assert err.count(HIDDEN) == 6 + 4 + 2
    assert err.count("0123") == 4


def test_texts_are_written_to_a_file(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "texts.txt"
    code, out, err = ran(capsys, "generate", bundle, "-n", 3, "-o", target, "--length", 9)
    assert (code, out) == (0, "")
    assert err.startswith(f"wrote {target}: 3 text(s) in")
    with mdruntime.load_text(bundle) as writer:
        texts = writer.generate(count=3, length=9)
    assert target.read_bytes().decode() == "\n---\n".join(texts) + "\n"


def test_infilling_makes_as_many_texts_as_asked_for(bundle: Path, capsys: Capture) -> None:
    flags = ("--infill", "front ___ back", "-n", 3, "--gap", 5)
    code, out, _ = ran(capsys, "generate", bundle, *flags)
    texts = out.removesuffix("\n").split("\n---\n")
    assert (code, len(set(texts))) == (0, 3)
    assert all(text.startswith("front ") and text.endswith(" back") for text in texts)
    code, out, _ = ran(capsys, "generate", bundle, "--infill", "___", "--json")
    assert (code, json.loads(out)["length"]) == (0, 16)


def test_a_terminal_gets_no_control_characters(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "tab\tbell\a escape\x1b[31m\r\nline"
    code, piped, _ = ran(capsys, "generate", bundle, "-p", prompt)
    assert code == 0
    assert piped.startswith(prompt)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, shown, err = ran(capsys, "generate", bundle, "-p", prompt, "--stream")
    bare = "\N{REPLACEMENT CHARACTER}"
    for text in (shown, err):
        assert f"tab\tbell{bare} escape{bare}[31m{bare}\nline" in text
        assert not set(text) & {"\a", "\x1b", "\r", "\x9b"}


def test_a_bar_counts_tokens_where_somebody_looks(
    bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = ran(capsys, "generate", bundle, "-n", 3, "--batch-size", 2)
    assert "\r[##############################] 100%  pass " in err
    assert "\r\033[K3 text(s) in" in err
    _, _, err = ran(capsys, "generate", bundle, "-q")
    assert err == ""


BAD: list[tuple[list[str], int, str]] = [
    (["-l", "3"], 2, "this bundle makes text; leave --labels"),
    (["--animate", "x.gif"], 2, "this bundle makes text"),
    (["--negative-prompt", "x"], 2, "this bundle makes text"),
    (["--columns", "2"], 2, "this bundle makes text"),
    (["--scale", "2"], 2, "this bundle makes text"),
    (["--gap", "3"], 2, "--gap is the size of gaps"),
    (["--gap", "0", "--infill", "a___"], 2, "gap must be between 1"),
    (["--infill", "no gap"], 2, "a text with gaps must have a gap '___', got 'no gap'"),
    (["--infill", "a___", "-p", "b"], 2, "--infill says the whole text"),
    (["--infill", "a___", "--length", "9"], 2, "--infill says the whole text"),
    (["--infill", "a___", "--gap", "40"], 2, "must have at most 32 tokens, got 41"),
    (["-p", "x" * 40], 2, "a prompt must leave room on a canvas of 32 tokens, got 40"),
    (["-p", "caf\udce9"], 2, "a prompt must be valid Unicode, got 'caf\\udce9'"),
    (["--infill", "\udce9___"], 2, "must be valid Unicode"),
    (["--length", "33"], 2, "length must be between 1 and 32 tokens, got 33"),
    (["--length", "-1"], 2, "length must be between"),
    (["-n", "0"], 2, "count must be between"),
    (["-o", "missing/x.txt"], 2, "the folder 'missing' does not exist"),
    (["--order", "best"], 2, "order must be one of"),
    (["--provider", "abacus"], 4, "provider must be one of"),
]


@pytest.mark.parametrize(("flags", "code", "text"), BAD, ids=lambda value: ascii(value)[:40])
def test_bad_requests_get_one_line(
    bundle: Path, capsys: Capture, flags: list[str], code: int, text: str
) -> None:
    found, out, err = ran(capsys, "generate", bundle, *flags)
    assert (found, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert text in err


@pytest.mark.parametrize(
    "flags", [["--infill", "a___"], ["--length", "3"], ["--stream"], ["--gap=1"]]
)
def test_image_bundles_refuse_flags_of_texts(
    digits_bundle: Path, tmp_path: Path, capsys: Capture, flags: list[str]
) -> None:
    target = tmp_path / "x.png"
    code, out, err = ran(capsys, "generate", digits_bundle, "-l", 1, "-o", target, *flags)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "this bundle makes images; leave --infill, --gap, --length and --stream out" in err
    assert not target.exists()


def test_tokenizers_that_do_not_work_are_refused(
    with_tokenizer: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = {f"w{number}": number for number in range(90)}
    small = Tokenizer(models.WordLevel(words, unk_token="w0")).to_str()
    folder = with_tokenizer(small)
    code, out, err = ran(capsys, "generate", folder)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "the tokenizer has 90 ids, the model 256: they do not belong together" in err
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, out, err = ran(capsys, "generate", folder)
    assert (code, out, len(err.splitlines())) == (4, "", 1)
    assert "python -m pip install tokenizers" in err
    (folder / "tokenizer.json").write_text(small[:-9])
    code, _, err = ran(capsys, "generate", folder)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "tokenizer.json does not match manifest.json" in err


def test_a_bundle_with_a_damaged_tokenizer_is_refused(
    with_tokenizer: Callable[[str], Path], capsys: Capture
) -> None:
    code, out, err = ran(capsys, "generate", with_tokenizer('{"model": 3}'))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "tokenizer.json is not a tokenizer" in err


def test_texts_with_a_tokenizer_of_words(
    with_tokenizer: Callable[[str], Path], capsys: Capture
) -> None:
    words = {f"w{number}": number for number in range(256)}
    folder = with_tokenizer(Tokenizer(models.WordLevel(words, unk_token="w0")).to_str())
    code, out, _ = ran(capsys, "generate", folder, "-p", "w3", "--length", 3)
    assert code == 0
    assert out.startswith("w3")
