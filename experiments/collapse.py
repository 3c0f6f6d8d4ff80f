"""A picture of codebooks that die and of one that lives: how codes and features move in the first steps of stage 1.

    python experiments/collapse.py    # out/ablate-collapse/collapse.png

A row for every codebook. Features of held-out tokens and codes are seen along the two directions in which features vary
most at the start. Takes flags of stage 1, such as --steps (default: 200), --seed, --preset, --encoder and --out, for
all rows alike: `python train.py --stage 1 --help` shows them. Quantizer and start are the experiment's choice.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from experiments.ablate import ablated_settings, refuse_chosen, refuse_other_work, stage_1_args  # noqa: E402
from support.pictures import save_figure  # noqa: E402
from support.run import Run, one_sentence_errors  # noqa: E402
from support.sets import open_images  # noqa: E402

COLLAPSE = {
    # Title, and the settings of a codebook whose first steps are drawn.
    "plain VQ, Gaussian start": {"quantizer": "vq", "codebook_init": "gaussian"},
    "plain VQ, from data": {"quantizer": "vq", "codebook_init": "data"},
    "SimVQ, Gaussian start": {"quantizer": "simvq", "codebook_init": "gaussian"},
    "SimVQ, from data (default)": {"quantizer": "simvq", "codebook_init": "data"},
}


def collapse(args):
    """Draw collapse.png, and print how many codes are in use at the steps that it shows."""
    refuse_chosen(args, "quantizer", "codebook_init")
    steps = args.steps or 200
    shown = [0, steps // 20, steps // 4, steps]
    figure = Figure(figsize=(3 * len(shown) + 4, 2.6 * len(COLLAPSE)))
    axes = figure.subplots(len(COLLAPSE), len(shown) + 1)
    for row, (title, changes) in zip(axes, COLLAPSE.items()):
        config = ablated_settings(args, "1", {"steps": steps, **changes})
        images = open_images(config.data, "val", config.image_size).spread(256)
        used, tokens = draw_training(row, Run(args, config), config, images, shown)
        row[0].set_ylabel(title)
        print(f"{title}: {', '.join(f'{count} codes in use at step {step}' for step, count in used if step in shown)}")
    for label, colour in (("features", "lightgrey"), ("codes in use", "tab:blue"), ("codes nobody chooses", "tab:red")):
        axes[0, 0].scatter([], [], s=3, c=colour, label=label)
    axes[0, 0].legend(fontsize=7, markerscale=4, loc="lower left")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    save_figure(figure, args.out / "collapse.png", dpi=80)
    print(f"{args.out}/collapse.png: {len(images)} held-out images, {tokens:,} tokens")


def draw_training(row, run, config, images, shown):
    """Train, and draw a panel at each of the steps `shown`, and into the last one of the row how many codes are in use.

    Returns those numbers as pairs (step, codes), and the number of tokens of the images (B, 3, H, W).
    """
    stage = train.STAGES["1"][0](run, config)
    stage.start()
    batches, panels, used, images = iter(stage.batches()), iter(row), [], images.to(run.device)
    for step in range(config.steps + 1):
        if step in shown or step % max(1, config.steps // 40) == 0:
            with torch.no_grad():
                z = run.model.project_features(run.model.encoder(images)).flatten(0, 1)  # (n, e)
                chosen = run.model.quantizer.search(z).unique()
                codes = run.model.quantizer.lookup(torch.arange(config.codebook_size, device=z.device))  # (K, e)
            used.append((step, len(chosen)))
            if step == 0:
                centre, (_, _, axes) = z.mean(0), torch.pca_lowrank(z, 2)  # (e,), (e, 2)
                corner = ((z - centre) @ axes).abs().quantile(0.995, dim=0).tolist()
            if step in shown:
                title = f"step {step}: {len(chosen):,} codes in use"
                draw_panel(next(panels), (z - centre) @ axes, (codes - centre) @ axes, chosen, corner, title)
        if step < config.steps:
            stage.step(next(batches))
    row[-1].plot(*zip(*used))
    row[-1].set(title=f"of {len(codes):,} codes in use", xlabel="step", ylim=(0, 1.05 * len(codes)))
    return used, len(z)


def draw_panel(panel, features, codes, chosen, corner, title):
    """Features (n, 2) and codes (K, 2), blue where they are among the `chosen` and red where they are not."""
    in_use = set(chosen.tolist())
    colours = ["tab:blue" if code in in_use else "tab:red" for code in range(len(codes))]
    for points, colour in ((features, "lightgrey"), (codes, colours)):  # codes in one go: neither kind on top
        panel.scatter(*points.cpu().T, s=3, c=colour, linewidths=0)
    panel.set(xlim=(-1.6 * corner[0], 1.6 * corner[0]), ylim=(-1.6 * corner[1], 1.6 * corner[1]), xticks=[], yticks=[],
              title=title)


def parse_args(argv=None):
    """The arguments of stage 1."""
    parser = argparse.ArgumentParser(usage="python experiments/collapse.py [flags of train.py --stage 1]",
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return stage_1_args("collapse.py", "out/ablate-collapse", parser.parse_known_args(argv)[1])


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        refuse_other_work(args)
        collapse(args)


if __name__ == "__main__":
    main()
