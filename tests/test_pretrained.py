"""data/pretrained: the models that come with the code, and the script that rounds them."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
import vqrae
from conftest import ROOT, module_of, small_model, text_lm
from support.files import PRETRAINED, InputError, digest
from support.metrics import evaluate
from support.run import INIT
from support.sets import open_images
from unitok import load_generator, load_language_model, load_tokenizer

prepare = module_of("data/pretrained/prepare.py")


@pytest.fixture
def runs(tmp_path):
    """Folders like those that three stages leave, with small models."""
    for name in ("stage1", "stage2", "ar"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps({"stage": name}))
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    small_model(seed=4, codebook_size=32, codebook_dim=8).save_pretrained(tmp_path / "runs/stage1")
    begun_with = digest((tmp_path / "runs/stage1/model.safetensors").read_bytes())
    (tmp_path / "runs/stage2/summary.json").write_text(json.dumps({INIT: begun_with}))
    tokenizer = small_model(codebook_size=32, codebook_dim=8)
    tokenizer.save_pretrained(tmp_path / "runs/stage2")
    tokenizer.save_pretrained(tmp_path / "runs/ar/vqrae")
    text_lm(codebook_size=32, image_tokens=16).save_pretrained(tmp_path / "runs/ar")
    return tmp_path / "runs"


def test_rounded_models_differ_from_the_trained_ones_by_what_half_precision_rounds(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "count_differences", lambda *_: None)
    prepare.main(["--runs", str(runs), "--out", str(tmp_path / "shipped"), "--device", "cpu"])
    shipped = load_language_model(tmp_path / "shipped/ar"), load_tokenizer(tmp_path / "shipped/stage2")
    for model, rounded in zip(load_generator(runs / "ar", "cpu"), shipped):
        for name, tensor in model.state_dict().items():
            assert torch.equal(rounded.state_dict()[name], tensor.half().float())
    for name in ("stage1", "stage2", "ar"):
        for file in ("summary.json", "metrics.jsonl"):
            assert (tmp_path / "shipped" / name / file).read_text() == (runs / name / file).read_text()
    assert not (tmp_path / "shipped/stage1/model.safetensors").exists()


def test_codes_that_rounding_changes_are_counted(runs, capsys):
    own, other = load_generator(runs / "ar", "cpu"), load_generator(runs / "ar", "cpu")
    prepare.count_differences(own, other, "cpu")
    assert "read from images: 0 of" in (said := capsys.readouterr().out) and "written from captions: 0 of" in said
    with torch.no_grad():
        other[1].project_in.bias += 1
    prepare.count_differences(own, other, "cpu")
    assert "read from images: 0 of" not in (said := capsys.readouterr().out) and "written from captions: 0 of" in said


@pytest.mark.parametrize("damage, sentence", [
    (lambda runs: small_model(seed=5, codebook_size=32, codebook_dim=8).save_pretrained(runs / "stage2"),
     "writes the codes of another tokenizer"),
    (lambda runs: small_model(seed=5, codebook_size=32, codebook_dim=8).save_pretrained(runs / "stage1"),
     "stage2 did not begin with the model in"),
    (lambda runs: (runs / "stage1/metrics.jsonl").unlink(), "stage1 has no metrics.jsonl")])
def test_runs_that_do_not_belong_together_or_lack_their_log_are_one_sentence(damage, sentence, runs, tmp_path):
    damage(runs)
    with pytest.raises(SystemExit, match=sentence):
        prepare.main(["--runs", str(runs), "--out", str(tmp_path / "shipped"), "--device", "cpu"])


# --- those that are in the repository ---


def test_shipped_models_are_in_half_precision_and_weigh_at_most_26_megabytes_together():
    weights = [load_file(PRETRAINED / name / "model.safetensors") for name in ("stage2", "ar")]
    assert {tensor.dtype for part in weights for tensor in part.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) <= 26e6


def test_the_shipped_tokenizer_is_as_good_as_its_log_says():
    model, summary = (vqrae.VQRAE.from_pretrained(PRETRAINED / "stage2"),
                      json.loads((PRETRAINED / "stage2/summary.json").read_text()))
    measured = evaluate(model, open_images(str(ROOT / "data/emoji"), "val", 64))
    assert measured["psnr"] == pytest.approx(summary["val_psnr"], abs=0.02)
    assert measured["perplexity"] == pytest.approx(summary["val_perplexity"], rel=0.01)


def test_before_anything_is_trained_there_is_a_picture_and_a_line_says_whose(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(["generate", "a red apple", "--count", "1", "--device", "cpu"])
    said = capsys.readouterr()
    assert f"out/ar is not there; using {PRETRAINED / 'ar'}, which came with the code" in said.err
    assert (tmp_path / "out/pictures/grid.png").exists()
    sample.main(["reconstruct", str(tmp_path / "out/pictures/grid.png"), "--device", "cpu"])
    assert f"out/stage1 is not there; using {PRETRAINED / 'stage2'}, which" in capsys.readouterr().err


def test_a_folder_that_is_named_is_never_replaced_by_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no model at out/ar"):
        sample.main(["generate", "a red apple", "--model", "out/ar", "--device", "cpu"])


@pytest.mark.parametrize("arguments", [["--stage", "2", "--init", "out/stage1"], ["--stage", "ar"]])
def test_training_never_reads_shipped_models(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, InputError), match="no model at '?out/stage"):
        train.main([*arguments, "--out", str(tmp_path / "run"), "--device", "cpu"])
