"""A training run: device, precision, ranks, checkpoints, exact resume, log, average, learning rates, signals.

What is trained, and how a step goes, is the driver's, which reads its batches from here:

    run = Run(args, config)
    run.train(model, optimizers)
    for batch in run.steps(stage):         # goes on where it stopped; logs, evaluates, saves; ends at Ctrl-C
        for part in run.parts(len(batch)):  # --accumulate
            loss, terms = ...
            run.backward(loss, terms)
        run.update()                       # clip, check, learning rates, step, average of weights
    run.finish(stage)
"""

import copy
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.files import InputError, digest, keep_apart, replace_text, replacing
from support.follow import check_log, open_log
from support.images import TrainingOrder
from support.metrics import codebook_usage
from support.pictures import draw_curves
from support.sets import open_images


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


@dataclass
class Stage:
    """What a stage of training hands to `Run.steps` and `Run.finish`: its functions, and the models it has beside."""

    step: Callable  # one update on a batch
    batches: Callable  # batches without end, from where the run is
    evaluate: Callable  # figures of the averaged model, a dict with "val_" before the names
    summarise: Callable  # the last figures, a dict
    draw: Callable  # writes pictures to --out and returns their name, or None
    export: Callable  # writes what the run was for to --out
    tokens_per_image: int
    start: Callable = lambda: None  # what comes before step 0
    teacher: nn.Module | None = None


INIT = "model of --init (SHA-256)"  # among the settings of a run that began with one


class Losses(nn.Module):
    """A function as the forward pass of a module that holds what it trains, for DistributedDataParallel."""

    def __init__(self, module, losses):
        super().__init__()
        self.module, self.losses = module, losses

    def forward(self, *inputs):
        return self.losses(*inputs)


class Network(NamedTuple):
    """What an update moves: the gradients of its parameters are clipped together, and it sets in at a step."""

    norm_name: str
    parameters: list
    optimizers: dict  # by name; each group has its highest learning rate under "peak"
    start: int


class Run:
    """One training run in the folder --out, by this process or, as one of several ranks, together with others."""

    FOLDERS = ("data", "encoder", "tokenizer", "qwen3")  # settings that may move between the parts of a run

    def __init__(self, args, config):
        self.args, self.config = args, config
        self.followed = None  # adds to the log of --log, once the run has begun
        if args.log:
            check_log(args.log)
        self.device = choose_device(args.device)
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and multiplies_bf16(self.device)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.batch_size % self.ranks:
            raise InputError(f"--batch-size {config.batch_size} cannot be shared out evenly to {self.ranks} processes")
        torch.manual_seed(args.seed)
        self.done, self.seconds, self.window, self.counts, self.lines = 0, 0.0, {}, None, []
        self.fixed = {}  # what else must not change between the parts of a run, see `settings`
        self.damaged = False  # whether the last checkpoint is, so that it must not replace the one before it
        self.exchanges = []  # of gradients, between ranks

    # --- what a driver sets up ---

    def read_images(self, size):
        """Both splits of --data as images of `size` pixels; InputError when --out would write over what is read."""
        out, named = self.args.out, {name: getattr(self.config, name, None) for name in self.FOLDERS}
        folders = {name: value for name, value in named.items() if isinstance(value, str)}  # what --init brings is none
        for place in (out, out / "vqrae"):
            keep_apart(place, init=self.args.init, **folders)
        where, how = self.config.data, (size, self.args.stream, self.args.columns)
        self.train_images, val_images = open_images(where, "train", *how), open_images(where, "val", *how)
        if out.resolve() in self.train_images.places() | val_images.places():
            raise InputError(f"{out} holds images of --data {self.config.data}; choose another --out")
        workers = 0 if self.train_images.from_sheets else min(4, os.cpu_count() or 1)
        self.workers = workers if self.args.workers is None else self.args.workers
        self.fixed["training images"] = len(self.train_images)
        self.fixed["names of the training images (SHA-256)"] = digest(self.train_images.names())
        return self.train_images, val_images

    def batches(self, with_places=False):
        """This rank's share of the training images from here on, with their places in the set if wanted."""
        order = TrainingOrder(len(self.train_images), self.args.seed, self.done * self.config.batch_size, self.rank,
                              self.ranks)
        return self.train_images.batches(order, self.config.batch_size // self.ranks, self.workers, with_places)

    def train(self, model, optimizers):
        """Take the model to train, on the device, and its optimizers by name. Its average starts as a copy."""
        self.model = model
        self.average = copy.deepcopy(model).eval()  # the exponential moving average: evaluated and exported
        trained = [p for p in model.parameters() if p.requires_grad]
        self.averaged = [p for p, q in zip(self.average.parameters(), model.parameters()) if q.requires_grad]
        self.networks = [Network("grad_norm", trained, optimizers, 0)]
        self.kept = {"model": model, "average": self.average, **optimizers}  # in a checkpoint

    def train_beside(self, name, module, optimizers, start):
        """Take a second network, whose updates and learning rates set in at step `start`."""
        optimizers = {f"{name}_{key}": optimizer for key, optimizer in optimizers.items()}
        self.networks.append(Network(f"{name}_grad_norm", list(module.parameters()), optimizers, start))
        self.kept.update({name: module, **optimizers})

    def compiled(self, function):
        """A model or function as it is or, with --compile, as torch makes it quicker."""
        return torch.compile(function) if self.args.compile else function

    def shared(self, module, losses):
        """A function that makes a loss of a module's output, such that gradients become means over the ranks.

        With several ranks it is DistributedDataParallel's forward, which exchanges gradients while the backward pass
        still goes on, once a step: in the last of its `parts`. The loss may then flow to no other module that trains.
        """
        if self.ranks == 1:
            return losses
        # Not all has a gradient in every run: a text tower without captions, a last norm that nobody reads behind.
        self.exchanges.append(DistributedDataParallel(Losses(module, losses), broadcast_buffers=False,
                                                      find_unused_parameters=True))
        return self.exchanges[-1]

    # --- ranks ---

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

    def of_all_ranks(self, value):
        """The values that all ranks have, plain ones, as a list."""
        values = [value] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def first_rank_first(self):
        """Inside, the first rank is alone; the others come when it is done."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.ranks > 1:
            dist.barrier()

    def share_start(self):
        """After a start that every rank has made: all take the first one's, since rounding may differ."""
        if self.ranks > 1:
            for tensor in self.model.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.average.load_state_dict(self.model.state_dict())

    # --- one step ---

    def generator(self):
        """What a step draws from: the same at the same step of the same seed, interrupted or not."""
        seed = (self.args.seed * (2**40 + 2654435761) + self.done) % 2**63  # see TrainingOrder
        torch.manual_seed(seed)  # of what draws without a generator, such as noise on latents
        return torch.Generator().manual_seed(seed)

    def autocast(self):
        """The context in which models compute: bf16 products where --precision says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def parts(self, count):
        """Slices of this rank's batch of `count`, --accumulate of them: gradients start at zero and add up."""
        for network in self.networks:
            for optimizer in network.optimizers.values():
                optimizer.zero_grad()
        self.terms = {}
        length = -(-count // self.config.accumulate)
        for begin in range(0, count, length):
            self.share = (min(begin + length, count) - begin) / count
            for exchange in self.exchanges:
                exchange.require_backward_grad_sync = begin + length >= count  # what its no_sync() sets
            yield slice(begin, begin + length)

    def backward(self, loss, terms={}, name="loss"):
        """Add the gradient of a part's loss, and the loss and its other terms to those of the step."""
        (self.share * loss).backward()
        for key, value in {name: loss, **terms}.items():
            self.terms[key] = self.terms.get(key, 0.0) + self.share * value.detach()

    def whole_batch(self, *names):
        """Terms of the step that was just made, over all of its parts and all ranks."""
        values = [self.terms[name].clone() for name in names]
        self.over_ranks(values)
        return values

    def update(self):
        """One update of weights and average; InputError, before any weight changes, when a loss is not finite."""
        networks, terms = [network for network in self.networks if self.done >= network.start], self.terms
        for network in networks:
            terms[network.norm_name] = nn.utils.clip_grad_norm_(network.parameters, self.config.max_grad_norm)
        if self.any_rank(not torch.isfinite(torch.stack(list(terms.values()))).all()):  # or the others would wait
            bad = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise InputError(f"the loss or its gradient is not finite at step {self.done} ({bad}); the last good "
                             f"checkpoint is kept, and a lower --learning-rate may help")
        for network in networks:
            for optimizer in network.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * self.schedule(self.done, network.start)
                optimizer.step()
        self.done += 1
        # Short at first, to forget the start: TiTok's ramp, one step ahead.
        decay = min(self.config.ema_decay, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.networks[0].parameters, 1 - decay)
        self.note(terms)

    def schedule(self, step, start=0):
        """What share of its highest learning rate a part that starts at step `start` has: linear warm-up, then cosine.

        Table 7 writes one end rate for all parts; the code it adapts, TiTok's, scales each by the same factor, and so
        does this. Other than there, step 0 moves already, and the warm-up takes at most half of a short run.
        """
        config, step, steps = self.config, step - start, self.config.steps - start
        warmup = min(config.warmup_steps, max(1, steps // 2))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return config.end_factor + (1 - config.end_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    # --- the log ---

    def note(self, terms):
        """Add named values to the sums that the next log line takes its means from."""
        for name, value in terms.items():  # stays on the device: reading a value would wait for it
            total, count = self.window.get(name, (0.0, 0))
            self.window[name] = (total + value.detach(), count + 1)

    def note_codes(self, counts):
        """Add to the counts (K,) of chosen codes, whose utilization and perplexity the next log line tells."""
        self.counts = counts if self.counts is None else self.counts + counts

    def log(self, images_per_second):
        """The means since the last log line, as one object of metrics.jsonl."""
        means = [total.float() / count for total, count in self.window.values()]
        self.over_ranks(means)
        line = {"step": self.done, **{name: mean.item() for name, mean in zip(self.window, means)},
                "lr": self.kept["optimizer"].param_groups[0]["lr"], "images_per_second": images_per_second}
        if self.counts is not None:
            self.over_ranks([self.counts], "sum")
            line["train_utilization"], line["train_perplexity"] = codebook_usage(self.counts)
        self.window, self.counts = {}, None
        return line

    def report(self, line, bar):
        """Add a line to the log, to metrics.jsonl and to the progress bar."""
        self.lines.append(line)
        metrics = self.args.out / "metrics.jsonl"
        try:
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {metrics} ({error}); --resume goes on from the last checkpoint") from None
        shown = {"loss": f"{line['loss']:.3f}"}
        if "train_psnr" in line:
            shown.update(psnr=f"{line['train_psnr']:.1f}", used=f"{line.get('train_utilization', 0):.0%}")
        bar.set_postfix(**shown, images_per_s=f"{line['images_per_second']:.0f}")
        if "val_loss" in line:
            bar.write(f"step {line['step']}: held-out loss {line['val_loss']:.3f} nats a token")
        if "val_psnr" in line:
            codes = (f", {line['val_utilization']:.1%} of codes used and perplexity {line['val_perplexity']:.0f} over "
                     f"{line['val_tokens']:,} tokens" if "val_tokens" in line else "")
            bar.write(f"step {line['step']}: held-out PSNR {line['val_psnr']:.2f} dB{codes}")

    def follow(self, line, picture):
        """Add a line of the log, and what `Stage.draw` says that it has drawn or None, to the log of --log."""
        if self.followed:
            figures = {name: value for name, value in line.items() if isinstance(value, (int, float))}
            self.followed(figures.pop("step"), figures, self.args.out / picture.split()[0] if picture else None)

    def write_log(self):
        """Write metrics.jsonl anew, one object a line."""
        replace_text(self.args.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    # --- checkpoints: one file, replaced in one step, and the one before it ---

    @property
    def checkpoints(self):
        """Where the last checkpoint is, and the one before it."""
        return [self.args.out / "checkpoint" / name for name in ("state.pt", "previous.pt")]

    def settings(self):
        """What must not change between the parts of a run, as plain values; folders may move."""
        config = {name: value for name, value in asdict(self.config).items() if name not in self.FOLDERS}
        return json.loads(json.dumps({"stage": self.args.stage, "seed": self.args.seed,
                                      "precision": "bf16" if self.bf16 else "fp32", **config, **self.fixed}))

    def save(self):
        """Write the checkpoint, then put it in the place of the one before, which stays beside it.

        The first rank writes, and of the log line under way it keeps its own part alone.
        """
        streams = self.of_all_ranks(self.train_images.state if self.args.stream else {})
        if self.rank > 0:
            return
        state = {"settings": self.settings(), "done": self.done, "seconds": self.seconds, "window": self.window,
                 "counts": self.counts, "lines": self.lines, "rng": torch.get_rng_state(),
                 "stream": {place: state for part in streams for place, state in part.items()},
                 **{name: part.state_dict() for name, part in self.kept.items()}}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        last, previous = self.checkpoints
        with replacing(last) as part:
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
        state, path, reasons = read_state(self.checkpoints)
        self.damaged = bool(reasons)
        if self.damaged and self.rank == 0:
            print(f"cannot read the checkpoint {reasons[0]}; going back to the one before it", file=sys.stderr)
        for name, value in {INIT: None, **self.settings()}.items():
            if state["settings"].get(name) != value:
                raise InputError(f"--resume continues a run with its own settings: {name} is "
                                 f"{state['settings'].get(name)!r} in {self.args.out}, not {value!r}")
        if "counts" not in state:
            raise InputError(f"{path} was written by an earlier version of train.py; --overwrite starts anew")
        for name, part in self.kept.items():
            part.load_state_dict(state[name])
        self.done, self.seconds, self.lines = state["done"], state["seconds"], state["lines"]
        self.window = {name: (total.to(self.device), count) for name, (total, count) in state["window"].items()}
        self.counts = None if state["counts"] is None else state["counts"].to(self.device)
        if self.args.stream:
            self.train_images.state = state["stream"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])

    # --- the loop ---

    def begin(self, stage):
        """Go to step 0, or to the last checkpoint, as --resume and --overwrite say; InputError when neither may be."""
        args, first = self.args, self.rank == 0  # the first of all ranks writes and speaks
        if args.init:
            self.fixed[INIT] = digest((args.init / "model.safetensors").read_bytes())
        args.out.mkdir(parents=True, exist_ok=True)
        begun = any(path.exists() for path in self.checkpoints)
        if args.resume and begun:
            self.load()
            if first:
                print(f"continuing {args.out} at step {self.done}" + self.args.stream * (
                    ", but not bit for bit: images that waited in the stream's buffer are passed over"))
        elif begun and not args.overwrite:
            raise InputError(f"{args.out} already holds a run: --resume continues it, --overwrite replaces it, and "
                             "another --out leaves it alone")
        else:
            if args.resume and first:
                print(f"no checkpoint in {args.out} yet, starting at step 0")
            if self.ranks > 1:
                dist.barrier()  # all have seen what there is
            if first:
                for path in self.checkpoints:
                    path.unlink(missing_ok=True)
            stage.start()
        if first:
            if args.log:
                # The last step's line waits for the last figures, see `finish`.
                self.followed = open_log(args.log, args.out, min(self.done, self.config.steps - 1))
            self.write_log()  # without what was written after the last checkpoint

    def steps(self, stage):
        """Yield the batches of all steps that are left; the reader makes its update before it asks for the next.

        Between two steps: a log line, an evaluation, a checkpoint, when their time has come. Asked to stop (Ctrl-C,
        SIGTERM), the run saves and ends the program. So do all ranks but the first, once the last step is done.
        """
        args, config, first, begin = self.args, self.config, self.rank == 0, time.time()
        self.begin(stage)
        self.begun = begin - self.seconds  # as if the parts before this one had come just before it
        batches, timed_steps, timer, saved = iter(stage.batches()), 0, time.time(), self.done
        with stop_signals() as stopped, tqdm(total=config.steps, initial=self.done, desc=f"stage {args.stage}",
                                             unit="step", dynamic_ncols=True, mininterval=1, disable=not first) as bar:
            while self.done < config.steps and not self.any_rank(stopped):
                yield next(batches)
                bar.update()
                timed_steps += 1
                last = self.done == config.steps
                evaluating = self.done % args.evaluate_every == 0 and not last  # the last one comes after the loop
                if self.done % args.log_every == 0 or evaluating or last:
                    line = self.log(timed_steps * config.batch_size / (time.time() - timer))
                    if first:
                        line |= stage.evaluate() if evaluating else {}
                        self.report(line, bar)
                        if self.followed and not last:
                            self.follow(line, stage.draw() if evaluating else None)
                    timed_steps, timer = 0, time.time()
                if self.done % args.checkpoint_every == 0 or last:
                    self.seconds, saved = time.time() - self.begun, self.done
                    self.save()
            if saved < self.done:
                self.seconds = time.time() - self.begun
                self.save()
        del batches  # its processes would go on reading
        if not first:
            leave_ranks(0 if self.done == config.steps else 130)
        if self.done < config.steps:
            print(f"stopped after step {self.done} of {config.steps}; the same command with --resume goes on from here")
            sys.exit(130)

    def finish(self, stage):
        """Final evaluation of the averaged weights; write the model, summary.json and the pictures."""
        out, lines = self.args.out, self.lines
        stage.export()
        summary = stage.summarise()
        lines[-1].update(summary)
        self.write_log()
        draw_curves(lines, out / "curves.png")
        picture = stage.draw()
        self.follow(lines[-1], picture)
        seconds = time.time() - self.begun
        steady = [line["images_per_second"] for line in lines[1:] or lines]  # the first line has torch's warm-up in it
        settings = {name: value for name, value in self.settings().items() if name != "encoder"}
        summary.update(seconds=seconds, images_per_second=sum(steady) / len(steady), train_loss=lines[-1]["loss"],
                       preset=self.args.preset, device=self.device.type,
                       data=os.path.basename(os.path.normpath(self.config.data)), **settings)
        replace_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary, indent=2))
        print("pictures: " + " and ".join(f"{out}/{name}" for name in (picture, "curves.png") if name))


def read_state(paths):
    """The first readable of some checkpoints -> its content, its path, and why those before it could not be read.

    InputError when none can be read.
    """
    reasons = []
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:  # torch itself does not look at its checksums
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} does not have its checksum")
            return torch.load(path, map_location="cpu", weights_only=True), path, reasons
        except Exception as error:  # a damaged file can fail anywhere inside torch.load
            reasons.append(f"{path}: {(str(error) or type(error).__name__).splitlines()[0]}")
    raise InputError(f"cannot read the checkpoint {', nor '.join(reasons)}; --overwrite starts anew")


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


@contextmanager
def one_sentence_errors():
    """End the program with a sentence, not a traceback, for what the user can mend.

    What the terminal has no characters for is printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what stands in its place may be anything
            stream.reconfigure(errors="replace")
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


def leave_ranks(code):
    """End a rank that is not the first.

    Not by the interpreter's own way out: on it a process has been seen to abort over a thread of torch's.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
