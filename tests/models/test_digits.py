"""The shipped digits are recognised, and are no copies of the training images."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mdzoo

ROOT = Path(__file__).parents[2]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_generated_digits_are_recognised_and_new(digits_bundle: Path) -> None:
    script = load_script(ROOT / "examples" / "measure_digits.py")
    quality = script.measure(digits_bundle, images=1000, seed=0)
    assert quality.held_out_accuracy >= 0.97
    assert quality.generated_accuracy >= 0.95
    assert quality.novelty >= 0.8
    assert quality.copies == 0


def test_held_out_images_are_never_trained_on() -> None:
    script = load_script(ROOT / "models" / "train_digits.py")
    images, labels, test_images, test_labels = script.split()
    assert (len(images), len(test_images)) == (1442, 355)
    assert set(labels) == set(test_labels) == set(range(10))
    train = {image.tobytes() for image in images}
    assert not any(image.tobytes() in train for image in test_images)
    assert images.max() == 16


def test_shipped_weights_beat_an_untrained_model_on_held_out_images() -> None:
    script = load_script(ROOT / "models" / "train_digits.py")
    _, _, images, labels = (torch.from_numpy(part) for part in script.split())
    entry = mdzoo.CATALOGUE["digits"]
    trained = mdzoo.load_denoiser(entry, mdzoo.Sources())
    assert trained.config == script.CONFIG
    assert script.held_out_loss(trained, images, labels) < 1.45
    untrained = mdzoo.load_denoiser(entry, mdzoo.Sources(random_seed=0))
    assert script.held_out_loss(untrained, images, labels) > 2.5


def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script(ROOT / "models" / "train_digits.py")
    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script, "INTERVAL", 2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = script.train(4, tmp_path / "whole")
    script.train(4, tmp_path / "parts", stop=2)
    resumed = script.train(4, tmp_path / "parts")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
