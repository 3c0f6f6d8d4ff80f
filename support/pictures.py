"""Pictures: images side by side, curves of a training, and what sample.py draws."""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms import functional as pixels

from support.files import part_of, replacing, same_file
from support.images import DRAWN_HERE, drawn_here, eight_bits
from support.text import readable


def tile(image, side):
    """An image (3, H, W), uint8 or floats in [0, 1], as a PIL image of `side` pixels."""
    image = pixels.to_pil_image(eight_bits(image.cpu().float()) if image.is_floating_point() else image)
    whole = side % image.width == 0  # then every pixel can become a square of pixels
    return image.resize((side, side), Image.NEAREST if whole else Image.LANCZOS)


def save(canvas, path):
    """Write a PNG in one step, and the folder that it goes to if there is none; InputError when it cannot be written.

    In it stands that it was drawn here, so that it is never taken for data.
    """
    note = PngInfo()
    note.add_text("Software", DRAWN_HERE)
    with replacing(path) as part:
        canvas.save(part, "PNG", pnginfo=note)


def save_figure(figure, path, dpi):
    """Write a figure of matplotlib's as `save` writes a picture."""
    with replacing(path) as part:
        figure.savefig(part, dpi=dpi, format="png", metadata={"Software": DRAWN_HERE})


def free(path, read=(), taken=()):
    """The path, or one with as many _ behind its name as it takes for a picture to harm nobody there.

    Not written over are files that are `read`, whatever they are called, any that was not drawn here, and the paths in
    `taken`, whatever the case of their names.
    """
    path, taken = Path(path), {other.name.lower() for other in taken}
    while (path.name.lower() in taken or os.path.lexists(path) and not drawn_here(path)
           or any(same_file(each, file) for each in (path, part_of(path)) for file in read)):
        path = path.with_name(f"{path.stem}_{path.suffix}")
    return path


def save_side_by_side(versions, path, columns=None, side=128):
    """Write a PNG that shows every image in all its versions: originals, then one or more reconstructions of them.

    versions: lists of as many images (3, H, W) in [0, 1]; `columns` such groups to a row, every image of `side` pixels.
    """
    columns = columns or max(1, 8 - len(versions))  # the more versions, the fewer groups, at about the same width
    gap, margin = 4, 12
    group = len(versions) * (side + gap) - gap + margin  # width of one image's versions
    rows = -(-len(versions[0]) // columns)
    canvas = Image.new("RGB", (columns * group + margin, rows * (side + margin) + margin), "#d0d0d0")
    for i, images in enumerate(zip(*versions)):
        for place, image in enumerate(images):
            x = margin + i % columns * group + place * (side + gap)
            canvas.paste(tile(image, side), (x, margin + i // columns * (side + margin)))
    save(canvas, path)


def draw_curves(lines, path):
    """Loss terms, PSNR, use of the codebook and norms over the steps, as one picture."""
    panels = {"loss terms": ["loss", "mse", "perceptual", "codebook", "commitment", "distillation", "contrastive",
                              "val_loss"],
              "PSNR, dB": ["train_psnr", "val_psnr"], "utilization": ["train_utilization", "val_utilization"],
              "perplexity": ["train_perplexity", "val_perplexity"], "norms": ["z_norm", "code_norm"],
              "discriminator": ["hinge", "real_logit", "fake_logit"], "gradient": ["grad_norm"]}
    kept = {name for line in lines for name in line}
    panels = {title: names for title, names in panels.items() if kept.intersection(names)}
    if len(panels) > 2:
        del panels["gradient"]  # there is more to look at
    figure = Figure(figsize=(4 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if name.startswith("val") else None, markersize=3)
        if title == "loss terms":
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=90)


def save_generated(images, captions, folder):
    """Write pictures of captions, one after the other as many of each: a file each, and grid.png with a row a caption.

    images (n, 3, H, W) in [0, 1]; the files are named after the captions, "" among them, and numbered. Returns the path
    of the grid.
    """
    count = len(images) // len(captions)
    side, gap, label = 128, 6, 14
    columns = min(count, 8)
    rows = -(-count // columns)  # of one caption
    height = label + rows * (side + gap)
    canvas = Image.new("RGB", (gap + columns * (side + gap), gap + len(captions) * height), "white")
    draw, names = ImageDraw.Draw(canvas), Counter()
    for place, caption in enumerate(captions):
        draw.text((gap, gap + place * height - 2), readable(caption) or "(no caption)", "black")
        name = re.sub(r"\W+", "-", caption.lower()).encode()[:180].decode(errors="ignore")  # no file's may be longer
        name = name.strip("-")[:60] or "unconditional"
        for i, image in enumerate(images[place * count:(place + 1) * count]):
            save(pixels.to_pil_image(eight_bits(image)), free(folder / f"{name}-{names[name]}.png"))
            names[name] += 1  # the same caption twice must not write one file twice
            canvas.paste(tile(image, side), (gap + i % columns * (side + gap),
                                             gap + place * height + label + i // columns * (side + gap)))
    path = free(folder / "grid.png")
    save(canvas, path)
    return path


def draw_clusters(images, clusterings, path, rows=8, columns=8):
    """Clusterings of the same images beside each other, a row a cluster, with the images nearest to its centre.

    images (n, 3, H, W) uint8; clusterings: {name: (labels (n,), distances to the centres (n,))}. Returns the path, or
    another where somebody else has a picture there.
    """
    side, gap, top, margin = 64, 3, 16, 24
    width = columns * (side + gap) + margin  # of one clustering
    canvas = Image.new("RGB", (len(clusterings) * width - margin, top + rows * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for half, (name, (labels, distances)) in enumerate(clusterings.items()):
        left, sizes = half * width, labels.bincount()
        draw.text((left, 2), f"{name}: {len(sizes)} clusters of {len(images)} images, nearest to the centre first",
                  "black")
        largest = sizes.argsort(descending=True, stable=True)
        for row, cluster in enumerate(largest[::max(1, len(sizes) // rows)][:rows]):  # from all over
            members = (labels == cluster).nonzero()[:, 0]
            for column, member in enumerate(members[distances[members].argsort()][:columns]):
                canvas.paste(tile(images[member], side), (left + column * (side + gap), top + row * (side + gap)))
    path = free(path)
    save(canvas, path)
    return path


def draw_codes(codes, places, images, patch_size, count, columns, path):
    """Patches that chose a code, a row a code, for `count` codes from the most to the least frequent.

    codes (n, N) of the images at `places` (n,) of an ImageSet. Drawn are codes that were chosen twice or more often.
    Returns how many there are in the picture; without one there is none.
    """
    chosen = defaultdict(list)  # by which tokens of which images
    for place, row in zip(places.tolist(), codes.tolist()):
        for token, code in enumerate(row):
            chosen[code].append((place, token))
    frequent = sorted((code for code in chosen if len(chosen[code]) >= 2), key=lambda code: -len(chosen[code]))
    count = min(count, len(frequent))
    side, gap, label = 48, 3, 64
    canvas = Image.new("RGB", (label + columns * (side + gap), count * (side + gap)), "white")
    for row in range(count):
        code = frequent[row * len(frequent) // count]
        tokens = chosen[code]
        ImageDraw.Draw(canvas).text((4, row * (side + gap) + 10), f"{code}\n{len(tokens)} x", fill="black")
        for column, (place, token) in enumerate(tokens[::max(1, len(tokens) // columns)][:columns]):
            window = draw_patch(images[place][0], token, patch_size, side)
            canvas.paste(window, (label + column * (side + gap), row * (side + gap)))
    if count:
        save(canvas, path)
    return count


def draw_patch(image, token, p, side):
    """The patch of a token in an image (3, H, W), framed in red, in its surroundings of 3 x 3 patches.

    A code of a transformer's features means more than its own pixels.
    """
    columns = image.shape[2] // p
    top, left = token // columns * p, token % columns * p
    around = ImageOps.expand(pixels.to_pil_image(image), border=p, fill="#d0d0d0")
    window = around.crop((left, top, left + 3 * p, top + 3 * p)).resize((side, side), Image.BICUBIC)
    ImageDraw.Draw(window).rectangle((side // 3, side // 3, 2 * side // 3, 2 * side // 3), outline="red")
    return window


@torch.no_grad()
def draw_written(lm, tokenizer, codes, captions, device, path, sampling):
    """Pairs of a tokenizer's reconstruction and what a language model writes from its caption, up to 21 of each split.

    codes and captions are dicts by split; `sampling` are the options of `generate`.
    """
    pairs = []
    for split, some in codes.items():
        count = min(21, len(some))
        chosen = [i * len(some) // count for i in range(count)]
        written = lm.generate([captions[split][i] for i in chosen], **sampling)
        pairs += zip(*(tokenizer.decode(each.to(device)) for each in (some[chosen], written)))
    save_side_by_side(list(zip(*pairs)), path, columns=7, side=64)
