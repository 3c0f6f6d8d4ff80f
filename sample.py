"""Look at a trained VQRAE.

    python sample.py reconstruct cat.jpg dog.png --model out/stage1 --out out/pictures
    python sample.py evaluate --model out/stage1                # held-out emoji: PSNR, SSIM, Frechet distance, codes
    python sample.py evaluate --model out/stage1 --data my/photos --split all
    python sample.py codes --model out/stage1                   # what single codes stand for
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms import functional as pixels

import vqrae
from train import above, choose_device, one_sentence_errors
from vqrae import InputError


def reconstruct(args, model, device):
    """Write NAME.png for every image file, original left and reconstruction right."""
    args.out.mkdir(parents=True, exist_ok=True)
    written = set()
    for path in args.images:
        try:
            source = vqrae.ImageSet.prepare(vqrae.read_image(path), args.image_size)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        images = source[None].to(device).float() / 255  # (1, 3, H, W)
        with torch.no_grad():
            output = model(images).reconstruction
        name = path.stem
        while name in written:  # a/cat.png and b/cat.png must not share one picture
            name += "_"
        written.add(name)
        vqrae.save_pairs(images, output, args.out / f"{name}.png", columns=1, side=max(256, args.image_size))
        score = vqrae.psnr(vqrae.resize_to(images, output), vqrae.eight_bits(output)).item()
        print(f"{args.out / name}.png: PSNR {score:.2f} dB")
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
    images = vqrae.ImageSet(args.data, args.split, args.image_size)
    encoder = vqrae.load_encoder(args.frechet_encoder).to(device)
    result = vqrae.evaluate(model, images, args.batch_size, device, frechet_encoder=encoder,
                            lpips=lpips_distance(device))
    result = {"model": str(args.model), "data": str(args.data), "split": args.split, **result}
    if "frechet" in result:  # named after its encoder and never called rFID, which is Inception's
        result[f"frechet_{Path(args.frechet_encoder).name}"] = result.pop("frechet")
    for name, value in result.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    print(json.dumps(result))


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
        sub.add_argument("--image-size", type=above(int, 1), help="side in pixels (default: the model's)")
        sub.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        if command is not evaluate:
            sub.add_argument("--out", type=Path, default=Path("out/pictures"), help="folder for the pictures")
        if command is reconstruct:
            sub.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files of any kind")
            continue
        sub.add_argument("--data", default=str(vqrae.ROOT / "data/emoji"), help="folder of images (default: the emoji)")
        sub.add_argument("--split", choices=["val", "train", "all"], default="val", help="val: the held-out images")
        sub.add_argument("--batch-size", type=above(int, 1), default=64)
        if command is evaluate:
            sub.add_argument("--frechet-encoder", default=str(vqrae.ROOT / "data/tiny_vit"),
                             help="whose mean patch features the Frechet distance compares; it is named after it")
        if command is codes:
            sub.add_argument("--codes", type=above(int, 1), default=16, help="how many codes to draw")
            sub.add_argument("--patches", type=above(int, 1), default=16, help="how many patches of each")
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
