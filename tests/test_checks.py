"""What models are given: images, codes, captions and numbers to sample by, or a sentence."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import unitok
import vqrae
from conftest import seeds, small_captioner, small_lm, small_model, small_vit, text_lm
from support.checks import number_in
from support.files import InputError


# --- images ---


BAD_IMAGES = {
    "bytes": lambda x: (255 * x).byte(), "whole numbers": lambda x: (255 * x).int(), "booleans": lambda x: x > 0.5,
    "no numbers": lambda x: x.where(x < 0.9, torch.nan), "infinite": lambda x: x.where(x < 0.9, torch.inf),
    "up to 255": lambda x: 255 * x, "around 0": lambda x: 2 * x - 1, "one channel": lambda x: x[:, :1],
    "four channels": lambda x: torch.cat([x, x[:, :1]], dim=1), "one image": lambda x: x[0],
    "channels last": lambda x: x.permute(0, 2, 3, 1), "no image": lambda x: x[:0], "no rows": lambda x: x[:, :, :0],
    "an array": lambda x: x.numpy(), "a list": lambda x: x.tolist(), "nothing": lambda x: None}


@pytest.mark.parametrize("what", list(BAD_IMAGES))
@pytest.mark.parametrize("way", ["encode", "forward", "encoder", "caption"])
def test_what_is_no_images_in_0_to_1_is_one_sentence_on_every_way_in(what, way):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = small_model()
    ways = {"encode": model.encode, "forward": model, "encoder": model.encoder, "caption": small_captioner().caption}
    ways[way](images)
    with pytest.raises(InputError, match="^images (must be|have values)") as error:
        ways[way](BAD_IMAGES[what](images))
    assert "\n" not in str(error.value)


@given(seed=seeds, side=st.integers(4, 40))
def test_resized_images_may_go_beyond_0_and_1_as_far_as_resizing_does(seed, side):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).round()
    for antialias in (False, True):
        resized = F.interpolate(images, (4 * side, 4 * side), mode="bicubic", antialias=antialias)
        assert small_model().encoder(resized).isfinite().all()


# --- codes ---


@given(seed=seeds, dtype=st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
                                          torch.uint32, torch.uint64]))
def test_codes_of_any_integer_type_are_decoded_alike(seed, dtype):
    codes = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(small_model().decode(codes.to(dtype)), small_model().decode(codes))


@given(rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_codes_without_rows_are_those_of_a_square_or_ask_for_rows(rows, columns):
    model, codes = small_model(), torch.zeros(1, rows * columns, dtype=torch.int64)
    assert model.decode(codes, rows=rows).shape == (1, 3, 4 * rows, 4 * columns)
    side = round((rows * columns) ** 0.5)
    if side**2 == rows * columns:
        assert model.decode(codes).shape == (1, 3, 4 * side, 4 * side)
    else:
        with pytest.raises(InputError, match="as rows="):
            model.decode(codes)


@pytest.mark.parametrize("codes, rows, sentence", [
    (torch.zeros(1, 16), None, "whole numbers, not torch.float32"), ([[0] * 16], None, "not list"),
    (torch.ones(1, 16, dtype=torch.bool), None, "not torch.bool"), (None, None, "not NoneType"),
    (torch.full((1, 16), 40), None, "from 0 to 39, not 40 to 40"), (torch.full((1, 16), -1), None, "not -1 to -1"),
    (torch.full((1, 16), 2**63 + 1, dtype=torch.uint64), None, "from 0 to 39"),
    *[(torch.zeros(shape, dtype=torch.int64), None, "a tensor .B, N. of")
      for shape in ((16,), (1, 16, 1), (0, 16), (1, 0))],
    *[(torch.zeros(1, 16, dtype=torch.int64), rows, "do not fill") for rows in (0, -4, 3, 17, 2.0, True, "4")],
])
def test_what_cannot_be_decoded_is_one_sentence(codes, rows, sentence):
    with pytest.raises(InputError, match=sentence):
        small_model().decode(codes, rows)


@pytest.mark.parametrize("shape", [(1, 16), (1, 16, 3), (1, 16, 4, 1), (16, 4)])
def test_codes_of_several_codebooks_come_as_many_at_a_place_or_are_refused(shape):
    model = unitok.UniTok(unitok.UniTokConfig(small_vit(), 16, 4, 40, 12, quantizer="mcq", codebooks=4)).eval()
    assert model.decode(torch.full((1, 16, 4), 9, dtype=torch.uint8)).shape == (1, 3, 16, 16)
    with pytest.raises(InputError, match=r"a tensor \(B, N, 4\) of whole numbers"):
        model.decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(InputError, match="from 0 to 9, not 0 to 10"):
        model.decode(torch.arange(64).view(1, 16, 4) % 11)


def test_a_model_without_a_codebook_says_so_whatever_it_is_to_decode():
    with pytest.raises(InputError, match="has no codebook"):
        small_model(quantizer="none").decode(None)


# --- captions, and numbers to sample by ---


@given(captions=st.lists(st.sampled_from(["red apple", "", "cat"]), min_size=1, max_size=3), seed=seeds)
def test_a_single_caption_may_be_a_string_and_several_a_list_or_a_tuple(captions, seed):
    model = text_lm(image_tokens=4)
    drawn = model.generate(captions, seed=seed)
    assert torch.equal(model.generate(tuple(captions), seed=seed), drawn)
    assert torch.equal(model.generate(captions[0], seed=seed), model.generate(captions[:1], seed=seed))


@pytest.mark.parametrize("text", [[], (), None, 5, b"red", ["red", 5], [None], {"red": 1}, [["red"]], {"red"},
                                  iter(["red"]), np.array(["red"])], ids=repr)
@pytest.mark.parametrize("codebooks", [0, 4])
def test_what_is_no_caption_is_one_sentence(text, codebooks):
    model = unitok.DepthLM.around(text_lm(), codebooks) if codebooks else text_lm()
    with pytest.raises(InputError, match="a caption, or a list of one or more, is wanted"):
        model.generate(text)


NUMBERS = {"cfg_scale": [math.nan, math.inf, -math.inf, 1e38, 10**400, "2", None, True, [2.0], torch.tensor(2.0), 1j],
           "temperature": [math.nan, math.inf, -1, -1e-9, "1", None, False, torch.tensor(1.0)],
           "top_k": [-1, 2.5, 2.0, math.nan, math.inf, "2", None, True, 2**70],
           "top_p": [0, 0.0, -0.5, 1.5, math.nan, math.inf, "1", None, True],
           "seed": [1.5, math.nan, None, "a", True, 2**64, -2**63 - 1, [1]]}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NUMBERS.items() for value in values])
def test_a_number_with_which_nothing_can_be_drawn_is_named_with_its_value(name, value):
    for model in (text_lm(), unitok.DepthLM.around(text_lm(), 4)):
        with pytest.raises(InputError, match=f"^{name} is ") as error:
            model.generate("red apple", **{name: value})
        assert "\n" not in str(error.value)


@given(cfg_scale=st.floats(-1000, 1000), temperature=st.floats(0, 1000), top_k=st.integers(0, 2**40),
       top_p=st.floats(0, 1, exclude_min=True), seed=st.integers(-2**63, 2**64 - 1))
def test_whatever_is_not_refused_draws_codes(cfg_scale, temperature, top_k, top_p, seed):
    drawn = text_lm(image_tokens=4).generate("red apple", cfg_scale, temperature, top_k, top_p, seed)
    assert drawn.shape == (1, 4) and 0 <= drawn.min() and drawn.max() < 20


def test_numbers_of_numpy_and_others_are_numbers():
    model = text_lm(image_tokens=4)
    expected = model.generate("red apple", 1.5, 0.5, 7, 0.75, 3)
    for real, whole in ((np.float32, np.int64), (np.float64, np.uint8), (np.float16, np.int32), (Fraction, int)):
        assert torch.equal(model.generate("red apple", real(1.5), real(0.5), whole(7), real(0.75), whole(3)), expected)


@given(st.floats(), st.floats(-10, 0), st.floats(0, 10))
def test_a_number_is_in_its_range_or_refused(value, least, most):
    if least <= value <= most:
        assert number_in("it", value, least, most) == value
    else:
        with pytest.raises(InputError, match="^it is .*; it must be a number from"):
            number_in("it", value, least, most)


@pytest.mark.parametrize("model, sentence", [
    (small_lm(image_tokens=4), "has no text tokenizer"), (text_lm(image_tokens=0), "codes to write .* is 0"),
    (text_lm(codebook_size=0), "no codes to write")], ids=["no text", "no image", "no codes"])
def test_a_model_that_cannot_write_images_says_why(model, sentence):
    with pytest.raises(InputError, match=sentence):
        model.generate("red apple")


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[-1]], [[30 + 20]]], ids=repr)
def test_prompts_are_tokens_of_the_model(prompts):
    assert small_lm().extend([[49]], 2).shape == (1, 2)
    with pytest.raises(InputError, match="prompts must be lists of one or more tokens from 0 to 49"):
        small_lm().extend(prompts, 2)


@pytest.mark.parametrize("most", [0, -1, 2.5, None, "5", True])
def test_a_captioner_writes_a_whole_number_of_tokens_from_1_on(most):
    with pytest.raises(InputError, match="^most is"):
        small_captioner().caption(torch.rand(1, 3, 16, 16), most)


def test_a_captioner_without_a_text_tokenizer_says_so():
    lm = small_lm(codebook_size=0)
    with pytest.raises(InputError, match="has no text tokenizer"):
        vqrae.Captioner(vqrae.CaptionerConfig(small_vit(), 16, lm.config)).caption(torch.rand(1, 3, 16, 16))
