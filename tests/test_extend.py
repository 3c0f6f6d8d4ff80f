"""docs/extend.md: the four scripts train at tiny sizes, and what they bring is in the run."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import support.run
import vqrae
from conftest import ROOT

SECTIONS = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", (ROOT / "docs/extend.md").read_text(encoding="utf-8"),
                           re.DOTALL | re.MULTILINE))


@pytest.fixture
def run_section(short_run, tmp_path, monkeypatch):
    """Runs a section's script with the arguments of a short run and more; returns its folder, its log and summary."""
    for module, name in ((vqrae, "Encoder"), (vqrae, "load_encoder"), (vqrae, "stage1_loss"),
                         (support.run, "open_images"), (vqrae, "QUANTIZERS")):
        value = getattr(module, name)
        monkeypatch.setattr(module, name, dict(value) if isinstance(value, dict) else value)  # and back in the end
    for name in ("presets", "unitok", "export", "train"):  # to be imported as if this were a program of its own
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(title, *more):
        monkeypatch.setattr(sys, "argv", ["mine.py", *short_run, *more])
        exec(compile(SECTIONS[title], "mine.py", "exec"), {"__name__": "__main__"})
        out = tmp_path / "run"
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return out, lines, json.loads((out / "summary.json").read_text())

    return run


def test_the_page_has_four_scripts_of_about_ten_lines():
    assert list(SECTIONS) == ["An encoder", "A quantizer", "A loss", "Data"]
    for code in SECTIONS.values():
        lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
        assert len(lines) <= 18 and max(map(len, lines)) <= 120


def test_the_encoder_of_the_page_is_trained_and_saved(run_section):
    out, lines, _ = run_section("An encoder", "--encoder-learning-rate", "1e-3")
    saved = load_file(out / "model.safetensors")
    assert "encoder.layers.0.weight" in saved and "encoder.blocks.0.norm1.weight" not in saved
    assert np.isfinite(lines[-1]["val_psnr"])
    model = vqrae.VQRAE.from_pretrained(out)  # by the lines of the page, which are still in force
    assert model.encode(torch.rand(2, 3, 16, 16))[0].shape == (2, 4, 192)


def test_the_quantizer_of_the_page_uses_its_codes_and_finds_them_again(run_section):
    out, lines, summary = run_section("A quantizer", "--quantizer", "fsq", "--codebook-size", "64", "--codebook-dim",
                                      "3")
    assert (summary["quantizer"], summary["codebook_size"]) == ("fsq", 64) and lines[-1]["commitment"] == 0
    quantizer = vqrae.VQRAE.from_pretrained(out).quantizer
    z_q, indices, *_ = quantizer(torch.randn(500, 3))
    assert quantizer.sizes() == (64, 0) and set(indices.tolist()) <= set(range(64)) and len(indices.unique()) > 30
    assert torch.allclose(quantizer.lookup(indices), z_q, atol=1e-6)
    assert len(quantizer.lookup(torch.arange(64)).unique(dim=0)) == 64


def test_the_loss_of_the_page_is_in_the_log_and_in_the_sum(run_section):
    _, lines, _ = run_section("A loss")
    for line in lines:
        parts = line["mse"] + line["codebook"] + line["commitment"] + 1.1 * line["perceptual"] + 0.5 * line["l1"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4) and line["l1"] > 0


def test_the_data_of_the_page_are_what_is_trained_and_held_out(run_section, tmp_path):
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "digits.npz", **{name: draw.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
                                         for name, count in (("train", 9), ("val", 5))})
    _, _, summary = run_section("Data", "--data", str(tmp_path / "digits.npz"))
    assert summary["training images"] == 9 and summary["val_images"] == 5
