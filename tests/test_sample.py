"""sample.py: reconstruct, evaluate, codes, generate and caption."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import vqrae
from conftest import command, edit, needs, small_captioner, small_model, small_vit, write_tars, write_variants
from export import save_encoder
from presets import SAMPLING
from support.images import ImageSet, drawn_here, eight_bits
from support.metrics import evaluate, fit_reading
from support.pictures import draw_patch
from support.text import caption_of


# --- reconstruct ---


def test_reconstruct_writes_a_picture_for_every_readable_file(saved_model, tmp_path, capsys):
    names = write_variants(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"broken")
    sample.main(["reconstruct", *(str(tmp_path / name) for name in names + ["broken.png"]), "--model", str(saved_model),
                 "--out", str(tmp_path / "pictures"), "--device", "cpu"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == len(names)
    assert "broken.png" in capsys.readouterr().err


def test_reconstruct_without_files_shows_a_split_and_models_side_by_side(saved_model, photo_folder, tmp_path):
    small_model(seed=1).save_pretrained(tmp_path / "other")
    sizes = []
    for beside in ([], ["--beside", str(tmp_path / "other")]):
        sample.main(["reconstruct", "--model", str(saved_model), "--data", str(photo_folder), "--split", "all",
                     "--out", str(tmp_path), "--device", "cpu", *beside])
        sizes.append(Image.open(tmp_path / "reconstructions.png").size)
    assert sizes[0] != sizes[1]


def test_reconstruct_shows_last_what_a_generator_writes_from_the_captions(written_models, photo_folder, tmp_path):
    sample.main(["reconstruct", "--model", written_models["vqrae"], "--generator", written_models["ar"], "--data",
                 str(photo_folder), "--split", "all", "--out", str(tmp_path), "--device", "cpu"])
    found = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    lm = vqrae.VisualLM.from_pretrained(written_models["ar"])
    records = ImageSet(photo_folder, "all", 16).records
    written = lm.generate([caption_of(record) for record in records], **SAMPLING, seed=0)
    image = eight_bits(vqrae.VQRAE.from_pretrained(written_models["vqrae"]).decode(written[:1]))[0]
    side, x = 128, 12 + 2 * (128 + 4)  # behind the first original and its reconstruction
    assert np.array_equal(found[12:12 + side:8, x:x + side:8], (255 * image).round().byte().permute(1, 2, 0).numpy())


def named_as(way, path, out):
    """The path of an image in other words: relative, by a link, by another name of its folder. -> it, and the --out."""
    if way == "relative":
        return Path(os.path.relpath(path)), out
    if way == "symbolic link":
        (out / "cat.png").symlink_to(path)
    elif way == "hard link":
        os.link(path, out / "cat.png")
    elif way == "linked folder":
        (out.parent / "linked").symlink_to(path.parent)
        return path, out.parent / "linked"
    elif way == "link as input":
        os.link(path, out / "cat.png")
        return out / "cat.png", out
    elif way == "own folder":
        return path, path.parent
    elif way == "half written":
        (path.parent / "cat.png.tmp").write_bytes(path.read_bytes())
        return path.parent / "cat.png.tmp", path.parent
    return path, out


@pytest.mark.parametrize("way", ["own folder", "relative", "symbolic link", "hard link", "linked folder",
                                 "link as input", "half written"])
def test_reconstruct_writes_over_nothing_that_it_reads(way, saved_model, photo_folder, tmp_path, monkeypatch, capsys):
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    out.mkdir()
    shutil.copy(photo_folder / "class0/0.png", own / "cat.png")
    monkeypatch.chdir(own)
    given, out = named_as(way, own / "cat.png", own if way == "relative" else out)
    before = given.read_bytes()
    for _ in range(2):
        sample.main(["reconstruct", str(given), "--model", str(saved_model), "--out", str(out), "--device", "cpu"])
        assert given.read_bytes() == before == (own / "cat.png").read_bytes()
        written = Path(capsys.readouterr().out.split(": PSNR")[0])
        assert drawn_here(written) and not any(os.path.samefile(written, path) for path in (given, own / "cat.png"))
    assert len(list(out.iterdir())) <= 3  # the second time takes the place of the first


def test_reconstruct_reads_every_file_as_it_was_before_the_first_picture(saved_model, photo_folder, tmp_path):
    for folder, source in (("a", "class0/0.png"), ("out", "class1/1.png")):
        (tmp_path / folder).mkdir()
        shutil.copy(photo_folder / source, tmp_path / folder / "cat.png")
    sample.main(["reconstruct", str(tmp_path / "a/cat.png"), str(tmp_path / "out/cat.png"), "--model", str(saved_model),
                 "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert (tmp_path / "out/cat.png").read_bytes() == (photo_folder / "class1/1.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cat.png", "cat_.png", "cat__.png"]


def test_our_own_picture_as_input_is_not_written_over_either(saved_model, photo_folder, tmp_path):
    arguments = ["--model", str(saved_model), "--out", str(tmp_path), "--device", "cpu"]
    sample.main(["reconstruct", str(photo_folder / "class0/0.png"), *arguments])
    before = (tmp_path / "0.png").read_bytes()
    sample.main(["reconstruct", str(tmp_path / "0.png"), *arguments])
    assert (tmp_path / "0.png").read_bytes() == before and drawn_here(tmp_path / "0_.png")


@pytest.mark.parametrize("name, arguments", [
    ("reconstructions.png", ["reconstruct", "--model", "{vqrae}", "--data", "{own}", "--split", "all"]),
    ("codes.png", ["codes", "--model", "{vqrae}", "--data", "{own}", "--split", "all"]),
    ("clusters.png", ["evaluate", "--model", "{vqrae}", "--data", "{own}", "--split", "all", "--clusters", "2"]),
    ("grid.png", ["generate", "cat", "--model", "{ar}", "--count", "1"]),
    ("cat-0.png", ["generate", "cat", "--model", "{ar}", "--count", "1"]),
])
def test_pictures_of_the_user_keep_their_names_and_ours_get_others(name, arguments, written_models, photo_folder,
                                                                   tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(photo_folder, own)
    shutil.copy(photo_folder / "class0/0.png", own / name)
    for _ in range(2):
        sample.main([part.format(own=own, **written_models) for part in arguments]
                    + ["--out", str(own), "--device", "cpu"])
        assert (own / name).read_bytes() == (photo_folder / "class0/0.png").read_bytes()
        assert drawn_here(own / name.replace(".png", "_.png"))
    ours = [path.name for path in own.glob("*.png") if drawn_here(path)]
    assert len(ours) == (2 if "generate" in arguments else 1)
    if name != "cat-0.png":
        assert f"{own}/{name.replace('.png', '_.png')}" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
@pytest.mark.parametrize("arguments", [["caption", "--model", "{caption}"], ["reconstruct", "--model", "{vqrae}"]])
def test_what_the_terminal_cannot_print_is_replaced(encoding, arguments, written_models, photo_folder, tmp_path,
                                                    monkeypatch):
    name = os.fsdecode("\u732b \U0001f431 ".encode() + b"\xff.png")
    shutil.copy(photo_folder / "class0/0.png", tmp_path / name)
    streams = {each: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for each in ("stdout", "stderr")}
    for each, stream in streams.items():
        monkeypatch.setattr(sys, each, stream)
    command, *rest = [part.format(**written_models) for part in arguments]
    sample.main([command, str(tmp_path / name), str(tmp_path / "broken\u732b.png"), *rest, "--out",
                 str(tmp_path / "out"), "--device", "cpu"])
    for stream, said in (("stdout", b"? ? "), ("stderr", b"broken?.png")):
        streams[stream].flush()
        assert said in streams[stream].buffer.getvalue()


# --- evaluate ---


def test_evaluate_prints_a_table_and_json_and_names_the_frechet_encoder(saved_model, photo_folder, encoder_folder,
                                                                         capsys):
    sample.main(["evaluate", "--model", str(saved_model), "--data", str(photo_folder), "--split", "all",
                 "--frechet-encoder", str(encoder_folder), "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 12 and result["tokens"] == 12 * 16
    expected = evaluate(vqrae.VQRAE.from_pretrained(saved_model), ImageSet(photo_folder, "all", 16),
                        frechet_encoder=vqrae.load_encoder(encoder_folder))
    expected[f"frechet_{encoder_folder.name}"] = expected.pop("frechet")
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert not any("fid" in name.lower() for name in result)


def test_the_frechet_encoder_can_be_shown_larger_images(saved_model, photo_folder, encoder_folder, capsys):
    side = 2 * vqrae.load_encoder(encoder_folder).config.image_size
    arguments = ["evaluate", "--model", str(saved_model), "--data", str(photo_folder), "--split", "all", "--device",
                 "cpu", "--frechet-encoder", str(encoder_folder), "--frechet-size"]
    sample.main(arguments + [str(side // 2)])
    own = json.loads(capsys.readouterr().out.splitlines()[-1])[f"frechet_{encoder_folder.name}_at_{side // 2}_pixels"]
    sample.main(arguments + [str(side)])
    closer = json.loads(capsys.readouterr().out.splitlines()[-1])[f"frechet_{encoder_folder.name}_at_{side}_pixels"]
    assert 0 < closer != own > 0
    with pytest.raises(SystemExit, match="do not divide into patches"):
        sample.main(arguments + [str(side + 1)])


def test_evaluate_measures_understanding_beside_the_teacher(saved_model, photo_folder, encoder_folder, tmp_path,
                                                            capsys):
    model = vqrae.VQRAE.from_pretrained(saved_model)
    fit_reading(model, ImageSet(photo_folder, "train", 16))
    model.save_pretrained(saved_model)
    arguments = ["evaluate", "--model", str(saved_model), "--data", str(photo_folder), "--device", "cpu",
                 "--frechet-encoder", str(encoder_folder), "--teacher"]
    sample.main(arguments + [str(encoder_folder)])
    said = capsys.readouterr().out
    rows = json.loads(said.splitlines()[-1])["understanding"]
    assert set(rows) == {"teacher", "continuous", "discrete"} and rows["teacher"]["cosine"] == pytest.approx(1)
    assert all(f"{row['category_transfer']:.4f}" in said for row in rows.values())
    torch.manual_seed(0)
    save_encoder(vqrae.Encoder(small_vit(width=12)), tmp_path / "other")
    sample.main(arguments + [str(tmp_path / "other")])
    assert "--teacher names the encoder that it was trained from" in capsys.readouterr().err


def test_clusters_are_drawn_and_what_they_follow_is_measured(saved_model, photo_folder, encoder_folder, tmp_path,
                                                             capsys):
    sample.main(["evaluate", "--model", str(saved_model), "--data", str(photo_folder), "--split", "all", "--device",
                 "cpu", "--frechet-encoder", str(encoder_folder), "--clusters", "3", "--out", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["clusters"]
    for measures in found.values():
        assert 0.5 <= measures["category_purity"] <= 1 and 0 < measures["colour_explained"] <= 1
    assert set(found) == {"continuous", "discrete"} and Image.open(tmp_path / "clusters.png").size[0] > 500


def test_one_cluster_of_all_images_is_refused(saved_model):
    with pytest.raises(SystemExit, match="--clusters 1 would put all images into one"):
        sample.main(["evaluate", "--model", str(saved_model), "--clusters", "1"])


def test_evaluate_of_a_generator_shows_reference_and_floor(written_models, photo_folder, encoder_folder, capsys):
    sample.main(["evaluate", "--model", written_models["ar"], "--data", str(photo_folder), "--count", "5", "--device",
                 "cpu", "--frechet-encoder", str(encoder_folder)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    training, held_out = result["training captions"], result["held-out captions"]
    assert training["pictures"] == 5 and held_out["pictures"] == 1  # a twentieth of twelve is held out
    for row in ("generated", "reconstructed (reference)", "shuffled captions (floor)"):
        assert set(training[row]) == {"name", "category"}  # one picture has no covariance, so no Frechet distance
        assert all(0 <= share <= 1 for share in training[row].values())


def test_evaluate_of_a_captioner_has_a_row_for_each_encoder_and_the_same_one_changes_nothing(
        written_models, photo_folder, tmp_path, capsys):
    captioner = vqrae.Captioner.from_pretrained(written_models["caption"])
    save_encoder(captioner.encoder, tmp_path / "same")
    sample.main(["evaluate", "--model", written_models["caption"], "--data", str(photo_folder), "--split", "all",
                 "--encoder", str(tmp_path / "same"), written_models["vqrae"], "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [value for name, value in result.items() if "encoder" in name]
    assert len(rows) == 3 and rows[0] == rows[1] and set(rows[2]) == {"exact", "category"}


def test_a_swapped_encoder_is_the_one_that_reads(written_models, tmp_path):
    captioner = vqrae.Captioner.from_pretrained(written_models["caption"])
    save_encoder(captioner.encoder, tmp_path / "same")
    images = torch.rand(2, 3, 16, 16)
    before = captioner.encoder(images)
    sample.swap_encoder(captioner, tmp_path / "same", torch.device("cpu"))
    assert torch.equal(captioner.encoder(images), before)
    sample.swap_encoder(captioner, written_models["vqrae"], torch.device("cpu"))
    assert not torch.equal(captioner.encoder(images), before)


# --- codes ---


def test_codes_draws_the_patches_that_chose_each_code(saved_model, photo_folder, tmp_path):
    sample.main(["codes", "--model", str(saved_model), "--data", str(photo_folder), "--split", "all", "--device", "cpu",
                 "--out", str(tmp_path / "pictures"), "--patches", "3"])
    drawn = np.asarray(Image.open(tmp_path / "pictures/codes.png").convert("RGB"))
    images = ImageSet(photo_folder, "all", 16)
    codes = vqrae.VQRAE.from_pretrained(saved_model).encode(torch.cat(list(images.views())))[1]  # (12, 16)
    counts = codes.flatten().bincount(minlength=40)
    assert len(drawn) // 51 == min(16, (counts > 1).sum())
    chosen = (codes == counts.argmax()).nonzero().tolist()[::max(1, int(counts.max()) // 3)][:3]
    for column, (place, token) in enumerate(chosen):  # the first row: patches of the most frequent code, in red
        expected = np.asarray(draw_patch(images[place][0], token, 4, 48))
        assert np.array_equal(drawn[:48, 64 + 51 * column:64 + 51 * column + 48], expected)


def test_beyond_the_edge_of_an_image_codes_draws_nothing_that_looks_like_image(saved_model, tmp_path):
    for name in "ab":
        Image.new("RGB", (16, 16), "yellow").save(tmp_path / f"{name}.png")
    sample.main(["codes", "--model", str(saved_model), "--data", str(tmp_path), "--split", "all", "--device", "cpu",
                 "--out", str(tmp_path / "pictures")])
    drawn = np.asarray(Image.open(tmp_path / "pictures/codes.png").convert("RGB"))[:, 64:]  # right of the labels
    assert not (drawn.max(2) < 100).any()


def test_codes_refuses_a_codebook_that_the_model_does_not_have(saved_model):
    with pytest.raises(SystemExit, match="--codebook 1: .* has codebooks 0 to 0"):
        sample.main(["codes", "--model", str(saved_model), "--codebook", "1"])


def test_codes_of_a_stream_are_one_sentence(saved_model, tmp_path):
    data = write_tars(tmp_path / "tars", 2, 3)
    with pytest.raises(SystemExit, match="is streamed, so its images cannot be asked for one by one"):
        sample.main(["codes", "--model", str(saved_model), "--data", str(data), "--stream"])


# --- generate and caption ---


def test_generate_writes_a_grid_and_single_pictures_that_a_seed_repeats(written_models, tmp_path):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        sample.main(["generate", "a red apple", "Cat / face?", "a red apple", "--model", written_models["ar"],
                     "--count", "2", "--seed", seed, "--out", str(tmp_path / out), "--device", "cpu"])
    names = {"grid.png", "cat-face-0.png", "cat-face-1.png", *(f"a-red-apple-{i}.png" for i in range(4))}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    pictures = [(tmp_path / out / "grid.png").read_bytes() for out in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]
    assert Image.open(tmp_path / "a/cat-face-0.png").size == (16, 16)


def test_generate_draws_by_the_options_it_was_given_and_every_batch_by_a_seed_of_its_own(written_models, tmp_path,
                                                                                          monkeypatch):
    asked, real = [], vqrae.VisualLM.generate
    monkeypatch.setattr(vqrae.VisualLM, "generate", lambda lm, captions, *options: (
        asked.append((captions, *options[:5])), real(lm, captions, *options))[1])
    sample.main(["generate", "cat", "--model", written_models["ar"], "--count", "5", "--batch-size", "2", "--cfg-scale",
                 "3", "--temperature", "0.75", "--top-k", "5", "--top-p", "0.875", "--seed", "4", "--device", "cpu",
                 "--out", str(tmp_path)])
    assert asked == [(["cat"] * count, 3.0, 0.75, 5, 0.875, seed) for count, seed in ((2, 4), (2, 6), (1, 8))]
    pictures = {(tmp_path / f"cat-{i}.png").read_bytes() for i in range(5)}
    assert len(pictures) == 5


def test_without_a_caption_generate_draws_whatever_comes(written_models, tmp_path):
    sample.main(["generate", "--model", written_models["ar"], "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert len(list((tmp_path / "out").glob("unconditional-*.png"))) == 16


def test_caption_says_a_line_for_every_readable_file(written_models, tmp_path, capsys):
    names = write_variants(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"broken")
    sample.main(["caption", *(str(tmp_path / name) for name in names + ["broken.png"]), "--model",
                 written_models["caption"], "--device", "cpu"])
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == [str(tmp_path / name) for name in names]
    assert "broken.png" in said.err


def test_a_captioner_remembers_the_size_of_its_images(tmp_path):
    small_captioner().save_pretrained(tmp_path / "caption")
    edit(tmp_path / "caption/config.json", '"image_size": 16,\n  "lm"', '"image_size": 12,\n  "lm"')
    args = sample.parse_args(["caption", "x.png", "--model", str(tmp_path / "caption")])
    sample.open_model(args, torch.device("cpu"), vqrae.Captioner.from_pretrained)
    assert args.image_size == 12


@pytest.mark.parametrize("caption", ["x\udcff", "\U00010348" * 90, "a\nb", "\u732b" * 100, "../../up", "/", "."])
def test_a_caption_of_any_characters_names_a_file(caption, written_models, tmp_path):
    sample.main(["generate", caption, "--model", written_models["ar"], "--count", "1", "--out", str(tmp_path / "out"),
                 "--device", "cpu"])
    assert len(list((tmp_path / "out").iterdir())) == 2 and not list(tmp_path.glob("*.png"))


# --- a full disk ---


@contextmanager
def full_disk(size):
    """Inside, no file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("arguments", [
    ["generate", "cat", "--model", "{ar}", "--count", "1"],
    ["reconstruct", "{photos}/class0/0.png", "--model", "{vqrae}"],
    ["reconstruct", "--model", "{vqrae}", "--data", "{photos}", "--split", "all"],
    ["codes", "--model", "{vqrae}", "--data", "{photos}", "--split", "all"],
    ["evaluate", "--model", "{vqrae}", "--data", "{photos}", "--split", "all", "--clusters", "2"],
    ["export", "--format", "hf", "--model", "{vqrae}"],
    ["export", "--format", "tokens", "--model", "{vqrae}", "--data", "{photos}"]])
def test_a_full_disk_is_a_sentence_and_what_stood_there_before_stays(arguments, before, written_models, photo_folder,
                                                                     tmp_path, capsys):  # pytest's own is a file
    out = tmp_path / "deep/out"
    arguments = [part.format(photos=photo_folder, **written_models) for part in arguments]
    arguments += ["--out", str(out), "--device", "cpu"]

    def files():
        return {path: path.read_bytes() for path in tmp_path.glob("deep/**/*") if path.is_file()}

    if before:
        sample.main(arguments)
        arguments += ["--shard-size", "5"] if "tokens" in arguments else []
        for path in out.glob("codes-*"):
            path.unlink()
            (out / "digest.txt").unlink()
            (out / "index.json").unlink()
    stood = files()
    sentence = "error: cannot write .*deep/out.*what stood there before is kept"
    with full_disk(30), pytest.raises(SystemExit, match=sentence):
        sample.main(arguments)
    assert files() == stood
    assert {path.name for path in tmp_path.rglob("*part*")} == set()


# --- what is asked for by name ---


def test_evaluate_fetches_nothing_unless_lpips_is_asked_for(saved_model, photo_folder, encoder_folder, tmp_path,
                                                            monkeypatch, capsys):
    needs("lpips")
    asked = []

    def no_network(*args, **kwargs):
        asked.append(args)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    arguments = ["evaluate", "--model", str(saved_model), "--data", str(photo_folder), "--split", "all",
                 "--frechet-encoder", str(encoder_folder), "--teacher", str(encoder_folder), "--device", "cpu"]
    sample.main(arguments)
    said = capsys.readouterr()
    assert not asked and "lpips" not in said.out.lower() + said.err.lower()
    with pytest.raises(SystemExit, match="error: the weights of VGG16.* cannot be fetched .*no network") as error:
        sample.main(arguments + ["--lpips"])
    assert asked and "\n" not in str(error.value)


def test_lpips_is_measured_where_it_is_asked_for(saved_model, photo_folder, encoder_folder, monkeypatch, capsys):
    monkeypatch.setattr(sample, "lpips_distance", lambda device: lambda x, y: torch.full((len(x),), 0.25))
    sample.main(["evaluate", "--model", str(saved_model), "--data", str(photo_folder), "--split", "all", "--lpips",
                 "--frechet-encoder", str(encoder_folder), "--device", "cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lpips"] == 0.25


# --- what cannot be done is one sentence ---


@pytest.mark.parametrize("arguments, sentence", [
    (["evaluate", "--model", "/nowhere"], "no model at /nowhere"),
    (["evaluate", "--model", "{model}", "--data", "/nowhere"], "no images at /nowhere"),
    (["evaluate", "--model", "{model}", "--data", "{photos}", "--image-size", "18"], "do not divide into patches"),
    (["reconstruct", "/nowhere.png", "--model", "{model}"], "none of the given files"),
])
def test_a_wrong_argument_of_sample_is_one_sentence(saved_model, photo_folder, tmp_path, arguments, sentence,
                                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=sentence):
        sample.main([part.format(model=saved_model, photos=photo_folder) for part in arguments])


def test_an_error_on_the_command_line_is_a_sentence_and_an_exit_code_not_a_traceback(tmp_path):
    arguments = command("sample.py", "codes", "--model", tmp_path / "nothing")
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: no model at")


@pytest.mark.parametrize("arguments, sentence", [
    (["generate", "x", "--model", "{vqrae}"], "does not describe a VisualLM"),
    (["reconstruct", "x.png", "--model", "{vqrae}", "--generator", "{ar}"], "--generator needs captions"),
    (["caption", "x.png", "--model", "{ar}"], "does not describe a Captioner"),
    (["evaluate", "--model", "{ar}", "--split", "train"], "--split is not for a generator"),
    (["evaluate", "--model", "{caption}", "--top-k", "5"], "--top-k is not for a captioner"),
    (["evaluate", "--model", "{vqrae}", "--encoder", "x"], "--encoder is not for a tokenizer"),
    (["evaluate", "--model", "{ar}", "--lpips"], "--lpips is not for a generator"),
    (["export", "--model", "{vqrae}", "--format", "hf", "--data", "x"], "--data is not for --format hf"),
    (["caption", "x.png", "--model", "{caption}"], "none of the given files"),
    (["caption", "x.png", "--model", "{caption}", "--encoder", "data/tiny_vit"], "has other sizes"),
    (["reconstruct", "x.png", "--model", "{ar}"], "does not describe a VQRAE"),
])
def test_a_model_of_another_kind_is_one_sentence(written_models, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        sample.main([part.format(**written_models) for part in arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command, sentence", [("evaluate", "holds no JSON object"), ("codes", "does not describe a")])
def test_a_config_that_is_no_object_is_one_sentence(saved_model, command, sentence):
    (saved_model / "config.json").write_text("7")
    with pytest.raises(SystemExit, match=sentence):
        sample.main([command, "--model", str(saved_model)])


def test_a_generator_and_a_tokenizer_that_do_not_belong_together_are_one_sentence(written_models, tmp_path):
    small_model(codebook_size=16, codebook_dim=8).save_pretrained(tmp_path / "ar/vqrae")
    with pytest.raises(SystemExit, match="they were not trained together"):
        sample.main(["generate", "x", "--model", written_models["ar"], "--device", "cpu"])
