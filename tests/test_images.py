"""Images: what is read of any file and any folder, and the order of training."""

import os
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import RED, ROOT, seeds, write_variants
from support.files import InputError
from support.images import ImageSet, TrainingOrder, eight_bits, held_out, read_image, resize_to


# --- our sets ---


def test_held_out_emoji_are_held_out_in_every_style():
    train_names, val_names = ({record["name"] for record in ImageSet(ROOT / "data/emoji", split, 64).records}
                              for split in ("train", "val"))
    assert train_names and val_names and not train_names & val_names
    assert 0.15 < len(val_names) / len(train_names | val_names) < 0.25


def test_every_shipped_image_has_a_tile_a_caption_and_a_category():
    for name, size, expected in (("emoji", 64, 4832), ("photos", 128, 210)):
        images = ImageSet(ROOT / "data" / name, "all", size)
        assert len(images) == expected
        assert all(record["caption"] and record["category"] for record in images.records)
        assert all(tile.std() > 0 and tile.shape == (size, size, 3) for tile in images.sources)


# --- any file ---


def test_every_kind_of_file_reads_as_the_same_rgb_picture(tmp_path):
    for name in write_variants(tmp_path):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (30, 20)
        assert np.abs(np.asarray(image).astype(int) - RED).max() <= 2, name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert("RGBA" if mode == "P" else mode)
    if mode == "P":
        image = image.quantize(4)
    image.save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


@given(st.integers(0, 65535))
@settings(max_examples=10)
def test_16_bit_grey_is_scaled_not_clipped(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("deep") / "deep.png"
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(path)
    assert abs(int(np.asarray(read_image(path))[0, 0, 0]) - value / 257) <= 0.51


def test_a_photo_taken_sideways_comes_upright(tmp_path):
    image = Image.new("RGB", (30, 20), RED)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)


# --- any folder ---


def test_files_that_are_no_images_are_skipped_counted_and_named_once(tmp_path, capsys):
    write_variants(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    whole = (tmp_path / "rgb.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "cut.jpg")
    os.truncate(tmp_path / "cut.jpg", 2000)  # its header is fine, its pixels are not
    images = ImageSet(tmp_path, "all", 16)
    for _ in range(2):
        assert sum(len(batch) for batch in images.batches(range(len(images)), 4)) == len(images) == 6
    said = capsys.readouterr().err
    assert "skipped 2 files" in said and all(said.count(name) == 1 for name in ("notes.txt", "broken.png", "cut.jpg"))
    assert whole == (tmp_path / "rgb.png").read_bytes()


def test_both_splits_of_a_folder_name_a_broken_file_together_only_once(tmp_path, photo_folder, capsys):
    for path in photo_folder.rglob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"broken")
    for split in ("train", "val"):
        ImageSet(tmp_path, split, 16)
    assert capsys.readouterr().err.count("broken.png") == 1


def test_an_empty_or_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=f"no images at {tmp_path}"):
        ImageSet(tmp_path, "train", 16)
    with pytest.raises(InputError, match="is not a folder"):
        ImageSet(tmp_path / "nowhere", "train", 16)


def test_a_folder_of_the_users_may_have_an_index_json_of_its_own(tmp_path):
    Image.new("RGB", (20, 20), RED).save(tmp_path / "one.png")
    (tmp_path / "index.json").write_text('["mine"]')
    assert len(ImageSet(tmp_path, "all", 16)) == 1


def test_images_read_by_worker_processes_are_the_same(photo_folder):
    images = ImageSet(photo_folder, "all", 16)
    keys = [(index, 100 + index) for index in range(len(images))]
    alone, shared = (torch.cat(list(images.batches(keys, 5, workers))) for workers in (0, 2))
    assert torch.equal(alone, shared)
    assert pickle.loads(pickle.dumps(ImageSet.collate)) is ImageSet.collate  # as macOS and Windows need


def test_a_folder_is_read_lazily_so_that_memory_stays_flat(photo_folder):
    assert all(isinstance(source, str) for source in ImageSet(photo_folder, "all", 16).sources)


def test_train_and_val_folders_make_the_split_and_otherwise_a_twentieth_is_held_out(tmp_path, photo_folder):
    for half, count in (("train", 3), ("val", 2)):
        (tmp_path / half / "cats").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / half / "cats" / f"{i}.png")
    assert [len(ImageSet(tmp_path, split, 16)) for split in ("train", "val", "all")] == [3, 2, 5]
    parts = [{r["name"] for r in ImageSet(photo_folder, split, 16).records} for split in ("train", "val", "all")]
    assert parts[0] | parts[1] == parts[2] and not parts[0] & parts[1] and len(parts[1]) == 1


@given(count=st.integers(0, 500))
def test_a_twentieth_is_held_out_the_same_every_time_and_from_all_over(count):
    chosen = held_out(count)
    assert len(chosen) == (0 if count < 2 else max(1, count // 20)) and chosen == held_out(count)
    assert chosen <= set(range(count))
    assert count < 100 or max(chosen) - min(chosen) > count / 2


# --- views, and their order ---


@given(height=st.integers(8, 40), width=st.integers(8, 40), size=st.sampled_from([8, 16]), seed=seeds)
def test_a_view_is_bicubic_of_the_shorter_side_and_its_middle(height, width, size, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    short = min(height, width)
    sides = [int(size * side / short) for side in (width, height)]
    whole = np.asarray(image.resize(sides, Image.BICUBIC))
    top, left = (sides[1] - size) // 2, (sides[0] - size) // 2
    found = ImageSet.prepare(image, size).permute(1, 2, 0).numpy()
    assert np.array_equal(found, whole[top:top + size, left:left + size])


def test_a_training_view_may_begin_at_every_place_and_is_turned_half_of_the_time():
    rows = Image.fromarray(np.arange(19, dtype=np.uint8)[None].repeat(16, 0)).convert("RGB")
    views = [ImageSet.prepare(rows, 16, seed)[0, 0].tolist() for seed in range(400)]
    starts = [min(view) for view in views]
    assert set(starts) == {0, 1, 2, 3} and min(starts.count(start) for start in range(4)) > 60
    assert 150 < sum(view[0] > view[-1] for view in views) < 250
    columns = Image.fromarray(np.arange(19, dtype=np.uint8)[:, None].repeat(16, 1)).convert("RGB")
    assert {ImageSet.prepare(columns, 16, seed)[0, :, 0].min().item() for seed in range(100)} == {0, 1, 2, 3}


@given(values=st.lists(st.floats(-1, 2), min_size=1, max_size=20))
def test_eight_bits_is_what_a_file_would_hold(values):
    found = eight_bits(torch.tensor(values, dtype=torch.float64))
    expected = [min(max(round(255 * min(max(value, 0), 1)), 0), 255) / 255 for value in values]
    assert found.tolist() == pytest.approx(expected, abs=1e-6) or any(abs(255 * v % 1 - 0.5) < 1e-6 for v in values)


def test_an_image_of_the_right_size_is_not_touched_and_another_stays_in_0_to_1():
    sharp = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert resize_to(sharp, torch.zeros(1, 1, 16, 16)) is sharp
    found = resize_to(sharp, torch.zeros(1, 1, 24, 20))
    assert found.shape == (2, 3, 24, 20) and found.min() == 0 and found.max() == 1


def test_evaluation_takes_the_centre_and_training_a_random_window_and_flip():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None], (16, 40, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    centre = ImageSet.prepare(image, 16)
    assert centre.shape == (3, 16, 16) and centre[0, 0].tolist() == list(range(12, 28))
    views = [ImageSet.prepare(image, 16, seed)[0, 0].tolist() for seed in range(60)]
    assert len({min(view) for view in views}) > 10
    assert {view[0] < view[-1] for view in views} == {True, False}
    assert ImageSet.prepare(image, 16, 7).equal(ImageSet.prepare(image, 16, 7))


@given(st.integers(1, 30), seeds, st.integers(0, 100))
def test_a_resumed_order_is_the_rest_of_the_order_and_an_epoch_shows_every_image_once(count, seed, start):
    whole = list(islice(TrainingOrder(count, seed, 0), start + 2 * count))
    assert list(islice(TrainingOrder(count, seed, start), 2 * count)) == whole[start:]
    assert sorted(index for index, _ in whole[:count]) == list(range(count))
    assert len({view for _, view in whole}) == len(whole)


@given(count=st.integers(8, 40), seed=seeds)
def test_every_epoch_and_every_seed_has_an_order_of_its_own(count, seed):
    def epochs(seed):
        keys = [index for index, _ in islice(TrainingOrder(count, seed, 0), 3 * count)]
        return [tuple(keys[i:i + count]) for i in range(0, 3 * count, count)]

    assert len({*epochs(seed), *epochs(seed + 1), tuple(range(count))}) == 7


@given(count=st.integers(1, 9), seed=st.integers(0, 2**50), place=st.integers(0, 1000))
def test_another_seed_cuts_and_turns_the_same_images_otherwise(count, seed, place):
    image, views = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)), []
    image = image.resize((200, 400))  # a window of 200 in 400 rows: 201 places
    for one in range(seed, seed + 6):
        _, key = next(iter(TrainingOrder(count, one, place)))
        views.append(ImageSet.prepare(image, 200, key).numpy().tobytes())
    assert len(set(views)) > 3


@given(count=st.integers(1, 9), seed=seeds, ranks=st.integers(1, 4), start=st.integers(0, 5))
def test_ranks_share_out_the_images_without_overlap(count, seed, ranks, start):
    whole = list(islice(TrainingOrder(count, seed, start * ranks), 3 * ranks))
    shares = [list(islice(TrainingOrder(count, seed, start * ranks, rank, ranks), 3)) for rank in range(ranks)]
    assert [key for keys in zip(*shares) for key in keys] == whole
