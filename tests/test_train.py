"""The stages: what trains in each and what stays, from which losses, at which rates."""

import inspect
import json
import shutil
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
import vqrae
from conftest import (assert_resume_is_exact, begin, make_run, needs, small_model, small_vit, take_steps, without_sizes,
                      write_tars)
from export import save_encoder
from support.files import InputError
from support.images import ImageSet, find_images
from support.text import caption_of


# --- stage 1 ---


def test_stage_1_leaves_the_encoder_and_the_codebook_bit_identical(short_run, encoder_folder):
    run, stage = make_run(short_run)
    stage.start()
    frozen = {name: t.clone() for name, t in run.model.state_dict().items()
              if name.startswith("encoder.") or name == "quantizer.codebook"}
    moving = {name: p.detach().clone() for name, p in run.model.named_parameters() if not name.startswith("encoder.")}
    take_steps(run, stage, 3)
    for name, tensor in frozen.items():
        assert torch.equal(run.model.state_dict()[name], tensor), name
    reference = vqrae.load_encoder(encoder_folder).state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in run.model.encoder.state_dict().items())
    for name, parameter in run.model.named_parameters():
        if name in moving:
            assert not torch.equal(parameter, moving[name]), f"{name} did not train"


def test_a_step_of_stage_1_goes_from_the_loop_through_the_step_and_what_ranks_share_to_the_loss(short_run, monkeypatch):
    real, ways = vqrae.stage1_loss, []

    def loss(*arguments):
        ways.append([frame.function for frame in inspect.stack()[1:]])
        return real(*arguments)

    monkeypatch.setattr(vqrae, "stage1_loss", loss)
    train.main(short_run)
    assert len(ways) == 6 and all(way[:4] == ["losses", "step", "train", "main"] for way in ways)


@pytest.mark.parametrize("quantizer, init", [("vq", "data"), ("vq", "gaussian"), ("simvq", "gaussian"),
                                             ("none", "data")])
def test_every_quantizer_and_start_trains(short_run, tmp_path, quantizer, init):
    train.main(short_run + ["--quantizer", quantizer, "--codebook-init", init])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["quantizer"] == quantizer and np.isfinite(summary["val_psnr"])
    assert ("val_utilization" in summary) == (quantizer != "none")


def test_an_encoder_learning_rate_unfreezes_the_encoder_in_stage_1_too(short_run):
    run, stage = make_run(short_run + ["--encoder-learning-rate", "1e-3", "--distillation-weight", "1"])
    stage.start()
    terms = take_steps(run, stage, 2)
    assert terms[0]["distillation"] == 0 < terms[1]["distillation"]


def test_q_other_than_p_trains_and_sample_uses_the_size_of_training(short_run, tmp_path, photo_folder, encoder_folder,
                                                                    capsys, monkeypatch):
    monkeypatch.setattr(sample, "lpips_distance", lambda device: None)
    train.main(short_run + ["--image-size", "24", "--output-patch-size", "5"])
    sample.main(["evaluate", "--model", str(tmp_path / "run"), "--data", str(photo_folder), "--device", "cpu",
                 "--split", "all", "--frechet-encoder", str(encoder_folder)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 12 * 36


def test_networks_that_cannot_be_fetched_are_one_sentence_that_names_the_way_out(monkeypatch, tmp_path, short_run):
    needs("lpips")

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="VGG16.* cannot be fetched .*; --perceptual vfm"):
        train.main(short_run + ["--perceptual", "lpips-convnext"])
    with pytest.raises(InputError, match="VGG16"):
        sample.lpips_distance(torch.device("cpu"))


# --- what a run reads and where it writes ---


def out_at(arguments, out):
    """Arguments of a run with another --out."""
    return [*arguments[:arguments.index("--out") + 1], str(out), *arguments[arguments.index("--out") + 2:]]


@pytest.mark.parametrize("way", ["itself", "a link", "another name", "a class folder"])
def test_a_run_does_not_write_into_the_folder_of_its_images(way, short_run, photo_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(photo_folder, own)
    (tmp_path / "link").symlink_to(own)
    arguments = out_at(short_run, {"itself": own, "a link": tmp_path / "link", "a class folder": own / "class1",
                                   "another name": own / "class0/.."}[way])
    arguments[arguments.index("--data") + 1] = str(own)
    before = sorted(own.rglob("*"))
    with pytest.raises(SystemExit, match="error: .* choose another --out"):
        train.main(arguments)
    assert sorted(own.rglob("*")) == before


def test_a_run_does_not_write_into_the_folder_of_its_encoder(short_run, encoder_folder, tmp_path):
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    arguments = out_at(short_run, tmp_path / "encoder")
    arguments[arguments.index("--encoder") + 1] = str(tmp_path / "encoder")
    with pytest.raises(SystemExit, match="is what --encoder .* reads, which would be lost; choose another --out"):
        train.main(arguments)
    assert {path.name for path in (tmp_path / "encoder").iterdir()} == {path.name for path in encoder_folder.iterdir()}


def test_stage_2_does_not_write_over_the_model_that_it_starts_from(second_stage, tmp_path):
    before = (tmp_path / "first/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="is what --init .* reads"):
        train.main([*out_at(second_stage, tmp_path / "first"), "--overwrite"])
    assert (tmp_path / "first/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("out", ["tokenizer", "run"])
def test_stage_ar_does_not_write_over_its_tokenizer(out, ar_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/vqrae").symlink_to(tmp_path / "tokenizer")
    before = (tmp_path / "tokenizer/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="is what --tokenizer .* reads"):
        train.main(out_at(ar_run, tmp_path / out))
    assert (tmp_path / "tokenizer/model.safetensors").read_bytes() == before


def test_a_run_inside_of_its_data_is_resumed_and_followed_on_the_same_images(short_run, photo_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(photo_folder, own)
    arguments = out_at(short_run, own / "run")
    arguments[arguments.index("--data") + 1] = str(own)
    train.main(arguments)
    find_images.cache_clear()  # as in a new process
    before = (own / "run/model.safetensors").read_bytes()
    train.main([*arguments, "--resume"])
    assert (own / "run/model.safetensors").read_bytes() == before
    assert (own / "run/reconstructions.png").exists()
    assert {record["category"] for record in ImageSet(own, "all", 16).records} == {"class0", "class1"}


def test_captions_beside_images_are_what_stage_ar_and_stage_caption_learn(ar_run, caption_run, photo_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(photo_folder, own)
    for path in own.rglob("*.png"):
        path.with_suffix(".txt").write_text("a gargoyle quaffs")
    for arguments in (ar_run, caption_run):
        arguments = out_at(arguments, tmp_path / arguments[1])
        arguments[arguments.index("--data") + 1] = str(own)
        train.main(arguments)
        vocabulary = json.loads((tmp_path / arguments[1] / "tokenizer.json").read_text())["model"]["vocab"]
        assert {"\u0120gargoyle", "\u0120quaffs"} <= set(vocabulary)


# --- stage 2 ---


def test_in_stage_2_everything_trains_but_the_teacher_and_the_base_codebook(second_stage, tmp_path):
    run, stage = make_run(second_stage)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    take_steps(run, stage, 3)
    first = load_file(tmp_path / "first/model.safetensors")
    for name, tensor in stage.teacher.state_dict().items():
        assert torch.equal(tensor, first[f"encoder.{name}"]), f"the teacher's {name} changed"
    for name, tensor in run.model.state_dict().items():
        fixed = name in ("quantizer.codebook", "feature_mean", "feature_std", "reading")
        behind = name.startswith("encoder.norm.")  # Z_I is what stands before it
        assert torch.equal(tensor, before[name]) == (fixed or behind), name


def test_distillation_is_0_at_the_first_step_of_stage_2_and_then_measures_the_way_gone(second_stage):
    terms = take_steps(*make_run(second_stage), 2)
    assert terms[0]["distillation"] == 0 < terms[1]["distillation"]


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(second_stage):
    gradients = []
    for parts in ("1", "2", "3", "4"):  # and not always of one size
        run, stage = make_run(second_stage + ["--accumulate", parts, "--max-grad-norm", "1e9", "--perceptual", "none",
                                              "--precision", "fp32", "--batch-size", "5"])
        take_steps(run, stage, 1)
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-6)


def test_without_distillation_the_teacher_is_not_asked(second_stage):
    assert "distillation" not in take_steps(*make_run(second_stage + ["--distillation-weight", "0"]), 1)[0]


def test_every_part_has_its_own_learning_rate_and_all_fall_by_one_factor(second_stage):
    run, stage = make_run(second_stage + ["--encoder-learning-rate", "1e-5", "--learning-rate", "1e-4"])
    take_steps(run, stage, 2)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    factor = run.schedule(1)
    for group in run.kept["optimizer"].param_groups:
        encoder = {names[parameter].startswith("encoder.") for parameter in group["params"]}
        assert len(encoder) == 1 and group["lr"] == pytest.approx(factor * (1e-5 if encoder.pop() else 1e-4))


def optimizers_of(run):
    """The optimizers of the model, by name; a checkpoint must hold them."""
    optimizers = run.networks[0].optimizers
    assert all(run.kept[name] is optimizer for name, optimizer in optimizers.items())
    return optimizers


def test_muon_moves_the_matrices_of_new_blocks_and_adamw_all_else_that_trains(second_stage):
    run, _ = make_run(second_stage)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    moved = {kind: [names[p] for group in optimizer.param_groups for p in group["params"]]
             for kind, optimizer in optimizers_of(run).items()}
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert sorted(moved["optimizer"] + moved["muon"]) == sorted(trained)
    assert set(moved["muon"]) == {name for name, p in run.model.decoder.named_parameters(prefix="decoder")
                                  if name.startswith("decoder.blocks") and p.dim() == 2}
    without, _ = make_run(second_stage + ["--muon-learning-rate", "0"])
    assert optimizers_of(without).keys() == {"optimizer"}


def test_the_discriminator_is_untouched_before_its_start_and_trains_after_it(second_stage):
    run, stage = make_run(second_stage)
    discriminator = run.kept["discriminator"]
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    terms = take_steps(run, stage, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in discriminator.state_dict().items())
    assert all("adversarial" not in step and "hinge" not in step for step in terms)
    terms = take_steps(run, stage, 1)
    assert "adversarial" in terms[0] and "hinge" in terms[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in discriminator.state_dict().items())


def test_stage_2_resumes_bit_identical_discriminator_included(second_stage, tmp_path):
    assert_resume_is_exact(second_stage, tmp_path)
    states = [torch.load(tmp_path / folder / "checkpoint/state.pt", weights_only=True) for folder in ("run", "parts")]
    for name, tensor in states[0]["discriminator"].items():
        assert torch.equal(tensor, states[1]["discriminator"][name]), name


def test_a_second_stage_is_not_resumed_on_another_first_stage(second_stage, tmp_path):
    begin(second_stage)
    model = vqrae.VQRAE.from_pretrained(tmp_path / "first")
    with torch.no_grad():
        model.project_in.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="--resume continues a run with its own settings: model of --init"):
        train.main(second_stage + ["--init", str(tmp_path / "other"), "--resume"])


# --- stage ar ---


def test_stage_ar_leaves_a_model_that_writes_images_and_all_its_files(ar_run, tmp_path):
    train.main(ar_run)
    out = tmp_path / "run"
    assert {"config.json", "model.safetensors", "tokenizer.json", "vqrae", "checkpoint", "metrics.jsonl", "curves.png",
            "summary.json", "samples.png"} <= {path.name for path in out.iterdir()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and "val_loss" in lines[1] and "val_loss" in lines[2]
    assert json.loads((out / "summary.json").read_text())["val_loss"] < 2 * np.log(332)
    codes = vqrae.VisualLM.from_pretrained(out).generate(text=["class0", "class1", ""], cfg_scale=3.0)
    assert codes.shape == (3, 16) and codes.max() < 32
    assert vqrae.VQRAE.from_pretrained(out / "vqrae").decode(codes).shape == (3, 3, 16, 16)


def test_muon_is_for_transformers_that_start_untrained(ar_run, qwen3_with_text):
    untrained, _ = make_run(ar_run)
    assert optimizers_of(untrained).keys() == {"optimizer", "muon"}
    pretrained, _ = make_run(without_sizes(ar_run) + ["--qwen3", str(qwen3_with_text[0])])
    assert optimizers_of(pretrained).keys() == {"optimizer"}


def test_stage_ar_resumes_bit_identical(ar_run, tmp_path):
    assert_resume_is_exact(ar_run, tmp_path)


def test_a_transformer_that_knows_its_images_by_heart_writes_them_when_asked(ar_run, tmp_path):
    run, stage = make_run(ar_run + ["--steps", "250", "--learning-rate", "1e-2", "--caption-dropout", "0",
                                    "--batch-size", "11", "--code-noise", "0"])
    for i, record in enumerate(run.train_images.records):
        record["category"] = f"picture {i}"  # a name for each
    take_steps(run, stage, 250)
    captions = [caption_of(record) for record in run.train_images.records]
    written = run.model.eval().generate(captions, temperature=0)
    images = torch.cat(list(run.train_images.views()))
    _, codes = vqrae.VQRAE.from_pretrained(tmp_path / "tokenizer").encode(images)
    assert (written == codes).float().mean() > 0.95


@pytest.mark.parametrize("dropout, expected", [("0", {"class0", "class1"}), ("1", {""})])
def test_captions_are_left_out_as_often_as_asked(ar_run, dropout, expected, monkeypatch):
    run, stage = make_run(ar_run + ["--caption-dropout", dropout])
    asked, prompt = set(), run.model.prompt
    monkeypatch.setattr(run.model, "prompt", lambda caption: (asked.add(caption), prompt(caption))[1])
    take_steps(run, stage, 4)
    assert asked == expected


def test_what_is_no_qwen3_is_said_to_be_none(ar_run, tmp_path):
    with pytest.raises(SystemExit, match="this loader reads dense Qwen3"):
        train.main(without_sizes(ar_run) + ["--qwen3", str(tmp_path / "tokenizer")])


def test_stage_ar_does_not_go_on_with_another_tokenizer(ar_run, tmp_path):
    begin(ar_run)
    small_model(seed=1, codebook_size=32, codebook_dim=8).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match="codes of the images"):
        train.main(ar_run + ["--resume"])


# --- stage caption ---


def test_stage_caption_trains_all_but_the_encoder(caption_run, encoder_folder):
    run, stage = make_run(caption_run + ["--learning-rate", "1e-2", "--warmup-steps", "1"])
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    take_steps(run, stage, 3)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder."), name
    reference = vqrae.load_encoder(encoder_folder).state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in run.model.encoder.state_dict().items())


def test_stage_caption_resumes_bit_identical(caption_run, tmp_path):
    assert_resume_is_exact(caption_run, tmp_path)


def test_a_captioner_that_learnt_its_images_names_their_classes(tmp_path, encoder_folder, caption_run):
    for i in range(40):
        colour = (255, 40 * (i % 5), 0) if i % 2 else (0, 40 * (i % 5), 255)
        folder = tmp_path / "colours" / ("red" if i % 2 else "blue")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
    train.main(caption_run + ["--data", str(tmp_path / "colours"), "--steps", "60", "--learning-rate", "1e-2",
                              "--warmup-steps", "5", "--overwrite"])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["val_exact"] == summary["val_category"] == 1.0


def test_images_without_captions_cannot_teach_a_captioner(caption_run, tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(SystemExit, match="have no captions: put them into one folder per class"):
        train.main(caption_run + ["--data", str(tmp_path / "flat")])


@pytest.mark.parametrize("change", [["--encoder", "{tmp}/other"], ["--data", "{tmp}/renamed"]])
def test_a_captioner_is_not_resumed_on_another_encoder_or_other_words(caption_run, photo_folder, tmp_path, change):
    begin(caption_run)
    torch.manual_seed(7)
    save_encoder(vqrae.Encoder(small_vit()), tmp_path / "other")
    shutil.copytree(photo_folder, tmp_path / "renamed")
    (tmp_path / "renamed/class0").rename(tmp_path / "renamed/quite another class")
    with pytest.raises(SystemExit, match="SHA-256"):
        train.main(caption_run + ["--resume", *(part.format(tmp=tmp_path) for part in change)])


# --- sets ---


@pytest.mark.parametrize("stage", ["second_stage", "ar_run", "caption_run"])
def test_the_other_stages_take_sets_too(stage, request, tmp_path):
    data = write_tars(tmp_path / "tars", 2, 10)
    train.main(request.getfixturevalue(stage) + ["--data", str(data), "--columns", "png,json", "--steps", "2"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["training images"] == 19


@pytest.mark.parametrize("run, more", [("caption_run", []), ("short_run", ["--contrastive", "sigmoid"])])
def test_what_needs_images_by_number_says_that_streamed_ones_have_none(run, more, request, tmp_path):
    data = write_tars(tmp_path / "tars", 3, 4)
    with pytest.raises(SystemExit, match="is streamed, so its images cannot be asked for one by one"):
        train.main(request.getfixturevalue(run) + more + ["--data", str(data), "--stream"])
