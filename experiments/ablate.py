"""Tables of the papers in small: many short runs of stage 1 that differ in one thing, a table and a plot.

    python experiments/ablate.py codebook       # VQRAE's Table 5: dimension and size of the codebook
    python experiments/ablate.py strategy       # its Table 6: when and how the encoder trains
    python experiments/ablate.py quantizer      # UniTok's Tables 7 and 8: what its quantizer and VQRAE's buy
    python experiments/ablate.py supervision    # its Table 6: pixels, captions, or both

Goes on where it stopped, row by row and step by step. Leaves in --out (default: out/ablate-NAME): table.md, plot.png,
and a folder for each row. Behind the name come flags of stage 1, such as --steps, --seed, --preset and --encoder, for
all rows alike: `python train.py --stage 1 --help` shows them. What the rows differ in cannot be chosen.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
import vqrae  # noqa: E402
from presets import PRESETS  # noqa: E402
from support.files import InputError, read_json, replace_text  # noqa: E402
from support.metrics import effective_dimension, evaluate, understanding  # noqa: E402
from support.pictures import save_figure  # noqa: E402
from support.run import Run, one_sentence_errors  # noqa: E402
from support.settings import flag  # noqa: E402
from support.sets import open_images  # noqa: E402
from unitok import load_tokenizer  # noqa: E402


# --- what an experiment has of train.py's flags; collapse.py too ---


def stage_1_args(experiment, out, words):
    """The arguments of stage 1 from command-line words, --out being `out` where they do not say."""
    args = train.parse_args(["--stage", "1", "--out", out, *words])
    args.experiment = experiment
    return args


def refuse_other_work(args):
    """InputError for what train.py can do and an experiment cannot."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{args.experiment} runs many small trainings one after the other; start it without torchrun")
    if args.stage != "1" or args.overwrite or args.init or args.benchmark or args.print_config:
        raise InputError(f"{args.experiment} goes with none of --stage, --overwrite, --init, --benchmark and "
                         "--print-config; another --out starts it anew")


def refuse_chosen(args, *names):
    """InputError for a setting given that the experiment would have to ignore, since its rows differ in it."""
    for name in names:
        if getattr(args, name) is not None:
            raise InputError(f"{args.experiment} chooses {flag(name)} itself")


# Rows compare what the paper compares, under its optimizer, and with all that features tell: the tiny preset's start of
# the projections would choose for every row how many dimensions count. Small batches make many steps in a short time.
ABLATED = {"muon_learning_rate": 0.0, "start_tokens": 65536, "projection_init": "features", "batch_size": 16}


def ablated_settings(args, stage, changes):
    """The settings of one run: as a stage has them, but for ABLATED, which flags change, and then for `changes`."""
    chosen = {name: value for name, value in ABLATED.items() if getattr(args, name) is None}
    return train.settings_for(argparse.Namespace(**{**vars(args), **chosen, **changes}), stage)


# --- the rows: of each its name, its seed and the runs it takes, each a stage and what it changes in the settings ---


# How codes and projections start: as ABLATED says, or as torch and SimVQ's authors have it, about which the paper is
# silent.
STARTS = {"ours": {"codebook_init": "data"}, "paper's": {"codebook_init": "gaussian", "projection_init": "random"}}


def codebook_rows(args):
    """Table 5: dimension and size of the codebook, from our start and from the paper's, random projections and Gaussian
    codes; three seeds for dimensions from our start.
    """
    base, steps = train.settings_for(args, "1"), args.steps or 200
    d, K = vqrae.load_encoder(base.encoder).config.width, base.codebook_size
    refuse_chosen(args, "codebook_dim", "codebook_init", "projection_init")
    shapes = [(16, K), (d // 4, K), (d // 2, K), (d, K), (2 * d, K), (d, 512), (d, 2048), (d, 16384), (d, 32768)]
    shapes = list(dict.fromkeys(shapes))  # with another K or d two of them may be one
    for start, init in STARTS.items():
        for e, size in shapes:
            for seed in range(args.seed, args.seed + (3 if start == "ours" and size == K else 1)):
                changes = {"steps": steps, "codebook_dim": e, "codebook_size": size, **init}
                yield {"dimension": e, "size": size, "start": start}, seed, [("1", changes)]


def strategy_rows(args):
    """Table 6: the encoder trained from step 0 or in a second stage, with distillation or without; three seeds each.

    All rows take the same number of steps and no adversarial loss; the first row, a frozen encoder, is not the paper's.
    They learn equally much, too: one peak for all stages, and a warm-up in proportion to a stage's steps, so that the
    learning rates of two halves add up to those of a whole.
    """
    refuse_chosen(args, "adversarial_weight")
    rate, base = train.settings_for(args, "2").encoder_learning_rate, train.settings_for(args, "1")
    half = max(1, (args.steps or 400) // 2)

    def stage(name, steps, rate, distillation):
        return name, {"steps": steps, "encoder_learning_rate": rate, "distillation_weight": distillation,
                      "adversarial_weight": 0.0, "learning_rate": base.learning_rate,
                      "warmup_steps": max(1, min(base.warmup_steps, half) * steps // (2 * half))}

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
        raise InputError(f"{args.experiment} is about captions: --contrastive is sigmoid or softmax here")
    train.settings_for(args, "1")  # InputError for a preset that has no such stage
    rate = PRESETS[args.preset]["2"].encoder_learning_rate
    for name, changes in {
        "reconstruction": {"contrastive_weight": 0.0},
        "contrastive": {"reconstruction_weight": 0.0},
        "both": {},
    }.items():
        yield {"supervision": name}, args.seed, [("1", {
            "steps": args.steps or 200, "batch_size": args.batch_size or 64, "encoder_learning_rate": rate,
            "contrastive": args.contrastive or "sigmoid", **UNITOK, **changes})]


ABLATIONS = {
    # rows, the columns of the table, and how many of those are drawn
    "codebook": (codebook_rows, ["train_utilization", "train_perplexity", "val_perplexity", "val_psnr", "val_ssim",
                                 "val_frechet_teacher", "z_dimension", "code_dimension"], 5),
    "strategy": (strategy_rows, ["val_psnr", "category_transfer", "category_probe", "val_ssim", "val_frechet_teacher",
                                 "train_utilization", "category_neighbours", "cosine"], 3),
    "quantizer": (quantizer_rows, ["val_psnr", "val_frechet_teacher", "category_transfer", "val_ssim", "bits_per_image",
                                   "train_utilization", "worst_utilization", "train_perplexity", "perplexity_of_each",
                                   "category_probe", "seconds"], 3),
    "supervision": (supervision_rows, ["val_psnr", "val_zero_shot", "val_ssim", "val_frechet_teacher",
                                       "train_utilization", "category_probe", "seconds"], 2),
}


# --- running them ---


def ablate(args):
    """Run the rows of an ablation one after the other, each in its own folder, and write table.md and plot.png.

    What is done is not done again. InputError when it was done with other settings.
    """
    make_rows, columns, drawn = ABLATIONS[args.ablation]
    rows, results = list(make_rows(args)), {}
    for place, (keys, seed, stages) in enumerate(rows, 1):
        name = "-".join(str(value).replace(",", "").replace(" ", "_") for value in keys.values())
        folder = args.out / f"{name}-seed{seed}"
        print(f"row {place} of {len(rows)}: {', '.join(f'{key} {value}' for key, value in keys.items())}, seed {seed}")
        configs = [(stage, ablated_settings(args, stage, changes)) for stage, changes in stages]
        settings = json.loads(json.dumps([[stage, asdict(config)] for stage, config in configs]))
        if not (folder / "row.json").exists():
            result = run_row(args, folder, seed, configs)
            replace_text(folder / "row.json", json.dumps({"settings": settings, **result}, indent=2) + "\n")
        row = read_json(folder / "row.json")
        if row.get("settings") != settings:
            raise InputError(f"{folder} was run with other settings than these; choose another --out")
        results.setdefault(tuple(keys.items()), []).append(row)
    write_table(results, columns, args.out / "table.md")
    draw_plot(args.ablation, results, columns[:drawn], args.out / "plot.png")
    print(f"{args.out}/table.md and {args.out}/plot.png")


def run_row(args, folder, seed, configs):
    """Train the stages of one row of an ablation, or what is left of them, and return the last one's figures."""
    for name, config in configs:
        init = folder / "stage1" if name == "2" else None
        stage_args = argparse.Namespace(**{
            **vars(args), "stage": name, "seed": seed, "init": init, "resume": True, "out": folder / f"stage{name}"})
        if (stage_args.out / "summary.json").exists():
            run = Run(stage_args, config)
            stage = train.STAGES[name][0](run, config)
            run.load()  # InputError when it ran with other settings
        else:
            run, stage = train.train(stage_args, config)
    result = read_json(stage_args.out / "summary.json")
    model, where = load_tokenizer(stage_args.out).to(run.device), {"device": run.device, "workers": run.workers}
    val_images = open_images(config.data, "val", config.image_size)
    # Of features of the encoder before training, read as sample.py does: no row is judged by what it has made of them.
    encoder = vqrae.load_encoder(configs[0][1].encoder).to(run.device)
    measured = evaluate(model, val_images, frechet_encoder=encoder, **where)
    if "frechet" in measured:
        result["val_frechet_teacher"] = measured["frechet"]
    if args.ablation == "codebook":
        result.update(dimensions(model, val_images.spread(256).to(run.device)))
    else:
        # A strategy is about the encoder, a quantizer about what its codes keep; without one z itself is kept.
        kind = "discrete" if args.ablation != "strategy" and config.quantizer != "none" else "continuous"
        read = understanding(model, stage.teacher, run.train_images, val_images, keys=("category",), **where)
        result.update(read.get(kind, {}))
    if "train_utilization_of_each" in result:
        result["worst_utilization"] = min(result["train_utilization_of_each"])
        each = result["train_perplexity_of_each"]
        result["perplexity_of_each"] = sum(each) / len(each)
    return result


@torch.no_grad()
def dimensions(model, images):
    """The effective dimensions of z and of all codes, as a dict."""
    z = model.project_features(model.encoder(images)).flatten(0, 1)  # (n, e)
    codes = model.quantizer.lookup(torch.arange(model.config.codebook_size, device=z.device))  # (K, e)
    return {"z_dimension": effective_dimension(z), "code_dimension": effective_dimension(codes)}


# --- what is left of them ---


def write_table(results, columns, path):
    """A Markdown table of means over seeds, with the standard deviation."""
    names = [key for key, _ in next(iter(results))] + ["seeds"] + columns
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for keys, rows in results.items():
        cells = [str(value) for _, value in keys] + [str(len(rows))]
        for column in columns:
            values = torch.tensor([row[column] for row in rows if column in row], dtype=torch.float64)
            digits = {"val_psnr": 2, "seconds": 0, "bits_per_image": 0}.get(
                column, 1 if "perplexity" in column or "dimension" in column else 3)
            spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}" if len(values) else "-")
        lines.append("| " + " | ".join(cells) + " |")
    replace_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


def mean(rows, column):
    """The mean of a column over the seeds of a row, NaN where it has none."""
    return sum(row.get(column, math.nan) for row in rows) / len(rows)


def draw_plot(ablation, results, columns, path):
    """A panel for each of the columns: curves over the dimension of a codebook, bars for everything else."""
    figure = Figure(figsize=(4 * len(columns), 3.4))
    axes = figure.subplots(1, len(columns))
    for axis, column in zip(axes, columns):
        axis.set_title(column)
        if ablation == "codebook":
            draw_dimensions(axis, results, column)
        else:
            names = [", ".join(str(value) for _, value in keys) for keys in results]
            axis.barh(names[::-1], [mean(rows, column) for rows in results.values()][::-1])
            axis.tick_params(labelleft=axis is axes[0])
    figure.tight_layout()
    save_figure(figure, path, dpi=90)


def draw_dimensions(axis, results, column):
    """A column over the dimension of the codebook, a curve for each start, at the size that most rows have."""
    sizes = [dict(keys)["size"] for keys in results]
    usual = max(set(sizes), key=sizes.count)
    for start in STARTS:
        points = sorted((dict(keys)["dimension"], mean(rows, column)) for keys, rows in results.items()
                        if dict(keys)["start"] == start and dict(keys)["size"] == usual)
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=f"{start} start")
    axis.set(xscale="log", xlabel=f"codebook dimension e (K {usual})")
    dimensions = sorted({dict(keys)["dimension"] for keys in results})
    axis.set_xticks(dimensions, dimensions)
    axis.minorticks_off()
    axis.legend(fontsize=8)


def parse_args(argv=None):
    """The name of the ablation, and behind it the arguments of stage 1."""
    parser = argparse.ArgumentParser(usage="python experiments/ablate.py ABLATION [flags of train.py --stage 1]",
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=list(ABLATIONS), help="which table")
    known, words = parser.parse_known_args(argv)
    args = stage_1_args(f"ablate.py {known.ablation}", f"out/ablate-{known.ablation}", words)
    args.ablation = known.ablation
    return args


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        refuse_other_work(args)
        ablate(args)


if __name__ == "__main__":
    main()
