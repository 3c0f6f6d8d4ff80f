"""Look at a trained VQRAE.

    python sample.py reconstruct cat.jpg dog.png --model out/stage1 --out out/pictures
    python sample.py reconstruct --model out/stage1 --beside out/stage2      # held-out emoji, two models side by side
    python sample.py evaluate --model out/stage1                # held-out emoji: PSNR, SSIM, Frechet distance, codes
    python sample.py evaluate --model out/stage1 --data my/photos --split all
    python sample.py evaluate --model out/stage2 --clusters     # and what its features and its tokens gather
    python sample.py codes --model out/stage1                   # what single codes stand for
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms import functional as pixels

import vqrae
from train import choose_device, number, one_sentence_errors
from vqrae import InputError


@torch.no_grad()
def reconstruct(args, model, device):
    """Write NAME.png for every image file: the original, then what the model makes of it, and any model --beside it.

    Without files, reconstructions.png shows images from all over a split of --data.
    """
    models = [model] + [vqrae.VQRAE.from_pretrained(folder).to(device) for folder in args.beside]
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.images:
        images = vqrae.ImageSet(args.data, args.split, args.image_size).spread(24).to(device)
        versions = [images] + [model(images).reconstruction for model in models]
        vqrae.save_side_by_side(versions, args.out / "reconstructions.png")
        print(f"{args.out}/reconstructions.png")
        return
    written = set()
    for path in args.images:
        try:
            source = vqrae.ImageSet.prepare(vqrae.read_image(path), args.image_size)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        images = source[None].to(device).float() / 255  # (1, 3, H, W)
        outputs = [model(images).reconstruction for model in models]
        name = path.stem
        while name in written:  # a/cat.png and b/cat.png must not share one picture
            name += "_"
        written.add(name)
        vqrae.save_side_by_side([images, *outputs], args.out / f"{name}.png", columns=1, side=max(256, args.image_size))
        scores = [vqrae.psnr(vqrae.resize_to(images, y), vqrae.eight_bits(y)).item() for y in outputs]
        print(f"{args.out / name}.png: PSNR {', '.join(f'{score:.2f}' for score in scores)} dB")
    if not written:
        raise InputError("none of the given files could be read as an image")


def lpips_distance(device):
    """LPIPS as a function of two batches, or None with a sentence when VGG16's weights are not to be had."""
    import lpips

    try:
        network = vqrae.PaperPerceptual(vgg=lpips.LPIPS(net="vgg", verbose=False), convnext=torch.nn.Identity())
    except OSError as error:
        print(f"LPIPS is left out: the weights of VGG16 cannot be fetched ({error})", file=sys.stderr)
        return None
    return network.to(device).lpips


def evaluate(args, model, device):
    """Print the metrics of one split as a table, then as one JSON line."""
    if args.clusters == 1:
        raise InputError("--clusters 1 would put all images into one; ask for 2 or more")
    if args.clusters and model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no discrete tokens to cluster (--quantizer none)")
    images = vqrae.ImageSet(args.data, args.split, args.image_size)
    encoder = vqrae.load_encoder(args.frechet_encoder).to(device)
    teacher = vqrae.load_encoder(args.teacher).to(device)
    result = vqrae.evaluate(model, images, args.batch_size, device, frechet_encoder=encoder,
                            lpips=lpips_distance(device))
    result = {"model": str(args.model), "data": str(args.data), "split": args.split, **result}
    if "frechet" in result:  # named after its encoder and never called rFID, which is Inception's
        result[f"frechet_{Path(args.frechet_encoder).name}"] = result.pop("frechet")
    for name, value in result.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    if args.split == "val":  # a probe is fitted to the training images and asked about held-out ones
        if asdict(teacher.config) == asdict(model.config.encoder):
            train_images = vqrae.ImageSet(args.data, "train", args.image_size)
            result["understanding"] = vqrae.understanding(model, teacher, train_images, images, args.batch_size, device)
            print_understanding(result["understanding"])
        else:
            print(f"understanding is left out: {args.teacher} is of other sizes than the encoder of {args.model}; "
                  "--teacher names the encoder that it was trained from", file=sys.stderr)
    if args.clusters:
        result["clusters"] = clusters(args, model, images, device)
    print(json.dumps(result))


def print_understanding(rows):
    """The measures of `vqrae.understanding` as a table, features down and measures across."""
    measures = list(rows.get("continuous", ()))
    if measures:
        print("".join([f"{'features':12}"] + [f"{name:>24}" for name in measures]))
    for name, values in rows.items():
        print("".join([f"{name:12}"] + [f"{values[measure]:24.4f}" for measure in measures]))


def clusters(args, model, images, device):
    """Figure 4: k-means of images, on the mean of their continuous features left and of their discrete tokens right.

    Draws clusters.png, a row a cluster with the images nearest to its centre, and returns what each clustering follows:
    the share of images whose category (style) is the most frequent one of their cluster, and the share of the variance
    of mean colour and of roughness (mean squared step between neighbouring pixels) that lies between clusters.
    """
    everything, vectors = [], {"continuous": [], "discrete": []}
    for batch in images.batches(range(len(images)), args.batch_size):
        with torch.no_grad():
            out = model(batch.to(device).float() / 255)
        everything.append(batch)
        vectors["continuous"].append(model.standardise(out.features).mean(1).cpu())
        vectors["discrete"].append(out.z_q.mean(1).cpu())
    everything = torch.cat(everything)  # (n, 3, H, W)
    count, columns, rows, side, gap = min(args.clusters, len(everything)), 8, 8, 64, 3
    x = everything.float() / 255
    colour = x.mean((2, 3))  # (n, 3)
    roughness = (x.diff(dim=-1).pow(2).mean((1, 2, 3)) + x.diff(dim=-2).pow(2).mean((1, 2, 3)))[:, None]  # (n, 1)
    canvas = Image.new("RGB", (2 * columns * (side + gap) + 24, 16 + rows * (side + gap)), "white")
    draw, result = ImageDraw.Draw(canvas), {}
    for half, (name, parts) in enumerate(vectors.items()):
        vector = torch.cat(parts)  # (n, d) or (n, e)
        means = vqrae.VectorQuantizer(count, vector.shape[1])
        vqrae.start_codebook(means, vector, steps=30, generator=torch.Generator().manual_seed(0))
        label = means.search(vector)  # (n,)
        distance = (vector - means.lookup(label)).norm(dim=1)  # (n,)
        left = half * (columns * (side + gap) + 24)
        draw.text((left, 2), f"{name}: {count} clusters of {len(vector)} images, nearest to the centre first", "black")
        sizes = torch.bincount(label, minlength=count)
        for row, cluster in enumerate(sizes.argsort(descending=True, stable=True)[::max(1, count // rows)][:rows]):
            members = (label == cluster).nonzero()[:, 0]
            for column, member in enumerate(members[distance[members].argsort()][:columns]):
                tile = pixels.to_pil_image(everything[member]).resize((side, side), Image.LANCZOS)
                canvas.paste(tile, (left + column * (side + gap), 16 + row * (side + gap)))
        result[name] = {}
        for key in ("category", "style"):
            values = [record.get(key) for record in images.records]
            if len(set(values)) > 1:
                kept = sum(max(Counter(v for v, c in zip(values, label.tolist()) if c == cluster).values(), default=0)
                           for cluster in range(count))
                result[name][f"{key}_purity"] = kept / len(values)
        for key, values in (("colour", colour), ("roughness", roughness)):
            centres = torch.zeros(count, values.shape[1]).index_add_(0, label, values) / sizes.clamp(min=1)[:, None]
            inside = (values - centres[label]).pow(2).sum()
            result[name][f"{key}_explained"] = (1 - inside / (values - values.mean(0)).pow(2).sum()).item()
        print("".join([f"clusters by {name} features:"] + [f"  {k} {v:.3f}" for k, v in result[name].items()]))
    args.out.mkdir(parents=True, exist_ok=True)
    canvas.save(args.out / "clusters.png")
    print(f"{args.out}/clusters.png")
    return result


def codes(args, model, device):
    """Draw held-out patches that chose a code, a row a code, for codes from the most to the least frequent."""
    if model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no codebook (it was trained with --quantizer none)")
    images = vqrae.ImageSet(args.data, args.split, args.image_size)
    p, everything, places = model.config.encoder.patch_size, [], defaultdict(list)
    for batch in images.batches(range(len(images)), args.batch_size):
        _, indices = model.encode(batch.to(device).float() / 255)  # (B, N)
        for image, row in zip(batch, indices.tolist()):
            for token, code in enumerate(row):
                places[code].append((len(everything), token))
            everything.append(image)
    frequent = sorted((code for code in places if len(places[code]) >= 2), key=lambda code: -len(places[code]))
    if not frequent:
        raise InputError(f"no code was chosen twice by the {args.split} images of {args.data}; give more images")
    chosen = [frequent[i * len(frequent) // args.codes] for i in range(min(args.codes, len(frequent)))]
    columns, side, gap, label = args.patches, 48, 3, 64
    canvas = Image.new("RGB", (label + columns * (side + gap), len(chosen) * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, code in enumerate(chosen):
        draw.text((4, row * (side + gap) + 10), f"{code}\n{len(places[code])} x", fill="black")
        step = max(1, len(places[code]) // columns)
        for column, (image, token) in enumerate(places[code][::step][:columns]):
            # The patch in its surroundings: a code of a transformer's features means more than its own pixels.
            top, left = token // (args.image_size // p) * p, token % (args.image_size // p) * p
            window = pixels.crop(pixels.to_pil_image(everything[image]), top - p, left - p, 3 * p, 3 * p)
            window = window.resize((side, side), Image.BICUBIC)
            ImageDraw.Draw(window).rectangle((side // 3, side // 3, 2 * side // 3, 2 * side // 3), outline="red")
            canvas.paste(window, (label + column * (side + gap), row * (side + gap)))
    args.out.mkdir(parents=True, exist_ok=True)
    canvas.save(args.out / "codes.png")
    print(f"{args.out}/codes.png: {len(chosen)} of the {len(places)} codes that the {args.split} split uses, most "
          "frequent first; each patch (red) in its surroundings")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (reconstruct, evaluate, codes):
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(function=command)
        sub.add_argument("--model", type=Path, default=Path("out/stage1"), help="folder that train.py wrote")
        sub.add_argument("--image-size", type=number(int), help="side in pixels (default: the model's)")
        sub.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        sub.add_argument("--out", type=Path, default=Path("out/pictures"), help="folder for the pictures")
        if command is reconstruct:
            sub.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files of any kind")
            sub.add_argument("--beside", type=Path, action="append", default=[], metavar="MODEL",
                             help="another model to show beside; may be given more than once")
        sub.add_argument("--data", default=str(vqrae.ROOT / "data/emoji"), help="folder of images (default: the emoji)")
        sub.add_argument("--split", choices=["val", "train", "all"], default="val", help="val: the held-out images")
        sub.add_argument("--batch-size", type=number(int), default=64)
        if command is evaluate:
            sub.add_argument("--frechet-encoder", default=str(vqrae.ROOT / "data/tiny_vit"),
                             help="whose mean patch features the Frechet distance compares; it is named after it")
            sub.add_argument("--teacher", default=str(vqrae.ROOT / "data/tiny_vit"),
                             help="the frozen encoder that the model was trained from, for the linear probes")
            sub.add_argument("--clusters", type=number(int), nargs="?", const=24, metavar="K",
                             help="also draw clusters.png: k-means on continuous features and on discrete tokens")
        if command is codes:
            sub.add_argument("--codes", type=number(int), default=16, help="how many codes to draw")
            sub.add_argument("--patches", type=number(int), default=16, help="how many patches of each")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        device = choose_device(args.device)
        model = vqrae.VQRAE.from_pretrained(args.model).to(device)
        args.image_size = args.image_size or model.config.image_size
        args.function(args, model, device)


if __name__ == "__main__":
    main()
