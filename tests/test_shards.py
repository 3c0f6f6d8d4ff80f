"""Images in tar shards: packed by data/imagenet/prepare.py, in WebDataset's layout, or streamed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import command, number_of, pack, swapped_profile, write_shards
from support.files import InputError
from support.images import TrainingOrder, read_image
from support.shards import decode_image, open_images


# --- packing ---


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_packing_keeps_every_image_once_under_its_class_and_split(packed, fake_imagenet):
    plain, shards = ([open_images(folder, split, 32) for split in ("train", "val")] for folder in (fake_imagenet,
                                                                                                     packed))
    seen = []
    for a, b in zip(plain, shards):
        classes = {Path(record["name"]).name: record["category"] for record in a.records}
        assert {Path(record["name"]).name: record["category"] for record in b.records} == classes
        assert len(b) == len(classes)
        for images, places in b.batches(range(len(b)), 100, indices=True):
            for image, place in zip(images, places):
                seen.append(number_of(image))
                assert b.records[place]["name"].endswith(f"image_{seen[-1]:04}.JPEG")
    assert sorted(seen) == list(range(2000))


def test_the_packing_shuffles_all_classes_into_every_shard_and_counts_them(packed):
    images = open_images(packed, "train", 32)
    categories = [record["category"] for record in images.records]
    assert all(len(set(categories[i:i + 100])) > 15 for i in range(0, 1900, 100))  # of 20 classes, when read in order
    index = json.loads((packed / "train/index.json").read_text())
    assert index["classes"] == {name: categories.count(name) for name in sorted(set(categories))}
    assert index["images"] == 1900 and len(index["shards"]) == 20


def test_a_damaged_image_is_skipped_named_and_listed(fake_imagenet, tmp_path, capfd):
    for name in ("broken.JPEG", "image_0015.JPEG"):
        (tmp_path / "some/cats").mkdir(parents=True, exist_ok=True)
        shutil.copy(fake_imagenet / "train/n0003" / name, tmp_path / "some/cats" / name)
    pack(tmp_path / "some", tmp_path / "out")
    said = capfd.readouterr().err
    assert said.count("skipped: cannot read") == 1 and "cats/broken.JPEG as an image" in said
    indices = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("index.json")]
    assert [name for index in indices for name in index["skipped"]] == ["cats/broken.JPEG"]
    assert sum(index["images"] for index in indices) == 1


def test_what_is_small_is_kept_byte_for_byte_and_what_is_large_is_resized_within_the_error_of_jpeg(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    (tmp_path / "in").mkdir()
    noise.resize((45, 30), Image.BICUBIC).save(tmp_path / "in/small.jpg", quality=70)
    noise.resize((150, 100), Image.BICUBIC).save(tmp_path / "in/large.JPG", quality=100)
    noise.resize((150, 100), Image.BICUBIC).save(tmp_path / "in/large.png")
    pack(tmp_path / "in", tmp_path / "out", "--size", "40", "--quality", "100")
    parts = [open_images(tmp_path / "out", split, 40) for split in ("train", "val")]
    found = {Path(member.name).name: member for part in parts for member in part.sources}
    assert found.keys() == {"small.jpg", "large.JPG", "large.png.jpg"}
    assert found["small.jpg"].data() == (tmp_path / "in/small.jpg").read_bytes()
    for name in ("large.JPG", "large.png"):
        image = read_image(tmp_path / "in" / name)
        member = found[name if name == "large.JPG" else "large.png.jpg"]
        got = decode_image(member.data(), member)
        assert got.size == (60, 40)
        expected = np.asarray(image.resize((60, 40), Image.BICUBIC)).astype(float)
        assert np.sqrt(np.mean((np.asarray(got) - expected) ** 2)) < 5  # colour is kept at half the resolution


def test_without_a_val_folder_the_packing_holds_out_what_a_plain_folder_does(photo_folder, tmp_path):
    pack(photo_folder, tmp_path)
    for split in ("train", "val"):
        plain, shards = ({Path(record["name"]).stem: record["category"] for record in
                          open_images(folder, split, 16).records} for folder in (photo_folder, tmp_path))
        assert {Path(name).stem: category for name, category in shards.items()} == plain


def test_the_packing_takes_validation_for_the_second_split_and_follows_links(fake_imagenet, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train").symlink_to(fake_imagenet / "val")
    (tmp_path / "own/validation/class").mkdir(parents=True)
    (tmp_path / "own/validation/class/linked").symlink_to(fake_imagenet / "val/n0001")
    pack(tmp_path / "own", tmp_path / "out")
    assert [len(open_images(tmp_path / "out", split, 16)) for split in ("train", "val")] == [100, 20]


def test_a_resumed_packing_equals_an_undisturbed_one_byte_for_byte(fake_imagenet, packed, tmp_path):
    arguments = ["data/imagenet/prepare.py", "--source", fake_imagenet, "--out", tmp_path, "--shard-size", "100",
                 "--workers", "2"]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.rglob("*.tar"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.rglob("0*.tar"))) < 21
    with pytest.raises(InputError, match="cannot read the shard .*/000..[.]tar .*No such file.*packed again"):
        open_images(tmp_path, "all", 16)
    for name in (".00003.tar.77", ".00003.npy.77"):
        (tmp_path / "train" / name).write_bytes(b"half of it")
    pack(fake_imagenet, tmp_path)
    assert files_of(tmp_path) == files_of(packed)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    pack(fake_imagenet, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}  # all was there


def test_a_full_disk_ends_the_packing_with_a_sentence_and_keeps_finished_shards(fake_imagenet, packed, tmp_path,
                                                                                monkeypatch):
    save = np.save

    def full(file, rows):
        if "00002" in file.name:
            raise OSError(28, "No space left on device")
        save(file, rows)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(SystemExit, match="cannot pack .*00002.tar .*No space left on device.*shards are kept"):
        pack(fake_imagenet, tmp_path)
    monkeypatch.undo()
    names = {path.name for path in (tmp_path / "train").iterdir()}
    assert {"00000.tar", "00001.tar"} <= names and "00002.tar" not in names and not any(".tar." in n for n in names)
    pack(fake_imagenet, tmp_path)
    assert files_of(tmp_path) == files_of(packed)


@pytest.mark.parametrize("extra, sentence", [
    (["--size", "16"], "holds another packing .with other size.: choose another --out"),
    (["--seed", "1"], "holds another packing"),
    (["--source", "/nowhere"], "no images at /nowhere: it is not a folder"),
])
def test_a_packing_refuses_to_mix_with_another(fake_imagenet, packed, extra, sentence):
    with pytest.raises(SystemExit, match=sentence):
        pack(fake_imagenet, packed, *extra)


# --- shards on disk ---


def test_a_shard_that_is_missing_cut_off_or_no_tar_is_a_sentence_with_its_path(packed, tmp_path):
    for number, (damage, sentence) in enumerate([
            (lambda path: path.unlink(), "No such file"),
            (lambda path: os.truncate(path, 50_000), "it is cut off"),
            (lambda path: path.with_suffix(".npy").write_bytes(b"no array"), "cannot read the shard"),
            (lambda path: (path.with_suffix(".npy").unlink(), os.truncate(path, 50_000)), "unexpected end of data"),
            (lambda path: (path.with_suffix(".npy").unlink(), path.write_bytes(b"no tar")), "cannot read the shard")]):
        shutil.copytree(packed, tmp_path / str(number))
        damage(tmp_path / str(number) / "train/00004.tar")
        with pytest.raises(InputError, match=sentence) as error:
            open_images(tmp_path / str(number), "train", 16)
        assert "train/00004.tar" in str(error.value) and "\n" not in str(error.value)


def test_shards_give_the_same_batches_with_and_without_workers_and_to_two_ranks_in_turn(packed):
    images = open_images(packed, "train", 16)
    keys = list(islice(TrainingOrder(len(images), 0, 0), 1900))
    alone = torch.cat(list(images.batches(keys, 100, 0)))
    assert alone.equal(torch.cat(list(images.batches(keys, 100, 2))))
    ranks = [torch.cat(list(images.batches(list(islice(TrainingOrder(len(images), 0, 0, rank, 2), 950)), 50)))
             for rank in range(2)]
    assert torch.stack(ranks, 1).flatten(0, 1).equal(alone)
    assert len({number_of(image) for image in alone}) == 1900


@pytest.mark.parametrize("named_by", ["folder", "pattern"])
def test_shards_of_others_are_read_with_their_labels_and_captions(named_by, tmp_path):
    write_shards(tmp_path / "shards", 3, 10)
    data = tmp_path / "shards" if named_by == "folder" else tmp_path / "shards/some-{000000..000002}.tar"
    images = open_images(data, "all", 16)
    assert [number_of(image) for batch in images.batches(range(30), 8) for image in batch] == list(range(30))
    for i, record in enumerate(images.records):
        assert record == {"name": f"v1.0/{i:05}." + ("jpg" if i % 3 else "seg.PNG"),
                          "category": "other" if i % 5 == 0 else "a class",
                          "caption": "a caption" if i % 2 else "\u00e9t\u00e9"}
    parts = [open_images(data, split, 16) for split in ("train", "val")]
    assert [len(part) for part in parts] == [29, 1] and parts[0].fingerprint() != parts[1].fingerprint()
    assert images.fingerprint() == open_images(data, "all", 16).fingerprint()


def test_without_the_webdataset_package_a_pattern_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(InputError, match="needs a package more: pip install webdataset"):
        open_images("some-{0..3}.tar", "train", 16)


@pytest.mark.parametrize("name", ["photos:v2", "file:photos", "http:", "photos.tar", "some{0..3}"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_folder_that_exists_is_a_folder_whatever_it_is_called(name, relative, photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photo_folder, tmp_path / name)
    images = open_images(name if relative else tmp_path / name, "all", 16)
    assert len(images) == 12 and {record["category"] for record in images.records} == {"class0", "class1"}


@pytest.mark.parametrize("pattern", ["some-{000000..000002}.tar", "some-000001.tar"])
def test_shards_in_a_folder_with_a_colon_are_read_from_disk(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards:v2", 3, 10)
    assert len(open_images(f"shards:v2/{pattern}", "all", 16)) == (30 if "{" in pattern else 10)
    assert len(open_images("shards:v2", "all", 16)) == 30


@pytest.mark.parametrize("second", ["validation", "test", "Valid"])
def test_shards_beside_each_other_in_two_halves_are_the_splits(second, tmp_path):
    write_shards(tmp_path / "train", 2, 10)
    write_shards(tmp_path / second, 1, 10)
    assert [len(open_images(tmp_path, split, 16)) for split in ("train", "val", "all")] == [20, 10, 30]


def test_a_jpeg_with_a_profile_is_read_from_a_shard_as_from_a_file():
    profile, file = swapped_profile(), io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 10)).save(file, "JPEG", icc_profile=profile, quality=95)
    found = np.asarray(decode_image(file.getvalue(), "x")).astype(int)
    assert np.abs(found - (40, 200, 10)).max() < 8
    assert np.array_equal(found, np.asarray(read_image("x", file)))


def test_why_an_image_of_a_shard_is_damaged_is_told(tmp_path, capfd):
    write_shards(tmp_path / "shards", 1, 10)
    data = (tmp_path / "shards/some-000000.tar").read_bytes()
    (tmp_path / "shards/some-000000.tar").write_bytes(data.replace(b"IDAT", b"IDOT", 1))
    images = open_images(tmp_path / "shards", "all", 16)
    list(images.batches(range(10), 4))
    assert "00000.seg.PNG as an image: " in capfd.readouterr().err


# --- shards behind a URL ---


def test_streamed_shards_show_every_image_once_an_epoch_however_many_workers_and_ranks(tmp_path):
    write_shards(tmp_path / "shards", 7, 12)
    images = open_images(f"file:{tmp_path}/shards/some-{{000000..000006}}.tar", "train", 16)
    for ranks, workers in ((1, 0), (1, 2), (2, 0), (3, 2)):
        shown, again = [], []
        for result in (shown, again):
            for rank in range(ranks):
                keys = [(shard, seed) for place, (shard, seed) in
                        zip(range(6), TrainingOrder(len(images), 5, 0)) if place % ranks == rank]
                result += [number_of(image) for batch in images.batches(keys, 5, workers) for image in batch]
        assert sorted(shown) == list(range(72)) and shown == again and shown != sorted(shown)
    held_out = open_images(f"file:{tmp_path}/shards/some-{{000000..000006}}.tar", "val", 16)
    shown = [number_of(image) for batch in held_out.batches(range(len(held_out)), 5) for image in batch]
    assert shown == list(range(72, 84))


@pytest.mark.parametrize("url, workers, sentence", [
    ("file:/nowhere/{0..3}.tar", 0, "cannot read the shard file:/nowhere/.[.]tar: No such file or directory"),
    ("file:/nowhere/{0..3}.tar", 1, "cannot read the shard file:/nowhere/.[.]tar: No such file or directory"),
    ("pipe:head -c 5000 SHARDS/some-00000{0..2}.tar", 0, "cannot read the shard pipe:"),
    ("file:SHARDS/some-000000.tar", 0, "is a single shard, and one more must be held out"),
    ("nothing:{0..3}.tar", 0, "cannot read the shard nothing:"),
    ("x{.tar", 0, "is no pattern of names"),
])
def test_a_stream_that_fails_is_a_sentence(tmp_path, url, workers, sentence):
    write_shards(tmp_path / "shards", 3, 4)
    with pytest.raises(InputError, match=sentence) as error:
        images = open_images(url.replace("SHARDS", str(tmp_path / "shards")), "train", 16)
        list(images.batches(range(len(images)), 4, workers))
    assert "\n" not in str(error.value)
