"""The README is true: its Python runs, its tables are the code's, its pictures are there."""

import re
from pathlib import Path

import pytest

import mdzoo
from mdruntime.guidance import GUIDANCE_SCHEDULES
from mdruntime.order import HYBRID, ORDERS
from mdruntime.sampling import Sampling
from mdruntime.session import PROVIDERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(digits_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "quickstart/digits" in source
    names: dict[str, object] = {}
    exec(source.replace("quickstart/digits", str(digits_bundle)), names)
    assert getattr(names["images"], "shape", None) == (2, 8, 8, 3)
    assert getattr(names["best"], "shape", None) == (8, 8, 8, 3)
    assert getattr(names["filled"], "shape", None) == (1, 8, 8, 3)
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 0")


@pytest.mark.parametrize("name", [*ORDERS, HYBRID, *GUIDANCE_SCHEDULES, *PROVIDERS])
def test_every_name_a_user_may_type_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in README or f'"{name}"' in README


@pytest.mark.parametrize("name", list(Sampling.__dataclass_fields__))
def test_every_option_is_in_the_readme(name: str) -> None:
    assert re.search(rf"\b{name}\b", README)


def test_the_table_of_models_is_the_catalogues() -> None:
    from mdexport.cli import model_table

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
