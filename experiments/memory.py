"""How large a part of a batch fits into a GPU's memory, reckoned on a CPU from one forward pass of the real sizes.

    python experiments/memory.py                         # every preset below, for 8, 24 and 80 GB; needs 16 GB itself
    python experiments/memory.py --only dinov2-s-1 --gb 12 16

Counted are all tensors that a run holds: weights in fp32, their average, gradients, AdamW's two moments, the frozen
teacher; and the tensors that autograd keeps of one image and of two for the backward pass, with bf16 products and
attention that keeps no scores, as on a GPU. Not counted is what is there for a moment, and CUDA's own: a tenth of the
memory is left for that. Weights are random, the perceptual loss is the encoder's own. Nothing is fetched.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
import vqrae  # noqa: E402
from experiments.gpu import QWEN3, SMALL_LM, SMALL_TRAINING, Place  # noqa: E402
from presets import PRESETS  # noqa: E402
from support.run import Run  # noqa: E402
from support.settings import number  # noqa: E402

# What stage 2 has and stage 1 has not: the encoder trains, beside its teacher and a discriminator.
STAGE_2 = ["--encoder-learning-rate", "1e-5", "--distillation-weight", "1", "--adversarial-weight", "0.1",
           "--discriminator-start", "0"]
CASES = {"dinov2-s-1": ("dinov2-s", []), "dinov2-s-2": ("dinov2-s", STAGE_2), "siglip2-256-1": ("siglip2-256", []),
         "siglip2-256-2": ("siglip2-256", STAGE_2), "qwen3-0.6b-ar": ("qwen3-0.6b", [])}
SPARE = 0.1  # of the memory, for what is not counted
WORDS = 32  # of a caption


class Enough(Exception):
    """The forward pass is over, and a backward pass would tell nothing more."""


def size(tensors):
    """The bytes of tensors, each storage once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def kept_for_backward(forward, held):
    """The bytes of what autograd keeps when `forward` is called, without the tensors in `held`, which are there anyway.
    """
    places, kept = {tensor.untyped_storage().data_ptr() for tensor in held}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in places:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()  # so that its place is nobody else's

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        forward()
    return size(kept.values())


def attend(q, k, v, mask=None):
    """`vqrae.attend` as it is on a GPU, where no scores are kept."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def tokenizer_memory(place, name, more):
    """(bytes that a run of stage 1 holds, those of its next image), with the flags in `more` of stage 2."""
    sizes = SMALL_TRAINING if place.small else []
    args = train.parse_args([
        "--stage", "1", "--preset", name, "--encoder", str(place.encoder(name)), "--data", str(place.pictures()),
        "--perceptual", "vfm", "--device", "cpu", "--precision", "bf16", "--workers", "0", *sizes, *more])
    run = Run(args, train.settings_for(args, "1"))
    stage = train.stage_1(run, run.config)
    modules = [part for part in run.kept.values() if isinstance(part, torch.nn.Module)] + [stage.teacher]
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    trained = [parameter for network in run.networks for parameter in network.parameters]

    def stop(loss, terms):
        raise Enough

    def forward(count):
        images, places = next(run.train_images.batches([(i, i) for i in range(count)], count, indices=True))
        try:
            stage.step((images, places))
        except Enough:
            pass

    run.backward = stop
    one, two = (kept_for_backward(lambda: forward(count), held) for count in (1, 2))
    return size(held) + 3 * size(trained) + one - (two - one), two - one


def transformer_memory(place):
    """The same of stage ar: pictures of 256 codes behind captions of WORDS tokens."""
    sizes = vqrae.LMConfig(**{**QWEN3, **(SMALL_LM if place.small else {})})
    model = vqrae.VisualLM(sizes)
    tokens = torch.randint(sizes.text_vocabulary, sizes.text_vocabulary + sizes.codebook_size, (2, WORDS + 256))
    tokens[:, :WORDS] = 1

    def forward(count):
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(tokens[:count], torch.zeros(count, dtype=torch.int64))

    one, two = (kept_for_backward(lambda: forward(count), model.parameters()) for count in (1, 2))
    return 5 * size(model.parameters()) + one - (two - one), two - one  # with average, gradients and two moments


def settings_that_fit(held, image, batch, gb):
    """The flags with which a batch fits into so many GB, in as few parts as can be, or a dash."""
    room = (1 - SPARE) * gb * 1e9 - held
    parts = [count for count in range(1, batch + 1) if batch % count == 0 and batch / count * image <= room]
    return f"`--accumulate {parts[0]}`, {batch // parts[0]} at a time" if parts else "-"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", default=list(CASES),
                        help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--gb", nargs="+", type=number(int), default=[8, 24, 80], metavar="N",
                        help="memories in 10^9 bytes (default: 8 24 80)")
    parser.add_argument("--small", action="store_true", help="at toy sizes, to see that it runs")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    vqrae.attend = attend
    print(f"| preset and stage | held, GB | an image, MB | {' | '.join(f'{gb} GB' for gb in args.gb)} |")
    print("|---" * (3 + len(args.gb)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        place = Place("cpu", args.small, Path(folder), time.time())
        for case in args.only:
            (name, more), stage = CASES[case], case.split("-")[-1]
            held, image = transformer_memory(place) if stage == "ar" else tokenizer_memory(place, name, more)
            fits = [settings_that_fit(held, image, PRESETS[name][stage].batch_size, gb) for gb in args.gb]
            figures = [f"`{name}`, stage {stage}", f"{held / 1e9:.2f}", f"{image / 1e6:.1f}", *fits]
            print(f"| {' | '.join(figures)} |", flush=True)
            gc.collect()  # a run and its functions hold each other


if __name__ == "__main__":
    main()
