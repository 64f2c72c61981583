"""The choice of ``mdruntime tune`` beside a bundle: kept, found again, and refused when wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mdruntime
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.cli import main
from mdruntime.errors import BundleError, SamplingError
from mdruntime.machine import this_machine
from mdruntime.sampling import Sampling
from mdruntime.tuned import TUNED_FORMAT, Tuned, read_tuned, save_tuned, tuned_path

Capture = pytest.CaptureFixture[str]
CHOSEN = Sampling(rounds=3, order="moment", substeps=2, guidance=1.0)


@pytest.fixture(scope="module")
def place(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a parent folder of its own."""
    return Path(shutil.copytree(digits_bundle, tmp_path_factory.mktemp("place") / "digits"))


@pytest.fixture
def bundle(place: Path) -> Bundle:
    tuned_path(place).unlink(missing_ok=True)
    return open_bundle(place, check=False)


def choice(of: Bundle, **changes: Any) -> Tuned:
    made = Tuned(
        format=TUNED_FORMAT,
        bundle=of.manifest.digest,
        name="moment-3",
        sampling=CHOSEN,
        predicted_ms=12,
        quality=3.25,
        measure="frechet",
        batch=1,
        machine=this_machine("cpu"),
        precision="fp32",
    )
    return replace(made, **changes)


def test_what_is_saved_stands_beside_the_bundle_and_is_read_back(bundle: Bundle) -> None:
    assert read_tuned(bundle) is None
    path = save_tuned(choice(bundle), bundle.folder)
    assert path == bundle.folder.parent / "digits.tuned.json"
    found = read_tuned(bundle)
    assert found is not None
    assert replace(found, digest="") == choice(bundle)
    assert [file.name for file in sorted(path.parent.iterdir())] == ["digits", "digits.tuned.json"]
    raw = path.read_bytes()
    assert raw == save_tuned(found, bundle.folder).read_bytes()
    open_bundle(bundle.folder)  # all hashes as they were


def test_the_bundle_is_found_from_inside_it_and_through_links(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tuned(choice(bundle), bundle.folder)
    monkeypatch.chdir(bundle.folder)
    assert read_tuned(open_bundle(".", check=False)) is not None
    (tmp_path / "link").symlink_to(bundle.folder)
    assert read_tuned(open_bundle(tmp_path / "link", check=False)) is not None


def test_the_choice_is_the_default_unless_it_is_not_wanted(bundle: Bundle) -> None:
    with mdruntime.load(bundle.folder) as plain:
        default = plain.sampling()
        assert default == plain.manifest.presets["default"] != CHOSEN
        with pytest.raises(SamplingError, match="got 'tuned'; 'mdruntime tune' makes that one"):
            plain.sampling("tuned")
    save_tuned(choice(bundle), bundle.folder)
    with mdruntime.load(bundle.folder) as pipeline:
        for used in (pipeline, pipeline.clone()):
            assert used.sampling() == used.sampling("tuned") == CHOSEN
            assert used.sampling(rounds=2) == CHOSEN.but(rounds=2)
            assert used.sampling("best") == used.manifest.presets["best"]
        counted = pipeline.counted()
        pipeline.generate([1])
        assert len(counted.shapes) == 6
    with mdruntime.load(bundle.folder, tuned=False) as pipeline:
        assert pipeline.sampling() == default


def test_text_bundles_have_a_choice_too(
    small_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small_bundle("mdlm"), tmp_path / "mdlm"))
    save_tuned(choice(open_bundle(folder, check=False)), folder)
    with mdruntime.load_text(folder, check=False) as pipeline:
        assert pipeline.sampling() == CHOSEN
    with mdruntime.load_text(folder, check=False, tuned=False) as pipeline:
        assert pipeline.sampling() == pipeline.manifest.presets["default"]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "is damaged": lambda raw: raw[:100],
    "is damaged (it has no format number)": lambda raw: b"[]",
    "has format 7, this mdruntime reads 2": lambda raw: raw.replace(b'"format": 2', b'"format": 7'),
    "was altered": lambda raw: raw.replace(b'"rounds": 3', b'"rounds": 4'),
    "is damaged or was altered": lambda raw: raw.replace(b"  ", b" "),
    "(its digest differs)": lambda raw: raw.replace(
        b'"predicted_ms": 12.0', b'"predicted_ms": NaN'
    ),
}


@pytest.mark.parametrize("text", DAMAGE)
def test_damaged_files_are_refused_with_their_remedy(
    bundle: Bundle, capsys: Capture, text: str
) -> None:
    path = save_tuned(choice(bundle), bundle.folder)
    raw = path.read_bytes()
    path.write_bytes(DAMAGE[text](raw))
    assert path.read_bytes() != raw
    with pytest.raises(BundleError) as caught:
        mdruntime.load(bundle.folder)
    assert text in str(caught.value)
    for remedy in (str(path), "run 'mdruntime tune' again, delete the file", "--no-tuned"):
        assert remedy in str(caught.value)
    mdruntime.load(bundle.folder, tuned=False).close()
    for command in ("info", "generate"):
        target = str(path.with_name("x.png"))
        more = ["-o", target] if command == "generate" else []
        assert main([command, str(bundle.folder), *more]) == 1
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert not Path(target).exists()


def test_other_builds_and_unknown_options_are_refused(bundle: Bundle) -> None:
    save_tuned(choice(bundle, bundle="0" * 64), bundle.folder)
    with pytest.raises(BundleError, match="was made for another build of this bundle; run"):
        read_tuned(bundle)
    path = save_tuned(choice(bundle), bundle.folder)
    data = json.loads(path.read_text(encoding="utf-8"))
    for changes, text in (
        ({"rounds": 0}, "rounds must be between 1 and 4096, got 0"),
        ({"magic": 1}, "has the unknown field 'magic'"),
    ):
        save_raw(path, {**data, "sampling": {**data["sampling"], **changes}})
        with pytest.raises(
            BundleError, match=rf"cannot be used \(.*{text}\); run 'mdruntime tune'"
        ):
            read_tuned(bundle)


def save_raw(path: Path, data: dict[str, Any]) -> None:
    """Write a file that is whole, whatever it says."""
    from mdruntime.tuned import _encode, _sha256

    rest = {key: value for key, value in data.items() if key != "digest"}
    path.write_bytes(_encode({**rest, "digest": _sha256(rest)}))


def test_no_half_written_file_is_left(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tuned(choice(bundle), bundle.folder)
    raw = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_tuned(choice(bundle, name="other"), bundle.folder)
    assert path.read_bytes() == raw
    assert not list(path.parent.glob(".*"))


def test_a_folder_that_cannot_be_written_to_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdruntime.tuned.os.access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"cannot be written to; copy .* --dry-run"):
        save_tuned(choice(bundle), bundle.folder)
    assert read_tuned(bundle) is None


def generated(bundle: Bundle, capsys: Capture, *flags: str) -> tuple[str, str]:
    target = bundle.folder.parent / "x.png"
    assert main(["generate", str(bundle.folder), "-l", "3", "-o", str(target), *flags]) == 0
    target.unlink()
    out, err = capsys.readouterr()
    return out, err


def test_generate_says_whose_choice_it_uses(bundle: Bundle, capsys: Capture) -> None:
    assert generated(bundle, capsys)[1] == ""
    save_tuned(choice(bundle), bundle.folder)
    made_for = choice(bundle).made_for
    out, err = generated(bundle, capsys)
    assert err == f"sampler 'moment-3', tuned for {made_for}\n"
    assert "6 passes" in out
    assert generated(bundle, capsys, "--preset", "best")[1] == ""
    assert generated(bundle, capsys, "--no-tuned")[1] == ""
    assert generated(bundle, capsys, "-q") == ("", "")
    facts = json.loads(generated(bundle, capsys, "--json")[0])
    assert facts["tuned"]["name"] == "moment-3"
    assert facts["tuned"]["made_here"] is True
    assert facts["sampling"]["rounds"] == 3
    assert json.loads(generated(bundle, capsys, "--json", "--no-tuned")[0])["tuned"] is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"threads": 97}, "97 threads"),
        ({"provider": "cuda"}, "on cuda"),
        ({"device": "Abacus 3000"}, "Abacus 3000"),
    ],
)
def test_a_choice_made_for_something_else_is_used_but_never_silently(
    bundle: Bundle, capsys: Capture, changes: dict[str, Any], text: str
) -> None:
    save_tuned(choice(bundle, machine=replace(this_machine("cpu"), **changes)), bundle.folder)
    out, err = generated(bundle, capsys)
    assert "6 passes" in out
    (line,) = err.splitlines()
    tuned, here = line.split("; this is ")
    assert text in tuned
    assert here.startswith("cpu, ")
    assert here.endswith("'mdruntime tune' measures here")
    facts = json.loads(generated(bundle, capsys, "--json")[0])
    assert facts["tuned"]["made_here"] is False
    assert main(["info", str(bundle.folder)]) == 0
    assert text in capsys.readouterr().out


def test_info_shows_the_choice(bundle: Bundle, capsys: Capture) -> None:
    assert main(["info", str(bundle.folder)]) == 0
    assert "tuned      no; see 'mdruntime tune'" in capsys.readouterr().out
    assert main(["info", str(bundle.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] is None
    save_tuned(choice(bundle), bundle.folder)
    assert main(["info", str(bundle.folder)]) == 0
    out = capsys.readouterr().out
    assert "tuned      moment-3, 12 ms predicted, frechet 3.25; for batch 1 on cpu, " in out
    assert main(["info", str(bundle.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"]["sampling"]["rounds"] == 3


def test_edit_uses_the_choice_too(bundle: Bundle, capsys: Capture) -> None:
    save_tuned(choice(bundle), bundle.folder)
    image, target = (str(bundle.folder.parent / name) for name in ("x.png", "y.png"))
    generate = ["generate", str(bundle.folder), "-l", "3", "-q", "--scale", "1", "-o", image]
    assert main(generate) == 0
    edit = ["edit", str(bundle.folder), "-i", image, "--fit", "--strength", "0.5", "-o", target]
    assert main(edit) == 0
    assert capsys.readouterr().err.startswith("sampler 'moment-3', tuned for batch 1")
    assert main([*edit, "--no-tuned"]) == 0
    assert capsys.readouterr().err == ""
    for name in (image, target):
        Path(name).unlink()
