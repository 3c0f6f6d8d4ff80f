"""Pieces of a page."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import cells_in, pictures_in
from support import page


@pytest.mark.parametrize("kind", ["bytes", "floats", "PIL"])
def test_a_picture_is_on_the_page_pixel_by_pixel(kind):
    expected = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    given = torch.from_numpy(expected).permute(2, 0, 1)
    given = {"bytes": given, "floats": given / 255, "PIL": Image.fromarray(expected)}[kind]
    assert np.array_equal(pictures_in(f'"{page.url_of(given)}"')[0], expected)


def test_over_a_picture_every_place_is_a_button_with_its_text_and_its_marks():
    html = page.picture_of(torch.rand(3, 4, 4), ["a", "b", "c", "d"], marked=[2], changed=[1, 2])
    assert cells_in(html) == [0, 1, 2, 3] and "grid: repeat(2, 1fr) / repeat(2, 1fr)" in html
    assert re.findall('class="([^"]*)">(.)</button>', html) == [("", "a"), ("changed", "b"), ("marked changed", "c"),
                                                                ("", "d")]


def test_a_mark_has_a_style():
    for name in ("changed", "marked", "empty"):
        assert f".{name} {{" in page.STYLE


def test_words_of_a_data_set_are_text_on_the_page():
    assert "<script>" not in page.tiles_of([(0, "", '"><script>', "")])
