"""How fast a training step is, and how near to what the device could do."""

import json
import math
import sys
import time
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def wait_for(device):
    """Return once the device has done all that it was given to do; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_rate(device, dtype, seconds=1.0):
    """Floating-point operations per second of a square matrix product, the most that a training step could reach."""
    # A GPU is through with a small product before it has been asked for the next one.
    side, together = (2048, 1) if device.type == "cpu" else (8192, 8)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    wait_for(device)
    begin, count = time.time(), 0
    while time.time() - begin < seconds:
        for _ in range(together):
            a @ b
        wait_for(device)
        count += together
    return 2 * side**3 * count / (time.time() - begin)


def loader_rate(run, stage, images=512):
    """Images per second that the loader gives when no step keeps it waiting, over all ranks."""
    batches, turn = iter(stage.batches()), max(1, run.workers)  # every process brings a batch in its turn
    for _ in range(turn):
        next(batches)
    begin, count = time.time(), turn * math.ceil(images / run.config.batch_size / turn)
    for _ in range(count):
        next(batches)
    return count * run.config.batch_size / (time.time() - begin)


def peak_memory(device):
    """The most bytes that the process has needed so far, on a GPU if that is the device; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def benchmark(run, stage, warmup=3, steps=20):
    """Time steady training steps and print one JSON line."""
    stage.start()
    batches = iter(stage.batches())
    on_cuda = run.device.type == "cuda"
    # The counter cannot look into attention other than CUDA's, nor into what torch.compile makes.
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"), \
            nullcontext() if on_cuda else sdpa_kernel(SDPBackend.MATH):
        stage.step(next(batches))
    for _ in range(warmup):
        stage.step(next(batches))
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()  # the step that was counted, and torch.compile, are not to be judged
    wait_for(run.device)
    begin = time.time()
    for _ in range(steps):
        stage.step(next(batches))
    wait_for(run.device)
    seconds = (time.time() - begin) / steps
    del batches  # its processes would go on reading
    loaded = loader_rate(run, stage)
    if run.rank > 0:
        return
    rate, flop = matmul_rate(run.device, torch.bfloat16 if run.bf16 else torch.float32), counter.get_total_flops()
    print(json.dumps({
        "images_per_second": run.config.batch_size / seconds,
        "loader_images_per_second": loaded,
        "tokens_per_second": run.config.batch_size * stage.tokens_per_image / seconds,
        "seconds_per_step": seconds,
        "flop_per_step": flop,
        "flop_per_second": flop / seconds,
        "matmul_flop_per_second": rate,
        "fp32_matmul_flop_per_second": matmul_rate(run.device, torch.float32),
        "share_of_matmul": flop / seconds / rate,
        "precision": "bf16" if run.bf16 else "fp32",
        "peak_memory_bytes": peak_memory(run.device),
        "device": run.device.type, "compile": run.args.compile, "batch_size": run.config.batch_size,
    }))
