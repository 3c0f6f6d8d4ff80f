"""Train a VQRAE, and the transformers that write and read its images.

    python train.py --stage 1                      # the shipped encoder and emoji, a laptop, a few minutes
    python train.py --stage 1 --data my/photos     # any folder of images
    python train.py --stage 1 --resume             # go on after an interruption, bit for bit
    python train.py --stage 2 --init out/stage1    # unfreeze the encoder, under self-distillation
    python train.py --stage ar --tokenizer out/stage2    # a transformer that writes images, code by code, from text
    python train.py --stage caption                # one that reads the encoder's features and writes captions
    python train.py --ablate codebook              # Table 5 in small; strategy: Table 6; quantizer: UniTok's 7 and 8;
                                                   # supervision: UniTok's 6; collapse: a picture of dying codebooks
    torchrun --nproc-per-node 8 train.py --stage 1 ...   # many GPUs: the batch is shared out, the result is the same;
                                                   # with --shard the weights are shared out too (FSDP2)

Leaves in --out: config.json + model.safetensors (averaged weights, what sample.py reads), metrics.jsonl, summary.json,
curves.png, reconstructions.png or samples.png, and checkpoint/ (what --resume needs).
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import unitok
import vqrae
from vqrae import InputError


def number(kind, zero=False, most=math.inf):
    """An argparse type: an int below 2^63 or a finite float, above 0, or 0 where `zero` allows it, up to `most`."""
    def parse(text):
        value = kind(text)
        if not 0 <= value <= most or value == math.inf or value == 0 and not zero or kind is int and value >= 2**63:
            raise ValueError
        return value

    sign = "" if zero else "positive "
    parse.__name__ = f"{sign}{kind.__name__}" + (f" up to {most}" if most < math.inf else "")
    return parse  # argparse says: invalid positive int value: '0'


def refuse_dashes(parser, argv):
    """End with a sentence for --flag=-- , which argparse would hand on as an empty list in place of a value."""
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--") and word.endswith("=--"):
            parser.error(f"argument {word}: expected a value")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole, count = parser.add_argument, number(int, zero=True), number(int)
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--stage", choices=list(STAGES), help="1: frozen encoder, train codebook and decoder; "
                         "2: train the encoder too, from a model of stage 1; ar: a transformer that predicts codes "
                         "from text; caption: one that writes captions of an encoder's features")
    command.add_argument("--ablate", choices=["collapse", *ABLATIONS], help="many short runs and a "
                         "table; codebook: Table 5, its dimension and size; strategy: Table 6, when and how the "
                         "encoder trains; quantizer: what VQRAE's quantizer and UniTok's buy; supervision: pixels, "
                         "captions or both; collapse: a picture of codebooks that die and of one that lives")
    add("--init", type=Path, help="stage 2: the model of stage 1 to start from (default: out/stage1)")
    add("--preset", choices=list(vqrae.PRESETS), default="tiny", help="the settings that the flags below change")
    for name, field in SETTINGS.items():
        kind = str if field.type in (str, str | None) else number(
            float if field.type is float else int, field.metadata["zero"], field.metadata["most"])
        add(f"--{name.replace('_', '-')}", type=kind, choices=field.metadata["choices"], help=field.metadata["help"])
    add("--seed", type=whole, default=0, help="of weights, order and crops: the same seed gives the same run")
    add("--out", type=Path, default=None,
        help="folder for everything the run writes (default: out/stage1, out/stage2, out/ar, out/caption)")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="start anew in an --out that already holds a run")
    add("--checkpoint-every", type=count, default=200, metavar="N", help="steps between checkpoints")
    add("--log-every", type=count, default=50, metavar="N", help="steps between lines of metrics.jsonl")
    add("--evaluate-every", type=count, default=600, metavar="N", help="steps between held-out evaluations")
    add("--workers", type=number(int, zero=True, most=1024), default=None,
        help="processes that read images (default: 0 for shipped data, up to 4 for other)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the device has it")
    add("--shard", action="store_true", help="with torchrun: split weights, gradients and AdamW's averages among the "
        "processes (FSDP2), for models that one GPU cannot hold")
    add("--compile", action="store_true", help="torch.compile: slower to start, faster steps")
    add("--benchmark", action="store_true", help="time steady steps, print one JSON line, train nothing")
    add("--print-config", action="store_true", help="print all settings as JSON and stop")
    refuse_dashes(parser, argv)
    args = parser.parse_args(argv)
    name = f"stage{args.stage}" if args.stage in ("1", "2") else args.stage or f"ablate-{args.ablate}"
    args.out = args.out or Path("out") / name
    return args


def settings_for(args, stage):
    """The preset's settings of a stage, changed by the flags given; InputError for flags that it does not have."""
    if args.init and stage != "2":
        raise InputError("--init is for --stage 2, which starts from a model of stage 1")
    if stage not in vqrae.PRESETS[args.preset]:
        raise InputError(f"--preset {args.preset} has no settings for --stage {stage}")
    config = vqrae.PRESETS[args.preset][stage]
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if stage == "1" and (args.quantizer in unitok.QUANTIZERS or unitok.DEFAULTS.keys() & given.keys()
                         or args.ablate in ("quantizer", "supervision")):
        config = unitok.UniTokTraining(**asdict(config), **unitok.DEFAULTS)
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        if args.stage == "2" and name in vqrae.FIXED_BY_STAGE_1:
            raise InputError(f"{flag} is fixed by the model that stage 2 starts from, --init")
        if name in vqrae.FIXED_BY_QWEN3 and (args.qwen3 or getattr(config, "qwen3", None)):
            raise InputError(f"{flag} is fixed by the checkpoint of --qwen3")
        if not hasattr(config, name):
            raise InputError(f"{flag} is no setting of --stage {stage}")
    return replace(config, **given)


def choose_device(name):
    """The torch device for --device; auto takes the fastest that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise InputError(f"--device {name} is not available here; choose auto, cuda, mps or cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun starts a process for every GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name} is not available here; try --device auto") from None


def multiplies_bf16(device):
    """Whether the device has instructions for bf16 products, without which bf16 would be slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024): before momentum moves a matrix, all its singular values are brought to about 1.

    So every direction of a matrix learns at one pace, where the gradient would favour a few, and a short training gets
    further. torch.optim.Muon always multiplies in bf16, which takes seconds a step where processors cannot; this one
    does it in `dtype`, and with all matrices of one shape at a time.
    """

    def __init__(self, groups, dtype, momentum=0.95):
        super().__init__(groups, {})
        self.dtype, self.momentum = dtype, momentum

    def orthogonalise(self, x, steps=5):
        """Matrices x (n, rows, columns) with their singular values near 1, by Newton and Schulz' iteration."""
        flip = x.shape[1] > x.shape[2]
        x = (x.mT if flip else x).to(self.dtype)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):  # a quintic polynomial of each singular value; its coefficients are Jordan's
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, polynomial, x, beta=3.4445)
        return (x.mT if flip else x).float()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, parameters in shapes.items():
                gradients = [p.grad for p in parameters]
                for p in parameters:
                    if p not in self.state:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
                ahead = torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum))  # (n, rows, columns)
                size = group["lr"] * 0.2 * math.sqrt(max(shape))  # an entry moves about as far as by AdamW
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(self.orthogonalise(ahead)), alpha=-size)


class Run:
    """What every training run has: model, average, optimizer, counters, checkpoints. A stage adds data and loss.

    A stage has `batches()`, which go on where the run is; `step(batch)`; `evaluate()`, figures with "val_" before their
    names; `draw()`, pictures in --out; and `summary()`, its last figures.
    """

    FOLDERS = ("data", "encoder", "tokenizer", "qwen3")  # settings that may move between the parts of a run
    with_places = False  # whether `batches` tells the places of images in their set

    def __init__(self, args, config):
        self.args, self.config = args, config
        self.device = choose_device(args.device)
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and multiplies_bf16(self.device)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.batch_size % self.ranks:
            raise InputError(f"--batch-size {config.batch_size} cannot be shared out evenly to {self.ranks} processes")
        if args.shard and (self.ranks == 1 or args.compile or config.muon_learning_rate):
            raise InputError("--shard is for torchrun with several processes, and goes with neither --compile nor Muon "
                             "(--muon-learning-rate 0 turns it off)")
        torch.manual_seed(args.seed)
        self.done, self.seconds, self.window, self.lines = 0, 0.0, {}, []
        self.damaged = False  # whether the last checkpoint is, so that it must not replace the one before it

    def read_images(self, size):
        """Both splits of --data, and the number of processes that read them."""
        self.train_images = vqrae.open_images(self.config.data, "train", size)
        self.val_images = vqrae.open_images(self.config.data, "val", size)
        self.names = hashlib.sha256(self.train_images.names())
        workers = 0 if self.train_images.from_sheets else min(4, os.cpu_count() or 1)
        self.workers = workers if self.args.workers is None else self.args.workers

    def batches(self):
        """This rank's share of the training images from here on, with their places in the set if `with_places`."""
        order = vqrae.TrainingOrder(len(self.train_images), self.args.seed, self.done * self.config.batch_size,
                                    self.rank, self.ranks)
        return self.train_images.batches(order, self.config.batch_size // self.ranks, self.workers, self.with_places)

    def over_ranks(self, tensors, operation="mean"):
        """Replace every tensor by its "mean", "sum" or "max" over all ranks; alone there is nothing to do."""
        if self.ranks > 1 and tensors:
            flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
            dist.all_reduce(flat, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
            flat = flat / self.ranks if operation == "mean" else flat
            with torch.no_grad():
                for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                    tensor.copy_(piece.view_as(tensor))

    def any_rank(self, condition):
        """Whether the condition holds on any rank: all must leave the loop together."""
        flag = torch.tensor(float(bool(condition)), device=self.device)
        self.over_ranks([flag], "max")
        return bool(flag)

    def set_up(self, model, forward):
        """Take a model on the device, and `forward`, the part of it that a step calls."""
        if self.args.shard and isinstance(model, (unitok.UniTok, unitok.DepthLM)):
            raise InputError("--shard does not go with the models of unitok.py")
        self.model, self.plain_forward = model, forward
        self.forward = torch.compile(forward) if self.args.compile else forward
        self.optimizers = self.make_optimizers(model, self.config.learning_rate)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average = copy.deepcopy(model).eval()  # the exponential moving average: evaluated and exported
        self.averaged = [p for p, q in zip(self.average.parameters(), model.parameters()) if q.requires_grad]
        self.moving = self.averaged  # with --shard it moves in parts
        self.parts = {"model": model, "average": self.average, **self.optimizers}

    def share_out(self):
        """--shard: from here on a rank holds only its part of every weight, gradient and average (FSDP2)."""
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.ranks,))
        state = self.optimizers["optimizer"].state_dict()
        for module in self.model.modules():
            if isinstance(module, (vqrae.Block, vqrae.CausalBlock)):
                fully_shard(module, mesh=mesh)  # gathered when its turn comes, and released after it
        fully_shard(self.model, mesh=mesh)
        if self.plain_forward is not self.model:
            register_fsdp_forward_method(self.model, "loss")
            self.plain_forward = self.model.loss
        self.forward = self.plain_forward
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = self.make_optimizers(self.model, self.config.learning_rate)
        self.parts.update(self.optimizers)
        in_order = [p for group in self.optimizers["optimizer"].param_groups for p in group["params"]]
        for place, values in state["state"].items():
            like = in_order[place]
            state["state"][place] = {name: distribute_tensor(value, mesh, like.placements) if value.dim() else value
                                     for name, value in values.items()}
        self.optimizers["optimizer"].load_state_dict(state)
        self.moving = [distribute_tensor(p.detach(), mesh, q.placements) for p, q in zip(self.averaged, self.trained)]

    def gather(self):
        """Bring the average together on every rank, to be evaluated and exported; all ranks must call this."""
        if self.moving is not self.averaged:
            with torch.no_grad():
                torch._foreach_copy_(self.averaged, gathered(self.moving))

    def make_optimizers(self, module, learning_rate):
        """AdamW for what a module trains: a VQRAE's encoder at its own rate, no decay for vectors and embeddings.

        With --muon-learning-rate the matrices under a name with ".blocks." that did not come pretrained are Muon's.
        """
        groups, config, blocks = {}, self.config, []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                # TiTok's rule exempts embeddings, and W stands for one.
                embeddings = ("quantizer.", "encoder.positions", "encoder.cls_token", "encoder.registers", "embedding.",
                              "lm.embedding.")
                matrix = parameter.dim() >= 2 and not name.startswith(embeddings)
                in_encoder = name.startswith("encoder.")
                pretrained = in_encoder or getattr(config, "qwen3", None)
                if parameter.dim() == 2 and ".blocks." in f".{name}" and not pretrained and config.muon_learning_rate:
                    blocks.append(parameter)
                    continue
                rate = config.encoder_learning_rate if in_encoder else learning_rate
                groups.setdefault((rate, config.weight_decay if matrix else 0.0), []).append(parameter)
        optimizers = {"optimizer": torch.optim.AdamW(
            [{"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
             for (rate, decay), parameters in groups.items()], betas=config.betas, eps=config.adam_epsilon)}
        if blocks:
            rate = config.muon_learning_rate
            optimizers["muon"] = Muon([{"params": blocks, "lr": rate, "peak": rate, "weight_decay":
                                        config.weight_decay}], torch.bfloat16 if self.bf16 else torch.float32)
        return optimizers

    def start(self):
        """What comes before step 0."""

    def export(self):
        """Write what the run was for, the averaged model, to --out."""
        self.average.save_pretrained(self.args.out)

    def schedule(self, step, start=0):
        """What share of its highest learning rate a part that starts at step `start` has: linear warm-up, then cosine.

        Table 7 writes one end rate for all parts; the code it adapts scales each by the same factor, and so does this.
        """
        config, step, steps = self.config, step - start, self.config.steps - start
        warmup = min(config.warmup_steps, max(1, steps // 2))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return config.end_factor + (1 - config.end_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    def generator(self):
        """What a step draws from: the same at the same step of the same seed, interrupted or not."""
        return torch.Generator().manual_seed((self.args.seed * 2**40 + self.done) % 2**63)

    def descend(self, losses, *others):
        """One update of weights and average; InputError, before any weight changes, when a loss is not finite.

        losses(part) computes the loss of a slice of the batch, its other terms, and whatever gradients are not the
        loss's. others: what else is trained, as the name of its gradient's norm, its parameters, their optimizers, and
        the step at which those set in.
        """
        trained, terms = [("grad_norm", self.trained, self.optimizers, 0), *others], {}
        for _, _, optimizers, _ in trained:
            for optimizer in optimizers.values():
                optimizer.zero_grad()
        size = self.config.batch_size // self.ranks
        length = -(-size // self.config.accumulate)
        for begin in range(0, size, length):
            loss, more = losses(slice(begin, begin + length))
            share = (min(begin + length, size) - begin) / size
            (share * loss).backward()
            for name, value in {"loss": loss, **more}.items():
                terms[name] = terms.get(name, 0.0) + share * value.detach()
        for name, parameters, _, _ in trained:
            # Explicitly, not by DistributedDataParallel, which does it only for what passes its own forward, and here
            # losses of features, of two networks and of parts of a batch all have gradients. FSDP2 has done it already.
            self.over_ranks([p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)])
            terms[name] = gathered(nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not torch.isfinite(torch.stack(list(terms.values()))).all():
            bad = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise InputError(f"the loss or its gradient is not finite at step {self.done} ({bad}); the last good "
                             f"checkpoint is kept, and a lower --learning-rate may help")
        for _, _, optimizers, start in trained:
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * self.schedule(self.done, start)
                optimizer.step()
        self.done += 1
        decay = min(self.config.ema_decay, (1 + self.done) / (10 + self.done))  # short at first, to forget the start
        with torch.no_grad():
            torch._foreach_lerp_(self.moving, self.trained, 1 - decay)
        self.note(terms)

    def note(self, terms):
        """Add named values to the sums that the next log line takes its means from."""
        for name, value in terms.items():  # stays on the device: reading a value would wait for it
            total, count = self.window.get(name, (0.0, 0))
            self.window[name] = (total + value.detach(), count + 1)

    def log(self, images_per_second):
        """The means since the last log line, as one object of metrics.jsonl."""
        means = [total.float() / count for total, count in self.window.values()]
        self.over_ranks(means)
        line = {"step": self.done, **{name: mean.item() for name, mean in zip(self.window, means)},
                "lr": self.optimizers["optimizer"].param_groups[0]["lr"], "images_per_second": images_per_second}
        self.window = {}
        return line

    def show(self, line):
        """What the progress bar says of a log line, and what a sentence of its own says of an evaluation."""
        return (dict(loss=f"{line['loss']:.3f}"),
                f"held-out loss {line['val_loss']:.3f} nats a token" if "val_loss" in line else "")

    # --- checkpoints: one file, replaced in one step, and the one before it ---

    @property
    def checkpoints(self):
        """Where the last checkpoint is, and the one before it."""
        return [self.args.out / "checkpoint" / name for name in ("state.pt", "previous.pt")]

    def settings(self):
        """What must not change between the parts of a run, as plain values; folders may move."""
        config = {name: value for name, value in asdict(self.config).items() if name not in self.FOLDERS}
        return json.loads(json.dumps({"stage": self.args.stage, "seed": self.args.seed,
                                      "precision": "bf16" if self.bf16 else "fp32",
                                      "training images": len(self.train_images),
                                      "names of the training images (SHA-256)": self.names.hexdigest(), **config}))

    def save(self):
        """Write the checkpoint, then put it in the place of the one before, which stays beside it.

        The first rank writes; with --shard all ranks must call this, for what they hold is brought together. Of the log
        line under way it keeps its own part alone.
        """
        self.gather()
        parts = {name: gathered(part.state_dict()) for name, part in self.parts.items()}
        if self.rank > 0:
            return
        state = {"settings": self.settings(), "done": self.done, "seconds": self.seconds, "window": self.window,
                 "lines": self.lines, "rng": torch.get_rng_state(), **parts}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        last, previous = self.checkpoints
        with vqrae.replacing(last) as part:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if last.exists() and not self.damaged:
                last.replace(previous)
        self.damaged = False

    def load(self):
        """Go back to the last checkpoint in --out, or the one before if that is damaged.

        InputError when there is none to go back to, or when it was made with other settings.
        """
        reasons = []
        for path in self.checkpoints:
            try:
                with zipfile.ZipFile(path) as archive:  # torch itself does not look at its checksums
                    damaged = archive.testzip()
                if damaged:
                    raise ValueError(f"{damaged} does not have its checksum")
                state = torch.load(path, map_location="cpu", weights_only=True)
                break
            except Exception as error:  # a damaged file can fail anywhere inside torch.load
                reasons.append(f"{path}: {(str(error) or type(error).__name__).splitlines()[0]}")
        else:
            raise InputError(f"cannot read the checkpoint {', nor '.join(reasons)}; --overwrite starts anew")
        self.damaged = bool(reasons)
        if self.damaged and self.rank == 0:
            print(f"cannot read the checkpoint {reasons[0]}; going back to the one before it", file=sys.stderr)
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                raise InputError(f"--resume continues a run with its own settings: {name} is "
                                 f"{state['settings'].get(name)!r} in {self.args.out}, not {value!r}")
        if "lines" not in state:
            raise InputError(f"{path} was written by an earlier version of train.py; --overwrite starts anew")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.done, self.seconds, self.lines = state["done"], state["seconds"], state["lines"]
        self.window = {name: (total.to(self.device), count) for name, (total, count) in state["window"].items()}
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])


class TokenizerRun(Run):
    """Stages 1 and 2: encoder, codebook and decoder learn to reconstruct images."""

    def __init__(self, args, config):
        super().__init__(args, config)
        if args.stage == "1":
            self.read_images(config.image_size)
            model = self.new_model()
        else:
            self.init = args.init or Path("out/stage1")
            model = unitok.load_tokenizer(self.init)
            for name in vqrae.FIXED_BY_STAGE_1:
                setattr(config, name, getattr(model.config, name, None))
            self.init_digest = hashlib.sha256((self.init / "model.safetensors").read_bytes()).hexdigest()
            self.read_images(config.image_size)

        # The teacher T is the encoder as it is now. As long as the encoder is frozen they are one.
        encoder_trains = config.encoder_learning_rate > 0
        self.teacher = copy.deepcopy(model.encoder) if encoder_trains or args.shard else model.encoder
        self.teacher.eval().requires_grad_(False).to(self.device)
        model.encoder.requires_grad_(encoder_trains)
        self.distils = encoder_trains and config.distillation_weight > 0
        model.to(self.device)
        self.perceptual = {"none": lambda: None, "vfm": lambda: vqrae.VFMPerceptual(self.teacher),
                           "lpips-convnext": lambda: vqrae.PaperPerceptual().to(self.device)}[config.perceptual]()

        self.set_up(model, model)
        self.tokens_per_image = (config.image_size // model.config.encoder.patch_size) ** 2
        self.discriminator = None
        if config.adversarial_weight > 0:
            if config.discriminator_width % 32:
                raise InputError(f"--discriminator-width {config.discriminator_width} is not a multiple of 32")
            self.discriminator = vqrae.Discriminator(config.discriminator_width).to(self.device)
            made = self.make_optimizers(self.discriminator, config.discriminator_learning_rate)
            self.discriminator_optimizers = {f"discriminator_{name}": optimizer for name, optimizer in made.items()}
            self.parts.update(discriminator=self.discriminator, **self.discriminator_optimizers)

    def new_model(self):
        """An untrained VQRAE around the pretrained encoder; InputError when the sizes do not fit together."""
        config, encoder = self.config, vqrae.load_encoder(self.config.encoder)
        p = encoder.config.patch_size
        q = config.output_patch_size or p
        if config.image_size % p or config.image_size < 2 * p:
            raise InputError(f"--image-size {config.image_size} is not a multiple, at least twice, of the encoder's "
                             f"patches of {p} pixels")
        if config.image_size * q // p < max(11, 2 * p):
            raise InputError(f"images of {config.image_size * q // p} pixels would come out; SSIM needs 11 and the "
                             f"perceptual loss {2 * p}: choose a larger --image-size or --output-patch-size")
        sizes = dict(encoder=encoder.config, image_size=config.image_size, output_patch_size=q,
                     codebook_size=config.codebook_size, codebook_dim=config.codebook_dim, quantizer=config.quantizer,
                     beta_side=config.beta_side)
        model = self.build(sizes)
        model.encoder = encoder
        return model

    def build(self, sizes):
        return vqrae.VQRAE(vqrae.VQRAEConfig(**sizes))

    def settings(self):
        settings = {**super().settings(), "encoder": json.loads(json.dumps(asdict(self.model.config.encoder)))}
        if self.args.stage == "2":
            settings["model of --init (SHA-256)"] = self.init_digest
        return settings

    def start(self):
        """Before step 0 of stage 1: show the model training features, to standardise them and to place its codes."""
        if self.args.stage == "2":
            return  # the model of stage 1 has done so
        keys = vqrae.TrainingOrder(len(self.train_images), self.args.seed, start=0)
        wanted, features, patches = max(self.config.start_tokens, 4 * self.config.codebook_size), [], []
        p = self.model.config.encoder.patch_size
        for batch in self.train_images.batches(keys, self.config.batch_size, self.workers):
            images = batch.to(self.device).float() / 255
            with torch.no_grad():
                features += [self.model.encoder(part).flatten(0, 1) for part in images.chunk(self.config.accumulate)]
            patches.append(nn.functional.unfold(images, p, stride=p).transpose(1, 2).flatten(0, 1))  # (B * N, 3*p*p)
            wanted -= len(patches[-1])
            if wanted <= 0:
                break
        generator = torch.Generator().manual_seed(self.args.seed)
        self.model.start(torch.cat(features), torch.cat(patches), self.config.codebook_init,
                         self.config.projection_init, generator)
        if self.ranks > 1:
            for tensor in self.model.state_dict().values():  # all have done the same, but rounding may differ
                dist.broadcast(tensor, src=0)
        self.average.load_state_dict(self.model.state_dict())

    def export(self):
        if isinstance(self.average, unitok.UniTok):
            self.average.fit_reading(self.train_images, 64, self.device, self.workers)
        super().export()

    def supervise(self, loss, terms, out, part):
        """What a stage adds to the loss of a part of the batch and to its terms: here nothing."""
        return loss, terms

    def step(self, batch):
        """One update on a batch of uint8 images."""
        config, generator = self.config, self.generator()
        adversarial = self.discriminator is not None and self.done >= config.discriminator_start

        def losses(part):
            images = batch[part].to(self.device).float() / 255
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                out = self.forward(images)
                with torch.no_grad():
                    teacher_features = self.teacher(images) if self.distils else None
                loss, terms = vqrae.stage2_loss(
                    images, out, self.perceptual, config.perceptual_weight, config.quantizer_weight, generator,
                    teacher_features, config.distillation_weight, self.discriminator if adversarial else None,
                    config.adversarial_weight)
                loss, terms = self.supervise(loss, terms, out, part)
            reconstruction = out.reconstruction.detach().float()
            target = vqrae.resize_to(images, reconstruction)
            if adversarial:
                discriminator_loss, logits = self.discriminator.loss(target, reconstruction, over_ranks=self.over_ranks)
                (len(images) / len(batch) * discriminator_loss).backward()
                terms.update(discriminator_loss=discriminator_loss, **logits)
            with torch.no_grad():
                self.note({"train_psnr": vqrae.psnr(target, reconstruction.clamp(0, 1)).mean(),
                           "z_norm": out.z.norm(dim=-1).mean(), "code_norm": out.z_q.norm(dim=-1).mean()})
                if out.indices is not None:
                    self.note({"code_counts": self.model.count(out.indices)})
            return loss, terms

        others = [("discriminator_grad_norm", list(self.discriminator.parameters()), self.discriminator_optimizers,
                   config.discriminator_start)] if adversarial else []
        self.descend(losses, *others)

    def log(self, images_per_second):
        counts, _ = self.window.pop("code_counts", (None, 0))
        line = super().log(images_per_second)
        if counts is not None:
            self.over_ranks([counts], "sum")
            line["train_utilization"], line["train_perplexity"] = vqrae.codebook_usage(counts)
        return line

    def show(self, line):
        codes = (f", {line['val_utilization']:.1%} of codes used and perplexity {line['val_perplexity']:.0f} over "
                 f"{line['val_tokens']:,} tokens" if "val_tokens" in line else "")
        return (dict(loss=f"{line['loss']:.3f}", psnr=f"{line['train_psnr']:.1f}",
                     used=f"{line.get('train_utilization', 0):.0%}"),
                f"held-out PSNR {line['val_psnr']:.2f} dB{codes}" if "val_psnr" in line else "")

    def evaluate(self, **options):
        """Metrics of the averaged model on the held-out images, each name with "val_" before it."""
        result = vqrae.evaluate(self.average, self.val_images, 64, self.device, self.workers, **options)
        return {f"val_{name}": value for name, value in result.items()}

    def summary(self):
        """The last evaluation, and one pass over the training images for the use of codes."""
        # A large encoder would make every run wait for its Frechet distance, which `sample.py evaluate` gives as well.
        summary = self.evaluate(frechet_encoder=self.teacher if self.args.ablate else None)
        if "val_frechet" in summary:  # named after its features, the frozen encoder's
            summary["val_frechet_teacher"] = summary.pop("val_frechet")
        if self.config.quantizer != "none":
            counts = vqrae.count_codes(self.average, self.train_images, 64, self.device, self.workers)
            summary["train_utilization"], summary["train_perplexity"] = vqrae.codebook_usage(counts)
            summary["train_tokens"] = int(counts.sum())
            if isinstance(self.average, unitok.UniTok):
                each = [vqrae.codebook_usage(part) for part in counts.view(self.average.config.codebooks, -1)]
                summary["train_utilization_of_each"], summary["train_perplexity_of_each"] = map(list, zip(*each))
        return summary

    @torch.no_grad()
    def draw(self):
        """Held-out originals and reconstructions side by side; in stage 2 those of the model before come between."""
        images = self.val_images.spread(24).to(self.device)
        models = [self.average]
        if self.args.stage == "2":
            models.insert(0, unitok.load_tokenizer(self.init).to(self.device))
        versions = [images] + [model(images).reconstruction for model in models]
        vqrae.save_side_by_side(versions, self.args.out / "reconstructions.png")
        return "reconstructions.png (originals left, then reconstructions)"


class UniTokRun(TokenizerRun):
    """Stage 1 of a model of `unitok.py`: other quantizers and projections, and captions as a second supervision."""

    with_places = True

    def build(self, sizes):
        config, tower, text = self.config, None, None
        if config.contrastive != "none":
            texts = [unitok.words_of(record) for record in self.train_images.records]
            if not any(texts):
                raise InputError(f"--contrastive needs captions: put the images in {config.data} into one folder per "
                                 "class")
            text = vqrae.train_text_tokenizer(texts, unitok.TOWER.text_vocabulary)
            tower = replace(unitok.TOWER, text_vocabulary=text.get_vocab_size())
        return unitok.UniTok(unitok.UniTokConfig(
            **sizes, codebooks=config.codebooks, projection=config.projection, latent_noise=config.latent_noise,
            text=tower), text)

    def step(self, batch):
        """One update on uint8 images and their places in the training set."""
        images, places = batch
        if self.config.contrastive != "none":  # streamed images have no records to ask for
            self.captions = [unitok.words_of(self.train_images.records[place]) for place in places]
        torch.manual_seed(self.generator().initial_seed())  # of the noise on latents: the same after an interruption
        super().step(images)

    def supervise(self, loss, terms, out, part):
        config = self.config
        of_pixels = terms["mse"] + config.perceptual_weight * terms.get("perceptual", 0.0)
        loss = loss + (config.reconstruction_weight - 1) * of_pixels
        if config.contrastive != "none":
            terms["contrastive"] = self.model.contrast(out.z_q, self.captions[part], config.contrastive,
                                                       read_along=config.contrastive_weight == 0)
            loss = loss + (config.contrastive_weight or 1.0) * terms["contrastive"]
        return loss, terms

    def summary(self):
        summary = super().summary()
        if self.config.quantizer != "none":
            summary["bits_per_image"] = self.average.bits_per_image(self.tokens_per_image)
        if self.config.contrastive != "none":
            summary["val_zero_shot"] = unitok.zero_shot(self.average, self.train_images.records, self.val_images, 64,
                                                        self.device, self.workers)
        return summary


class GenerationRun(Run):
    """Stage ar, Section 3.5: a transformer learns to write an image's codes behind its caption."""

    def __init__(self, args, config):
        super().__init__(args, config)
        self.tokenizer = unitok.load_tokenizer(config.tokenizer).to(self.device)
        if self.tokenizer.config.quantizer == "none":
            raise InputError(f"the model in {config.tokenizer} has no codes to predict (--quantizer none)")
        self.read_images(self.tokenizer.config.image_size)
        self.codes, self.records = {}, {}
        for split, images in (("train", self.train_images), ("val", self.val_images)):
            if self.rank > 0:
                dist.barrier()  # the first rank makes them, the others read them
            self.codes[split], places = vqrae.image_codes(self.tokenizer, images, args.out / "codes", 64, self.device,
                                                          self.workers)
            if self.rank == 0 and self.ranks > 1:
                dist.barrier()
            self.records[split] = [images.records[place] for place in places.tolist()]
            if split == "train" and config.recolour == "yes":
                codes, records = vqrae.recolour(self.tokenizer, images, places.tolist(), self.device)
                if records:
                    self.codes[split] = torch.cat([self.codes[split], codes])
                    self.records[split] += records
        self.digest = hashlib.sha256(self.codes["train"].numpy().tobytes() + self.codes["val"].numpy().tobytes())
        self.tokens_per_image = self.codes["train"].shape[1]
        texts = [vqrae.caption_of(record) for record in self.records["train"]]
        if not any(texts) and self.rank == 0:
            print("no captions: the images are not in folders of classes, so the model learns to write images unasked")
        torch.manual_seed(args.seed)  # again: reading images has drawn from it, reading cached codes has not
        model = language_model(config, texts, self.tokenizer.config.codebook_size, self.tokens_per_image)
        if self.codes["train"].dim() == 3:  # several codes at every place
            model = unitok.DepthLM.around(model, self.tokenizer.config.codebooks)
        model.to(self.device)
        self.set_up(model, model.loss)

    def settings(self):
        return {**super().settings(), "codes of the images (SHA-256)": self.digest.hexdigest(),
                "text tokenizer (SHA-256)": hashlib.sha256(self.model.text.to_str().encode()).hexdigest()}

    def export(self):
        """The model, and a copy of the tokenizer, for codes mean nothing without it."""
        super().export()
        self.tokenizer.save_pretrained(self.args.out / "vqrae")

    def batches(self):
        # Every rank knows all of a batch, and takes its share when all is drawn.
        keys = iter(vqrae.TrainingOrder(len(self.codes["train"]), self.args.seed, self.done * self.config.batch_size))
        while True:
            yield [next(keys)[0] for _ in range(self.config.batch_size)]

    def step(self, indices):
        """One update on the images of these indices, some without their caption or its style."""
        config, generator = self.config, self.generator()
        without_caption, without_style = torch.rand(2, len(indices), generator=generator)
        captions = [vqrae.caption_of(self.records["train"][index], style=b >= config.style_dropout)
                    if a >= config.caption_dropout else ""
                    for index, a, b in zip(indices, without_caption.tolist(), without_style.tolist())]
        prompts = [self.model.prompt(caption) for caption in captions]
        codes = self.codes["train"][indices]  # (B, N)
        places = torch.arange(codes.shape[0] * codes.shape[1]).view(codes.shape[:2])  # a place has one code or several
        misread = codes.flatten(0, 1)[vqrae.misread(places, config.code_noise, generator)]  # (B, N)
        prompts, codes, misread = (all_of_them[self.rank::self.ranks] for all_of_them in (prompts, codes, misread))

        def losses(part):
            tokens, first = self.model.pack(prompts[part], codes[part])
            seen, _ = self.model.pack(prompts[part], misread[part])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return self.forward(tokens, first, seen), {}

        self.descend(losses)

    @torch.no_grad()
    def summary(self):
        """The averaged model's loss on the held-out images, all captions in full."""
        total, count = 0.0, len(self.codes["val"])
        for i in range(0, count, 64):
            prompts = [self.average.prompt(vqrae.caption_of(record)) for record in self.records["val"][i:i + 64]]
            loss = self.average.loss(*self.average.pack(prompts, self.codes["val"][i:i + 64]))
            total += loss.item() * len(prompts)
        return {"val_loss": total / count}

    def evaluate(self):
        """The held-out loss, and samples.png as it is now."""
        self.draw()
        return self.summary()

    @torch.no_grad()
    def draw(self):
        """Pairs of the tokenizer's reconstruction and what is written from its caption: training, then held out."""
        pairs = []
        for split, codes in self.codes.items():
            count = min(21, len(codes))
            chosen = [i * len(codes) // count for i in range(count)]
            captions = [vqrae.caption_of(self.records[split][i]) for i in chosen]
            written = self.average.generate(captions, **vqrae.SAMPLING)
            pairs += zip(*(self.tokenizer.decode(some.to(self.device)) for some in (codes[chosen], written)))
        vqrae.save_side_by_side(list(zip(*pairs)), self.args.out / "samples.png", columns=7, side=64)
        return "samples.png (the tokenizer's left, written right; three rows of training, three of held-out captions)"


class CaptionRun(Run):
    """Stage caption, Section 3.4: a transformer learns to write captions of a frozen encoder's features."""

    with_places = True

    def __init__(self, args, config):
        super().__init__(args, config)
        encoder = vqrae.load_encoder(config.encoder)
        if config.image_size % encoder.config.patch_size:
            raise InputError(f"--image-size {config.image_size} is not a multiple of the encoder's patches of "
                             f"{encoder.config.patch_size} pixels")
        self.read_images(config.image_size)
        texts = [vqrae.text_of(record) for record in self.train_images.records]
        if not any(texts):
            raise InputError(f"the images in {config.data} have no captions: put them into one folder per class")
        lm = language_model(config, texts)
        model = vqrae.Captioner(vqrae.CaptionerConfig(encoder.config, config.image_size, lm.config), lm.text)
        model.encoder, model.lm = encoder.requires_grad_(False), lm
        model.to(self.device)
        self.set_up(model, model.loss)
        self.tokens_per_image = (config.image_size // encoder.config.patch_size) ** 2

    def settings(self):
        weights = hashlib.sha256()
        for _, tensor in sorted(self.model.encoder.state_dict().items()):
            weights.update(tensor.cpu().contiguous().numpy().tobytes())
        return {**super().settings(), "encoder (SHA-256)": weights.hexdigest(),
                "text tokenizer (SHA-256)": hashlib.sha256(self.model.lm.text.to_str().encode()).hexdigest()}

    def captions_of(self, images, places):
        """The captions of some images, and how many tokens each has: the loss is a mean over tokens."""
        captions = [vqrae.text_of(images.records[place]) for place in places]
        return captions, [len(self.model.tokens(caption)) for caption in captions]

    def step(self, batch):
        """One update on uint8 images and their places in the training set."""
        images, places = batch
        captions, tokens = self.captions_of(self.train_images, places)
        # Parts and ranks are weighed by their images, and this loss is a mean over tokens.
        usual = torch.tensor(sum(tokens) / len(tokens), dtype=torch.float64,
                             device=self.device if self.ranks > 1 else "cpu")
        self.over_ranks([usual])

        def losses(part):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.forward(images[part].to(self.device).float() / 255, captions[part])
            return loss * (sum(tokens[part]) / len(tokens[part]) / usual.item()), {}

        self.descend(losses)

    @torch.no_grad()
    def evaluate(self):
        """The averaged model's loss on the held-out images."""
        images, total, count = self.val_images, 0.0, 0
        for batch, places in images.batches(range(len(images)), 64, self.workers, indices=True):
            captions, tokens = self.captions_of(images, places)
            loss = self.average.loss(batch.to(self.device).float() / 255, captions)
            total, count = total + sum(tokens) * loss.item(), count + sum(tokens)
        return {"val_loss": total / count}

    def summary(self):
        """The last evaluation, and how many captions are right."""
        right = vqrae.caption_accuracy(self.average, self.val_images, 64, self.device, self.workers)
        return {**self.evaluate(), **{f"val_{name}": share for name, share in right.items()}}

    def draw(self):
        """Nothing: `sample.py caption` shows what it writes."""


def language_model(config, texts, codebook_size=0, image_tokens=0):
    """A VisualLM of the configured sizes with a text tokenizer made from the texts; or Qwen3's, with its tokenizer."""
    if config.qwen3:
        model = vqrae.load_qwen3(config.qwen3, codebook_size, image_tokens)
        if model.text is None:
            raise InputError(f"{config.qwen3} has no tokenizer.json, so it cannot read captions")
        return model
    if config.heads % config.kv_heads or config.head_width % 2:
        raise InputError(f"--heads {config.heads} must be a multiple of --kv-heads {config.kv_heads}, and --head-width "
                         f"{config.head_width} even")
    text = vqrae.train_text_tokenizer(texts, config.text_vocabulary)
    return vqrae.VisualLM(vqrae.LMConfig(
        text_vocabulary=text.get_vocab_size(), codebook_size=codebook_size, image_tokens=image_tokens,
        width=config.width, depth=config.depth, heads=config.heads, kv_heads=config.kv_heads,
        head_width=config.head_width, mlp_width=config.mlp_width), text)


def gathered(tree):
    """A tensor, or dicts and lists of them, with every DTensor brought together from the ranks that share it."""
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value) for value in tree)
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def make_run(args, config):
    """The Run of the stage that the settings are for."""
    if isinstance(config, unitok.UniTokTraining):
        return UniTokRun(args, config)
    return STAGES[args.stage](args, config)


STAGES = {"1": TokenizerRun, "2": TokenizerRun, "ar": GenerationRun, "caption": CaptionRun}

# Every setting of every stage, by name; each is a flag.
SETTINGS = {field.name: field for config in (vqrae.CaptionConfig, vqrae.GenerationConfig, unitok.UniTokTraining)
            for field in fields(config) if "help" in field.metadata}


def replace_text(path, text):
    """Write a file in one step: whoever reads it, whenever the power fails, meets the old text or the new one."""
    with vqrae.replacing(path) as part:
        part.write_text(text)


def write_log(path, lines):
    """Write metrics.jsonl, one object a line."""
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


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


def start_or_resume(run):
    """Go to step 0, or to the last checkpoint, as --resume and --overwrite say; InputError when neither may be."""
    args, first = run.args, run.rank == 0  # the first of all ranks writes and speaks
    args.out.mkdir(parents=True, exist_ok=True)
    begun = any(path.exists() for path in run.checkpoints)
    if args.resume and begun:
        run.load()
        if first:
            streamed = isinstance(run.train_images, vqrae.ShardStream)
            print(f"continuing {args.out} at step {run.done}" + streamed * (
                ", but not bit for bit: its shards are streamed, and begin again in another order"))
    elif begun and not args.overwrite:
        raise InputError(f"{args.out} already holds a run: --resume continues it, --overwrite replaces it, and another "
                         "--out leaves it alone")
    else:
        if args.resume and first:
            print(f"no checkpoint in {args.out} yet, starting at step 0")
        if run.ranks > 1:
            dist.barrier()  # all have seen what there is
        if first:
            for path in run.checkpoints:
                path.unlink(missing_ok=True)
        run.start()
    if args.shard:
        run.share_out()
    if first:
        write_log(args.out / "metrics.jsonl", run.lines)  # without what was written after the last checkpoint


def report(run, line, bar):
    """Add a line to the log, to metrics.jsonl and to the progress bar."""
    run.lines.append(line)
    metrics = run.args.out / "metrics.jsonl"
    try:
        with open(metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {metrics} ({error}); --resume goes on from the last checkpoint") from None
    figures, sentence = run.show(line)
    bar.set_postfix(**figures, images_per_s=f"{line['images_per_second']:.0f}")
    if sentence:
        bar.write(f"step {line['step']}: {sentence}")


def train(run):
    """The loop: steps, log lines, evaluations, checkpoints; then the final figures and pictures."""
    args, config, first, begin = run.args, run.config, run.rank == 0, time.time()
    start_or_resume(run)
    begin -= run.seconds  # as if the parts before this one had come just before it
    batches, timed_steps, timer, saved = iter(run.batches()), 0, time.time(), run.done
    with stop_signals() as stopped, tqdm(total=config.steps, initial=run.done, desc=f"stage {args.stage}", unit="step",
                                         dynamic_ncols=True, mininterval=1, disable=not first) as bar:
        while run.done < config.steps and not run.any_rank(stopped):
            run.step(next(batches))
            bar.update()
            timed_steps += 1
            last = run.done == config.steps
            evaluating = run.done % args.evaluate_every == 0 and not last  # the last evaluation comes after the loop
            if run.done % args.log_every == 0 or evaluating or last:
                line = run.log(timed_steps * config.batch_size / (time.time() - timer))
                if evaluating:
                    run.gather()
                timed_steps = 0
                if first:
                    if evaluating:
                        line.update(run.evaluate())
                    report(run, line, bar)
                timer = time.time()
            if run.done % args.checkpoint_every == 0 or last:
                run.seconds, saved = time.time() - begin, run.done
                run.save()
        if saved < run.done:
            run.seconds = time.time() - begin
            run.save()
    if not first:
        del batches  # its processes would go on reading
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by the interpreter's own way out: on it a process has been seen to abort over a thread of torch's.
        os._exit(0 if run.done == config.steps else 130)
    if run.done < config.steps:
        print(f"stopped after step {run.done} of {config.steps}; the same command with --resume goes on from here")
        sys.exit(130)
    finish(run, begin)


@contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list instead of dying of them, so that the loop can save before it ends."""
    received, before = [], {}
    for name in (signal.SIGINT, signal.SIGTERM):
        before[name] = signal.signal(name, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def finish(run, begin):
    """Final evaluation of the averaged weights; write the model, summary.json and the pictures."""
    out, lines = run.args.out, run.lines
    run.export()
    summary = run.summary()
    lines[-1].update(summary)
    write_log(out / "metrics.jsonl", lines)
    draw_curves(lines, out / "curves.png")
    picture = run.draw()
    seconds = time.time() - begin
    steady = [line["images_per_second"] for line in lines[1:] or lines]  # the first line has torch's warm-up in it
    settings = {name: value for name, value in run.settings().items() if name != "encoder"}
    summary.update(seconds=seconds, images_per_second=sum(steady) / len(steady), preset=run.args.preset,
                   device=run.device.type, train_loss=lines[-1]["loss"], **settings)
    replace_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    print("pictures: " + " and ".join(f"{out}/{name}" for name in (picture, "curves.png") if name))


def matmul_rate(device, dtype, side=2048, seconds=1.0):
    """Floating-point operations per second of a square matrix product, the most that a training step could reach."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    begin, count = time.time(), 0
    while time.time() - begin < seconds:
        (a @ b).flatten()[0].item()  # reading a value waits for the device
        count += 1
    return 2 * side**3 * count / (time.time() - begin)


def loader_rate(run, images=512):
    """Images per second that the loader gives when no step keeps it waiting, over all ranks."""
    batches, turn = iter(run.batches()), max(1, run.workers)  # every process brings a batch in its turn
    for _ in range(turn):
        next(batches)
    begin, count = time.time(), turn * math.ceil(images / run.config.batch_size / turn)
    for _ in range(count):
        next(batches)
    return count * run.config.batch_size / (time.time() - begin)


def benchmark(run, warmup=3, steps=20):
    """Time steady training steps and print one JSON line."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    run.start()
    if run.args.shard:
        run.share_out()
    batches = iter(run.batches())
    compiled, run.forward = run.forward, run.plain_forward
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it cannot count the CPU's attention
        run.step(next(batches))
    run.forward = compiled
    for _ in range(warmup):
        run.step(next(batches))
    begin = time.time()
    for _ in range(steps):
        run.step(next(batches))
    seconds = (time.time() - begin) / steps
    del batches  # its processes would go on reading
    loaded = loader_rate(run)
    if run.rank > 0:
        return
    rate = matmul_rate(run.device, torch.bfloat16 if run.bf16 else torch.float32)
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # not on Windows, and needed only here

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({
        "images_per_second": run.config.batch_size / seconds,
        "loader_images_per_second": loaded,
        "tokens_per_second": run.config.batch_size * run.tokens_per_image / seconds,
        "seconds_per_step": seconds,
        "flop_per_step": counter.get_total_flops(),
        "flop_per_second": counter.get_total_flops() / seconds,
        "matmul_flop_per_second": rate,
        "fp32_matmul_flop_per_second": matmul_rate(run.device, torch.float32),
        "share_of_matmul": counter.get_total_flops() / seconds / rate,
        "precision": "bf16" if run.bf16 else "fp32",
        "peak_memory_bytes": peak,
        "device": run.device.type, "compile": run.args.compile, "batch_size": run.config.batch_size,
    }))


def refuse_chosen(args, *names):
    """InputError for a setting given that the ablation would have to ignore, since its rows differ in it."""
    for name in names:
        if getattr(args, name) is not None:
            raise InputError(f"--ablate {args.ablate} chooses --{name.replace('_', '-')} itself")


def codebook_rows(args):
    """Table 5: dimension and size of the codebook, from both starts; three seeds for dimensions started from data.

    Every row is its name, its seed and the runs it takes, each a stage and what it changes in the settings.
    """
    base, steps = settings_for(args, "1"), args.steps or 200
    d, K = vqrae.load_encoder(base.encoder).config.width, base.codebook_size
    refuse_chosen(args, "codebook_dim", "codebook_init")
    shapes = [(16, K), (d // 4, K), (d // 2, K), (d, K), (2 * d, K), (d, 512), (d, 2048), (d, 16384)]
    shapes = list(dict.fromkeys(shapes))  # with another K or d two of them may be one
    for init in ("data", "gaussian"):
        for e, size in shapes:
            for seed in range(args.seed, args.seed + (3 if init == "data" and size == K else 1)):
                changes = {"codebook_dim": e, "codebook_size": size, "codebook_init": init}
                yield {"dimension": e, "size": size, "start": init}, seed, [("1", {"steps": steps, **changes})]


def strategy_rows(args):
    """Table 6: the encoder trained from step 0 or in a second stage, with distillation or without; three seeds each.

    All rows take the same number of steps and no adversarial loss; the first row, a frozen encoder, is not the paper's.
    """
    refuse_chosen(args, "adversarial_weight")
    rate = settings_for(args, "2").encoder_learning_rate
    half = max(1, (args.steps or 400) // 2)

    def stage(name, steps, rate, distillation):
        return name, {"steps": steps, "encoder_learning_rate": rate, "distillation_weight": distillation,
                        "adversarial_weight": 0.0}

    for name, runs in {
        "encoder frozen throughout": [stage("1", 2 * half, 0.0, 0.0)],
        "end to end, no distillation": [stage("1", 2 * half, rate, 0.0)],
        "end to end, distillation": [stage("1", 2 * half, rate, 1.0)],
        "two stages, distillation": [stage("1", half, 0.0, 0.0), stage("2", half, rate, 1.0)],
    }.items():
        for seed in range(args.seed, args.seed + 3):
            yield {"strategy": name}, seed, runs


# UniTok's shape: 8 dimensions for each of 8 codebooks, and attention that goes from our encoder's 192 to their sum.
UNITOK = {"quantizer": "mcq", "codebooks": 8, "codebook_dim": 64}


def quantizer_rows(args):
    """UniTok's Tables 7 and 8, and the choices of VQRAE beside them: one number of codes in all, one width of z."""
    chosen = ("quantizer", "codebooks", "projection", "latent_noise", "codebook_init", "codebook_dim", "contrastive")
    refuse_chosen(args, *chosen)
    for name, changes, claims in [
        ("vq", {"quantizer": "vq", "codebooks": 1}, False),
        ("simvq, Gaussian start", {"quantizer": "simvq", "codebooks": 1, "codebook_init": "gaussian"}, False),
        ("simvq", {"quantizer": "simvq", "codebooks": 1}, True),
        ("mcq 1", {"codebooks": 1}, True),
        ("mcq 2", {"codebooks": 2}, False),
        ("mcq 4", {"codebooks": 4}, False),
        ("mcq 8", {}, True),
        ("mcq 8 of simvq", {"quantizer": "mcq-simvq"}, False),
        ("rq 8", {"quantizer": "rq"}, True),
        ("mcq 8, attention", {"projection": "attention"}, True),
        ("none", {"quantizer": "none", "codebooks": 1}, False),
        ("none, RAE's noise", {"quantizer": "none", "codebooks": 1, "latent_noise": 0.8}, False),
    ]:
        for seed in range(args.seed, args.seed + (3 if claims else 1)):
            yield {"quantizer": name}, seed, [("1", {"steps": args.steps or 200, **UNITOK, **changes})]


def supervision_rows(args):
    """UniTok's Table 6: what the encoder, free to move, learns from pixels, from captions, and from both."""
    refuse_chosen(args, "quantizer", "codebooks", "codebook_dim", "contrastive_weight", "reconstruction_weight",
                  "encoder_learning_rate")
    if args.contrastive == "none":
        raise InputError("--ablate supervision is about captions: --contrastive is sigmoid or softmax here")
    settings_for(args, "1")  # InputError for a preset that has no such stage
    rate = vqrae.PRESETS[args.preset]["2"].encoder_learning_rate
    for name, changes in {
        "reconstruction": {"contrastive_weight": 0.0},
        "contrastive": {"reconstruction_weight": 0.0},
        "both": {},
    }.items():
        yield {"supervision": name}, args.seed, [("1", {
            "steps": args.steps or 200, "batch_size": args.batch_size or 64, "encoder_learning_rate": rate,
            "contrastive": args.contrastive or "sigmoid", **UNITOK, **changes})]


# Rows compare what the paper compares, under its optimizer, and with all that features tell: the tiny preset's start of
# the projections would choose for every row how many dimensions count.
ABLATED = {"muon_learning_rate": 0.0, "start_tokens": 65536, "projection_init": "features"}

ABLATIONS = {
    # rows, the columns of the table, and those that are drawn
    "codebook": (codebook_rows, ["train_utilization", "train_perplexity", "val_perplexity", "val_psnr", "val_ssim",
                                 "val_frechet_teacher"], 5),
    "strategy": (strategy_rows, ["val_psnr", "category_transfer", "category_probe", "val_ssim", "val_frechet_teacher",
                                 "train_utilization", "category_neighbours", "cosine"], 3),
    "quantizer": (quantizer_rows, ["val_psnr", "val_frechet_teacher", "category_transfer", "val_ssim", "bits_per_image",
                                   "train_utilization", "worst_utilization", "train_perplexity", "category_probe",
                                   "seconds"], 3),
    "supervision": (supervision_rows, ["val_psnr", "val_zero_shot", "val_ssim", "val_frechet_teacher",
                                       "train_utilization", "category_probe", "seconds"], 2),
}


def ablated_settings(args, stage):
    """The settings that the rows of an ablation change: as a stage has them, but for ABLATED, which flags change."""
    return replace(settings_for(args, stage), **{k: v for k, v in ABLATED.items() if getattr(args, k) is None})


def ablate(args):
    """Run the rows of an ablation one after the other, each in its own folder, and write table.md and plot.png.

    What is done is not done again: the same command goes on where it stopped, row by row and step by step.
    """
    make_rows, columns, drawn = ABLATIONS[args.ablate]
    rows, results = list(make_rows(args)), {}
    for place, (keys, seed, stages) in enumerate(rows, 1):
        name = "-".join(str(value).replace(",", "").replace(" ", "_") for value in keys.values())
        folder = args.out / f"{name}-seed{seed}"
        print(f"row {place} of {len(rows)}: {', '.join(f'{key} {value}' for key, value in keys.items())}, seed {seed}")
        configs = [(stage, replace(ablated_settings(args, stage), **changes)) for stage, changes in stages]
        settings = json.loads(json.dumps([[stage, asdict(config)] for stage, config in configs]))
        if not (folder / "row.json").exists():
            result = run_row(args, folder, seed, configs)
            replace_text(folder / "row.json", json.dumps({"settings": settings, **result}, indent=2) + "\n")
        row = vqrae.read_json(folder / "row.json")
        if row.get("settings") != settings:
            raise InputError(f"{folder} was run with other settings than these; choose another --out")
        results.setdefault(tuple(keys.items()), []).append(row)
    write_ablation(args, results, columns, columns[:drawn])


def run_row(args, folder, seed, configs):
    """Train the stages of one row of an ablation, or what is left of them, and return the last one's figures."""
    for stage, config in configs:
        init = folder / "stage1" if stage == "2" else None
        run = make_run(argparse.Namespace(**{
            **vars(args), "stage": stage, "seed": seed, "init": init, "resume": True, "out": folder / f"stage{stage}"}),
            config)
        if (run.args.out / "summary.json").exists():
            run.load()  # InputError when it ran with other settings
        else:
            train(run)
    result = vqrae.read_json(run.args.out / "summary.json")
    if args.ablate != "codebook":
        # A strategy is about the encoder, a quantizer about what its codes keep; without one z itself is kept.
        kind = "discrete" if args.ablate != "strategy" and config.quantizer != "none" else "continuous"
        model = unitok.load_tokenizer(run.args.out).to(run.device)
        read = vqrae.understanding(model, run.teacher, run.train_images, run.val_images, device=run.device,
                                   workers=run.workers, keys=("category",))
        result.update(read.get(kind, {}))
    if "train_utilization_of_each" in result:
        result["worst_utilization"] = min(result["train_utilization_of_each"])
    return result


COLLAPSE = {
    # Title, and the settings of a codebook whose first steps are drawn.
    "plain VQ, Gaussian start": {"quantizer": "vq", "codebook_init": "gaussian"},
    "plain VQ, from data": {"quantizer": "vq", "codebook_init": "data"},
    "SimVQ, Gaussian start": {"quantizer": "simvq", "codebook_init": "gaussian"},
    "SimVQ, from data (default)": {"quantizer": "simvq", "codebook_init": "data"},
}


def collapse(args):
    """Draw collapse.png: how codes and features move in the first steps of a training, a row for every codebook.

    Features of held-out tokens and codes are seen along the two directions in which features vary most at the start.
    """
    refuse_chosen(args, "quantizer", "codebook_init")
    steps = args.steps or 200
    shown = [0, steps // 20, steps // 4, steps]
    figure = Figure(figsize=(3 * len(shown) + 4, 2.6 * len(COLLAPSE)))
    axes = figure.subplots(len(COLLAPSE), len(shown) + 1)
    for row, (title, changes) in zip(axes, COLLAPSE.items()):
        run = make_run(argparse.Namespace(**{**vars(args), "stage": "1"}),
                       replace(ablated_settings(args, "1"), steps=steps, **changes))
        run.start()
        images = run.val_images.spread(256).to(run.device)
        batches, used, panels = iter(run.batches()), [], iter(row)
        for step in range(steps + 1):
            if step in shown or step % max(1, steps // 40) == 0:
                with torch.no_grad():
                    z = run.model.project_features(run.model.encoder(images)).flatten(0, 1)  # (n, e)
                    chosen = run.model.quantizer.search(z).unique()
                    used.append((step, len(chosen)))
                    if step == 0:
                        centre, (_, _, axis) = z.mean(0), torch.pca_lowrank(z, 2)  # (e,), (e, 2)
                        corner = ((z - centre) @ axis).abs().quantile(0.995, dim=0).tolist()
                    if step in shown:
                        codes = run.model.quantizer.lookup(torch.arange(run.config.codebook_size, device=z.device))
                        panel, in_use = next(panels), set(chosen.tolist())
                        colours = ["tab:blue" if code in in_use else "tab:red" for code in range(len(codes))]
                        for x, colour in ((z, "lightgrey"), (codes, colours)):  # codes in one go: neither kind on top
                            panel.scatter(*((x - centre) @ axis).cpu().T, s=3, c=colour, linewidths=0)
                        panel.set(xlim=(-1.6 * corner[0], 1.6 * corner[0]), ylim=(-1.6 * corner[1], 1.6 * corner[1]),
                                  xticks=[], yticks=[], title=f"step {step}: {len(chosen):,} codes in use")
            if step < steps:
                run.step(next(batches))
        row[0].set_ylabel(title)
        row[-1].plot(*zip(*used))
        row[-1].set(title=f"of {len(codes):,} codes in use", xlabel="step", ylim=(0, len(codes)))
        print(f"{title}: {', '.join(f'{count} codes in use at step {step}' for step, count in used if step in shown)}")
    for label, colour in (("features", "lightgrey"), ("codes in use", "tab:blue"), ("codes nobody chooses", "tab:red")):
        axes[0, 0].scatter([], [], s=3, c=colour, label=label)
    axes[0, 0].legend(fontsize=7, markerscale=4, loc="lower left")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(args.out / "collapse.png", dpi=80)
    print(f"{args.out}/collapse.png: {len(images)} held-out images, {len(z):,} tokens")


def write_ablation(args, results, columns, shown):
    """table.md (means over seeds, with the standard deviation) and plot.png."""
    names = [key for key, _ in next(iter(results))] + ["seeds"] + columns
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for keys, rows in results.items():
        cells = [str(value) for _, value in keys] + [str(len(rows))]
        for column in columns:
            values = torch.tensor([row[column] for row in rows if column in row], dtype=torch.float64)
            digits = {"val_psnr": 2, "seconds": 0, "bits_per_image": 0}.get(column, 1 if "perplexity" in column else 3)
            spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}" if len(values) else "-")
        lines.append("| " + " | ".join(cells) + " |")
    replace_text(args.out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    figure = Figure(figsize=(4 * len(shown), 3.4))
    axes = figure.subplots(1, len(shown))

    def mean(rows, column):
        return sum(row.get(column, math.nan) for row in rows) / len(rows)

    for axis, column in zip(axes, shown):
        if args.ablate == "codebook":
            sizes = [dict(keys)["size"] for keys in results]
            usual = max(set(sizes), key=sizes.count)
            for start in ("data", "gaussian"):
                points = sorted((dict(keys)["dimension"], mean(rows, column)) for keys, rows in results.items()
                                if dict(keys)["start"] == start and dict(keys)["size"] == usual)
                axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=f"start from {start}")
            axis.set(xscale="log", xlabel=f"codebook dimension e (K {usual})", title=column)
            dimensions = sorted({dict(keys)["dimension"] for keys in results})
            axis.set_xticks(dimensions, dimensions)
            axis.minorticks_off()
            axis.legend(fontsize=8)
        else:
            names = [", ".join(str(value) for _, value in keys) for keys in results]
            axis.barh(names[::-1], [mean(rows, column) for rows in results.values()][::-1])
            axis.set(title=column)
            axis.tick_params(labelleft=axis is axes[0])
    figure.tight_layout()
    figure.savefig(args.out / "plot.png", dpi=90)
    print(f"{args.out}/table.md and {args.out}/plot.png")


@contextmanager
def one_sentence_errors():
    """End the program with a sentence, not a traceback, for what the user can mend."""
    try:
        yield
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # torch has a type of its own only for the memory of a GPU.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory|Storage size", reason):
            raise
        sys.exit(f"error: not enough memory ({reason}); smaller sizes, a smaller batch or more --accumulate need less")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def process_group(device):
    """Join the other processes that torchrun started, if it did, and leave them in the end."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # The others wait while the first rank evaluates.
    backend = "nccl" if choose_device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    if backend == "nccl":
        torch.cuda.set_device(choose_device(device))
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for a lost connection
        reason = (str(error) or "no reason given").splitlines()[0]
        if not re.search("gloo|nccl|connection", reason, re.IGNORECASE):
            raise
        raise InputError(f"rank {dist.get_rank()} of {dist.get_world_size()} has lost another rank ({reason}); "
                         "--resume goes on from the last checkpoint") from None
    finally:
        dist.destroy_process_group()


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors(), process_group(args.device):
        if args.ablate:
            if dist.is_initialized():
                raise InputError("--ablate runs many small trainings one after the other; start it without torchrun")
            if args.overwrite or args.init or args.benchmark or args.print_config:
                raise InputError("--ablate goes with none of --overwrite, --init, --benchmark and --print-config; "
                                 "another --out starts it anew")
            collapse(args) if args.ablate == "collapse" else ablate(args)
            return
        config = settings_for(args, args.stage)
        if args.print_config:
            settings = {"stage": args.stage, "preset": args.preset, "seed": args.seed, **asdict(config)}
            fixed = vqrae.FIXED_BY_STAGE_1 if args.stage == "2" else ()
            print(json.dumps({name: value for name, value in settings.items() if name not in fixed}, indent=2))
            return
        run = make_run(args, config)
        benchmark(run) if args.benchmark else train(run)


if __name__ == "__main__":
    main()
