"""Images that Hugging Face datasets reads: packed by data/imagenet/prepare.py, saved by others, in tars, streamed."""

import io
import os
import pickle
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

from conftest import coloured_png, command, needs, number_of, pack, swapped_profile, write_tars
from support.files import InputError
from support.images import TrainingOrder, read_image
from support.sets import Stream, decode_image, open_images

needs("datasets")
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_from_disk  # noqa: E402
from datasets import Image as ImageColumn  # noqa: E402


def numbers(batches):
    return [number_of(image) for batch in batches for image in batch]


# --- packing ---


def test_packing_keeps_every_image_once_under_its_class_and_split_shuffled(packed, fake_imagenet):
    shown = []
    for split in ("train", "val"):
        plain, images = open_images(fake_imagenet, split, 32), open_images(packed, split, 32)
        classes = {Path(record["name"]).name: record["category"] for record in plain.records}
        assert {record["name"]: record["category"] for record in images.records}.items() == \
            {name: label for name, label in classes.items() if name != "broken.JPEG"}.items()
        for record, number in zip(images.records, numbers(images.batches(range(len(images)), 100))):
            assert record["name"].endswith(f"image_{number:04}.JPEG")
            shown.append(number)
    assert sorted(shown) == list(range(400))
    assert len({record["category"] for record in open_images(packed, "train", 32).records[:60]}) > 15  # of 20


def test_a_damaged_image_is_skipped_and_named(fake_imagenet, tmp_path, capfd):
    (tmp_path / "some/cats").mkdir(parents=True)
    for name in ("broken.JPEG", "image_0015.JPEG", "image_0016.JPEG"):
        shutil.copy(fake_imagenet / "train/n0003" / name, tmp_path / "some/cats" / name)
    pack(tmp_path / "some", tmp_path / "out")
    said = capfd.readouterr()
    assert said.err.count("skipped: cannot read") == 1 and "cats/broken.JPEG as an image" in said.err
    assert "skipped 1 files" in said.out and len(open_images(tmp_path / "out", "all", 16)) == 2


def test_what_is_small_is_kept_byte_for_byte_and_what_is_large_is_resized_within_the_error_of_jpeg(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    (tmp_path / "in").mkdir()
    noise.resize((45, 30), Image.BICUBIC).save(tmp_path / "in/small.jpg", quality=70)
    noise.resize((150, 100), Image.BICUBIC).save(tmp_path / "in/large.JPG", quality=100)
    noise.resize((150, 100), Image.BICUBIC).save(tmp_path / "in/large.png")
    pack(tmp_path / "in", tmp_path / "out", "--size", "40", "--quality", "100")
    images = open_images(tmp_path / "out", "all", 40)
    found = {row["image"]["path"]: row["image"] for row in images.encoded}
    assert found["small.jpg"]["bytes"] == (tmp_path / "in/small.jpg").read_bytes()
    for name in ("large.JPG", "large.png"):
        got = decode_image(found[name])
        assert got.size == (60, 40)
        expected = np.asarray(read_image(tmp_path / "in" / name).resize((60, 40), Image.BICUBIC)).astype(float)
        assert np.sqrt(np.mean((np.asarray(got) - expected) ** 2)) < 5  # colour is kept at half the resolution


def test_packing_holds_out_what_a_plain_folder_does_and_takes_its_captions_along(photo_folder, tmp_path):
    source = shutil.copytree(photo_folder, tmp_path / "in")
    for path in source.rglob("*.*g"):
        path.with_suffix(".txt").write_text(f"says {path.name}")
    pack(source, tmp_path / "out")
    for split in ("train", "val"):
        plain, images = ({Path(record["name"]).name: (record["category"], record["caption"]) for record in
                          open_images(folder, split, 16).records} for folder in (source, tmp_path / "out"))
        assert images == plain


def test_packing_takes_validation_for_the_second_split_and_follows_links(fake_imagenet, tmp_path):
    (tmp_path / "own/train").mkdir(parents=True)
    (tmp_path / "own/train/x").symlink_to(fake_imagenet / "val/n0001")
    (tmp_path / "own/validation/class").mkdir(parents=True)
    (tmp_path / "own/validation/class/linked").symlink_to(fake_imagenet / "val/n0005")
    pack(tmp_path / "own", tmp_path / "out")
    for split in ("train", "val"):
        assert len(open_images(tmp_path / "out", split, 16)) == len(open_images(tmp_path / "own", split, 16)) > 0


def test_a_killed_packing_goes_on_with_the_parts_that_are_not_there_and_equals_an_undisturbed_one(
        fake_imagenet, packed, tmp_path):
    arguments = ["data/imagenet/prepare.py", "--source", fake_imagenet, "--out", tmp_path / "out", "--workers", "1"]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.rglob("0*.arrow"))) < 1:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.arrow")}
    assert len(done) == 1 and not (tmp_path / "out").exists()
    again = subprocess.run(command(*arguments), capture_output=True, text=True, check=True)
    assert "skipped: cannot read" not in again.stderr  # the training images were packed before
    for split in ("train", "validation"):
        assert load_from_disk(tmp_path / "out")[split].with_format("arrow")[:] == \
            load_from_disk(packed)[split].with_format("arrow")[:]
    assert os.listdir(tmp_path) == ["out"]


def test_packing_refuses_to_write_over_what_is_there(fake_imagenet, packed):
    with pytest.raises(SystemExit, match="is there already: remove it, or choose another --out"):
        pack(fake_imagenet, packed)


# --- sets that can be asked for any image ---


def test_a_set_gives_the_same_batches_with_and_without_workers_and_to_two_ranks_in_turn(packed):
    images = open_images(packed, "train", 16)
    keys = list(islice(TrainingOrder(len(images), 0, 0), 380))
    alone = torch.cat(list(images.batches(keys, 100, 0)))
    assert alone.equal(torch.cat(list(images.batches(keys, 100, 2))))
    ranks = [torch.cat(list(images.batches(list(islice(TrainingOrder(len(images), 0, 0, rank, 2), 190)), 50)))
             for rank in range(2)]
    assert torch.stack(ranks, 1).flatten(0, 1).equal(alone)
    assert sorted(numbers([alone])) == [i for i in range(400) if i % 20 != 7]


def test_a_set_reaches_a_spawned_worker_without_its_images(packed):
    images = open_images(packed, "val", 16)
    sent = pickle.dumps(images)
    assert len(sent) < 20_000 and pickle.loads(sent)[3, 7][0].equal(images[3, 7][0])


def save_set(folder, columns, **features):
    """A set of 20 images with further columns, saved by datasets."""
    rows = {"photo": [{"bytes": coloured_png(i), "path": None} for i in range(20)], **columns}
    Dataset.from_dict(rows, features=Features({"photo": ImageColumn(), **features})).save_to_disk(folder)


@pytest.mark.parametrize("columns, features, named, record", [
    ({"kind": [1] * 20}, {"kind": ClassLabel(names=["cat", "dog"])}, None, {"category": "dog"}),
    ({"kind": [-1] * 20}, {"kind": ClassLabel(names=["cat", "dog"])}, None, {}),
    ({"id": ["x"] * 20, "text": ["a cat "] * 20}, {"id": Value("string"), "text": Value("string")}, None,
     {"caption": "a cat"}),
    ({"said": [["one", "two"]] * 20}, {"said": List(Value("string"))}, None, {"caption": "one"}),
    ({"id": ["x"] * 20, "alt": ["a cat"] * 20}, {"id": Value("string"), "alt": Value("string")}, None, {}),
    ({"id": ["x"] * 20, "alt": ["a cat"] * 20}, {"id": Value("string"), "alt": Value("string")}, "photo,alt",
     {"caption": "a cat"}),
    ({"json": [{"caption": "a cat"}] * 20}, {"json": {"caption": Value("string")}}, None, {"caption": "a cat"}),
])
def test_labels_and_captions_are_found_by_types_and_names_of_columns(columns, features, named, record, tmp_path):
    save_set(tmp_path / "set", columns, **features)
    images = open_images(tmp_path / "set", "all", 16, columns=named)
    assert images.records[5] == {"name": "5", "category": "", **record}
    assert numbers(images.batches(range(20), 8)) == list(range(20))


def test_a_set_without_a_second_split_holds_out_a_twentieth_and_knows_itself_again(tmp_path):
    save_set(tmp_path / "set", {})
    parts = [open_images(tmp_path / "set", split, 16) for split in ("train", "val", "train")]
    assert sorted(numbers(parts[0].batches(range(19), 8)) + numbers(parts[1].batches(range(1), 8))) == list(range(20))
    assert parts[0].fingerprint() == parts[2].fingerprint() != parts[1].fingerprint()
    assert parts[0].names() == parts[2].names() != parts[1].names()


def test_a_jpeg_with_a_profile_is_read_from_a_set_as_from_a_file():
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 10)).save(file, "JPEG", icc_profile=swapped_profile(), quality=95)
    found = np.asarray(decode_image({"bytes": file.getvalue(), "path": "x"})).astype(int)
    assert np.abs(found - (40, 200, 10)).max() < 8 and np.array_equal(found, np.asarray(read_image("x", file)))


def test_a_set_of_the_hub_is_asked_for_by_its_name_and_configuration(monkeypatch):
    asked, rows = [], Dataset.from_dict({"image": [{"bytes": coloured_png(0), "path": None}]},
                                        features=Features({"image": ImageColumn()}))
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **how: asked.append((names, how)) or DatasetDict(
        {"train": rows, "test": rows, "validation": rows}))
    assert len(open_images("hub:frgfm/imagenette/320px", "all", 16)) == 2
    assert asked == [(("frgfm/imagenette", "320px"), {"streaming": False})]


@pytest.mark.parametrize("data, columns, sentence", [
    ("SET", "photo,nothing", "has no column nothing, but photo"),
    ("DAMAGED", None, "cannot read .*damaged: "),
    ("/nowhere/{0..3}.tar", None, "cannot read /nowhere/.*[.]tar"),
    ("hub:nobody/nothing", None, "cannot read hub:nobody/nothing: "),
    ("hub:nothing", None, "hub:nothing is no set of the hub, which is called hub:USER/NAME"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_a_set_that_cannot_be_read_is_a_sentence(data, columns, sentence, stream, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    save_set(tmp_path / "set", {})
    shutil.copytree(tmp_path / "set", tmp_path / "damaged")
    next((tmp_path / "damaged").glob("*.arrow")).write_bytes(b"half of it")
    data = data.replace("SET", str(tmp_path / "set")).replace("DAMAGED", str(tmp_path / "damaged"))
    with pytest.raises(InputError, match=sentence) as error:
        open_images(data, "train", 16, stream, columns)
    assert "\n" not in str(error.value)


def test_without_the_package_a_set_is_a_sentence(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets.distributed", None)
    with pytest.raises(InputError, match="needs packages more .*: pip install datasets"):
        open_images(packed, "train", 16)


# --- WebDataset's tars ---


@pytest.mark.parametrize("data", ["", "/some-{000000..000002}.tar", "/*.tar"])
@pytest.mark.parametrize("name", ["tars", "tars:v2"])
def test_tars_are_read_with_the_first_of_their_captions_without_masks_and_what_macos_adds(data, name, tmp_path):
    images = open_images(f"{write_tars(tmp_path / name, 3, 10)}{data}", "all", 16)
    assert numbers(images.batches(range(30), 8)) == list(range(30))
    assert images.records == [{"name": f"v1/{i:05}.png", "category": "3", "caption": f"\u00e9t\u00e9 {i}"}
                              for i in range(30)]
    assert open_images(f"{tmp_path / name}{data}", "all", 16, columns="png,json").records[2]["caption"] == "one"


@pytest.mark.parametrize("second", ["validation", "test", "Valid"])
def test_tars_in_two_halves_are_the_splits(second, tmp_path):
    for name, count in (("train", 2), (second, 1)):
        write_tars(tmp_path / name, count, 10)
    assert [len(open_images(tmp_path, split, 16)) for split in ("train", "val", "all")] == [20, 10, 30]


def test_a_tar_beside_images_or_their_folders_hides_none(photo_folder, tmp_path):
    write_tars(tmp_path / "tars", 1, 10).joinpath("some-000000.tar").rename(tmp_path / "annotations.tar")
    for number, source in enumerate((photo_folder, photo_folder / "class0")):
        shutil.copytree(source, tmp_path / str(number))
        shutil.copy(tmp_path / "annotations.tar", tmp_path / str(number))
        assert len(open_images(tmp_path / str(number), "all", 16)) == len(open_images(source, "all", 16))


@pytest.mark.parametrize("name", ["photos:v2", "file:photos", "http:", "photos.tar", "some{0..3}", "hub:me"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_folder_that_exists_is_a_folder_whatever_it_is_called(name, relative, photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photo_folder, tmp_path / name)
    assert len(open_images(name if relative else tmp_path / name, "all", 16)) == 12


def test_why_an_image_of_a_tar_is_damaged_is_told(tmp_path, capfd):
    path = write_tars(tmp_path / "tars", 1, 10) / "some-000000.tar"
    path.write_bytes(path.read_bytes().replace(coloured_png(3), coloured_png(3).replace(b"IDAT", b"IDOT")))
    assert len(set(numbers(open_images(path, "all", 16).batches(range(10), 4)))) == 9
    assert "v1/00003.png as an image: " in capfd.readouterr().err


# --- streams ---


def show(data, count, rank=0, ranks=1, workers=0, start=0, state=None):
    """The numbers of the first `count` images of a stream's training views, and the state behind them."""
    images = open_images(data, "train", 16, stream=True)
    images.state = state or {}
    batches = images.batches(TrainingOrder(len(images), 5, start, rank, ranks), 3, workers)
    return numbers(islice(batches, count // 3)), images.state


def test_streamed_images_are_shown_once_an_epoch_however_many_workers_and_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(Stream, "BUFFER", 8)
    tars = write_tars(tmp_path / "tars", 7, 12)
    for ranks, workers in ((1, 0), (1, 2), (2, 0), (3, 2)):
        shown, again = (sum((show(tars, 72 // ranks, rank, ranks, workers)[0] for rank in range(ranks)), [])
                        for _ in range(2))
        assert sorted(shown) == list(range(72)) and shown == again and shown != sorted(shown)
    held_out = open_images(tars, "val", 16, stream=True)
    assert numbers(held_out.batches(range(len(held_out)), 5, 2)) == list(range(72, 84))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_shows_no_image_again_and_passes_over_no_more_than_the_buffer(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(Stream, "BUFFER", 4)
    tars = write_tars(tmp_path / "tars", 7, 12)
    before, state = show(tars, 36, workers=workers)
    after, _ = show(tars, 24, workers=workers, start=36, state=state)
    assert len({*before, *after}) == 60


def test_a_stream_resumed_by_more_processes_begins_an_epoch_that_none_has_seen(tmp_path, monkeypatch):
    tars = write_tars(tmp_path / "tars", 3, 12)
    _, state = show(tars, 30)
    assert show(tars, 24, start=30, state=dict(state), workers=2) != show(tars, 24, workers=2)


def test_a_saved_set_can_be_streamed(packed):
    images = open_images(packed, "val", 16, stream=True)
    assert sorted(numbers(images.batches(range(len(images)), 8))) == list(range(7, 400, 20))


@pytest.mark.parametrize("data, sentence", [
    ("PHOTOS", "--stream is for sets that datasets reads, and .* is a folder of images"),
    ("TARS/some-000000.tar", "is a single file, and one more must be held out"),
    ("TARS/cut-{0..1}.tar", "cannot read .*cut-.*tar: "),
])
def test_a_stream_that_cannot_be_is_a_sentence(data, sentence, photo_folder, tmp_path):
    tars = write_tars(tmp_path / "tars", 1, 12)
    for name in ("cut-0.tar", "cut-1.tar"):
        (tars / name).write_bytes((tars / "some-000000.tar").read_bytes()[:30_000])
    with pytest.raises(InputError, match=sentence) as error:
        images = open_images(data.replace("PHOTOS", str(photo_folder)).replace("TARS", str(tars)), "train", 16, True)
        list(images.batches(range(len(images)), 4))
    assert "\n" not in str(error.value)
