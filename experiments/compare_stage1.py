"""A preset's stage-1 step on a CPU beside the same step of well-known parts, in alternating processes.

    python experiments/compare_stage1.py
    python experiments/compare_stage1.py --preset dinov2-s --batch-size 4 --encoder ../shared/weights/dinov2-small

The other step: transformers' Dinov2Model, frozen, and a decoder of as many ViTMAE layers of the same sizes, with
vector-quantize-pytorch's SimVQ between them. Both: the preset's image size, K and e, MSE and the quantizer's losses (no
perceptual loss), AdamW, clipping, an average of the weights, the same batch; in fp32 and under autocast to bf16.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
import vqrae  # noqa: E402
from presets import TINY  # noqa: E402
from support.benchmark import peak_memory  # noqa: E402
from support.run import Run  # noqa: E402
from support.sets import open_images  # noqa: E402


def settings(args):
    """train.py's arguments, and the settings of the preset."""
    run_args = train.parse_args([
        "--stage", "1", "--preset", args.preset, "--encoder", args.encoder, "--batch-size", str(args.batch_size),
        "--perceptual", "none", "--muon-learning-rate", "0", "--precision", args.precision or "auto",
        "--device", "cpu"])
    return run_args, train.settings_for(run_args, "1")


def our_step(args):
    run = Run(*settings(args))
    return train.stage_1(run, run.config).step


class Theirs(nn.Module):
    """Encoder, projections, quantizer and decoder of transformers' and vector-quantize-pytorch's parts."""

    def __init__(self, settings):
        super().__init__()
        from transformers import Dinov2Model, ViTMAEConfig
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAELayer
        from vector_quantize_pytorch import SimVQ

        self.encoder = Dinov2Model.from_pretrained(settings.encoder, dtype=torch.float32).eval().requires_grad_(False)
        sizes = self.encoder.config
        d, self.patch, e = sizes.hidden_size, sizes.patch_size, settings.codebook_dim
        config = ViTMAEConfig(
            hidden_size=d, num_hidden_layers=sizes.num_hidden_layers, num_attention_heads=sizes.num_attention_heads,
            intermediate_size=d * sizes.mlp_ratio, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config._attn_implementation = "sdpa"
        self.project_in, self.project_out = nn.Linear(d, e), nn.Linear(e, d)
        self.quantizer = SimVQ(dim=e, codebook_size=settings.codebook_size, rotation_trick=False)
        self.layers = nn.ModuleList([ViTMAELayer(config) for _ in range(sizes.num_hidden_layers)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3 * self.patch**2)
        side = settings.image_size // self.patch
        self.register_buffer("positions", vqrae.sincos_positions(side, side, d))
        self.register_buffer("mean", torch.tensor(vqrae.ViTConfig.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(vqrae.ViTConfig.std).view(3, 1, 1))

    def forward(self, images):
        with torch.no_grad():
            features = self.encoder((images - self.mean) / self.std).last_hidden_state[:, 1:]  # (B, N, d)
        with torch.autocast("cpu", enabled=False):  # as ours: codes are searched for in fp32
            z_q, _, quantizer_loss = self.quantizer(self.project_in(features.float()))  # (B, N, e)
        x = self.project_out(z_q) + self.positions
        for layer in self.layers:
            x = layer(x)  # (B, N, d)
        x = self.head(self.norm(x)).transpose(1, 2)  # (B, 3*p*p, N)
        return F.fold(x.float(), images.shape[-2:], self.patch, stride=self.patch), quantizer_loss


def their_step(args):
    torch.manual_seed(0)
    config = settings(args)[1]
    model = Theirs(config)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)

    def step(batch):
        images = batch[0].float() / 255
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            reconstruction, quantizer_loss = model(images)
        optimizer.zero_grad()
        (F.mse_loss(reconstruction, images) + quantizer_loss).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update_parameters(model)

    return step


def measure(args):
    """One process: the median seconds of a step, and the highest memory of all."""
    step = {"ours": our_step, "theirs": their_step}[args.which](args)
    config = settings(args)[1]
    images = open_images(config.data, "train", config.image_size)
    batch, times = next(images.batches(range(args.batch_size), args.batch_size, indices=True)), []
    for _ in range(args.steps + 1):
        begin = time.time()
        step(batch)
        times.append(time.time() - begin)
    return {"seconds": statistics.median(times[1:]),
            "peak_mb": peak_memory(torch.device("cpu")) / 2**20}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "dinov2-s"], default="tiny")
    parser.add_argument("--encoder", default=TINY.encoder, help="folder of a DINOv2 of the preset's size")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="timed steps in a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turn")
    parser.add_argument("--which", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.which:
        print(json.dumps(measure(args)))
        return
    for precision in ("fp32", "bf16"):
        found = {"ours": [], "theirs": []}
        for _ in range(args.rounds):
            for which, results in found.items():
                command = [sys.executable, *sys.argv, "--which", which, "--precision", precision]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results.append(json.loads(answer.splitlines()[-1]))
        ours, theirs = ({key: statistics.median(run[key] for run in runs) for key in runs[0]}
                        for runs in found.values())
        print(f"{precision}, batch {args.batch_size}: ours {args.batch_size / ours['seconds']:.2f} images/s and "
              f"{ours['peak_mb']:.0f} MB, theirs {args.batch_size / theirs['seconds']:.2f} and "
              f"{theirs['peak_mb']:.0f} MB: {theirs['seconds'] / ours['seconds']:.2f} x the images, "
              f"{ours['peak_mb'] / theirs['peak_mb']:.2f} of the memory", flush=True)


if __name__ == "__main__":
    main()
