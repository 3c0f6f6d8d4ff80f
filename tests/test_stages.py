"""Runs that go on from a finished one, and what users of comparable projects stumbled over."""

import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import train
import unitok
import vqrae
from conftest import (assert_resume_is_exact, make_run, small_captioner, small_model, small_vit, take_steps, text_lm,
                      weights)
from presets import PRESETS
from support.files import InputError
from support.images import ImageSet


# --- images that are all alike ---


@pytest.mark.parametrize("count, extra", [(8, []), (1, ["--quantizer", "mcq", "--codebooks", "4"])], ids=str)
def test_stage_1_trains_on_images_that_are_all_alike(count, extra, short_run, tmp_path):
    (tmp_path / "white").mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), "white").save(tmp_path / f"white/{i}.png")
    train.main(short_run + ["--data", str(tmp_path / "white"), "--start-tokens", "64", *extra])
    assert all(np.isfinite(value) for value in json.loads((tmp_path / "run/summary.json").read_text()).values()
               if isinstance(value, float))


# --- codes and features ---


def test_what_a_run_leaves_has_a_reading_of_its_codes(short_run, photo_folder, tmp_path):
    train.main(short_run)
    model, images = vqrae.VQRAE.from_pretrained(tmp_path / "run"), ImageSet(photo_folder, "train", 16)
    with torch.no_grad():
        out = model(torch.cat(list(images.views())))
        inside = (out.z_q - model.project_in.bias) @ torch.linalg.pinv(model.project_in.weight).T
        read, inverted = (F.cosine_similarity(found, out.features, dim=2).mean().item() for found in (
            model.features_of(out.z_q), inside * model.feature_std + model.feature_mean))
    assert read > 0.7 and read > inverted


def test_features_may_be_those_before_the_last_norm_from_training_to_evaluation(short_run, encoder_folder, photo_folder,
                                                                                tmp_path, capsys):
    train.main(short_run + ["--features", "before_norm"])
    model, encoder = vqrae.VQRAE.from_pretrained(tmp_path / "run"), vqrae.load_encoder(encoder_folder)
    images = torch.cat(list(ImageSet(photo_folder, "val", 16).views()))
    *_, last = encoder.hidden_states(images)
    assert torch.equal(model(images).features, last[:, 1:]) and not torch.equal(encoder(images), last[:, 1:])
    capsys.readouterr()
    sample.main(["evaluate", "--model", str(tmp_path / "run"), "--data", str(photo_folder), "--device", "cpu",
                 "--teacher", str(encoder_folder), "--frechet-encoder", str(encoder_folder)])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["understanding"]
    assert rows["continuous"]["cosine"] == pytest.approx(1) and set(rows) == {"teacher", "continuous", "discrete"}
    assert rows["continuous"]["drift_before_norm"] == rows["continuous"]["drift_behind_norm"] == 0


def test_a_captioner_reads_every_encoder_on_its_own_side_of_the_norm(tmp_path):
    captioner, other = small_captioner(), small_model()
    other.encoder.config.final_norm = other.config.encoder.final_norm = "class"
    other.save_pretrained(tmp_path / "other")
    before = captioner.encoder.config.final_norm
    sample.swap_encoder(captioner, tmp_path / "other", "cpu")
    images = torch.rand(2, 3, 16, 16)
    *_, last = other.encoder.hidden_states(images)
    assert captioner.encoder.config.final_norm == before == "tokens"
    assert torch.equal(captioner.encoder(images), other.encoder.norm(last)[:, 1:])


# --- the discriminator's memory ---


def test_lecams_averages_move_once_a_step_however_many_parts_a_batch_has(short_run):
    found = []
    for parts in (1, 2, 4):
        run, stage = make_run(short_run + ["--adversarial-weight", "0.1", "--discriminator-width", "32", "--accumulate",
                                           str(parts), "--precision", "fp32"])
        stage.start()
        memory = []
        for _ in range(3):
            [terms] = take_steps(run, stage, 1)
            memory.append([run.kept["discriminator"].real_average.item(), terms["real_logit"],
                           run.kept["discriminator"].fake_average.item(), terms["fake_logit"]])
        found.append(memory)
        real = fake = 0.0
        for real_average, real_logit, fake_average, fake_logit in memory:
            real, fake = 0.999 * real + 0.001 * real_logit, 0.999 * fake + 0.001 * fake_logit
            assert [real_average, fake_average] == pytest.approx([real, fake], rel=1e-4)
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-4)
        assert other[2][0] == pytest.approx(found[0][2][0], rel=0.05)  # steps of parts differ a little


# --- going on from a finished run ---


@pytest.fixture
def finished(short_run, ar_run, caption_run, tmp_path):
    """Folders of models by kind, and arguments of a run of each stage that goes on from one."""
    small_model(codebook_size=32, codebook_dim=8).save_pretrained(tmp_path / "vqrae")
    words = text_lm().text
    sizes = dict(codebook_size=32, codebook_dim=8, quantizer="mcq", codebooks=4)
    for name, text in (("unitok", None), ("tower", text_lm(codebook_size=0).config)):
        torch.manual_seed(0)
        config = unitok.UniTokConfig(small_vit(), 16, 4, **sizes, text=text)
        unitok.UniTok(config, words).save_pretrained(tmp_path / name)
    text_lm(codebook_size=32, image_tokens=16).save_pretrained(tmp_path / "ar")
    unitok.DepthLM.around(text_lm(codebook_size=32, image_tokens=16), 4).save_pretrained(tmp_path / "depth")
    text_lm(codebook_size=32, image_tokens=9).save_pretrained(tmp_path / "ar of 9")
    small_captioner().save_pretrained(tmp_path / "caption")
    keep = ("--stage", "--data", "--batch-size", "--steps", "--log-every", "--evaluate-every", "--checkpoint-every",
            "--workers", "--device", "--tokenizer", "--out")
    runs = {"1": short_run, "2": ["--stage", "2", *short_run[2:]], "ar": ar_run, "caption": caption_run}
    runs = {stage: [word for flag in keep if flag in arguments
                    for word in (flag, arguments[arguments.index(flag) + 1])] for stage, arguments in runs.items()}
    return tmp_path, runs


def begun_from(finished, stage, name, *more):
    """Arguments of a run that goes on from a model; --out comes last."""
    folder, runs = finished
    return [*runs[stage][:-2], "--init", str(folder / name), *more, *runs[stage][-2:]]


def begin(arguments):
    """Leave a checkpoint as of a run that was stopped before its first step; its model."""
    run, prepared = make_run(arguments)
    run.begin(prepared)
    run.save()
    return run.model


KINDS = [("1", "vqrae"), ("1", "unitok"), ("1", "tower"), ("2", "vqrae"), ("2", "tower"), ("ar", "ar"),
         ("caption", "caption")]


@pytest.mark.parametrize("stage, name", KINDS)
def test_a_run_goes_on_from_the_very_weights_of_its_init_with_new_optimizers(stage, name, finished):
    run, prepared = make_run(begun_from(finished, stage, name))
    run.args.out.mkdir(exist_ok=True)
    run.begin(prepared)
    run.model.save_pretrained(run.args.out / "again")
    assert weights(run.args.out / "again") == weights(finished[0] / name) and run.done == 0
    assert not any(optimizer.state for optimizer in run.networks[0].optimizers.values())
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    take_steps(run, prepared, 2)
    assert sum(not torch.equal(p, before[name]) for name, p in run.model.named_parameters() if name in before) > 5


@pytest.mark.parametrize("stage, name", [("1", "vqrae"), ("1", "tower"), ("ar", "ar"), ("caption", "caption")])
def test_a_run_that_went_on_from_another_resumes_bit_identical(stage, name, finished):
    assert_resume_is_exact(begun_from(finished, stage, name), finished[0])


def test_a_finished_run_goes_on_for_longer(finished):
    train.main(begun_from(finished, "1", "vqrae"))
    folder, _ = finished
    more = begun_from(finished, "1", "run", "--steps", "9", "--learning-rate", "1e-4")
    train.main(more[:-1] + [str(folder / "longer")])
    summary = json.loads((folder / "longer/summary.json").read_text())
    assert summary["steps"] == 9 and summary["learning_rate"] == 1e-4 and summary["codebook_size"] == 32


@pytest.mark.parametrize("stage, name", [("1", "vqrae"), ("ar", "ar"), ("caption", "caption")])
def test_a_run_is_resumed_with_the_init_that_it_began_with_and_no_other(stage, name, finished):
    folder, runs = finished
    begun = begun_from(finished, stage, name)
    begin(begun)
    maker = {"1": lambda: small_model(5, codebook_size=32, codebook_dim=8), "ar": lambda: text_lm(
        5, codebook_size=32, image_tokens=16), "caption": lambda: small_captioner(5)}[stage]
    maker().save_pretrained(folder / "other")
    other = [str(folder / "other") if word == str(folder / name) else word for word in begun]
    with pytest.raises(SystemExit, match="with its own settings: .*SHA-256"):
        train.main([*other, "--resume"])
    shutil.copytree(folder / name, folder / "moved")
    moved = [str(folder / "moved") if word == str(folder / name) else word for word in begun]
    train.main([*moved, "--resume", "--print-config"])
    train.main([*moved, "--resume"])


def test_a_run_that_began_with_an_init_is_not_resumed_without(ar_run, finished):
    folder, runs = finished
    begin(ar_run[:-1] + [str(folder / "first")]).save_pretrained(folder / "first")
    begin(begun_from(finished, "ar", "first"))
    with pytest.raises(SystemExit, match="with its own settings: model of --init .SHA-256. is '.*' in .*, not None"):
        train.main(ar_run[:-1] + [runs["ar"][-1], "--resume"])


@pytest.mark.parametrize("stage, name", KINDS)
def test_the_settings_of_a_run_that_goes_on_are_those_of_its_model(stage, name, finished):
    run, _ = make_run(begun_from(finished, stage, name))
    sizes = getattr(run.model, "lm", run.model).config
    told = {key: value for key, value in run.settings().items() if hasattr(sizes, key) and key != "encoder"}
    assert told == {key: getattr(sizes, key) for key in told} and len(told) >= 4
    assert run.config.image_size == 16 if hasattr(run.config, "image_size") else stage == "ar"


FIXED = [(stage, name, flag, value) for stage, name, flags in (
    ("1", "vqrae", {"--encoder": "x", "--image-size": "16", "--features": "before_norm", "--quantizer": "vq",
                    "--codebook-size": "32", "--codebook-dim": "8", "--output-patch-size": "4", "--beta-side":
                    "codebook", "--codebook-init": "gaussian", "--start-tokens": "99", "--projection-init": "random"}),
    ("1", "unitok", {"--codebooks": "4", "--projection": "attention", "--latent-noise": "0.5"}),
    ("2", "vqrae", {"--codebook-size": "32"}), ("ar", "ar", {"--width": "32", "--qwen3": "x", "--text-vocabulary":
                                                             "300"}),
    ("caption", "caption", {"--encoder": "x", "--image-size": "16", "--depth": "2"})) for flag, value in flags.items()]


@pytest.mark.parametrize("stage, name, flag, value", FIXED)
def test_what_the_model_of_init_is_made_of_is_no_setting(stage, name, flag, value, finished):
    with pytest.raises(SystemExit, match=f"{flag} is fixed by the model that stage {stage} starts from, --init"):
        train.main(begun_from(finished, stage, name, flag, value))


@pytest.mark.parametrize("stage, name, sentence", [
    ("1", "caption", "does not describe a VQRAE"), ("1", "ar", "does not describe a VQRAE"),
    ("1", "nowhere", "no model at"), ("2", "caption", "does not describe a VQRAE"),
    ("ar", "vqrae", "does not describe a VisualLM"),
    ("ar", "caption", "does not describe a VisualLM"), ("ar", "nowhere", "no model at"),
    ("caption", "ar", "does not describe a Captioner"), ("caption", "unitok", "does not describe a Captioner"),
    ("caption", "nowhere", "no model at"), ("ar", "depth", "was trained with other codes"),
    ("ar", "ar of 9", "was trained with other codes")])
def test_an_init_of_another_kind_is_one_sentence(stage, name, sentence, finished):
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}") as error:
        train.main(begun_from(finished, stage, name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage, name", [("1", "vqrae"), ("ar", "ar"), ("caption", "caption")])
@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"), "cannot read the weights"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    (lambda folder: (folder / "model.safetensors").unlink(), "cannot read the weights")])
def test_a_damaged_init_is_one_sentence(stage, name, damage, sentence, finished):
    damage(finished[0] / name)
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}") as error:
        train.main(begun_from(finished, stage, name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, extra, sentence", [
    ("vqrae", ["--contrastive", "sigmoid"], "is a plain VQRAE"),
    ("vqrae", ["--reconstruction-weight", "2"], "is a plain VQRAE"),
    ("unitok", ["--contrastive", "softmax"], "was trained without one"),
    ("tower", ["--contrastive", "softmax", "--accumulate", "2"], "would take --contrastive its negatives")])
def test_captions_need_a_model_that_reads_them_and_a_batch_in_one_part(name, extra, sentence, finished):
    with pytest.raises(SystemExit, match=sentence):
        train.main(begun_from(finished, "1", name, *extra))


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_a_contrastive_loss_takes_no_batch_in_parts(form, short_run):
    with pytest.raises(SystemExit, match="--accumulate would take --contrastive its negatives"):
        train.main(short_run + ["--contrastive", form, "--accumulate", "2"])


# --- captions as they are typed ---


def test_captions_that_are_no_text_or_look_like_control_tokens_are_drawn(written_models, tmp_path):
    sample.main(["generate", "x\udcff", "<|endoftext|> <|vision_start|>", "--model", written_models["ar"], "--count",
                 "1", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 3  # and a grid of both


@pytest.mark.parametrize("fixture", ["ar_run", "caption_run"])
def test_class_folders_may_be_called_like_control_tokens(fixture, request, photo_folder, tmp_path):
    shutil.copytree(photo_folder / "class0", tmp_path / "photos/<|endoftext|> red")
    shutil.copytree(photo_folder / "class1", tmp_path / "photos/<|vision_start|>")
    run, stage = make_run(request.getfixturevalue(fixture) + ["--data", str(tmp_path / "photos")])
    lm = getattr(run.model, "lm", run.model)
    controls = {lm.text.token_to_id(name) for name in ("<|endoftext|>", "<|vision_start|>")}
    for model in (lm, getattr(run.average, "lm", run.average)):
        assert not controls & set(model.prompt("<|endoftext|> red")[:-1])
    take_steps(run, stage, 1)


# --- the language model of the paper ---


TABLE_9 = {"learning_rate": 1e-4, "end_factor": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.999), "adam_epsilon": 1e-15,
           "warmup_steps": 4000, "max_grad_norm": 1.0, "batch_size": 512, "muon_learning_rate": 0.0}


@pytest.mark.parametrize("name", TABLE_9)
def test_the_papers_language_model_trains_by_table_9(name):
    assert getattr(PRESETS["qwen3-0.6b"]["ar"], name) == TABLE_9[name]


def test_the_papers_language_model_reads_and_writes_at_most_1536_tokens(qwen3_twin, monkeypatch):
    assert PRESETS["qwen3-0.6b"]["ar"].qwen3 == "Qwen/Qwen3-0.6B"
    model = train.language_model(Namespace(qwen3=None, text_vocabulary=300, width=32, depth=1, heads=2, kv_heads=1,
                                           head_width=16, mlp_width=32), ["red apple"], 32, 16)
    assert model.config.max_tokens == 1536 and vqrae.load_qwen3(qwen3_twin[1], 7).config.max_tokens == 1536
    assert len(model.prompt("red apple " * 24000)) + 16 == 1536
    with pytest.raises(InputError, match="may have 1519 tokens here"):
        model.generate("red apple " * 24000)


def test_the_papers_internvit_is_the_one_inside_internvl3():
    assert {PRESETS["internvit-448"][stage].encoder for stage in "12"} == {"OpenGVLab/InternVL3-8B-hf"}
