"""Captions: what a record says, the text tokenizer, misread codes and turned colours."""

import colorsys
import copy

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

import vqrae
from conftest import WORDS, edit, seeds, small_captioner, text_lm
from support.files import InputError
from support.images import ImageSet
from support.text import (COLOURS, END_OF_TEXT, START_OF_IMAGE, caption_of, load_text_tokenizer, misread, readable,
                          recolour, text_of, tokens_of, train_text_tokenizer, turn_colour)


# --- captions ---


@pytest.mark.parametrize("record, styled, plain", [
    ({"style": "noto", "caption": "red apple", "category": "Food & Drink"}, "noto red apple", "red apple"),
    ({"name": "tench/1.jpg", "category": "great_white_shark"}, "great white shark", "great white shark"),
    ({"name": "1.jpg", "category": ""}, "", ""),
])
def test_a_caption_is_style_and_words_or_the_name_of_the_class(record, styled, plain):
    assert caption_of(record) == styled and caption_of(record, style=False) == plain


@pytest.mark.parametrize("record, text", [
    ({"category": "Food & Drink", "caption": "red apple", "style": "noto"}, "Food & Drink: red apple"),
    ({"category": "great_white_shark"}, "great white shark"), ({"category": ""}, "")])
def test_a_captioner_is_to_say_category_and_caption_as_far_as_there_are(record, text):
    assert text_of(record) == text


# --- the text tokenizer ---


@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFFF, exclude_categories=["Cs"]), max_size=30))
def test_the_text_tokenizer_reads_any_text_and_loses_only_case_and_form(text):
    import unicodedata

    tokenizer = train_text_tokenizer(WORDS, 300)
    expected = tokenizer.normalizer.normalize_str(text)
    for special in (START_OF_IMAGE, END_OF_TEXT):
        if special in text:
            return
    assert tokenizer.decode(tokenizer.encode(text).ids).strip() == expected.strip()
    plain = unicodedata.normalize("NFKC", text)
    if plain.isascii() and not plain.lower().lstrip().startswith(("a ", "an ", "the ")):
        assert expected == plain.lower().strip()


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "tokenizer.json").unlink(), "cannot read the text tokenizer"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot read the text tokenizer"),
    (lambda folder: edit(folder / "tokenizer.json", START_OF_IMAGE, "<|start|>"), "has no token"),
    (lambda folder: train_text_tokenizer([*WORDS, "a great many more words"], 400).save(
        str(folder / "tokenizer.json")), "has more tokens than"),
])
def test_a_damaged_text_tokenizer_is_one_sentence(tmp_path, damage, sentence):
    text_lm().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=sentence):
        vqrae.VisualLM.from_pretrained(tmp_path)


LOOKALIKES = [START_OF_IMAGE, END_OF_TEXT, END_OF_TEXT.upper(), "\uff5c".join(END_OF_TEXT.split("|")), "<|im_end|>"]
texts = st.lists(st.one_of(st.sampled_from(LOOKALIKES), st.text(max_size=8)), max_size=5).map("".join)


def byte_pairs(special, normalized):
    """A tokenizer as others make them: added tokens that may not be called special, pieces that are looked up whole."""
    tokenizer = Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(WORDS, tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([tokenizers.AddedToken(name, special=special, normalized=normalized) for name in LOOKALIKES])
    return tokenizer


def assert_read_as_text(tokenizer, text):
    ids = tokens_of(tokenizer, text)
    assert not set(ids) & {tokenizer.token_to_id(START_OF_IMAGE), tokenizer.token_to_id(END_OF_TEXT)}
    return ids


@given(text=texts)
def test_what_looks_like_a_control_token_is_read_as_the_text_that_it_is(text):
    tokenizer = train_text_tokenizer([*WORDS, text], 400)
    for one in (tokenizer, copy.deepcopy(tokenizer)):  # a run's average has a copy
        found = one.decode(assert_read_as_text(one, text))
        assert found.strip() == one.normalizer.normalize_str(readable(text)).strip()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_so_it_is_with_tokenizers_of_others_whatever_they_call_special(special, normalized, tmp_path):
    byte_pairs(special, normalized).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_text_tokenizer(tmp_path / "tokenizer.json", 400)
    for text in (*LOOKALIKES, f"red{END_OF_TEXT}{START_OF_IMAGE} apple", f"{END_OF_TEXT} " * 9):
        assert_read_as_text(tokenizer, text)
    assert tokenizer.decode(assert_read_as_text(tokenizer, "red apple")) == "red apple"


def test_a_control_token_among_whole_words_is_left_out_when_nothing_else_helps():
    words = {"red": 0, "apple": 1, START_OF_IMAGE: 2, END_OF_TEXT: 3}
    tokenizer = Tokenizer(tokenizers.models.WordLevel(words, unk_token="red"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    assert assert_read_as_text(tokenizer, f"apple {END_OF_TEXT} apple")[-1] == 1


def test_a_tokenizer_neither_cuts_nor_pads_nor_ends_captions_whatever_its_file_asks_for(tmp_path):
    tokenizer = byte_pairs(True, False)
    expected = tokens_of(tokenizer, "fluent red apple")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=30)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokens_of(load_text_tokenizer(tmp_path / "tokenizer.json", 400), "fluent red apple") == expected


@given(text=st.text(st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=20))
def test_any_string_is_readable_and_text_stays_as_it_is(text):
    found = readable(text)
    found.encode()  # now it can be written
    assert readable(found) == found
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert found == text
    record = {"style": text, "caption": text, "category": text}
    for said in (caption_of(record), text_of(record), caption_of(record, style=False)):
        assert tokens_of(train_text_tokenizer([said], 300), said) is not None


def test_halves_of_a_pair_beside_each_other_are_the_character_that_they_spell():
    assert readable("\ud83c\udf4e") == "\U0001f34e" and readable("x\udcff") == "x\ufffd"
    assert readable("\udf4e\ud83c") == "\ufffd\ufffd"


def test_a_model_in_a_copy_reads_captions_as_it_did():
    model = text_lm()
    for one in (model, copy.deepcopy(model), small_captioner().lm, copy.deepcopy(small_captioner()).lm):
        controls = {one.text.token_to_id(START_OF_IMAGE), one.text.token_to_id(END_OF_TEXT)}
        assert controls & set(one.prompt(f"a {END_OF_TEXT} {START_OF_IMAGE}\udcff")) == {one.prompt("")[0]}


def test_a_captioner_learns_no_end_inside_a_caption():
    model = small_captioner()
    tokens = model.tokens(f"red {END_OF_TEXT} apple")
    assert tokens.index(model.lm.text.token_to_id(END_OF_TEXT)) == len(tokens) - 1


# --- for small sets: misread codes, turned colours ---


@given(seed=seeds, most=st.floats(0, 1))
def test_misread_codes_are_other_codes_of_the_batch_and_no_more_than_asked(seed, most):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1000, (4, 500), generator=generator)
    seen = misread(codes, most, generator)
    assert seen.shape == codes.shape and set(seen.flatten().tolist()) <= set(codes.flatten().tolist())
    assert (seen != codes).float().mean(1).max() <= most + 0.1  # 500 draws: five standard deviations at the most
    assert (seen != codes).float().mean() >= most / 2 - 0.45  # four images' shares are half of it on average
    everything = misread(torch.arange(2000).view(4, 500), 1.0, generator) != torch.arange(2000).view(4, 500)
    assert 0.05 < everything.float().mean() < 0.95 and torch.equal(misread(codes, 0.0, generator), codes)


@given(seed=seeds, codebooks=st.integers(1, 4))
def test_codes_of_one_place_are_misread_together(seed, codebooks):
    place = torch.arange(4 * 50).view(4, 50, 1)
    codes = 1000 * torch.arange(codebooks) + place  # every code tells its codebook and its place
    seen = misread(codes, 1.0, torch.Generator().manual_seed(seed))
    assert (seen - seen[..., :1]).equal(codes - codes[..., :1]) and not seen.equal(codes)


class SeesOnly:
    """In a tokenizer's place: what it is shown is what it gives for codes."""

    def encode(self, images):
        return None, (255 * images).round().long()


def test_a_green_apple_in_red_is_learned_as_a_red_apple_and_stays_an_apple():
    images = ImageSet("data/emoji", "train", 64)
    captions = [caption_of(record) for record in images.records]
    places = [captions.index(caption) for caption in ("noto green apple", "noto blue circle", "noto orange circle",
                                                      "twemoji green apple", "noto man: red hair")]
    seen, records = recolour(SeesOnly(), images, places)
    told = [caption_of(record) for record in records]
    assert len(seen) == len(told) == len(set(told)) and not set(told) & {captions[place] for place in places}
    assert {caption.split(" ", 2)[2] for caption in told} == {"apple", "circle"}  # captions that begin with a colour
    for style, place in (("noto", places[0]), ("twemoji", places[3])):
        [green], red = images.batches([place], 1), seen[told.index(f"{style} red apple")][0].double()
        white = green[0].amin(0) > 250
        assert white.any() and (red[:, white] > 245).all()
        strong = green[0].double().amax(0) - green[0].double().amin(0) > 60
        r, g, b = red[:, strong].mean(1)
        assert r > g + 20 and r > b + 20
        r, g, b = green[0].double()[:, strong].mean(1)
        assert g > r + 20 and g > b + 20


@given(old=st.sampled_from(list(COLOURS)), new=st.sampled_from(list(COLOURS)), grey=st.integers(0, 255))
def test_grey_stays_grey_in_any_colour(old, new, grey):
    image = torch.full((1, 3, 8, 8), grey, dtype=torch.uint8)
    torch.testing.assert_close(turn_colour(image, old, new), image, atol=1, rtol=0)


@given(old=st.sampled_from(list(COLOURS)), new=st.sampled_from(list(COLOURS)), strength=st.integers(60, 200))
def test_what_is_turned_is_as_strong_as_its_new_colour_and_never_weaker_than_it_was(old, new, strength):
    hue = COLOURS[old][0]
    colour = [255 * value for value in colorsys.hsv_to_rgb(hue, strength / 230, 230 / 255)]  # from 230 down
    image = torch.tensor(colour).round().byte().view(1, 3, 1, 1).expand(-1, -1, 8, 8)
    turned = turn_colour(image, old, new).double()
    spread = (turned.amax(1) - turned.amin(1)).mean().item()
    wanted = COLOURS[new][1]
    if strength >= wanted:
        assert spread == pytest.approx(strength, abs=6)
    else:  # stronger than it was, and near what is wanted, as far as channels end at 0 and 255
        assert strength + 0.6 * (wanted - strength) - 6 < spread < wanted + 6
    found = colorsys.rgb_to_hsv(*(turned[0, :, 0, 0] / 255).tolist())[0]
    assert abs((found - COLOURS[new][0] + 0.5) % 1 - 0.5) < 0.03


def test_captions_without_a_colour_are_not_recoloured(tmp_path):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "green.png")
    images = ImageSet(tmp_path, "all", 64)
    assert recolour(SeesOnly(), images, range(len(images))) == ([], [])
