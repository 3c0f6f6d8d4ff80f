"""demo.py: what the page shows of a tokenizer, and the page itself in a headless browser."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import demo
import unitok
from conftest import (ROOT, cells_in, pictures_in, small_captioner, small_model, small_vit, started_model,
                      text_lm)
from experiments.clicks import look_at, open_in_browser, swap_near
from support.files import InputError
from support.images import ImageSet, eight_bits
from support.pictures import draw_patch

# --- what the page shows ---


@pytest.fixture(scope="module")
def halves(photo_folder, tmp_path_factory):
    """The photos, six of them held out."""
    folder = tmp_path_factory.mktemp("halves")
    shutil.copytree(photo_folder / "class0", folder / "train")
    shutil.copytree(photo_folder / "class1", folder / "val")
    return folder


def well_used_model(folder, **changes):
    """A small model whose codes have started from the images of a folder."""
    return started_model(small_model(**changes), torch.cat(list(ImageSet(folder, "all", 16).views())))


@pytest.fixture(scope="module")
def studio(halves, tmp_path_factory):
    """A Studio of a small model and the photos."""
    images, training = (ImageSet(halves, split, 16) for split in ("val", "train"))
    return demo.Studio(well_used_model(halves), images, training, tmp_path_factory.mktemp("codes"), "cpu")


def bytes_of(image):
    """An image (3, H, W) in [0, 1] as an array (H, W, 3)."""
    return (255 * eight_bits(image)).round().byte().permute(1, 2, 0).numpy()


def test_the_tokens_stand_over_what_the_decoder_makes_of_them(studio):
    now = studio.start()
    html = studio.tokens(now)
    expected = bytes_of(studio.model.decode(studio.model.encode(now.image[None])[1])[0])
    assert all(np.array_equal(picture, expected) for picture in pictures_in(html))
    assert re.findall(r">(\d+)</button>", html) == [str(code) for code in now.codes]


def test_one_held_out_image_is_enough(photo_folder, tmp_path):
    images, training = (ImageSet(photo_folder, split, 16) for split in ("val", "train"))
    now = demo.Studio(small_model(), images, training, tmp_path, "cpu").start()
    assert len(images) == 1 and now.own == now.other


def test_the_nearest_codes_are_the_nearest_effective_ones(studio):
    codes = studio.model.quantizer.lookup(torch.arange(40))
    for code in (0, 17, 39):
        order = torch.cdist(codes[code][None], codes)[0].argsort().tolist()
        order.remove(code)
        assert [other for other, _ in studio.nearest(code)] == order[:16]


def test_what_a_code_stands_for_are_patches_of_training_images_that_chose_it(studio):
    images = torch.cat(list(studio.training.views()))
    indices = studio.model.encode(images)[1]  # (n, N)
    code = int(indices.flatten().mode().values)
    chosen = (indices == code).nonzero().tolist()
    assert studio.counts[code] == len(chosen)
    every = [np.asarray(draw_patch(studio.training[image][0], token, 4, 48)).tolist() for image, token in chosen]
    shown = [picture.tolist() for picture in pictures_in("".join(map('"{}"'.format, studio.patches(code, 5))))]
    assert len(shown) == min(5, len(chosen)) and all(picture in every for picture in shown)


def test_a_swap_changes_the_code_at_the_place_that_is_looked_at_and_no_other(studio):
    now = studio.start()
    swapped = studio.swap(now, (now.codes[now.place] + 1) % 40)
    assert [i for i, (a, b) in enumerate(zip(now.codes, swapped.codes)) if a != b] == [now.place]
    assert "1 swapped" in studio.tokens(swapped) and swapped.own == now.codes
    assert np.array_equal(pictures_in(studio.tokens(swapped))[0],
                          bytes_of(studio.model.decode(torch.tensor([swapped.codes]))[0]))


@pytest.mark.parametrize("code", [None, -1, 40])
def test_what_is_no_code_is_a_sentence(code, studio):
    with pytest.raises(InputError, match="a code is a whole number from 0 to 39"):
        studio.swap(studio.start(), code)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_mixture_has_each_places_code_from_the_image_that_the_mask_says(share, studio):
    now = studio.start()
    assert now.own != now.other
    mask = tuple(place < share * 16 for place in range(16))
    for place in (place for place in range(16) if now.mask[place] != mask[place]):
        now = studio.toggle(now, place)
    taken = int(share * 16)
    expected = studio.model.decode(torch.tensor([now.other[:taken] + now.own[taken:]]))[0]
    assert now.mask == mask and np.array_equal(pictures_in(studio.mixture(now))[0], bytes_of(expected))


def test_without_the_quantizer_the_decoder_reads_the_features_themselves(studio):
    now = studio.start()
    plain = small_model(quantizer="none")
    weights = {name: tensor for name, tensor in studio.model.state_dict().items() if not name.startswith("quantizer")}
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected = plain(now.image[None]).reconstruction[0].clamp(0, 1)
    torch.testing.assert_close(now.unquantized, expected)


@pytest.mark.parametrize("cfg_scale, temperature", [(1.25, 0.2), (1, 1), (3, 0)])
def test_codes_written_one_by_one_are_those_of_generate(cfg_scale, temperature):
    lm = text_lm(codebook_size=32, image_tokens=16)
    steps = list(demo.write(lm, "noto red apple", 3, cfg_scale, temperature))
    assert [len(codes) for codes in steps] == list(range(1, 17))
    assert all(codes == steps[-1][:len(codes)] for codes in steps)
    assert [list(steps[-1])] == lm.generate("noto red apple", cfg_scale, temperature, seed=3).tolist()


def test_every_emoji_on_show_leads_to_its_own_image(studio):
    html = studio.emoji()
    for place, picture in zip(cells_in(html), pictures_in(html), strict=True):
        assert np.array_equal(picture, studio.images[place][0].permute(1, 2, 0).numpy())


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "gr", None)
    with pytest.raises(SystemExit, match=r"Gradio: pip install -r requirements-extra.txt"):
        demo.main([])


def test_a_model_without_codes_is_refused(tmp_path):
    small_model(quantizer="none").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no codes to play with"):
        demo.open_page(demo.parse_args(["--model", str(tmp_path)]), "cpu")


def test_a_generator_of_several_codes_at_a_place_is_refused(written_models, tmp_path):
    sizes = dict(codebook_size=32, codebook_dim=8, quantizer="mcq", codebooks=4)
    unitok.DepthLM.around(text_lm(codebook_size=32, image_tokens=16), 4).save_pretrained(tmp_path / "depth")
    unitok.UniTok(unitok.UniTokConfig(small_vit(), 16, 4, **sizes)).save_pretrained(tmp_path / "depth/vqrae")
    with pytest.raises(InputError, match="the page draws with a VQRAE, and .*depth writes the codes of a UniTok"):
        demo.open_page(demo.parse_args(["--model", written_models["vqrae"], "--generator", str(tmp_path / "depth")]),
                       "cpu")


# --- the page in a browser ---

SERVER = """
import signal, sys
def note(event, arguments):
    address = arguments[1] if event == "socket.connect" else arguments[0] if event == "socket.getaddrinfo" else None
    if address is not None:
        print("reached for", address[0] if isinstance(address, tuple) else address, flush=True)
sys.addaudithook(note)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background would be without
import demo
demo.main(sys.argv[1:])
"""

@pytest.fixture(scope="module")
def models(halves, tmp_path_factory):
    """A small tokenizer, a generator and a captioner, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("models")
    found = {"model": well_used_model(halves, codebook_size=32, codebook_dim=8),
             "generator": text_lm(codebook_size=32, image_tokens=16), "captioner": small_captioner()}
    for name, model in found.items():
        model.save_pretrained(folder / name)
    found["model"].save_pretrained(folder / "generator/vqrae")
    return found, folder


@pytest.fixture(scope="module")
def server(models, halves, tmp_path_factory):
    """python demo.py, as a process, its address and the file that it writes to."""
    pytest.importorskip("gradio", reason="there is no page without pip install gradio")
    said = tmp_path_factory.mktemp("demo") / "said.txt"
    flags = [word for name in models[0] for word in (f"--{name}", str(models[1] / name))]
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *flags, "--data", str(halves), "--out", str(said.parent), "--device",
             "cpu"], cwd=ROOT, stdout=file, stderr=file)
    deadline = time.monotonic() + 600
    while not (found := re.search(r"http://\S+", said.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)
    yield process, found[0], said
    process.kill()


@pytest.fixture(scope="module")
def seen(server):
    """The page in a browser, one for all tests, and what it asks for."""
    try:
        with open_in_browser(server[1]) as page_and_requests:
            yield page_and_requests
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def page(seen):
    return seen[0]


def numbers_on(page):
    """The codes that stand over the first picture."""
    return [int(number) for number in page.locator("#tokens [data-cell]").all_text_contents()]


def wait_for(condition, limit=60):
    """Wait until a function of nothing is true."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def upload(page, path):
    """Choose a file in the dialogue behind the button."""
    with page.expect_file_chooser() as chooser:
        page.click("#emoji-file")
    chooser.value.set_files(path)


def test_a_click_on_a_token_shows_its_code(page):
    look_at(page, 5)
    assert page.inner_text("#code b") == str(numbers_on(page)[5])


def test_a_click_on_a_near_code_puts_it_there_and_the_picture_is_soon_another(page):
    look_at(page, 6)
    before, code = numbers_on(page), page.locator("#code .tiles").nth(1).locator("button").nth(3)
    new = int(code.get_attribute("data-cell"))
    milliseconds = swap_near(page, 4)
    assert numbers_on(page) == before[:6] + [new] + before[7:]
    assert milliseconds < 20_000  # under 200 on two quiet cores, see experiments/clicks.py; a busy machine is slow


def test_a_number_is_put_there_too_and_all_can_be_taken_back(page):
    page.click("#back")
    wait_for(lambda: "0 swapped" in page.inner_text("#tokens"))
    before = numbers_on(page)
    look_at(page, 7)
    page.fill("#number input", str((before[7] + 1) % 32))
    page.press("#number input", "Enter")
    page.wait_for_selector("#tokens [data-cell='7'].changed")
    assert numbers_on(page) == before[:7] + [(before[7] + 1) % 32] + before[8:]
    page.click("#back")
    wait_for(lambda: numbers_on(page) == before)


def test_what_is_no_code_is_a_sentence_on_the_page(page):
    page.fill("#number input", "32")
    page.press("#number input", "Enter")
    page.wait_for_selector("text=a code is a whole number from 0 to 31")
    page.click(".toast-close")


def test_a_click_in_the_mixture_takes_a_place_from_the_other_image(page):
    page.get_by_role("tab", name="Mix two images").click()
    place = page.locator("#mixture [data-cell='4']")
    before = place.get_attribute("class")
    place.click()
    wait_for(lambda: place.get_attribute("class") != before)
    page.get_by_role("tab", name="Tokens").click()


def test_a_file_is_read_and_its_tokens_shown(page, models, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    upload(page, tmp_path / "a.png")
    image = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None] / 255
    expected = models[0]["model"].encode(image)[1][0].tolist()
    wait_for(lambda: numbers_on(page) == expected)


def test_a_file_that_is_no_image_is_a_sentence_on_the_page(page, tmp_path):
    before = numbers_on(page)
    (tmp_path / "a.png").write_bytes(b"nothing")
    upload(page, tmp_path / "a.png")
    page.wait_for_selector("text=as an image: damaged, or of no kind that Pillow knows")
    page.click(".toast-close")
    assert numbers_on(page) == before


def test_a_caption_becomes_a_picture_code_by_code(page, models):
    page.get_by_role("tab", name="Caption in, picture out").click()
    page.evaluate("""() => { window.counts = []; new MutationObserver(() =>
        window.counts.push(document.querySelectorAll('#drawn .empty').length)
    ).observe(document.querySelector('#drawn'), {childList: true, subtree: true}) }""")
    page.fill("#caption input, #caption textarea", "noto red apple")
    page.click("#draw")
    page.wait_for_selector("#drawn .beside > div:nth-child(2) img")
    written = [int(number) for number in page.locator("#drawn [data-cell]").all_inner_texts()]
    assert [written] == models[0]["generator"].generate("noto red apple", **demo.SAMPLING).tolist()
    missing = [count for count in page.evaluate("window.counts") if count]
    assert missing == sorted(missing, reverse=True) and len(set(missing)) > 3


def test_a_picture_gets_a_caption(page, models, halves):
    page.get_by_role("tab", name="Picture in, caption out").click()
    place = page.locator("#emoji [data-cell]").first
    image = ImageSet(halves, "val", 16)[int(place.get_attribute("data-cell"))][0][None] / 255
    place.click()
    wait_for(lambda: numbers_on(page) == models[0]["model"].encode(image)[1][0].tolist())
    page.click("#tell")
    expected = models[0]["captioner"].caption(image)[0]
    wait_for(lambda: page.locator("#told textarea, #told input").input_value() == expected)
    page.get_by_role("tab", name="Tokens").click()


def test_nothing_is_asked_of_another_machine(seen, server):
    page, asked = seen
    assert len(asked) > 5 and all(url.startswith((server[1], "data:", "blob:")) for url in asked)
    reached = set(re.findall(r"reached for (.*)", server[2].read_text()))
    assert reached <= {"127.0.0.1", "localhost", "::1", "None"}


def test_only_this_machine_is_let_in(server):
    address = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", server[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(address[1])), timeout=60)  # ours too, by another name


def test_ctrl_c_ends_it(server):
    server[0].send_signal(signal.SIGINT)
    assert server[0].wait(60) == 130 and "Traceback" not in server[2].read_text()

