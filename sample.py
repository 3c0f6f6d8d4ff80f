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
import copy
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms import functional as pixels
from tqdm import tqdm

import unitok
import vqrae
from train import choose_device, number, one_sentence_errors, refuse_dashes, replace_text
from vqrae import InputError


def load_tokenizer(args, device):
    """The VQRAE in --model; --image-size becomes its own unless it is given."""
    model = unitok.load_tokenizer(args.model).to(device)
    args.image_size = args.image_size or model.config.image_size
    return model


def read_files(args, device):
    """Yield the path and the image (1, 3, H, W) in [0, 1] of every readable file; InputError if there is none."""
    readable = False
    for path in args.images:
        try:
            image = vqrae.ImageSet.prepare(vqrae.read_image(path), args.image_size)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        readable = True
        yield path, image[None].to(device).float() / 255
    if not readable:
        raise InputError("none of the given files could be read as an image")


@torch.no_grad()
def reconstruct(args, device):
    """Write NAME.png for every image file: the original, then what the model makes of it, and any model --beside it.

    Without files, reconstructions.png shows images from all over a split of --data, and with --generator also what is
    written from their captions.
    """
    if args.generator and args.images:
        raise InputError("--generator needs captions, which image files do not have; leave the files out")
    models = [load_tokenizer(args, device)] + [unitok.load_tokenizer(folder).to(device) for folder in args.beside]
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.images:
        source = vqrae.ImageSet(args.data, args.split, args.image_size)
        images = source.spread(24).to(device)
        versions = [images] + [model(images).reconstruction for model in models]
        if args.generator:
            lm, tokenizer = load_generator(args.generator, device)
            captions = [vqrae.caption_of(source.records[place]) for place in source.spread_places(24)]
            versions.append(tokenizer.decode(lm.generate(captions, **vqrae.SAMPLING, seed=0)))
        vqrae.save_side_by_side(versions, args.out / "reconstructions.png")
        print(f"{args.out}/reconstructions.png")
        return
    written = set()
    for path, images in read_files(args, device):
        outputs = [model(images).reconstruction for model in models]
        name = path.stem
        while name in written:  # a/cat.png and b/cat.png must not share one picture
            name += "_"
        written.add(name)
        vqrae.save_side_by_side([images, *outputs], args.out / f"{name}.png", columns=1, side=max(256, args.image_size))
        scores = [vqrae.psnr(vqrae.resize_to(images, y), vqrae.eight_bits(y)).item() for y in outputs]
        print(f"{args.out / name}.png: PSNR {', '.join(f'{score:.2f}' for score in scores)} dB")


def lpips_distance(device):
    """LPIPS as a function of two batches, or None with a sentence when VGG16's weights are not to be had."""
    import lpips

    try:
        network = vqrae.PaperPerceptual(vgg=lpips.LPIPS(net="vgg", verbose=False), convnext=torch.nn.Identity())
    except OSError as error:
        print(f"LPIPS is left out: the weights of VGG16 cannot be fetched ({error})", file=sys.stderr)
        return None
    return network.to(device).lpips


# Which flags of evaluate are for which kind of model, and which flags of export for which format; others are for all.
USED_BY = {
    "tokenizer": ("image_size", "split", "frechet_encoder", "frechet_size", "teacher", "clusters"),
    "generator": ("frechet_encoder", "count", "cfg_scale", "temperature", "top_k", "top_p", "seed"),
    "captioner": ("image_size", "split", "encoder"),
    "hf": (), "tokens": ("data", "split", "image_size", "batch_size", "shard_size"), "onnx": ("image_size",),
}


def fill_in(args, kind, what):
    """Give the flags that were left out their defaults; InputError for one that USED_BY does not have for this kind."""
    for name, default in args.defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif name not in USED_BY[kind]:
            raise InputError(f"--{name.replace('_', '-')} is not for {what}")


def evaluate(args, device):
    """Print the metrics of a tokenizer, a generator or a captioner as a table, then as one JSON line."""
    config = vqrae.read_config(args.model / "config.json") if args.model.is_dir() else {}
    kind = "generator" if "text_vocabulary" in config else "captioner" if "lm" in config else "tokenizer"
    fill_in(args, kind, f"a {kind}, and {args.model} holds one")
    run = {"tokenizer": evaluate_tokenizer, "generator": evaluate_generator, "captioner": evaluate_captioner}[kind]
    result = run(args, device)
    print(json.dumps({"model": str(args.model), "data": str(args.data), **result}))


def evaluate_tokenizer(args, device):
    """Pixels, codes and understanding of one split."""
    model = load_tokenizer(args, device)
    if args.clusters == 1:
        raise InputError("--clusters 1 would put all images into one; ask for 2 or more")
    if args.clusters and model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no discrete tokens to cluster (--quantizer none)")
    images = vqrae.ImageSet(args.data, args.split, args.image_size)
    encoder = vqrae.load_encoder(args.frechet_encoder).to(device)
    teacher = vqrae.load_encoder(args.teacher).to(device)
    result = vqrae.evaluate(model, images, args.batch_size, device, frechet_encoder=encoder,
                            lpips=lpips_distance(device), frechet_size=args.frechet_size)
    result = {"split": args.split, **result}
    if "frechet" in result:  # named after its encoder and never called rFID, which is Inception's
        size = f"_at_{args.frechet_size}_pixels" if args.frechet_size else ""
        result[f"frechet_{Path(args.frechet_encoder).name}{size}"] = result.pop("frechet")
    for name, value in result.items():
        print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    if args.split == "val":  # a probe is fitted to the training images and asked about held-out ones
        if sizes(teacher) == sizes(model.encoder):
            train_images = vqrae.ImageSet(args.data, "train", args.image_size)
            result["understanding"] = vqrae.understanding(model, teacher, train_images, images, args.batch_size, device)
            print_understanding(result["understanding"])
            if getattr(model, "tower", None) is not None:
                result["zero_shot"] = unitok.zero_shot(model, train_images.records, images, args.batch_size, device)
                print(f"{'zero_shot':32} {result['zero_shot']:.4f}")
        else:
            print(f"understanding is left out: {args.teacher} is of other sizes than the encoder of {args.model}; "
                  "--teacher names the encoder that it was trained from", file=sys.stderr)
    if args.clusters:
        result["clusters"] = clusters(args, model, images, device)
    return result


@torch.no_grad()
def evaluate_generator(args, device):
    """Do pictures show what their captions say, and do they look like the held-out images?

    A picture counts for an emoji, a category or a subcategory when the real image of all splits that is nearest to it
    in the encoder's features does. Beside it the tokenizer's reconstructions of the images that the captions belong to
    (no picture of its codes can do better: the ceiling), and the same pictures held against shuffled captions (what
    they would reach by chance: the floor). The Frechet distance is to the held-out images, in the same features.
    """
    lm, model = load_generator(args.model, device)
    size = model.config.image_size
    encoder, name = vqrae.load_encoder(args.frechet_encoder).to(device), Path(args.frechet_encoder).name
    sets = {split: vqrae.ImageSet(args.data, split, size) for split in ("train", "val")}
    real = {split: vqrae.pooled_features(encoder, images.views(args.batch_size))
            for split, images in sets.items()}  # (n, d) each
    gallery = torch.cat(list(real.values()))
    gallery_records = [record for images in sets.values() for record in images.records]
    result, measures = {}, []
    for split, title in (("train", "training captions"), ("val", "held-out captions")):
        images = sets[split]
        chosen = images.spread_places(args.count or len(sets["val"]))
        count = len(chosen)
        records = [images.records[i] for i in chosen]
        batches = images.batches(chosen, args.batch_size)
        pictures = {"generated": write(args, lm, model, [vqrae.caption_of(record) for record in records]),
                    "reconstructed (ceiling)": torch.cat([
                        model(batch.to(device).float() / 255).reconstruction.clamp(0, 1).cpu() for batch in batches])}
        order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
        rows = {}
        for kind, some in pictures.items():
            features = vqrae.pooled_features(encoder, vqrae.eight_bits(some).split(args.batch_size))  # (count, d)
            found = [gallery_records[i] for i in vqrae.nearest(features, gallery).tolist()]
            frechet = {}
            if min(count, len(real["val"])) > 1:  # one picture has no covariance
                frechet[f"frechet_{name}"] = vqrae.frechet_distance(features, real["val"])
            rows[kind] = {**vqrae.retrieval(found, records), **frechet}
            if kind == "generated":
                rows["shuffled captions (floor)"] = {
                    **vqrae.retrieval(found, [records[i] for i in order]), **frechet}
        if not measures:
            measures = list(rows["generated"])
            print("".join([f"{'':44}"] + [f"{measure:>18}" for measure in measures]))
        for kind, row in rows.items():
            print("".join([f"{f'{count} {title}, {kind}':52}"] + [f"{row[measure]:<18.4f}" for measure in measures]))
        result[title] = {"pictures": count, **rows}
    return {"cfg_scale": args.cfg_scale, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
            "seed": args.seed, **result}


def evaluate_captioner(args, device):
    """Shares of right captions and categories with the captioner's own encoder and with each --encoder in its place."""
    captioner = load_captioner(args, device)
    images = vqrae.ImageSet(args.data, args.split, args.image_size)
    result = {}
    for source in [None, *args.encoder]:
        if source is not None:
            swap_encoder(captioner, source, device)
        name = "its own encoder" if source is None else f"encoder of {source}"
        result[name] = vqrae.caption_accuracy(captioner, images, args.batch_size, device)
        print(f"{name:40} " + "  ".join(f"{key} {value:.4f}" for key, value in result[name].items()))
    return {"split": args.split, "images": len(images), **result}


def load_captioner(args, device):
    """The Captioner in --model; --image-size becomes its own unless it is given."""
    captioner = vqrae.Captioner.from_pretrained(args.model).to(device)
    args.image_size = args.image_size or captioner.config.image_size
    return captioner


def sizes(encoder):
    """What two encoders must agree in to take each other's place; the two names of InternViT's layout are one."""
    return {**asdict(encoder.config), "family": encoder.config.family.replace("intern_vit_6b", "internvl_vision")}


def swap_encoder(captioner, source, device):
    """Put another encoder of the same sizes before the captioner's projector; nothing is trained again."""
    encoder = vqrae.load_encoder(source)
    if sizes(encoder) != sizes(captioner.encoder):
        raise InputError(f"the encoder of {source} has other sizes than the one the captioner was trained with")
    captioner.encoder = encoder.to(device)


def caption(args, device):
    """Print what a captioner says of every image file."""
    captioner = load_captioner(args, device)
    for source in args.encoder:
        swap_encoder(captioner, source, device)
    for path, image in read_files(args, device):
        print(f"{path}: {captioner.caption(image)[0]}")


def load_generator(folder, device):
    """The VisualLM in a folder, and beside it the VQRAE whose codes it writes."""
    lm = unitok.load_language_model(folder).to(device)
    model = unitok.load_tokenizer(folder / "vqrae").to(device)
    if lm.config.codebook_size != model.config.codebook_size:
        raise InputError(f"{folder} writes {lm.config.codebook_size} codes and the tokenizer in {folder}/vqrae "
                         f"has {model.config.codebook_size}; they were not trained together")
    return lm, model


def write(args, lm, model, captions):
    """Draw a picture for every caption, a batch at a time -> (n, 3, H, W) in [0, 1] on the CPU."""
    pictures, parts = [], range(0, len(captions), args.batch_size)
    with tqdm(total=len(parts) * lm.config.image_tokens, desc="generate", unit="step", dynamic_ncols=True) as bar:
        def progress(steps):
            for step in steps:
                yield step
                bar.update()

        for place in parts:
            codes = lm.generate(captions[place:place + args.batch_size], args.cfg_scale, args.temperature, args.top_k,
                                args.top_p, args.seed + place, progress)  # (B, N)
            pictures.append(model.decode(codes).cpu())
    return torch.cat(pictures)


def generate(args, device):
    """Write pictures of every caption, or of none at all: a file each, and grid.png with a row for every caption."""
    lm, model = load_generator(args.model, device)
    captions = args.captions or [""]
    count = args.count or (4 if args.captions else 16)
    pictures = write(args, lm, model, [caption for caption in captions for _ in range(count)])  # (n, 3, H, W)
    args.out.mkdir(parents=True, exist_ok=True)
    side, gap, label = 128, 6, 14
    columns = min(count, 8)
    rows = -(-count // columns)  # of one caption
    height = label + rows * (side + gap)
    canvas = Image.new("RGB", (gap + columns * (side + gap), gap + len(captions) * height), "white")
    draw, names = ImageDraw.Draw(canvas), Counter()
    for place, caption in enumerate(captions):
        draw.text((gap, gap + place * height - 2), caption or "(no caption)", "black")
        name = re.sub(r"\W+", "-", caption.lower()).strip("-")[:60] or "unconditional"
        for i, picture in enumerate(pictures[place * count:(place + 1) * count]):
            image = pixels.to_pil_image(vqrae.eight_bits(picture))
            image.save(args.out / f"{name}-{names[name]}.png")
            names[name] += 1  # the same caption twice must not write one file twice
            tile = image.resize((side, side), Image.NEAREST if side % image.width == 0 else Image.LANCZOS)
            canvas.paste(tile, (gap + i % columns * (side + gap),
                                gap + place * height + label + i // columns * (side + gap)))
    canvas.save(args.out / "grid.png")
    print(f"{args.out}/grid.png and {len(pictures)} single pictures beside it")


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


def export(args, device):
    """Hand a trained model over. hf: the encoder as transformers' own class loads it, and the tokenizer as a folder.

    tokens: the codes of all images of --data, in shards with an index; what is written is not written again.
    onnx: graphs from images to codes and from codes to images, for batches of any size, held to torch's answers.
    """
    fill_in(args, args.format, f"--format {args.format}")
    model = load_tokenizer(args, device)
    if args.format != "hf" and model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no codes (--quantizer none)")
    if args.format == "onnx":
        export_onnx(args, model.cpu())
        return
    if args.format == "hf":
        vqrae.save_encoder(model.encoder, args.out / "encoder")
        model.save_pretrained(args.out / "tokenizer")
        class_name = vqrae.read_json(args.out / "encoder/config.json")["architectures"][0]
        print(f"{args.out}/encoder: for transformers.{class_name}.from_pretrained; {args.out}/tokenizer: for "
              f"{type(model).__module__}.{type(model).__name__}.from_pretrained")
        return
    images = vqrae.ImageSet(args.data, args.split, args.image_size)
    digest, records, shards = vqrae.codes_digest(model, images), images.records, []
    note, wanted = args.out / "digest.txt", f"{digest} in shards of {args.shard_size}\n"
    if note.exists() and note.read_text() != wanted:
        raise InputError(f"{args.out} holds tokens of another model or other images, or in shards of another size; "
                         "choose another --out")
    for shard, begin in enumerate(tqdm(range(0, len(images), args.shard_size), desc="tokens", unit="shard")):
        path = args.out / f"codes-{shard:05}.safetensors"
        if not path.exists():
            keys = range(begin, min(begin + args.shard_size, len(images)))
            codes_and_places = vqrae.codes_of(model, images, keys, args.batch_size, device)
            args.out.mkdir(parents=True, exist_ok=True)
            note.write_text(wanted)
            vqrae.write_codes(path, *codes_and_places)
        places = vqrae.read_safetensors(path)["places"].tolist()
        shards.append({"file": path.name, "images": len(places), "names": [records[i].get("name") for i in places],
                       "captions": [vqrae.caption_of(records[i]) for i in places]})
    tokens = (args.image_size // model.config.encoder.patch_size) ** 2
    index = {"codebook_size": model.config.codebook_size, "codebooks": getattr(model.config, "codebooks", 1),
             "tokens_per_image": tokens, "digest": digest, "shards": shards}
    replace_text(args.out / "index.json", json.dumps(index))
    print(f"{args.out}/index.json: {sum(shard['images'] for shard in shards)} images of {tokens} tokens in "
          f"{len(shards)} shards")


class ToCodes(torch.nn.Module):
    """Images (B, 3, H, W) -> codes (B, N): `VQRAE.encode` with one product in the place of its search in chunks."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("codes", model.quantizer.project(model.quantizer.codebook).detach().clone())  # (K, e)

    def forward(self, images):
        z = self.model.project_features(self.model.encoder(images))  # (B, N, e)
        return (self.codes.pow(2).sum(1) - 2 * z @ self.codes.T).argmin(-1)


class ToImages(torch.nn.Module):
    """Codes (B, N) -> images (B, 3, H*q/p, W*q/p)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, indices):
        return self.model.decode(indices)


def export_onnx(args, model):
    """Write encode.onnx and decode.onnx for images of --image-size, and ask both what torch says of some images."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch exports with
    except ImportError as error:
        raise InputError(f"--format onnx needs packages: pip install onnx onnxscript onnxruntime ({error})") from None
    side, p = args.image_size, model.config.encoder.patch_size
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    _, indices = model.encode(images)  # (3, N); InputError when patches do not fit
    if indices.dim() == 3:
        raise InputError(f"--format onnx is for models of VQRAE's quantizers; the one in {args.model} is "
                         f"{model.config.quantizer}")
    expected = {"encode": (images, indices), "decode": (indices, model.decode(indices))}
    resized, encoder = copy.deepcopy(model), model.encoder
    with torch.no_grad():  # ONNX cannot resize positions as torch does, so they come in the size of the images
        resized.encoder.positions = torch.nn.Parameter(encoder.positions_for(side // p, side // p))
    resized.encoder.config = replace(encoder.config, image_size=side)
    graphs = {"encode": ToCodes(resized), "decode": ToImages(resized)}
    args.out.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    for name, (given, answer) in expected.items():
        path = args.out / f"{name}.onnx"
        torch.onnx.export(graphs[name].eval(), (given[:2],), path, dynamo=True, verbose=False, dynamic_shapes=(
            {0: torch.export.Dim("batch")},), input_names=["images" if name == "encode" else "indices"],
            output_names=["indices" if name == "encode" else "images"])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for some in (slice(0, 1), slice(0, 3)):  # other batches than it was written with
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given[some].numpy()})[0])
            gap = (found - answer[some]).abs().max().item()
            worst = max(worst, gap)  # of the images: codes that differ at all end here
            if gap > (0 if name == "encode" else 1e-4):
                raise InputError(f"{path} does not say what torch says, but something else by up to {gap}")
    print(f"{args.out}/encode.onnx and decode.onnx, for batches of {side} x {side} pixels: onnxruntime's codes equal "
          f"torch's, and its images to within {worst:.1e}")


def codes(args, device):
    """Draw held-out patches that chose a code, a row a code, for codes from the most to the least frequent."""
    model = load_tokenizer(args, device)
    if model.config.quantizer == "none":
        raise InputError(f"the model in {args.model} has no codebook (it was trained with --quantizer none)")
    images = vqrae.ImageSet(args.data, args.split, args.image_size)
    p, everything, places = model.config.encoder.patch_size, [], defaultdict(list)
    for batch in images.batches(range(len(images)), args.batch_size):
        _, indices = model.encode(batch.to(device).float() / 255)  # (B, N), or (B, N, M) with M codebooks
        if indices.dim() == 3:
            if args.codebook >= indices.shape[2]:
                raise InputError(f"--codebook {args.codebook}: {args.model} has codebooks 0 to {indices.shape[2] - 1}")
            indices = indices[..., args.codebook]
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
            around = ImageOps.expand(pixels.to_pil_image(everything[image]), border=p, fill="#d0d0d0")
            window = around.crop((left, top, left + 3 * p, top + 3 * p)).resize((side, side), Image.BICUBIC)
            ImageDraw.Draw(window).rectangle((side // 3, side // 3, 2 * side // 3, 2 * side // 3), outline="red")
            canvas.paste(window, (label + column * (side + gap), row * (side + gap)))
    args.out.mkdir(parents=True, exist_ok=True)
    canvas.save(args.out / "codes.png")
    print(f"{args.out}/codes.png: {len(chosen)} of the {len(places)} codes that the {args.split} split uses, most "
          "frequent first; each patch (red) in its surroundings")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {reconstruct: "out/stage1", evaluate: "out/stage1", codes: "out/stage1", generate: "out/ar",
                caption: "out/caption", export: "out/stage2"}
    for command, folder in defaults.items():
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(function=command)
        sub.add_argument("--model", type=Path, default=Path(folder), help=f"folder that train.py wrote ({folder})")
        sub.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        sub.add_argument("--out", type=Path, default=Path("out/pictures"), help="folder for the pictures")
        sub.add_argument("--batch-size", type=number(int), default=64)
        if command in (reconstruct, caption):
            sub.add_argument("images", type=Path, nargs="*" if command is reconstruct else "+", metavar="IMAGE",
                             help="image files of any kind")
        if command is not generate:
            sub.add_argument("--image-size", type=number(int, most=16384), help="side in pixels (default: the model's)")
        if command in (reconstruct, evaluate, codes, export):
            sub.add_argument("--data", default=str(vqrae.ROOT / "data/emoji"),
                             help="folder of images (default: the emoji)")
            sub.add_argument("--split", choices=["val", "train", "all"], default="all" if command is export else "val",
                             help="val: the held-out images")
        if command is reconstruct:
            sub.add_argument("--beside", type=Path, action="append", default=[], metavar="MODEL",
                             help="another model to show beside; may be given more than once")
            sub.add_argument("--generator", type=Path, metavar="MODEL",
                             help="show last what this model of --stage ar writes from the images' captions")
        if command in (evaluate, caption):
            sub.add_argument("--encoder", nargs="+" if command is evaluate else 1, default=[], metavar="MODEL",
                             help="of a captioner: encoders, or VQRAEs whose encoder is taken, to read with in place "
                             "of its own, one after the other")
        if command is evaluate:
            sub.add_argument("--frechet-encoder", default=str(vqrae.ROOT / "data/tiny_vit"),
                             help="whose mean patch features the Frechet distance compares; it is named after it")
            sub.add_argument("--frechet-size", type=number(int, most=4096), metavar="PIXELS",
                             help="of a tokenizer: side at which that encoder sees images (default: its own); a larger "
                             "one shows it finer detail")
            sub.add_argument("--teacher", default=str(vqrae.ROOT / "data/tiny_vit"),
                             help="of a tokenizer: the frozen encoder that it was trained from, for the linear probes")
            sub.add_argument("--clusters", type=number(int), nargs="?", const=24, metavar="K",
                             help="of a tokenizer: draw clusters.png, k-means on continuous features and on codes")
        if command in (generate, evaluate):
            of = "of a generator: " if command is evaluate else ""
            sub.add_argument("--count", type=number(int, most=2**20),
                             help="pictures of each caption (default: 4; 16 of none)"
                             if command is generate else of + "captions of each split (default: all held-out, as many "
                             "training ones)")
            sub.add_argument("--cfg-scale", type=number(float, zero=True, most=1000),
                             default=vqrae.SAMPLING["cfg_scale"],
                             help=of + "classifier-free guidance: how much the caption counts; 1: as trained")
            sub.add_argument("--temperature", type=number(float, zero=True), default=vqrae.SAMPLING["temperature"],
                             help=of + "below 1 likely codes get likelier; 0: always the likeliest")
            sub.add_argument("--top-k", type=number(int, zero=True), default=0, help=of + "the K likeliest; 0: all")
            sub.add_argument("--top-p", type=number(float, most=1), default=1.0,
                             help=of + "only the fewest codes that make up this probability")
            sub.add_argument("--seed", type=number(int, zero=True), default=0, help="of the draw of codes")
        if command is generate:
            sub.add_argument("captions", nargs="*", metavar="CAPTION", help='such as "a red apple" or "noto red apple"')
        if command is export:
            sub.add_argument("--format", choices=["hf", "tokens", "onnx"], required=True,
                             help="hf: the encoder for transformers, and the tokenizer; tokens: codes of --data; onnx: "
                             "graphs from images to codes and back")
            sub.add_argument("--shard-size", type=number(int), default=10000, help="images to a shard of tokens")
        if command is codes:
            sub.add_argument("--codes", type=number(int, most=1000), default=16, help="how many codes to draw")
            sub.add_argument("--codebook", type=number(int, zero=True), default=0, help="of which codebook, if a model "
                             "has several")
            sub.add_argument("--patches", type=number(int, most=1000), default=16, help="how many patches of each")
        if command in (evaluate, export):  # which of them were given shows in what is not None
            kinds = ("tokenizer", "generator", "captioner") if command is evaluate else ("hf", "tokens", "onnx")
            names = {name for kind in kinds for name in USED_BY[kind]}
            sub.set_defaults(defaults={name: sub.get_default(name) for name in names}, **dict.fromkeys(names))
    refuse_dashes(parser, argv)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        args.function(args, choose_device(args.device))


if __name__ == "__main__":
    main()
