"""The dinov2-s preset's stage-1 step on a CPU beside the same step of well-known parts, in alternating processes.

    python .ci/compare_dinov2.py [../shared/weights/dinov2-small]

The other step: transformers' Dinov2Model, frozen, and a decoder of as many ViTMAE layers of the same sizes, with
vector-quantize-pytorch's SimVQ between them. Both: 224 px, K 16,384, e 512, MSE and the quantizer's losses (no
perceptual loss), AdamW, clipping, an average of the weights, the same batch; in fp32 and under autocast to bf16.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
import vqrae  # noqa: E402


def our_step(args):
    run_args = train.parse_args([
        "--stage", "1", "--preset", "dinov2-s", "--encoder", args.encoder, "--batch-size", str(args.batch_size),
        "--perceptual", "none", "--precision", args.precision, "--device", "cpu"])
    run = train.TokenizerRun(run_args, train.settings_for(run_args, "1"))
    return run.step


class Theirs(nn.Module):
    """Encoder, projections, quantizer and decoder of transformers' and vector-quantize-pytorch's parts."""

    def __init__(self, folder, K=16384, e=512, image_size=224):
        super().__init__()
        from transformers import Dinov2Model, ViTMAEConfig
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAELayer
        from vector_quantize_pytorch import SimVQ

        self.encoder = Dinov2Model.from_pretrained(folder).eval().requires_grad_(False)
        sizes = self.encoder.config
        d, self.patch = sizes.hidden_size, sizes.patch_size
        config = ViTMAEConfig(
            hidden_size=d, num_hidden_layers=sizes.num_hidden_layers, num_attention_heads=sizes.num_attention_heads,
            intermediate_size=d * sizes.mlp_ratio, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config._attn_implementation = "sdpa"
        self.project_in, self.project_out = nn.Linear(d, e), nn.Linear(e, d)
        self.quantizer = SimVQ(dim=e, codebook_size=K, rotation_trick=False)
        self.layers = nn.ModuleList([ViTMAELayer(config) for _ in range(sizes.num_hidden_layers)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3 * self.patch**2)
        self.register_buffer("positions", vqrae.sincos_positions(image_size // self.patch, image_size // self.patch, d))
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
    model = Theirs(args.encoder)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-4, weight_decay=1e-4)

    def step(batch):
        images = batch.float() / 255
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
    images = vqrae.ImageSet(ROOT / "data/photos", "train", 224)
    batch, times = next(iter(images.batches(range(args.batch_size), args.batch_size))), []
    for _ in range(args.steps + 1):
        begin = time.time()
        step(batch)
        times.append(time.time() - begin)
    return {"seconds": statistics.median(times[1:]),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", nargs="?", default=str(ROOT.parent / "shared/weights/dinov2-small"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turn")
    parser.add_argument("--which", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.which:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not Path(args.encoder).is_dir():
            print(f"no weights at {args.encoder}: random ones of the same shapes take their place")
            vqrae.save_encoder(vqrae.Encoder(vqrae.ViTConfig(518, 14, 384, 12, 6, 1536)), folder)
            args.encoder = folder
        for precision in ("fp32", "bf16"):
            found = {"ours": [], "theirs": []}
            for _ in range(args.rounds):
                for which, results in found.items():
                    command = [sys.executable, __file__, args.encoder, "--batch-size", str(args.batch_size), "--steps",
                               str(args.steps), "--which", which, "--precision", precision]
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
