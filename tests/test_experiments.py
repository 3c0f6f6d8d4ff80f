"""The experiments: ablations in small, the collapse, and what fits into a memory."""

import itertools
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
import vqrae
from conftest import small_model, small_vit
from experiments import ablate, collapse, memory, semantics
from export import save_encoder
from presets import PRESETS
from support.files import InputError
from support.images import ImageSet
from support.metrics import evaluate


def without_dimension(short_run):
    """The flags of a short stage 1 that an ablation understands: it chooses the dimension of the codebook."""
    at = short_run.index("--codebook-dim")
    return [*short_run[2:at], *short_run[at + 2:]]


def few_small_rows(make_rows, every):
    """The rows of an ablation, but one in `every`, and their codebooks small."""
    def make(args):
        return [(keys, seed, [(stage, {**changes, **({"codebook_size": 32} if stage == "1" else {})})
                              for stage, changes in stages])
                for keys, seed, stages in list(make_rows(args))[::every]]

    return make


@pytest.mark.parametrize("ablation, every", [("codebook", 5), ("strategy", 3)])
def test_an_ablation_goes_on_row_by_row_and_ends_in_a_table_and_a_plot(short_run, tmp_path, monkeypatch, ablation,
                                                                       every):
    make_rows, *columns = ablate.ABLATIONS[ablation]
    rows = few_small_rows(make_rows, every)
    monkeypatch.setitem(ablate.ABLATIONS, ablation, (rows, *columns))
    trained, real = [], train.train

    def interrupted(args, config):
        if len(trained) == 2:
            raise InputError("interrupted")
        return going_on(args, config)

    def going_on(args, config):
        trained.append(args.out)
        return real(args, config)

    arguments, out = [ablation, *without_dimension(short_run)], tmp_path / "run"
    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        ablate.main(arguments)
    assert not (out / "table.md").exists()
    monkeypatch.setattr(train, "train", going_on)
    ablate.main(arguments)
    assert len(trained) == len(set(trained)), "a row that was done ran again"
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 2 + len({tuple(keys.items()) for keys, _, _ in rows(ablate.parse_args(arguments))})
    assert "nan" not in "".join(table)
    assert Image.open(out / "plot.png").size[0] > 200
    with pytest.raises(SystemExit, match="was run with other settings than these; choose another --out"):
        ablate.main(arguments + ["--steps", "8"])


@pytest.mark.parametrize("extra", [["--print-config"], ["--benchmark"], ["--init", "x"], ["--overwrite"],
                                   ["--stage", "2"], ["--codebook-dim", "8"]])
def test_an_ablation_refuses_what_it_would_have_to_ignore(extra, tmp_path):
    with pytest.raises(SystemExit, match="error: ablate.py codebook"):
        ablate.main(["codebook", "--out", str(tmp_path / "out"), *extra])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, words", [(ablate, ["strategy"]), (collapse, []), (semantics, [])])
def test_an_experiment_does_not_start_as_one_of_several_ranks(script, words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="start it without torchrun"):
        script.main([*words, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("arguments, sentence", [
    (["strategy", "--adversarial-weight", "0.1"], "ablate.py strategy chooses --adversarial-weight itself"),
    (["quantizer", "--codebooks", "4"], "ablate.py quantizer chooses --codebooks itself"),
    (["supervision", "--contrastive", "none"], "ablate.py supervision is about captions"),
    (["supervision", "--preset", "qwen3-0.6b"], "--preset qwen3-0.6b has no settings for --stage 1"),
])
def test_what_an_ablation_cannot_do_is_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        ablate.main([*arguments, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("extra", [["--init", "x"], ["--quantizer", "vq"], ["--codebook-init", "data"]])
def test_the_collapse_refuses_what_it_would_have_to_ignore(extra, tmp_path):
    with pytest.raises(SystemExit, match="error: collapse.py"):
        collapse.main(["--out", str(tmp_path / "out"), *extra])
    assert not (tmp_path / "out").exists()


def test_an_experiment_writes_into_a_folder_of_its_own():
    assert str(ablate.parse_args(["strategy"]).out) == "out/ablate-strategy"
    assert str(collapse.parse_args([]).out) == "out/ablate-collapse"
    assert str(collapse.parse_args(["--out", "elsewhere"]).out) == "elsewhere"


def test_a_row_of_an_ablation_does_not_go_on_from_a_stage_of_other_settings(short_run, tmp_path):
    def run_row(steps):
        args = ablate.parse_args(["codebook", *short_run[2:], "--steps", steps])
        return ablate.run_row(args, tmp_path / "row", 0, [("1", train.settings_for(args, "1"))])

    assert run_row("2") == run_row("2")  # what is done is not done again
    with pytest.raises(InputError, match="continues a run with its own settings"):
        run_row("3")


@pytest.mark.parametrize("ablation", ["codebook", "strategy"])
def test_a_row_has_the_frechet_distance_of_its_saved_model_by_the_encoder_before_training(
        short_run, encoder_folder, photo_folder, tmp_path, ablation):
    for split in ("train", "val"):
        shutil.copytree(photo_folder, tmp_path / "data" / split)
    args = ablate.parse_args([ablation, *short_run[2:], "--data", str(tmp_path / "data")])
    changes = {"encoder_learning_rate": 0.1 if ablation == "strategy" else 0.0}
    row = ablate.run_row(args, tmp_path / "row", 0, [("1", ablate.ablated_settings(args, "1", changes))])
    measured = evaluate(vqrae.VQRAE.from_pretrained(tmp_path / "row/stage1"), ImageSet(tmp_path / "data", "val", 16),
                        frechet_encoder=vqrae.load_encoder(encoder_folder))
    assert row["val_psnr"] == pytest.approx(measured["psnr"])
    assert row["val_frechet_teacher"] == pytest.approx(measured["frechet"])


def test_the_collapse_is_drawn_and_its_codes_in_use_are_told(short_run, tmp_path, capsys):
    collapse.main(short_run[2:])
    told = re.findall(r"(\d+) codes in use at step 0", capsys.readouterr().out)
    assert len(told) == 4 and all(1 <= int(count) <= 32 for count in told)
    assert Image.open(tmp_path / "run/collapse.png").size[0] > 200


def test_flags_do_not_turn_one_strategy_into_another():
    args = ablate.parse_args(["strategy", "--distillation-weight", "0.5", "--encoder-learning-rate", "0.1"])
    first = [ablate.ablated_settings(args, *stages[0]) for _, _, stages in ablate.strategy_rows(args)][::3]
    assert [config.encoder_learning_rate for config in first] == [0, 0.1, 0.1, 0]
    assert [config.distillation_weight for config in first] == [0, 0, 1, 0]


def test_flags_change_what_the_rows_have_in_common():
    for words, rate, start in (([], 0.0, "features"), (["--muon-learning-rate", "0.1"], 0.1, "features"),
                               (["--projection-init", "random"], 0.0, "random")):
        args = ablate.parse_args(["strategy", *words])
        configs = [ablate.ablated_settings(args, *stage)
                   for _, _, stages in ablate.strategy_rows(args) for stage in stages]
        assert {(config.muon_learning_rate, config.projection_init) for config in configs} == {(rate, start)}


def test_the_rows_of_the_ablations_are_those_of_the_papers_tables():
    rows = list(ablate.codebook_rows(ablate.parse_args(["codebook"])))
    d, K = 192, PRESETS["tiny"]["1"].codebook_size
    shapes = {(row["dimension"], row["size"]) for row, _, _ in rows}
    assert {e for e, size in shapes if size == K} >= {16, d, 2 * d}
    assert {size for e, size in shapes if e == d} >= {512, K, 16384, 32768}
    starts = {(row["start"], changes["codebook_init"], changes.get("projection_init"))
              for row, _, ((_, changes),) in rows}
    assert starts == {("ours", "data", None), ("paper's", "gaussian", "random")}
    for _, _, runs in ablate.strategy_rows(ablate.parse_args(["strategy"])):
        assert sum(changes["steps"] for _, changes in runs) == 400


def test_the_rows_of_the_quantizer_ablation_differ_in_the_choice_and_in_nothing_else():
    args = ablate.parse_args(["quantizer"])
    rows = list(ablate.quantizer_rows(args))
    by_name = {row["quantizer"]: asdict(ablate.ablated_settings(args, *stages[0])) for row, _, stages in rows}
    choices = {"quantizer", "codebooks", "projection", "latent_noise", "codebook_init"}
    common = [{name: value for name, value in config.items() if name not in choices} for config in by_name.values()]
    assert all(config == common[0] for config in common)
    assert [by_name[f"mcq {m}"]["codebooks"] for m in (1, 2, 4, 8)] == [1, 2, 4, 8]


def test_the_rows_of_the_quantizer_ablation_that_a_claim_rests_on_have_three_seeds():
    rows = list(ablate.quantizer_rows(ablate.parse_args(["quantizer", "--seed", "5"])))
    for claimed in ("mcq 1", "mcq 8", "rq 8", "mcq 8, attention"):
        assert [seed for row, seed, _ in rows if row["quantizer"] == claimed] == [5, 6, 7]


@pytest.mark.parametrize("ablation, every", [("quantizer", 7), ("supervision", 1)])
def test_an_ablation_of_unitok_ends_in_a_table_and_a_plot(ablation, every, short_run, tmp_path, monkeypatch):
    make_rows, *others = ablate.ABLATIONS[ablation]
    monkeypatch.setattr(ablate, "UNITOK", {**ablate.UNITOK, "codebooks": 4, "codebook_dim": 12})
    monkeypatch.setitem(ablate.ABLATIONS, ablation, (lambda args: list(make_rows(args))[::every], *others))
    ablate.main([ablation, *without_dimension(short_run)])
    table = (tmp_path / "run/table.md").read_text()
    rows = ablate.ABLATIONS[ablation][0](ablate.parse_args([ablation]))
    names = {tuple(row.values()) for row, _, _ in rows}
    assert len(table.splitlines()) == 2 + len(names) and "nan" not in table
    assert (tmp_path / "run/plot.png").exists()


# --- what semantics cost ---


@torch.no_grad()
def test_pixels_as_an_encoder_are_the_standardised_patches_and_layers_summed_are_all_blocks():
    encoder, images = small_model().encoder, torch.rand(2, 3, 16, 24)
    encoder.__class__ = semantics.Pixels
    standard = (images - encoder.mean) / encoder.std
    assert torch.equal(encoder(images)[1, 7], standard[1, :, 4:8, 4:8].flatten())  # 6 patches of 4 pixels in a row
    encoder.__class__ = semantics.LayersSummed
    states = torch.stack(list(encoder.hidden_states(images))).double()  # (blocks, B, 1 + N, d)
    states = (states - states.mean(-1, keepdim=True)) / (states.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(encoder(images).double(), states.sum(0)[:, 1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_k_means_of_pixels_paints_every_patch_as_its_nearest_centre():
    sizes, images = small_model().config, torch.rand(2, 3, 16, 16)
    centres = torch.rand(sizes.codebook_size, 48)
    out = semantics.PatchCodebook(sizes, centres)(images)
    for image, row, column in itertools.product(range(2), range(4), range(4)):
        place = image, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        nearest = (centres - images[place].flatten()).pow(2).sum(1).argmin()
        assert out.indices[image, 4 * row + column] == nearest
        torch.testing.assert_close(out.reconstruction[place].flatten(), centres[nearest])


def mostly_plain(count):
    """A set of images nine tenths of which have one colour, nearly white."""
    images = (0.97 + 0.02 * torch.rand(count, 1, 1, 1)).repeat(1, 3, 16, 16)
    images[::10] = torch.rand(len(images[::10]), 3, 16, 16)
    return SimpleNamespace(views=lambda *_: iter((255 * images).round().div(255).split(64)))


@pytest.mark.parametrize("plain", [False, True])
def test_what_codes_are_worth_without_a_decoder_is_what_least_squares_makes_of_nine_mean_patches(plain, photo_folder):
    model = small_model(codebook_size=8)
    splits = ([mostly_plain(count) for count in (4000, 64)] if plain else
              [ImageSet(photo_folder, split, 16) for split in ("train", "val")])
    found = semantics.without_decoder(model, *splits, "cpu", 0)
    data = []
    for images in splits:
        x = torch.cat(list(images.views(64, "cpu", 0)))
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 16, 48)
        data.append((patches.double().numpy(), model.encode(x)[1].numpy()))
    (patches, codes), (truth, others) = data
    means = np.stack([patches[codes == k].mean(0) if (codes == k).any() else np.zeros(48) for k in range(8)])

    def around(codes):
        grid = np.pad(means[codes].reshape(-1, 4, 4, 48), ((0, 0), (1, 1), (1, 1), (0, 0)))
        seen = np.stack([grid[:, i:i + 4, j:j + 4] for i in range(3) for j in range(3)], axis=-1)  # channel, then place
        return np.concatenate([seen.reshape(-1, 9 * 48), np.ones((codes.size, 1))], axis=1)

    seen = around(codes)
    painted = around(others) @ np.linalg.solve(seen.T @ seen + np.eye(seen.shape[1]), seen.T @ patches.reshape(-1, 48))
    for name, some in (("own_code_psnr", means[others]), ("nine_codes_psnr", painted.reshape(truth.shape))):
        errors = ((np.clip(some, 0, 1) * 255).round() / 255 - truth)**2
        assert found[name] == pytest.approx(np.mean(-10 * np.log10(errors.mean((1, 2)))), abs=0.05)


@pytest.mark.parametrize("extra", [["--quantizer", "none"], ["--codebooks", "2"], ["--output-patch-size", "4"]])
def test_what_semantics_cost_is_asked_of_one_codebook_and_of_patches_of_one_size(extra, tmp_path):
    with pytest.raises(SystemExit, match=f"error: semantics.py chooses {extra[0]} itself"):
        semantics.main(["--out", str(tmp_path / "out"), *extra])


def test_what_semantics_cost_is_a_table_of_four_rows_that_is_not_made_twice(short_run, tmp_path, monkeypatch):
    save_encoder(vqrae.Encoder(small_vit(width=48)), tmp_path / "encoder")  # as many channels as a patch has values
    arguments = [*short_run[2:], "--encoder", str(tmp_path / "encoder")]
    semantics.main(arguments)
    out = tmp_path / "run"
    table = (out / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == ["k-means", "pixels", "layers summed", "last layer"]
    assert all(float(cell) > 3 for row in table[2:] for cell in row.split("|")[3:6])  # three times a PSNR
    monkeypatch.setattr(train, "train", None)
    semantics.main(arguments)
    assert (out / "table.md").read_text().splitlines() == table
    with pytest.raises(SystemExit, match="was run with other settings than these"):
        semantics.main([*arguments, "--seed", "5"])

# --- memory ---


def test_what_autograd_keeps_is_what_the_profiler_sees_allocated():
    model = torch.nn.Sequential(*[layer for _ in range(4) for layer in (torch.nn.Linear(64, 64), torch.nn.GELU())])
    x = torch.randn(512, 64)
    kept = memory.kept_for_backward(lambda: model(x), model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = model(x)  # held, and with it all that is kept
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert kept == pytest.approx(allocated - y.nbytes + x.nbytes, rel=0.01)


def test_a_run_holds_its_weights_their_average_gradients_and_two_moments():
    kept = memory.transformer_memory(SimpleNamespace(small=True))[0]
    weights = memory.size(vqrae.VisualLM(vqrae.LMConfig(**{**memory.QWEN3, **memory.SMALL_LM})).parameters())
    assert 5 * weights <= kept < 6.5 * weights


def test_settings_that_fit_are_the_largest_part_that_leaves_a_tenth_of_the_memory():
    assert memory.settings_that_fit(held=2e9, image=1e8, batch=96, gb=8) == "`--accumulate 2`, 48 at a time"
    assert memory.settings_that_fit(held=2e9, image=1e8, batch=96, gb=7) == "`--accumulate 3`, 32 at a time"
    assert memory.settings_that_fit(held=7.2e9, image=1e8, batch=96, gb=8) == "-"


def test_memory_prints_a_row_for_every_case(capsys, monkeypatch):
    monkeypatch.setattr(vqrae, "attend", vqrae.attend)  # which it sets to another
    memory.main(["--small", "--only", "dinov2-s-1", "dinov2-s-2", "qwen3-0.6b-ar", "--gb", "8"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and rows[2].startswith("| `dinov2-s`, stage 1 | ") and rows[4].startswith("| `qwen3-0.6b`, ")
