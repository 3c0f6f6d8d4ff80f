"""Time and memory of our SimVQ beside vector-quantize-pytorch's, forward and backward, in alternating processes.

    pip install vector-quantize-pytorch && python experiments/compare_simvq.py
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def memory(name):
    """A line of /proc/self/status in MB: VmRSS now, VmHWM at its highest."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def measure(which, tokens, codes, dim, repeats):
    """One process: the median time of forward + backward, and the memory it needs beyond the quantizer itself."""
    torch.manual_seed(0)
    z = torch.randn(1, tokens, dim, requires_grad=True)
    if which == "ours":
        import vqrae

        quantizer = vqrae.SimVQ(codes, dim)
    else:
        from vector_quantize_pytorch import SimVQ

        quantizer = SimVQ(dim=dim, codebook_size=codes, rotation_trick=False)

    def step():
        if which == "ours":
            z_q, _, codebook_loss, commitment_loss = quantizer(z)
            loss = codebook_loss + commitment_loss
        else:
            z_q, _, loss = quantizer(z)
        (z_q.square().mean() + loss).backward()
        z.grad = None
        quantizer.zero_grad()

    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # the library's own buffers are not the quantizer's
    start, times = memory("VmRSS"), []
    for _ in range(repeats):
        begin = time.time()
        step()
        times.append(time.time() - begin)
    return {"seconds": statistics.median(times), "extra_mb": memory("VmHWM") - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3, help="of each, alternating")
    parser.add_argument("--which", choices=["ours", "theirs"], help="measure this one in this process, print JSON")
    args = parser.parse_args()
    if args.which:
        print(json.dumps(measure(args.which, args.tokens, args.codes, args.dim, args.repeats)))
        return
    results = {"ours": [], "theirs": []}
    for _ in range(args.processes):
        for which in results:
            answer = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--which", which], check=True,
                                    capture_output=True, text=True).stdout
            results[which].append(json.loads(answer.splitlines()[-1]))
    ours, theirs = ({key: statistics.median(run[key] for run in runs) for key in runs[0]} for runs in results.values())
    for name, row in (("ours", ours), ("vector-quantize-pytorch", theirs)):
        print(f"{name:24} {row['seconds']:.3f} s  {row['extra_mb']:.0f} MB")
    print(f"{'ratio':24} {ours['seconds'] / theirs['seconds']:.2f}    {ours['extra_mb'] / theirs['extra_mb']:.2f}")


if __name__ == "__main__":
    main()
