"""Pictures: images side by side, curves of a training, and what sample.py draws."""

from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms import functional as pixels

from support.images import eight_bits


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
            image = pixels.to_pil_image(eight_bits(image.cpu().float()))
            whole = side % image.width == 0  # then every pixel can become a square of pixels
            image = image.resize((side, side), Image.NEAREST if whole else Image.LANCZOS)
            x = margin + i % columns * group + place * (side + gap)
            canvas.paste(image, (x, margin + i // columns * (side + margin)))
    canvas.save(path)


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
    axes = figure.subplots(1, len(panels))
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
    figure.savefig(path, dpi=90)
