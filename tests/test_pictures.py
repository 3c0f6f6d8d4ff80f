"""support/pictures.py: what is drawn shows the images that it should."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import seeds
from support import pictures
from support.images import eight_bits


def canvas(path):
    return np.asarray(Image.open(path).convert("RGB"))


@given(side=st.sampled_from([4, 16]), seed=seeds)
def test_a_tile_has_a_square_of_pixels_for_every_pixel_of_a_small_image(side, seed):
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))
    found = torch.tensor(np.asarray(pictures.tile(image, 4 * side))).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, eight_bits(image).repeat_interleave(4, 1).repeat_interleave(4, 2))


@given(side=st.sampled_from([4, 16, 20]), seed=seeds)
def test_a_tile_is_the_same_for_bytes_and_for_the_floats_that_they_stand_for(side, seed):
    image = torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(seed)).byte()
    tiles = [np.asarray(pictures.tile(some, 32)) for some in (image, image.float() / 255)]
    assert np.array_equal(*tiles)


def test_every_version_of_every_image_has_its_place_side_by_side(tmp_path):
    versions = torch.rand(3, 4, 3, 1, 1).expand(-1, -1, -1, 8, 8)  # 3 versions of 4 images, each of one colour
    pictures.save_side_by_side(list(versions), tmp_path / "a folder/picture.png", columns=2, side=8)
    found = canvas(tmp_path / "a folder/picture.png")
    group = 3 * 8 + 2 * 4 + 12
    for i in range(4):
        for version in range(3):
            y, x = 12 + i // 2 * (8 + 12), 12 + i % 2 * group + version * (8 + 4)
            expected = (255 * versions[version, i, :, 0, 0]).round().byte().tolist()
            assert (found[y:y + 8, x:x + 8] == expected).all()


def test_generated_pictures_are_named_after_their_captions_and_none_is_overwritten(tmp_path):
    pictures.save_generated(torch.rand(8, 3, 16, 16), ["A cat!", "a cat", "", "x" * 100], tmp_path)
    names = [f"{name}-{i}.png" for name, count in (("a-cat", 4), ("unconditional", 2), ("x" * 60, 2))
             for i in range(count)]
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", *names}


def test_a_cluster_shows_its_images_from_the_centre_outwards(tmp_path):
    images = torch.randint(256, (6, 3, 1, 1)).byte().expand(-1, -1, 64, 64)  # each of one colour
    labels, distances = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([3.0, 1.0, 2.0, 4.0, 0.0, 1.0])
    pictures.draw_clusters(images, {"one": (labels, distances)}, tmp_path / "clusters.png")
    found = canvas(tmp_path / "clusters.png")
    for row, members in enumerate(([5, 2, 0, 3], [4, 1])):  # the larger cluster first
        for column, member in enumerate(members):
            assert (found[16 + row * 67, column * 67] == images[member, :, 0, 0].numpy()).all()


@given(codes=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=5),
       count=st.integers(1, 8))
def test_codes_that_were_chosen_twice_are_drawn_once_each_from_the_most_frequent_on(codes, count, tmp_path_factory):
    path, codes = tmp_path_factory.mktemp("codes") / "codes.png", torch.tensor(codes)  # (n, 4)
    grey = (40 * codes + 20).byte().unflatten(1, (2, 2))  # of its code, every patch of 4 x 4 pixels
    images = [(image.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, -1, -1), 0, []) for image in grey]
    drawn = pictures.draw_codes(codes, torch.arange(len(codes)), images, 4, count, 3, path)
    chosen = codes.flatten().bincount(minlength=6)
    assert drawn == min(count, (chosen > 1).sum()) and path.exists() == (drawn > 0)
    if drawn:
        shown = [int(grey) // 40 for grey in canvas(path)[24::51, 64 + 24, 0]]  # the middle of each row's first window
        assert len(set(shown)) == drawn == len(shown) and chosen[shown[0]] == chosen.max()
        assert (chosen[shown].diff() <= 0).all() and (chosen[shown] > 1).all()
