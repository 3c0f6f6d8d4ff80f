"""Draw how time and memory grow: SimVQ with tokens, codes and dimension, generation with the length of a picture.

    pip install vector-quantize-pytorch && python experiments/growth.py --model out/ar --out assets/growth.png

SimVQ forward + backward is measured by compare_simvq.py, ours beside vector-quantize-pytorch's, each point a process.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
BASE = {"tokens": 1024, "codes": 4096, "dim": 256}
AXES = {"tokens": [256, 1024, 4096, 16384], "codes": [1024, 4096, 16384, 65536], "dim": [64, 256, 768, 1536]}
KINDS = {"ours": "ours", "theirs": "vector-quantize-pytorch"}


def answer(script, *arguments):
    return subprocess.run([sys.executable, HERE / script, *map(str, arguments)], check=True, text=True,
                          stdout=subprocess.PIPE).stdout.splitlines()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/ar", help="the generator whose pictures get longer")
    parser.add_argument("--out", type=Path, default=Path("growth.png"))
    args = parser.parse_args()
    figure, axes = plt.subplots(2, 4, figsize=(15, 6))
    for column, (name, values) in enumerate(AXES.items()):
        for kind, label in KINDS.items():
            points = []
            for value in values:
                sizes = [f"--{key}={value if key == name else base}" for key, base in BASE.items()]
                points.append(json.loads(answer("compare_simvq.py", "--which", kind, *sizes)[-1]))
                print(f"{label}, {value} {name}: {points[-1]['seconds']:.4f} s, {points[-1]['extra_mb']:.0f} MB")
            for axis, key in zip(axes[:, column], ("seconds", "extra_mb")):
                axis.loglog(values, [max(point[key], 1e-3) for point in points], "o-", label=label)
        others = ", ".join(f"{base:,} {key}" for key, base in BASE.items() if key != name)
        axes[0, column].set_title(f"SimVQ: {name}\n({others})", fontsize=10)
    found = [re.match(r" *(\d+) tokens: ([\d.]+) ms each, cache ([\d.]+) MB", line)
             for line in answer("compare_generate.py", "--only", "lengths", "--model", args.model)]
    lengths, each, memory = zip(*(map(float, match.groups()) for match in found))
    axes[0, 3].loglog(lengths, [n * ms / 1000 for n, ms in zip(lengths, each)], "o-")
    axes[1, 3].loglog(lengths, memory, "o-")
    axes[0, 3].set_title("generation: codes of one picture\n(key/value cache, batch 1)", fontsize=10)
    for row, label in zip(axes, ("seconds", "MB beyond the start")):
        row[0].set_ylabel(label)
        for axis in row:
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    print(args.out)


if __name__ == "__main__":
    main()
