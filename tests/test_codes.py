"""The codes of an image set, made once and kept on disk."""

import os
import shutil
from pathlib import Path

import torch

import vqrae
from conftest import small_model
from support.codes import image_codes
from support.images import ImageSet


def test_codes_are_made_once_and_made_anew_for_another_tokenizer_or_other_images(photo_folder, tmp_path, monkeypatch):
    shutil.copytree(photo_folder, tmp_path / "photos")
    images, calls = ImageSet(tmp_path / "photos", "all", 16), []
    real = vqrae.VQRAE.encode
    monkeypatch.setattr(vqrae.VQRAE, "encode", lambda model, x: (calls.append(len(x)), real(model, x))[1])
    first, _ = image_codes(small_model(), images, tmp_path / "codes")
    again, _ = image_codes(small_model(), images, tmp_path / "codes")
    assert torch.equal(first, again) and calls == [12]
    model = small_model()
    with torch.no_grad():
        model.quantizer.W.bias += 1e-3
    image_codes(model, images, tmp_path / "codes")
    assert calls == [12, 12]
    os.utime(tmp_path / "photos/class0/0.png", ns=(1, 1))
    image_codes(small_model(), images, tmp_path / "codes")
    assert calls == [12, 12, 12]
    for path in (tmp_path / "codes").iterdir():
        os.truncate(path, 100)
    assert torch.equal(image_codes(small_model(), images, tmp_path / "codes")[0], first) and len(calls) == 4


def test_codes_of_an_image_are_those_of_its_caption_also_behind_an_unreadable_file(photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "photos")
    model, clean = small_model(), ImageSet(tmp_path / "photos", "all", 16)
    expected, _ = image_codes(model, clean, tmp_path / "codes")
    broken = Path(clean.sources[3])
    broken.write_bytes(broken.read_bytes()[:60])  # a header that promises pixels which are not there
    codes, places = image_codes(model, ImageSet(tmp_path / "photos", "all", 16), tmp_path / "codes")
    assert places.tolist() == [0, 1, 2, *range(4, 12)] and torch.equal(codes, expected[places])
