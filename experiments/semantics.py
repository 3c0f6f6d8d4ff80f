"""What semantics cost: the same tokenizer around the encoder's features, around raw pixels, and without any network.

    python experiments/semantics.py             # four rows, about 25 minutes; goes on where it stopped
    python experiments/semantics.py --rows k-means pixels    # some of them

    k-means         every patch becomes the nearest of K centres of training patches: vector quantization of 1980
    pixels          stage 1 with patches in place of the encoder's features
    layers summed   stage 1 with the sum of what the encoder's blocks put out, shallow ones and deep ones
    last layer      stage 1, the default: Z_I is the last layer's

All rows spend the same bits. own_code_psnr and nine_codes_psnr are what codes are worth with no decoder: every patch is
painted as the mean of the training patches of its code, or by least squares from those means of its code and of the
eight around it. Leaves table.md in --out (default: out/semantics) and a folder for each row. Takes flags
of stage 1, such as --steps, --seed and --preset, for all rows alike: `python train.py --stage 1 --help` shows them.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
import vqrae  # noqa: E402
from experiments.ablate import refuse_chosen, refuse_other_work, stage_1_args, write_table  # noqa: E402
from support.files import InputError, read_json, replace_text  # noqa: E402
from support.images import eight_bits  # noqa: E402
from support.metrics import codebook_usage, evaluate, psnr, understanding  # noqa: E402
from support.run import Run, one_sentence_errors  # noqa: E402
from support.sets import open_images  # noqa: E402
from unitok import DEFAULTS, new_tokenizer  # noqa: E402


class Pixels(vqrae.Encoder):
    """No network: a token's features are the pixels of its patch. The blocks stay, as eyes of the perceptual loss."""

    def forward(self, images):
        p = self.config.patch_size
        return F.unfold((images - self.mean) / self.std, p, stride=p).transpose(1, 2)  # (B, N, 3*p*p)


class LayersSummed(vqrae.Encoder):
    """The sum of all blocks' tokens, each at zero mean and unit variance: first ones know pixels, last ones things."""

    def forward(self, images):
        states = [F.layer_norm(x, x.shape[-1:]) for x in self.hidden_states(images)]  # (B, 1 + N, d) each
        return sum(states)[:, self.config.class_token + self.config.registers:]  # (B, N, d)


READERS = {"pixels": Pixels, "layers summed": LayersSummed, "last layer": vqrae.Encoder}
COLUMNS = ["own_code_psnr", "nine_codes_psnr", "val_psnr", "val_ssim", "val_seam_ratio", "val_perplexity",
           "category_probe", "category_neighbours", "seconds"]


class PatchCodebook(torch.nn.Module):
    """K-means on patches in the form that `evaluate` asks for: images (B, 3, H, W) in [0, 1] -> a vqrae.Output."""

    def __init__(self, config, centres):
        super().__init__()
        self.config, self.quantizer = config, vqrae.VectorQuantizer(*centres.shape)
        self.quantizer.codebook.data = centres

    def encode(self, images):
        out = self(images)
        return out.features, out.indices

    def count(self, indices):
        return torch.bincount(indices.flatten(), minlength=len(self.quantizer.codebook))

    def forward(self, images):
        p = self.config.output_patch_size
        patches = F.unfold(images, p, stride=p).transpose(1, 2)  # (B, N, 3*p*p)
        quantized, indices, *losses = self.quantizer(patches)
        image = F.fold(quantized.transpose(1, 2), images.shape[-2:], p, stride=p)  # (B, 3, H, W)
        return vqrae.Output(image, patches, indices, *losses, patches, quantized)


@torch.no_grad()
def without_decoder(model, train_images, val_images, device, workers):
    """PSNR of held-out images painted from their own codes' mean patches, and from nine by least squares, as a dict."""
    p, K = model.config.encoder.patch_size, model.config.codebook_size

    def tokens(images):  # (B, 3, H, W), (B, N, 3*p*p), (B, N)
        for x in images.views(64, device, workers):
            yield x, F.unfold(x, p, stride=p).transpose(1, 2), model.encode(x)[1]

    def around(means, indices, rows):  # (B, N, 9*3*p*p + 1); in float64, for plain patches are many and all alike
        grid = means[indices].transpose(1, 2).unflatten(2, (rows, -1))  # (B, 3*p*p, rows, columns)
        return F.pad(F.unfold(grid, 3, padding=1).transpose(1, 2), (0, 1), value=1.0).cpu().double()

    sums, counts = 0.0, 0
    for _, patches, indices in tokens(train_images):
        own = patches.new_zeros(K, patches.shape[2])
        sums, counts = sums + own.index_add_(0, indices.flatten(), patches.flatten(0, 1)), counts + model.count(indices)
    means, products, targets = sums / counts.clamp(min=1)[:, None], 0.0, 0.0  # (K, 3*p*p)
    for x, patches, indices in tokens(train_images):
        seen = around(means, indices, x.shape[2] // p).flatten(0, 1)
        products, targets = products + seen.T @ seen, targets + seen.T @ patches.flatten(0, 1).cpu().double()
    solution = torch.linalg.solve(products + torch.eye(len(products)), targets)  # (9*3*p*p + 1, 3*p*p)
    scores = {"own_code_psnr": [], "nine_codes_psnr": []}
    for x, _, indices in tokens(val_images):
        painted = means[indices], (around(means, indices, x.shape[2] // p) @ solution).to(x)  # (B, N, 3*p*p) each
        for values, patches in zip(scores.values(), painted):
            values.append(psnr(x, eight_bits(F.fold(patches.transpose(1, 2), x.shape[2:], p, stride=p))))
    return {name: torch.cat(values).mean().item() for name, values in scores.items()}


@torch.no_grad()
def pixel_k_means(args, config, rounds=25):
    """The figures of k-means on all training patches, as a dict."""
    run = Run(args, config)
    train_images, val_images = run.read_images(config.image_size)
    begin, sizes, patches = time.time(), new_tokenizer(config, train_images).config, []
    for images in train_images.views(64, run.device, run.workers):
        patches.append(F.unfold(images, sizes.output_patch_size, stride=sizes.output_patch_size).transpose(1, 2))
    patches = torch.cat(patches).flatten(0, 1)  # (n, 3*p*p)
    model = PatchCodebook(sizes, torch.empty(config.codebook_size, patches.shape[1], device=run.device))
    vqrae.start_codebook(model.quantizer, patches, rounds, torch.Generator().manual_seed(args.seed))
    seconds, figures = time.time() - begin, evaluate(model, val_images, 64, run.device, run.workers)
    used, perplexity = codebook_usage(model.count(model.quantizer.search(patches)))
    return {**{f"val_{name}": value for name, value in figures.items()}, "train_utilization": used,
            "train_perplexity": perplexity, "seconds": seconds,
            **without_decoder(model, train_images, val_images, run.device, run.workers)}


def trained(args, config, reads):
    """The figures of stage 1 whose quantizer reads `reads`, as a dict."""
    def tokenizer(config, images):
        model = new_tokenizer(config, images)
        model.encoder.__class__ = READERS[reads]  # the same weights, another forward pass
        return model

    sizes = vqrae.load_encoder(config.encoder).config
    if reads == "pixels" and sizes.width != 3 * sizes.patch_size**2:
        raise InputError(f"pixels can take the features' place only where a patch has as many of them, 3 x "
                         f"{sizes.patch_size} x {sizes.patch_size}, as the encoder has channels, {sizes.width}")
    train.new_tokenizer = tokenizer
    try:
        run, stage = train.train(args, config)
    finally:
        train.new_tokenizer = new_tokenizer
    if reads != "last layer":
        (args.out / "model.safetensors").unlink()  # it would be loaded as a model that reads the last layer
    splits = run.train_images, open_images(config.data, "val", config.image_size)
    read = understanding(run.average, stage.teacher, *splits, device=run.device, workers=run.workers,
                         keys=("category",))
    return {**read_json(args.out / "summary.json"), **read.get("discrete", {}),
            **without_decoder(run.average, *splits, run.device, run.workers)}


def semantics(args):
    """Run the rows, each in its own folder, and write table.md; what is done is not done again.

    InputError when it was done with other settings.
    """
    refuse_chosen(args, "quantizer", "output_patch_size", *DEFAULTS)  # one codebook, and patches of the encoder's size
    config, results = train.settings_for(args, "1"), {}
    settings = json.loads(json.dumps({"seed": args.seed, **asdict(config)}))
    for reads in args.rows or ["k-means", *READERS]:
        folder = args.out / reads.replace(" ", "_")
        if not (folder / "row.json").exists():
            print(f"row {reads}")
            own = argparse.Namespace(**{**vars(args), "out": folder, "resume": True})
            row = pixel_k_means(own, config) if reads == "k-means" else trained(own, config, reads)
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / "row.json", json.dumps({**row, "settings": settings}, indent=2) + "\n")
        row = read_json(folder / "row.json")
        if row.get("settings") != settings:
            raise InputError(f"{folder} was run with other settings than these; choose another --out")
        results["reads", reads] = [row]
    write_table({(keys,): rows for keys, rows in results.items()}, COLUMNS, args.out / "table.md")


def parse_args(argv=None):
    """--rows, and the arguments of stage 1."""
    parser = argparse.ArgumentParser(usage="python experiments/semantics.py [--rows ROW ...] [flags of train.py "
                                     "--stage 1]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=["k-means", *READERS], help="default: all")
    known, words = parser.parse_known_args(argv)
    args = stage_1_args("semantics.py", "out/semantics", words)
    args.rows = known.rows
    return args


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        refuse_other_work(args)
        semantics(args)


if __name__ == "__main__":
    main()
