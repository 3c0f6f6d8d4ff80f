"""Look at what was trained: reconstruct, generate, caption, measure.

    python sample.py reconstruct cat.jpg dog.png --model out/stage1 --out out/pictures
    python sample.py reconstruct --model out/stage1 --beside out/stage2      # held-out emoji, two models side by side
    python sample.py evaluate --model out/stage1                # held-out emoji: PSNR, SSIM, Frechet distance, codes
    python sample.py evaluate --model out/stage1 --data my/photos --split all
    python sample.py evaluate --model out/stage2 --clusters     # and what its features and its tokens gather
    python sample.py codes --model out/stage1                   # what single codes stand for
    python sample.py generate "a red apple" "noto cat face"     # pictures of captions, by out/ar
    python sample.py evaluate --model out/ar                    # do pictures show what their captions say?
    python sample.py export --format hf --out out/export        # the encoder for transformers, for LLaVA and others
    python sample.py caption cat.jpg                            # what out/caption says of an image
    python sample.py evaluate --model out/caption --encoder out/stage2    # how many captions are right, encoder swapped
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import vqrae
from export import export_onnx, export_tokens, save_encoder
from presets import ROOT, SAMPLING
from support import metrics, pictures
from support.codes import codes_of
from support.files import InputError, keep_apart, read_config, read_json, replacing_all, trained
from support.images import ImageSet, eight_bits, read_image, resize_to
from support.metrics import lpips_distance
from support.networks import inception
from support.run import choose_device, one_sentence_errors
from support.settings import add_set_flags, fill_in, leave_open, number, refuse_dashes, sampling_flags
from support.sets import open_images
from support.text import caption_of
from unitok import load_generator, load_tokenizer, zero_shot


def open_model(args, device, load=load_tokenizer):
    """What `load` finds in --model, a VQRAE or a Captioner; --image-size becomes its own unless it is given."""
    model = load(args.model).to(device)
    args.image_size = args.image_size or model.config.image_size
    return model


def sizes(encoder):
    """What two encoders must agree in to take each other's place.

    The two names of InternViT's layout are one, and where there is a last norm features are read behind it or before.
    """
    return {**asdict(encoder.config), "family": encoder.config.family.replace("intern_vit_6b", "internvl_vision"),
            "final_norm": encoder.config.final_norm == "none"}


def swap_encoder(captioner, source, device):
    """Put another encoder of the same sizes before the captioner's projector; nothing is trained again."""
    encoder = vqrae.load_encoder(source)
    if sizes(encoder) != sizes(captioner.encoder):
        raise InputError(f"the encoder of {source} has other sizes than the one the captioner was trained with")
    encoder.config = captioner.encoder.config  # read where the captioner reads, behind the last norm or before it
    captioner.encoder = encoder.to(device)


def read_files(args, device):
    """Yield the path and the image (1, 3, H, W) in [0, 1] of every readable file; InputError if there is none."""
    readable = False
    for path in args.images:
        try:
            image = ImageSet.prepare(read_image(path), args.image_size)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        readable = True
        yield path, image[None].to(device).float() / 255
    if not readable:
        raise InputError("none of the given files could be read as an image")


def images_of(args, split, size):
    """The images of a split of --data."""
    return open_images(args.data, split, size, args.stream, args.columns)


@torch.no_grad()
def reconstruct(args, device):
    """Write NAME.png for every image file: the original, then what the model makes of it, and any model --beside it.

    Without files, reconstructions.png shows images from all over a split of --data, and with --generator also what is
    written from their captions.
    """
    if args.generator and args.images:
        raise InputError("--generator needs captions, which image files do not have; leave the files out")
    models = [open_model(args, device)] + [load_tokenizer(folder).to(device) for folder in args.beside]
    if not args.images:
        source = images_of(args, args.split, args.image_size)
        images = source.spread(24).to(device)
        versions = [images] + [model(images).reconstruction for model in models]
        if args.generator:
            lm, tokenizer = load_generator(args.generator, device)
            captions = [caption_of(source.records[place]) for place in source.spread_places(24)]
            versions.append(tokenizer.decode(lm.generate(captions, **SAMPLING, seed=0)))
        path = pictures.free(args.out / "reconstructions.png")
        pictures.save_side_by_side(versions, path)
        print(path)
        return
    written = []
    for path, images in read_files(args, device):
        outputs = [model(images).reconstruction for model in models]
        # a/cat.png and b/cat.png must not share one picture, nor any take the place of what is read.
        written.append(pictures.free(args.out / f"{path.stem}.png", args.images, written))
        pictures.save_side_by_side([images, *outputs], written[-1], columns=1, side=max(256, args.image_size))
        scores = [metrics.psnr(resize_to(images, y), eight_bits(y)).item() for y in outputs]
        print(f"{written[-1]}: PSNR {', '.join(f'{score:.2f}' for score in scores)} dB")


def write(args, lm, model, captions):
    """Draw a picture for every caption, a batch at a time -> (n, 3, H, W) in [0, 1] on the CPU."""
    drawn = []
    for place in range(0, len(captions), args.batch_size):
        progress = partial(tqdm, desc=f"{place} of {len(captions)} pictures", unit="step", dynamic_ncols=True)
        indices = lm.generate(captions[place:place + args.batch_size], args.cfg_scale, args.temperature, args.top_k,
                              args.top_p, args.seed + place, progress)  # (B, N)
        drawn.append(model.decode(indices).cpu())
    return torch.cat(drawn)


def generate(args, device):
    """Write pictures of every caption, or of none at all: a file each, and grid.png with a row for every caption."""
    lm, model = load_generator(args.model, device)
    captions = args.captions or [""]
    count = args.count or (4 if args.captions else 16)
    drawn = write(args, lm, model, [caption for caption in captions for _ in range(count)])  # (n, 3, H, W)
    grid = pictures.save_generated(drawn, captions, args.out)
    print(f"{grid} and {len(drawn)} single pictures beside it")


def caption(args, device):
    """Print what a captioner says of every image file."""
    captioner = open_model(args, device, vqrae.Captioner.from_pretrained)
    for source in args.encoder:
        swap_encoder(captioner, source, device)
    for path, image in read_files(args, device):
        print(f"{path}: {captioner.caption(image)[0]}")


def codes(args, device):
    """Draw held-out patches that chose a code, a row a code, for codes from the most to the least frequent."""
    model = open_model(args, device)
    if model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no codebook (it was trained with --quantizer none)")
    last = getattr(model.config, "codebooks", 1) - 1
    if args.codebook > last:
        raise InputError(f"--codebook {args.codebook}: {args.model} has codebooks 0 to {last}")
    images = images_of(args, args.split, args.image_size)
    keys = range(len(images.records))  # InputError for a stream, of which no image can be asked for again
    indices, places = codes_of(model, images, keys, args.batch_size, device)  # (n, N), (n,)
    if indices.dim() == 3:  # (n, N, M) with M codebooks
        indices = indices[..., args.codebook]
    out = pictures.free(args.out / "codes.png")
    drawn = pictures.draw_codes(indices, places, images, model.config.encoder.patch_size, args.codes, args.patches, out)
    if not drawn:
        raise InputError(f"no code was chosen twice by the {args.split} images of {args.data}; give more images")
    print(f"{out}: {drawn} of the {len(indices.unique())} codes that the {args.split} split uses, most "
          "frequent first; each patch (red) in its surroundings")


# Which flags of evaluate are for which kind of model, and which flags of export for which format; others are for all.
USED_BY = {
    "tokenizer": ("image_size", "split", "at", "rfid", "lpips", "frechet_encoder", "frechet_size", "teacher",
                  "clusters"),
    "generator": ("frechet_encoder", "count", "cfg_scale", "temperature", "top_k", "top_p", "seed"),
    "captioner": ("image_size", "split", "encoder"),
    "hf": (), "tokens": ("data", "split", "image_size", "batch_size", "shard_size"), "onnx": ("image_size",),
}


def export(args, device):
    """Hand a trained model over. hf: the encoder as transformers' own class loads it, and the tokenizer as a folder.

    tokens: the codes of all images of --data, in shards with an index; what is written is not written again.
    onnx: graphs from images to codes and from codes to images, for batches of any size, held to torch's answers.
    """
    fill_in(args, USED_BY[args.format], f"--format {args.format}")
    model = open_model(args, device)
    if args.format != "hf" and model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no codes (--quantizer none)")
    if args.format == "hf":
        for place in ("encoder", "tokenizer"):
            keep_apart(args.out / place, model=args.model)
        with replacing_all(args.out) as part:
            save_encoder(model.encoder, part / "encoder")
            model.save_pretrained(part / "tokenizer")
        class_name = read_json(args.out / "encoder/config.json")["architectures"][0]
        print(f"{args.out}/encoder: for transformers.{class_name}.from_pretrained; {args.out}/tokenizer: for "
              f"{type(model).__module__}.{type(model).__name__}.from_pretrained")
    elif args.format == "tokens":
        keep_apart(args.out, model=args.model, data=args.data)
        images = images_of(args, args.split, args.image_size)
        index = export_tokens(model, images, args.out, args.shard_size, args.batch_size, device)
        print(f"{args.out}/index.json: {sum(shard['images'] for shard in index['shards'])} images of "
              f"{index['tokens_per_image']} tokens in {len(index['shards'])} shards")
    else:
        if model.config.quantizer not in vqrae.QUANTIZERS:
            raise InputError(f"--format onnx is for models of VQRAE's quantizers; the one in {args.model} is "
                             f"{model.config.quantizer}")
        with replacing_all(args.out) as part:
            worst = export_onnx(model.cpu(), args.image_size, part)
        print(f"{args.out}/encode.onnx and decode.onnx, for batches of {args.image_size} x {args.image_size} pixels: "
              f"onnxruntime's codes equal torch's, and its images to within {worst:.1e}")


def evaluate(args, device):
    """Print the metrics of a tokenizer, a generator or a captioner as a table, then as one JSON line."""
    config = read_config(args.model / "config.json") if args.model.is_dir() else {}
    kind = "generator" if "text_vocabulary" in config else "captioner" if "lm" in config else "tokenizer"
    fill_in(args, USED_BY[kind], f"a {kind}, and {args.model} holds one")
    run = {"tokenizer": evaluate_tokenizer, "generator": evaluate_generator, "captioner": evaluate_captioner}[kind]
    result = run(args, device)
    print(json.dumps({"model": str(args.model), "data": str(args.data), **result}))


def evaluate_tokenizer(args, device):
    """Pixels, codes and understanding of one split."""
    model = open_model(args, device)
    if args.clusters == 1:
        raise InputError("--clusters 1 would put all images into one; ask for 2 or more")
    if args.clusters and model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no discrete tokens to cluster (--quantizer none)")
    images = images_of(args, args.split, args.image_size)
    encoder = vqrae.load_encoder(args.frechet_encoder).to(device)
    teacher = vqrae.load_encoder(args.teacher).to(device)
    result = metrics.evaluate(
        model, images_of(args, args.split, args.at) if args.at else images, args.batch_size, device,
        frechet_encoder=encoder, frechet_size=args.frechet_size, lpips=lpips_distance(device) if args.lpips else None,
        rfid=inception(device) if args.rfid else None, model_size=args.image_size if args.at else None)
    result |= {"split": args.split, "tokens_per_image": (args.image_size // model.config.encoder.patch_size) ** 2}
    if "frechet" in result:  # named after its encoder and never called rFID, which is Inception's
        size = f"_at_{args.frechet_size}_pixels" if args.frechet_size else ""
        result[f"frechet_{Path(args.frechet_encoder).name}{size}"] = result.pop("frechet")
    for name, value in result.items():
        print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    if args.split == "val" and sizes(teacher) == sizes(model.encoder):
        # A probe is fitted to the training images and asked about held-out ones.
        train_images = images_of(args, "train", args.image_size)
        teacher.config = model.encoder.config  # read where the model reads, behind the last norm or before it
        result["understanding"] = metrics.understanding(model, teacher, train_images, images, args.batch_size, device)
        print_table("features", result["understanding"], 12, 24)
        for name in ("drift_before_norm", "drift_behind_norm"):  # of the continuous features alone
            if result["understanding"]:
                print(f"{name:32} {result['understanding']['continuous'][name]:.4f}")
        if getattr(model, "tower", None) is not None:
            result["zero_shot"] = zero_shot(model, train_images.records, images, args.batch_size, device)
            print(f"{'zero_shot':32} {result['zero_shot']:.4f}")
    elif args.split == "val":
        print(f"understanding is left out: {args.teacher} is of other sizes than the encoder of {args.model}; "
              "--teacher names the encoder that it was trained from", file=sys.stderr)
    if args.clusters:
        everything, clusterings, result["clusters"] = metrics.clusters(model, images, args.clusters, args.batch_size,
                                                                       device)
        for name, measures in result["clusters"].items():
            print(f"clusters by {name} features:" + "".join(f"  {key} {value:.3f}" for key, value in measures.items()))
        print(pictures.draw_clusters(everything, clusterings, args.out / "clusters.png"))
    return result


def print_table(corner, rows, first, other):
    """Print rows {name: {measure: value}} below their measures; `first` is the width of names, `other` of values."""
    measures = list(next(iter(rows.values()), ()))
    if measures:
        print(f"{corner:{first}}" + "".join(f"{measure:>{other}}" for measure in measures))
    for name, row in rows.items():
        print(f"{name:{first}}" + "".join(f"{row[measure]:{other}.4f}" for measure in measures))


@torch.no_grad()
def evaluate_generator(args, device):
    """Do pictures show what their captions say, and do they look like the held-out images? See `metrics.generation`."""
    lm, model = load_generator(args.model, device)
    encoder, name = vqrae.load_encoder(args.frechet_encoder).to(device), Path(args.frechet_encoder).name
    train_images, val_images = (images_of(args, split, model.config.image_size) for split in ("train", "val"))
    result = metrics.generation(
        partial(write, args, lm, model), lambda x: model(x.to(device)).reconstruction.cpu(), encoder,
        train_images, val_images, args.count, args.batch_size, args.seed, f"frechet_{name}")
    table = {f"{found['pictures']} {title}, {kind}": row for title, found in result.items()
             for kind, row in found.items() if kind != "pictures"}
    print_table("", table, 52, 18)
    return {"cfg_scale": args.cfg_scale, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
            "seed": args.seed, **result}


def evaluate_captioner(args, device):
    """Shares of right captions and categories with the captioner's own encoder and with each --encoder in its place."""
    captioner = open_model(args, device, vqrae.Captioner.from_pretrained)
    images = images_of(args, args.split, args.image_size)
    result = {}
    for source in [None, *args.encoder]:
        if source is not None:
            swap_encoder(captioner, source, device)
        name = "its own encoder" if source is None else f"encoder of {source}"
        result[name] = metrics.caption_accuracy(captioner, images, args.batch_size, device)
        print(f"{name:40} " + "  ".join(f"{key} {value:.4f}" for key, value in result[name].items()))
    return {"split": args.split, "images": len(images), **result}


def add_command(commands, command, folder, split=None):
    """A command's parser with the flags that several have; --model and --split are what they are unless given."""
    parser = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
    parser.set_defaults(function=command, folder=folder)
    add = parser.add_argument
    add("--model", type=Path, help=f"folder that train.py wrote (default: {folder}, or what came with the code)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", type=Path, default=Path("out/pictures"), help="folder for the pictures")
    add("--batch-size", type=number(int), default=64)
    if command is not generate:
        add("--image-size", type=number(int, most=16384), help="side in pixels (default: the model's)")
    if split:
        add("--data", default=str(ROOT / "data/emoji"), help="as for train.py (default: the emoji)")
        add_set_flags(add)
        add("--split", choices=["val", "train", "all"], default=split, help="val: the held-out images")
    if command in (evaluate, caption):
        add("--encoder", nargs="+" if command is evaluate else 1, default=[], metavar="MODEL",
            help="of a captioner: encoders, or VQRAEs whose encoder is taken, to read with in place of its own")
    return parser


def evaluate_flags(parser):
    """What evaluate has beside; --help says of which kind of model, and USED_BY does."""
    add, tiny_vit = parser.add_argument, str(ROOT / "data/tiny_vit")
    add("--rfid", action="store_true", help="of a tokenizer: the paper's Frechet distance; fetches Inception-v3")
    add("--at", type=number(int, most=16384), metavar="PIXELS",
        help="of a tokenizer: side of the images, if the model shall see them resized to --image-size (as in Table 2)")
    add("--frechet-encoder", default=tiny_vit,
        help="whose mean patch features the Frechet distance compares; it is named after it")
    add("--frechet-size", type=number(int, most=4096), metavar="PIXELS",
        help="of a tokenizer: side at which that encoder sees images (default: its own); a larger one shows it finer "
        "detail")
    add("--lpips", action="store_true", help="of a tokenizer: LPIPS too; VGG16's weights are fetched on first use")
    add("--teacher", default=tiny_vit,
        help="of a tokenizer: the frozen encoder that it was trained from, for the linear probes")
    add("--clusters", type=number(int), nargs="?", const=24, metavar="K",
        help="of a tokenizer: draw clusters.png, k-means on continuous features and on codes")
    sampling_flags(parser, "captions of each split (default: all held-out, as many training ones)", **SAMPLING,
                   of="of a generator: ")
    leave_open(parser, {name for kind in ("tokenizer", "generator", "captioner") for name in USED_BY[kind]})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = add_command(commands, reconstruct, "out/stage1", "val").add_argument
    add("images", type=Path, nargs="*", metavar="IMAGE", help="image files of any kind")
    add("--beside", type=Path, action="append", default=[], metavar="MODEL",
        help="another model to show beside; may be given more than once")
    add("--generator", type=Path, metavar="MODEL",
        help="show last what this model of --stage ar writes from the images' captions")
    evaluate_flags(add_command(commands, evaluate, "out/stage1", "val"))
    add = add_command(commands, codes, "out/stage1", "val").add_argument
    add("--codes", type=number(int, most=1000), default=16, help="how many codes to draw")
    add("--codebook", type=number(int, zero=True), default=0, help="of which codebook, if a model has several")
    add("--patches", type=number(int, most=1000), default=16, help="how many patches of each")
    writer = add_command(commands, generate, "out/ar")
    sampling_flags(writer, "pictures of each caption (default: 4; 16 of none)", **SAMPLING)
    writer.add_argument("captions", nargs="*", metavar="CAPTION", help='such as "a red apple" or "noto red apple"')
    reader = add_command(commands, caption, "out/caption")
    reader.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files of any kind")
    exporter = add_command(commands, export, "out/stage2", "all")
    exporter.add_argument("--format", choices=["hf", "tokens", "onnx"], required=True,
                          help="hf: the encoder for transformers, and the tokenizer; tokens: codes of --data; onnx: "
                          "graphs from images to codes and back")
    exporter.add_argument("--shard-size", type=number(int), default=10000, help="images to a shard of tokens")
    leave_open(exporter, USED_BY["tokens"])
    refuse_dashes(parser, argv)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        args.model = args.model or trained(args.folder)
        args.function(args, choose_device(args.device))


if __name__ == "__main__":
    main()
