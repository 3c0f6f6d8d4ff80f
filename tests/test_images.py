"""Images: what is read of any file and any folder, and the order of training."""

import io
import os
import pickle
import struct
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from conftest import RED, ROOT, seeds, swapped_profile, write_variants
from support.files import InputError
from support.images import ImageSet, TrainingOrder, eight_bits, held_out, read_image, resize_to, to_rgb
from support.pictures import draw_curves, save_generated, save_side_by_side
from support.text import caption_of, text_of


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


def png(depth, colour, rows, transparent):
    """The bytes of a PNG of any bit depth, grey or colour (0 or 2), with one value transparent."""
    def packed(row):
        bits = "".join(f"{value:0{depth}b}" for value in row)
        return bytes(int(bits[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = len(rows[0]) // (3 if colour else 1)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
            + chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + packed(row) for row in rows))) + chunk(b"IEND", b""))


@given(depth=st.sampled_from([1, 2, 4, 8, 16]), seed=seeds)
def test_the_grey_that_a_png_calls_transparent_is_white_at_every_depth_and_no_other_is(depth, seed):
    values = np.random.default_rng(seed).integers(0, 2**depth, (5, 7))
    transparent = int(values[0, 0])
    found = np.asarray(read_image("x.png", io.BytesIO(png(depth, 0, values.tolist(), [transparent]))))
    expected = np.where(values == transparent, 255, values * 255 / (2**depth - 1))
    assert np.abs(found - expected[..., None]).max() <= 0.51


@given(depth=st.sampled_from([8, 16]), seed=seeds)
def test_the_colour_that_a_png_calls_transparent_is_white_at_every_depth_and_no_other_is(depth, seed):
    bytes_ = np.random.default_rng(seed).integers(0, 256, (5, 7, 3))
    values = bytes_ * (257 if depth == 16 else 1)
    found = read_image("x.png", io.BytesIO(png(depth, 2, values.reshape(5, 21).tolist(), values[0, 0].tolist())))
    clear = (bytes_ == bytes_[0, 0]).all(2, keepdims=True)
    assert np.array_equal(np.asarray(found), np.where(clear, 255, bytes_))


@given(values=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_grey_of_floats_up_to_1_is_scaled(values):
    file = io.BytesIO()
    Image.fromarray(np.array([values], np.float32)).save(file, "TIFF")
    assert np.abs(np.asarray(read_image("x.tif", file))[0, :, 0] - 255 * np.array(values)).max() <= 0.501


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
@pytest.mark.parametrize("type_, low, high", [
    ("f4", 0, 1), ("f4", -0.02, 1.03), ("f4", 0, 255), ("f4", 0.5, 254.5), ("f4", 0, 65535), ("f4", -1, 1),
    ("f4", 0, 7.5), ("f4", -1e30, 1e30), ("u2", 0, 65535), (">u2", 0, 65535), ("i4", 0, 255), ("i4", 0, 65535),
    ("i4", 0, 4095),
    ("i4", 0, 2**31 - 1), ("i4", -2**31, 2**31 - 1), ("i4", 0, 1)])
def test_grey_of_any_type_keeps_its_black_its_white_and_its_order(kind, type_, low, high):
    ramp, file = np.linspace(low, high, 40).astype(type_), io.BytesIO()
    try:
        Image.fromarray(ramp[None]).save(file, kind)
    except OSError:
        pytest.skip(f"Pillow writes no {type_} in {kind}")
    if kind == "PPM" and type_ == "i4" and (low, high) != (0, 65535):
        pytest.skip("PPM has 16 bits")
    found = np.asarray(read_image("x", file)).astype(int)[0, :, 0]
    assert found[0] <= 6 and found[-1] >= 249 and (np.diff(found) >= 0).all()
    if high > 1 and type_ != "f4":
        assert len(set(found.tolist())) > 30


def test_grey_of_32_bits_without_a_sign_is_in_order():
    ramp, file = np.linspace(0, 2**32 - 1, 40).astype(np.uint32).view(np.int32), io.BytesIO()
    Image.fromarray(ramp[None]).save(file, "TIFF")
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert file.getvalue().count(signed) == 1
    found = np.asarray(read_image("x", io.BytesIO(file.getvalue().replace(signed, unsigned))))[0, :, 0]
    assert np.abs(found - np.linspace(0, 255, 40)).max() < 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused_with_the_reason(value):
    file = io.BytesIO()
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(file, "TIFF")
    with pytest.raises(InputError, match="cannot read x.tif as an image: it has values that are no numbers"):
        read_image("x.tif", file)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX",
                                  "RGBa", "La", "I;16", "I;16B", "I", "F"])
def test_no_mode_of_pillows_comes_out_black(mode):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp[None]] * 3, -1).repeat(4, 0))
    lab = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                    outputMode="LAB")
    wide = Image.fromarray((ramp.astype(np.uint16) * 257)[None].repeat(4, 0).astype(">u2" if mode == "I;16B" else "u2"))
    odd = {"LAB": lab, "I;16": wide, "I;16B": wide, "P": image.quantize(64), "PA": image.quantize(64).convert("PA"),
           "La": image.convert("LA").convert("La"), "RGBa": image.convert("RGBA").convert("RGBa")}
    found = np.asarray(to_rgb(odd.get(mode) or image.convert(mode))).astype(int)
    assert found.shape == (4, 64, 3) and found[:, 0].max() <= 12 and found[:, -1].min() >= 243
    assert np.abs(found - ramp[:, None]).max() < 12 or mode == "1"


def tag(kind, data):
    """An element of an ICC profile."""
    return kind + bytes(4) + data + bytes(-len(data) % 4)


def icc_profile(device, colours, connection, **more):
    """The bytes of an ICC profile of a kind of device, with its colours and those that they are connected to."""
    tags = {"wtpt": tag(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061)), **more, "cprt": tag(b"text", b"none\0"),
            "desc": tag(b"desc", struct.pack(">I", 5) + b"some\0" + bytes(78))}
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content
    header = (bytes(4) + struct.pack(">I", 0x02100000) + device + colours + connection + bytes(12) + b"acsp" + bytes(28)
              + struct.pack(">3i", 63190, 65536, 54061) + bytes(48))
    return struct.pack(">I", 4 + len(header + table + data)) + header + table + data


def grey_profile(gamma):
    """The bytes of an ICC profile of grey with a gamma."""
    return icc_profile(b"mntr", b"GRAY", b"XYZ ", kTRC=tag(b"curv", struct.pack(">IH", 1, round(gamma * 256))))


def ink_profile():
    """The bytes of an ICC profile of four inks by which whatever is printed is darker the less ink there is of it."""
    identity = struct.pack(">9i", *[65536 * (i % 4 == 0) for i in range(9)])
    steps = bytes(range(256))
    inks = [(c + m + y + k) / 4 for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    corners = b"".join(bytes([round(255 * ink), 128, 128]) for ink in inks)  # L, a, b
    table = tag(b"mft1", bytes([4, 3, 2, 0]) + identity + 4 * steps + corners + 3 * steps)
    return icc_profile(b"prtr", b"CMYK", b"Lab ", A2B0=table)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_a_profile_of_inks_is_applied(kind):
    for ink in (0, 128, 255):
        file = io.BytesIO()
        Image.new("CMYK", (16, 16), (ink,) * 4).save(file, kind, icc_profile=ink_profile())
        lightness = ink / 255 * 100
        light = ((lightness + 16) / 116) ** 3 if lightness > 8 else lightness / 903.3
        expected = 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)
        assert np.abs(np.asarray(read_image("x", file)).astype(int) - expected).max() <= 6


@pytest.mark.parametrize("mode, kind", [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "TIFF"), ("RGB", "WEBP"),
                                        ("RGBA", "PNG"), ("P", "PNG")])
def test_a_profile_of_other_primaries_is_applied(mode, kind):
    image, file = Image.new("RGB", (8, 8), (200, 40, 10)), io.BytesIO()
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(file, kind, icc_profile=swapped_profile(), **({"lossless": True} if kind == "WEBP" else {}))
    assert np.abs(np.asarray(read_image("x", file)).astype(int) - (40, 200, 10)).max() <= 4


@given(value=st.integers(30, 255), gamma=st.sampled_from([1.0, 1.8]), kind=st.sampled_from(["L", "LA", "I;16"]))
def test_a_profile_of_grey_is_applied(value, gamma, kind):
    file = io.BytesIO()
    deep = Image.fromarray(np.full((4, 4), value * 257, np.uint16))
    image = deep if kind == "I;16" else Image.new("L", (4, 4), value).convert(kind)
    image.save(file, "PNG", icc_profile=grey_profile(gamma))
    light = (value / 255) ** gamma
    expected = 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(np.asarray(read_image("x", file)).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("profile", ["sRGB", b"broken", b"", "cut off"])
@given(seed=seeds)
@settings(max_examples=5)
def test_srgbs_own_profile_and_a_broken_one_leave_pixels_as_they_are(profile, seed):
    image, file = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)), io.BytesIO()
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(file, "PNG", icc_profile={"sRGB": whole, "cut off": whole[:200]}.get(profile, profile))
    assert np.array_equal(np.asarray(read_image("x", file)), np.asarray(image))


def test_a_profile_of_another_kind_of_image_is_ignored():
    image, file = Image.new("RGB", (8, 8), RED), io.BytesIO()
    image.save(file, "PNG", icc_profile=grey_profile(1.0))
    assert np.asarray(read_image("x", file))[0, 0].tolist() == list(RED)


def test_an_image_that_has_been_read_does_not_hand_its_profile_on(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "one.png", icc_profile=swapped_profile())
    once = read_image(tmp_path / "one.png")
    once.save(tmp_path / "two.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "two.png")), np.asarray(once))


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


def some_images(folder, count=2, start=0):
    """Write so many images, numbered from `start`, into a folder, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i}.png")


def found_in(folder, split="all"):
    """What an ImageSet finds there: the names of the images by split."""
    return {record["name"] for record in ImageSet(folder, split, 16).records}


def test_links_to_folders_and_files_are_followed(tmp_path):
    some_images(tmp_path / "elsewhere/cats")
    some_images(tmp_path / "own/dogs")
    (tmp_path / "own/cats").symlink_to(tmp_path / "elsewhere/cats")
    (tmp_path / "own/dogs/more").symlink_to("../../elsewhere")
    (tmp_path / "own/one.png").symlink_to("dogs/0.png")
    images = ImageSet(tmp_path / "own", "all", 16)
    assert found_in(tmp_path / "own") == {"dogs/0.png", "dogs/1.png", "cats/0.png", "cats/1.png", "one.png"}
    assert {record["category"] for record in images.records} == {"dogs", "cats", ""}


@pytest.mark.parametrize("target", [".", "..", "../cats", "loop", "../back", "../..", "/"])
def test_links_that_lead_back_end(target, tmp_path):
    some_images(tmp_path / "own/cats")
    some_images(tmp_path / "own/dogs", start=5)
    (tmp_path / "own/cats/loop").symlink_to(target)
    (tmp_path / "own/back").symlink_to("cats")
    some_images(tmp_path / "beside")
    assert found_in(tmp_path / "own") == {"cats/0.png", "cats/1.png", "dogs/5.png", "dogs/6.png"}


def test_a_folder_that_is_linked_twice_is_data_once_and_under_its_own_name(tmp_path):
    some_images(tmp_path / "own/z")
    for name in ("a", "b"):
        (tmp_path / "own" / name).symlink_to("z")
    assert found_in(tmp_path / "own") == {"z/0.png", "z/1.png"}


def test_a_split_may_be_a_link(tmp_path):
    some_images(tmp_path / "elsewhere/cats", 3)
    some_images(tmp_path / "own/val/cats", start=5)
    (tmp_path / "own/train").symlink_to("../elsewhere")
    assert [len(found_in(tmp_path / "own", split)) for split in ("train", "val")] == [3, 2]


def test_a_link_to_nothing_is_named(tmp_path, capsys):
    some_images(tmp_path)
    (tmp_path / "dogs").symlink_to("/nowhere/dogs")
    (tmp_path / "self").symlink_to("self")
    assert len(found_in(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "skipped 2 files" in said and "dogs (a link to nothing)" in said and "self (" in said


def test_a_folder_that_may_not_be_read_is_named(tmp_path, capsys, monkeypatch):
    some_images(tmp_path / "cats")
    some_images(tmp_path / "dogs/closed")
    for i in range(20):
        (tmp_path / f"{i}.json").write_text("{}")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found_in(tmp_path) == {"cats/0.png", "cats/1.png"}
    assert "dogs/closed (Permission denied)" in capsys.readouterr().err


def test_a_data_folder_that_may_not_be_read_itself_is_a_sentence(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(InputError, match="cannot read the folder .*: Permission denied"):
        ImageSet(tmp_path, "all", 16)


def test_a_file_that_may_not_be_read_is_named_with_the_reason(tmp_path, capsys, monkeypatch):
    some_images(tmp_path)
    opened = Image.open

    def refuse(path, *args):
        if str(path).endswith("0.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args)

    monkeypatch.setattr(Image, "open", refuse)
    assert found_in(tmp_path) == {"1.png"}
    assert "0.png (Permission denied)" in capsys.readouterr().err


def test_why_an_image_is_damaged_is_told(tmp_path, capsys):
    some_images(tmp_path, 3)
    (tmp_path / "3.png").write_bytes(b"no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "0.png")
    os.truncate(tmp_path / "0.png", 2000)
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "4.tif")
    images = ImageSet(tmp_path, "all", 16)
    list(images.batches(range(len(images)), 2))
    said = capsys.readouterr().err
    assert "3.png (damaged" in said and "0.png as an image: " in said and "truncated" in said
    assert "4.tif as an image: it has values that are no numbers" in said


# --- captions beside images ---


def test_a_text_file_of_an_images_name_is_its_caption_and_not_a_file_too_many(tmp_path, capsys):
    some_images(tmp_path / "cats", 4)
    (tmp_path / "cats/0.txt").write_bytes("\ufeffein K\u00e4tzchen\n im Korb\r\n".encode())
    (tmp_path / "cats/1.TXT").write_bytes(b"bytes \xff of none")
    (tmp_path / "cats/2.txt").write_text("\n")
    (tmp_path / "cats/notes.txt").write_text("of no image")
    records = {record["name"]: record for record in ImageSet(tmp_path, "all", 16).records}
    assert records["cats/0.png"]["caption"] == "ein K\u00e4tzchen im Korb"
    assert records["cats/1.png"]["caption"] == "bytes \ufffd of none"
    assert [caption_of(records[f"cats/{i}.png"]) for i in (2, 3)] == ["cats", "cats"]
    assert text_of(records["cats/0.png"]) == "cats: ein K\u00e4tzchen im Korb"
    said = capsys.readouterr().err
    assert "skipped 1 files" in said and "cats/notes.txt (not an image)" in said


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", '{"file_name": "cats/0.png", "text": "one  cat"}\n{"file_name": "cats/1.png", "text": null}\n'),
    ("metadata.csv", "file_name,label,caption\ncats/0.png,3,one cat\n./cats/1.png,4,\n"),
    ("cats/metadata.jsonl", '{"file_name": "0.png", "captions": ["one cat", "a cat"]}\n'),
])
def test_a_metadata_file_tells_captions_as_the_library_datasets_has_it(name, text, tmp_path, capsys):
    (tmp_path / "cats").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"cats/{i}.png")
    (tmp_path / "cats/2.txt").write_text("from beside")
    (tmp_path / name).write_text(text)
    assert [record.get("caption") for record in ImageSet(tmp_path, "all", 16).records] == [
        "one cat", None, "from beside"]
    assert "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "no file"}', '{"file_name": "0.png", "text": 3}'])
def test_a_damaged_metadata_file_is_a_sentence(line, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(InputError, match="metadata.jsonl does not describe images: "):
        ImageSet(tmp_path, "all", 16).records


def test_captions_beside_images_do_not_change_which_images_a_run_is_on(tmp_path):
    some_images(tmp_path)
    before = ImageSet(tmp_path, "all", 16)
    (tmp_path / "0.txt").write_text("a caption")
    assert ImageSet(tmp_path, "all", 16).names() == before.names()


# --- what is no data ---


@pytest.mark.parametrize("marks", [("config.json", "model.safetensors"), ("metrics.jsonl",), ("checkpoint/state.pt",),
                                   ("checkpoint/previous.pt", "config.json"), ("model.safetensors.index.json",)])
def test_folders_that_hold_a_run_or_a_model_are_no_data(marks, tmp_path, capsys):
    some_images(tmp_path / "cats")
    some_images(tmp_path / "cats/run/pictures")
    some_images(tmp_path / "cats/run")
    for name in marks:
        (tmp_path / "cats/run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cats/run" / name).write_text("{}")
    assert found_in(tmp_path) == {"cats/0.png", "cats/1.png"}
    assert "that were made here: cats/run" in capsys.readouterr().err


def test_a_config_of_the_users_makes_no_run(tmp_path):
    some_images(tmp_path / "cats")
    (tmp_path / "cats/config.json").write_text("{}")
    (tmp_path / "cats/checkpoint").mkdir()
    assert len(found_in(tmp_path)) == 2


def test_pictures_that_were_drawn_here_are_no_data_wherever_they_lie(tmp_path, capsys):
    some_images(tmp_path / "cats")
    save_side_by_side([torch.rand(1, 3, 8, 8)], tmp_path / "cats/shown.png")
    save_generated(torch.rand(1, 3, 8, 8), ["a cat"], tmp_path / "cats")
    draw_curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], tmp_path / "curves.png")
    assert found_in(tmp_path) == {"cats/0.png", "cats/1.png"}
    assert "left out 4 pictures" in capsys.readouterr().err


# --- splits ---


@pytest.mark.parametrize("first, second", [
    ("train", "validation"), ("train", "valid"), ("train", "dev"), ("train", "test"), ("Train", "VAL"),
    ("train", "eval"), ("training", "holdout"), ("train", "held-out"), ("train2017", "val2017"),
    ("train_set", "test_set"),
    ("train_images", "validation_images"), ("TRAINING", "testing"), ("train", "Validation-Set")])
def test_two_folders_of_the_usual_names_are_the_two_splits(first, second, tmp_path):
    some_images(tmp_path / first / "cats", 3)
    some_images(tmp_path / second, 2, start=5)
    assert [len(found_in(tmp_path, split)) for split in ("train", "val", "all")] == [3, 2, 5]
    assert {name.split("/")[0] for name in found_in(tmp_path, "val")} == {second}
    assert {record["category"] for record in ImageSet(tmp_path, "all", 16).records} == {"cats", ""}


def test_of_three_splits_val_is_held_out_and_what_is_left_out_is_named(tmp_path, capsys):
    for i, name in enumerate(("train", "val", "test", "extra")):
        some_images(tmp_path / name, 2 + i)
    assert [len(found_in(tmp_path, split)) for split in ("train", "val", "all")] == [2, 3, 5]
    said = capsys.readouterr().err
    assert said.count("left out: extra, test") == 1


@pytest.mark.parametrize("names", [("train", "car", "bus"), ("validation", "test"), ("tests", "trains"), ("train",),
                                   ("value", "train")])
def test_folders_of_other_names_are_classes(names, tmp_path):
    for i, name in enumerate(names):
        some_images(tmp_path / name, 12)
    images = ImageSet(tmp_path, "all", 16)
    assert {record["category"] for record in images.records} - {""} == set(names)
    assert len(found_in(tmp_path, "train")) < len(images) == 12 * len(names)


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
