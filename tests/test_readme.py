"""The README is true: its Python runs, its tables are the code's, its pictures are there."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import mdexport
import mdzoo
from mdruntime.guidance import GUIDANCE_SCHEDULES
from mdruntime.manifest import TextSpec
from mdruntime.order import HYBRID, ORDERS
from mdruntime.sampling import Sampling
from mdruntime.session import PROVIDERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _examples() -> tuple[str, str]:
    images, texts = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return images, texts


def test_the_python_example_runs(digits_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = _examples()
    assert "quickstart/digits" in source
    names: dict[str, object] = {}
    exec(source.replace("quickstart/digits", str(digits_bundle)), names)
    assert getattr(names["images"], "shape", None) == (2, 8, 8, 3)
    assert getattr(names["best"], "shape", None) == (8, 8, 8, 3)
    assert getattr(names["edited"], "shape", None) == (2, 8, 8, 3)
    assert getattr(names["varied"], "shape", None) == (2, 8, 8, 3)
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 0")


def test_the_text_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a small random model of bytes in the place of the published one."""
    import mdruntime

    entry = mdzoo.CATALOGUE["mdlm-owt"]
    sizes = {"length": 512, "codebook": 256, "width": 32, "depth": 1, "heads": 2, "hidden": 32}
    entry = replace(entry, config=replace(entry.config, **sizes), text=TextSpec("bytes"))
    model = mdzoo.load(entry, mdzoo.Sources(random_seed=0))
    for _ in mdexport.build(model, tmp_path / "mdlm", mdexport.Options()):
        pass
    _, source = _examples()
    assert '"mdlm"' in source
    names: dict[str, list[str]] = {}
    exec(
        source.replace("import mdruntime", "").replace('"mdlm"', repr(str(tmp_path / "mdlm"))),
        {"mdruntime": mdruntime},
        names,
    )
    assert names["stories"][0].startswith("Once upon a time")
    assert len(names["free"]) == 4
    assert names["code"][0].startswith("def add(a, b):\n    return ")
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", [*ORDERS, HYBRID, *GUIDANCE_SCHEDULES, *PROVIDERS])
def test_every_name_a_user_may_type_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in README or f'"{name}"' in README


@pytest.mark.parametrize("name", list(Sampling.__dataclass_fields__))
def test_every_option_is_in_the_readme(name: str) -> None:
    assert re.search(rf"\b{name}\b", README)


def test_the_table_of_models_is_the_catalogues() -> None:
    from mdexport.cli_models import model_table

    table = re.search(r"<!-- models: begin -->\n(.*?)<!-- models: end -->", README, re.DOTALL)
    assert table is not None
    assert table[1] == model_table()
    assert all(f"`{name}`" in table[1] for name in mdzoo.CATALOGUE)


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in() -> None:
    for word in ("TODO", "FIXME", "QUALITY", "MEASURED", "DATE"):
        assert word not in README
