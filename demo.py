"""A page to play with: the tokens of an image as numbers to look at, swap and mix, and captions that become pictures.

    python demo.py                                    # out/stage2 and out/ar, at http://127.0.0.1:7860, until Ctrl-C
    python demo.py --model out/stage1 --port 8000

It needs Gradio (requirements-extra.txt), and nothing leaves this machine. What a visitor has before them is a Session.
The page is made of it, and every click makes another.
"""

import argparse
import functools
import os
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import vqrae
from presets import ROOT, SAMPLING
from support.codes import image_codes
from support.files import InputError, trained
from support.images import ImageSet, eight_bits, read_image, resize_to
from support.metrics import codebook_usage, psnr
from support.page import CLICK, STYLE, beside, picture_of, tiles_of, url_of
from support.pictures import draw_patch
from support.run import choose_device, one_sentence_errors
from support.settings import number, refuse_dashes
from support.sets import open_images
from support.text import caption_of
from unitok import load_generator

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
except ImportError:
    gr = None  # `main` has a sentence for it

# --- what there is to see and to do ---


@dataclass(frozen=True)
class Session:
    """What one visitor has before them."""

    other: tuple  # the N codes of the image that it is mixed with
    mask: tuple  # of N booleans: the places that the mixture has of the other
    place: int  # the token that is looked at
    image: torch.Tensor = None  # (3, H, W) in [0, 1]
    unquantized: torch.Tensor = None  # what the decoder makes of z itself
    own: tuple = ()  # the codes of the image
    codes: tuple = ()  # what they have become


class Studio:
    """A tokenizer, held-out images, and where its codes are in training images, which is kept in `folder`."""

    def __init__(self, model, images, training, folder, device):
        self.model, self.images, self.training, self.device = model, images, training, device
        self.known, self.known_places = image_codes(model, training, folder, device=device)  # (n, N), (n,)
        self.counts = model.count(self.known)  # (K,)
        with torch.no_grad():
            self.vectors = model.quantizer.lookup(torch.arange(len(self.counts), device=device))  # (K, e)
        self.paint, self.patches = functools.lru_cache(64)(self.paint), functools.lru_cache(4096)(self.patches)

    def paint(self, codes):
        """A tuple of N codes -> the image (3, H, W) that the decoder makes of them."""
        return self.model.decode(torch.tensor([codes], device=self.device))[0].cpu()

    def patches(self, code, most):
        """Patches of training images that chose a code, up to `most` from all over, in their surroundings, as URLs."""
        found, p = (self.known == code).nonzero(), self.model.config.encoder.patch_size  # (count, 2)
        return [url_of(draw_patch(self.training[int(self.known_places[row])][0], token, p, 48))
                for row, token in found[::max(1, len(found) // most)][:most].tolist()]

    def nearest(self, code, count=16):
        """The codes nearest to one in Euclidean distance, nearest first, as pairs (code, distance)."""
        distances = (self.vectors - self.vectors[code]).norm(dim=1)  # (K,)
        distances[code] = torch.inf
        values, codes = distances.topk(min(count, len(distances) - 1), largest=False)
        return list(zip(codes.tolist(), values.tolist()))

    # HTML of a Session

    def emoji(self, count=48):
        """Held-out images, others every time; the number of each is its place."""
        places = torch.randperm(len(self.images))[:count].tolist()
        return tiles_of((place, url_of(self.images[place][0]), caption_of(self.images.records[place]), "")
                        for place in places)

    def tokens(self, now):
        image, swapped = self.paint(now.codes), [i for i, (a, b) in enumerate(zip(now.own, now.codes)) if a != b]
        return beside(picture_of(image, now.codes, changed=swapped, marked=[now.place]), picture_of(image)) + (
            f"<p>{len(set(now.codes))} different codes in {len(now.codes)} places, {len(swapped)} swapped; "
            f"{likeness(now.image, image)}</p>")

    def code(self, now):
        code = now.codes[now.place]
        return (f"<p>Code <b>{code}</b> was chosen by {self.counts[code]} of {self.known.numel()} patches of training "
                "images:</p>" + tiles_of((code, url, "", "") for url in self.patches(code, 16))
                + "<p>The codes nearest to it, and how far away they are. Click one to put it there:</p>" + tiles_of(
                    (code, "".join(self.patches(code, 1)), f"chosen {self.counts[code]} times",
                     f"{code}<br>{distance:.1f}") for code, distance in self.nearest(code)))

    def mixture(self, now):
        codes = tuple(two if other else one for one, two, other in zip(now.codes, now.other, now.mask))
        theirs = [place for place, other in enumerate(now.mask) if other]
        return beside(picture_of(self.paint(codes), [""] * len(codes), changed=theirs),
                      picture_of(self.paint(now.other)))

    def quantizer(self, now):
        utilization, perplexity = codebook_usage(self.counts)
        on, off = self.paint(now.own), now.unquantized
        return beside(
            f"The image{picture_of(now.image)}", f"Quantizer off{picture_of(off)}no codes; {likeness(now.image, off)}",
            f"Quantizer on{picture_of(on)}{len(set(now.own))} different codes; {likeness(now.image, on)}") + (
            "<p>Off, the decoder is given the projected features z and not the code nearest to each. It has learned "
            f"from codes alone. Training images use {utilization:.2%} of the {len(self.counts)} codes, with a "
            f"perplexity of {perplexity:.0f}.</p>")

    # a Session and an input -> the next Session; images are bytes (3, H, W)

    def start(self):
        one, two = self.images[0][0], self.images[len(self.images) // 2][0]
        side = self.images.size // self.model.config.encoder.patch_size
        right = tuple(place % side >= side // 2 for place in range(side**2))
        middle = side**2 // 2 + side // 2
        return self.take(self.take_second(Session((), right, middle), two), one)

    @torch.no_grad()
    def take(self, now, image):
        image = image.float() / 255
        out = self.model(image[None].to(self.device))
        bottleneck = self.model.project_out(out.z)  # (1, N, d)
        unquantized = self.model.decoder(bottleneck, *self.model.grid(image))[0].clamp(0, 1).cpu()
        codes = tuple(out.indices[0].tolist())
        return replace(now, image=image, unquantized=unquantized, own=codes, codes=codes)

    def take_second(self, now, image):
        return replace(now, other=tuple(self.model.encode(image[None].to(self.device) / 255)[1][0].tolist()))

    def swap(self, now, code):
        if code is None or not 0 <= code < len(self.counts):
            raise InputError(f"a code is a whole number from 0 to {len(self.counts) - 1}")
        return replace(now, codes=(*now.codes[:now.place], code, *now.codes[now.place + 1:]))

    def toggle(self, now, place):
        return replace(now, mask=tuple(other != (i == place) for i, other in enumerate(now.mask)))


def likeness(image, painted):
    """The PSNR of what was painted of an image, in words."""
    like = resize_to(image[None], painted[None])
    return f"PSNR {psnr(like, eight_bits(painted[None])).item():.2f} dB"


def write(lm, caption, seed, cfg_scale, temperature):
    """Yield the codes of a caption's picture so far, a tuple that grows to what `lm.generate` gives in one piece."""
    prompt, without, codes = lm.prompt(caption), lm.prompt(""), ()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(lm.config.image_tokens):
        tokens = [lm.config.text_vocabulary + code for code in codes]
        new = lm.extend([prompt + tokens], 1, without + tokens, cfg_scale, temperature, generator=generator)  # (1, 1)
        codes = (*codes, *new[0].tolist())
        yield codes


# --- the page ---


class Page:
    """The parts of the page. In `views` is what shows a Session, by the Studio's method that makes its HTML."""

    def __init__(self, studio):
        self.studio, start = studio, studio.start()
        self.html_of = functools.partial(gr.HTML, js_on_load=CLICK, apply_default_css=False)
        self.session = gr.State(start)
        self.views = {name: self.html_of(getattr(studio, name)(start), render=False, elem_id=name)
                      for name in ("tokens", "code", "mixture", "quantizer")}

    def follow(self, listen, action, *inputs):
        """Let an event make the next Session by `action`, of its inputs or of the number clicked, and show it."""
        def answer(now, *given):
            try:
                now = action(now, *given)
            except InputError as error:
                raise gr.Error(str(error), print_exception=False) from None
            return now, *(getattr(self.studio, name)(now) for name in self.views)

        def clicked(now, click: gr.EventData):
            return answer(now, click.cell)

        listen(answer if inputs else clicked, [self.session, *inputs], [self.session, *self.views.values()],
               show_progress="hidden")

    def choose(self, action, name):
        """Where an image is chosen, which `action` takes."""
        images = self.studio.images
        file = gr.UploadButton("Upload an image", file_types=["image"], elem_id=f"{name}-file")
        tiles, others = self.html_of(self.studio.emoji(), elem_id=name), gr.Button("Other emoji", size="sm")
        others.click(self.studio.emoji, None, tiles, show_progress="hidden")
        self.follow(file.upload, lambda now, path: action(now, ImageSet.prepare(read_image(path), images.size)), file)
        self.follow(tiles.click, lambda now, place: action(now, images[place][0]))

    def tokens(self):
        gr.Markdown("Each place has one of the codebook's codes. Click one to see what it stands for.")
        self.views["tokens"].render()
        with gr.Row():
            code = gr.Number(0, label="Another code for the token in red (Enter)", precision=0, elem_id="number")
            back = gr.Button("All as they were", size="sm", elem_id="back")
        self.views["code"].render()
        self.follow(self.views["tokens"].click, lambda now, place: replace(now, place=place))
        self.follow(self.views["code"].click, self.studio.swap)
        self.follow(code.submit, self.studio.swap, code)
        self.follow(back.click, lambda now, _: replace(now, codes=now.own), code)

    def mix(self):
        gr.Markdown("Places in orange have the second image's tokens. Click one to change that.")
        with gr.Row():
            with gr.Column(scale=3):
                self.views["mixture"].render()
            with gr.Column(min_width=220):
                self.choose(self.studio.take_second, "second")
        self.follow(self.views["mixture"].click, self.studio.toggle)

    def draw(self, lm, painter):
        def pictures(caption, seed, cfg_scale, temperature):
            for codes in write(lm, caption, int(seed or 0), cfg_scale, temperature):
                rest = range(len(codes), lm.config.image_tokens)  # painted like the first code, and hidden
                every = torch.tensor([[*codes, *(codes[0] for _ in rest)]], device=self.studio.device)
                image = painter.decode(every)[0].cpu()
                numbers = picture_of(image, [*codes, *("" for _ in rest)], empty=rest)
                yield beside(numbers, "" if rest else picture_of(image))

        caption = gr.Textbox("noto cat face", label="Caption, such as emoji have", max_length=200, elem_id="caption")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            cfg_scale = gr.Slider(0, 5, SAMPLING["cfg_scale"], label="Guidance by the caption")
            temperature = gr.Slider(0, 2, SAMPLING["temperature"], label="Temperature")
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        shown = self.html_of(elem_id="drawn")
        gr.on([caption.submit, button.click], pictures, [caption, seed, cfg_scale, temperature], shown,
              show_progress="hidden", concurrency_limit=1)

    def tell(self, captioner):
        def caption(now):
            like = torch.empty(1, 3, captioner.config.image_size, captioner.config.image_size)
            return captioner.caption(resize_to(now.image[None], like).to(self.studio.device))[0]

        button, said = gr.Button("What is it?", elem_id="tell"), gr.Textbox(label="Caption", elem_id="told")
        button.click(caption, self.session, said)


def page_of(studio, generator, captioner):
    """The page, a gr.Blocks. generator, a VisualLM and its VQRAE, and captioner may be sentences in their place."""
    with gr.Blocks(title="VQRAE") as blocks:
        page = Page(studio)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                page.choose(studio.take, "emoji")
            with gr.Column(scale=4):
                with gr.Tab("Tokens"):
                    page.tokens()
                with gr.Tab("Mix two images"):
                    page.mix()
                with gr.Tab("Quantizer on and off"):
                    page.views["quantizer"].render()
                with gr.Tab("Caption in, picture out"):
                    gr.Markdown(generator) if isinstance(generator, str) else page.draw(*generator)
                with gr.Tab("Picture in, caption out"):
                    gr.Markdown(captioner) if isinstance(captioner, str) else page.tell(captioner)
    return blocks


def open_page(args, device):
    """The page of the models that the flags name."""
    sentence = "There is no model in {}; `python train.py --stage {}` makes one."
    folder = args.model or trained("out/stage2")
    model = vqrae.VQRAE.from_pretrained(folder).to(device)
    if model.config.quantizer == "none":
        raise InputError(f"the model in {folder} has no codes to play with (--quantizer none)")
    images, training = (open_images(args.data, split, model.config.image_size) for split in ("val", "train"))
    folder = args.generator or trained("out/ar")
    generator = load_generator(folder, device) if folder.is_dir() else sentence.format(folder, "ar")
    if not isinstance(generator, str) and type(generator[1]) is not vqrae.VQRAE:
        raise InputError(f"the page draws with a VQRAE, and {folder} writes the codes of a "
                         f"{type(generator[1]).__name__}")
    folder = args.captioner or trained("out/caption")
    captioner = vqrae.Captioner.from_pretrained(folder).to(device) if folder.is_dir() else (
        sentence.format(folder, "caption"))
    print("Looking where training images have which codes, once; kept in", args.out, flush=True)
    return page_of(Studio(model, images, training, args.out, device), generator, captioner)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="tokenizer (default: out/stage2, or the one that came with the code)")
    add("--generator", type=Path, help="what draws from captions (default: out/ar, or the one that came with the code)")
    add("--captioner", type=Path, help="what captions (default: out/caption)")
    add("--data", default=str(ROOT / "data/emoji"), help="as for train.py (default: the emoji)")
    add("--out", type=Path, default=Path("out/demo"), help="where the codes of training images are kept (out/demo)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--port", type=number(int, most=65535), help="of 127.0.0.1 (default: the first free one from 7860 on)")
    refuse_dashes(parser, argv)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        if gr is None:
            raise InputError("this page needs Gradio: pip install -r requirements-extra.txt")
        with tempfile.TemporaryDirectory() as uploads:  # which are gone when the page is
            os.environ["GRADIO_TEMP_DIR"] = uploads
            _, url, _ = open_page(args, choose_device(args.device)).launch(
                server_name="127.0.0.1", server_port=args.port, share=False, prevent_thread_lock=True, quiet=True,
                ssr_mode=False, footer_links=[], run_history=False, css=STYLE,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]))  # none to fetch
            print(f"{url} is there until Ctrl-C", flush=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        os._exit(130)  # at once: Gradio's threads would be waited for as long as a browser looks at the page


if __name__ == "__main__":
    main()
