"""The experiments: ablations in small, and the collapse."""

import argparse
import re

import pytest
from PIL import Image

import train
from presets import PRESETS
from support.files import InputError


@pytest.mark.parametrize("ablation, every", [("codebook", 5), ("strategy", 3)])
def test_an_ablation_goes_on_row_by_row_and_ends_in_a_table_and_a_plot(short_run, tmp_path, monkeypatch, ablation,
                                                                       every):
    make_rows, *columns = train.ABLATIONS[ablation]

    def few_small_rows(args):
        return [(keys, seed, [(stage, {**changes, **({"codebook_size": 32} if stage == "1" else {})})
                              for stage, changes in stages])
                for keys, seed, stages in list(make_rows(args))[::every]]

    monkeypatch.setitem(train.ABLATIONS, ablation, (few_small_rows, *columns))
    trained, real = [], train.train

    def interrupted(run):
        if len(trained) == 2:
            raise InputError("interrupted")
        going_on(run)

    def going_on(run):
        trained.append(run.args.out)
        real(run)

    at = short_run.index("--codebook-dim")
    arguments = ["--ablate", ablation, *short_run[2:at], *short_run[at + 2:]]
    out = tmp_path / "run"
    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        train.main(arguments)
    assert not (out / "table.md").exists()
    monkeypatch.setattr(train, "train", going_on)
    train.main(arguments)
    assert len(trained) == len(set(trained)), "a row that was done ran again"
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 2 + len({tuple(keys.items()) for keys, _, _ in few_small_rows(train.parse_args(arguments))})
    assert "nan" not in "".join(table) and Image.open(out / "plot.png").size[0] > 200
    with pytest.raises(SystemExit, match="was run with other settings than these; choose another --out"):
        train.main(arguments + ["--steps", "8"])


@pytest.mark.parametrize("extra", [["--print-config"], ["--benchmark"], ["--init", "x"], ["--overwrite"],
                                   ["--codebook-dim", "8"]])
def test_an_ablation_refuses_what_it_would_have_to_ignore(extra, tmp_path):
    with pytest.raises(SystemExit, match="error: --ablate"):
        train.main(["--ablate", "codebook", "--out", str(tmp_path / "out"), *extra])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, sentence", [
    (["strategy", "--adversarial-weight", "0.1"], "--ablate strategy chooses --adversarial-weight itself"),
    (["supervision", "--contrastive", "none"], "--ablate supervision is about captions"),
    (["supervision", "--preset", "qwen3-0.6b"], "--preset qwen3-0.6b has no settings for --stage 1"),
])
def test_what_an_ablation_cannot_do_is_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main(["--ablate", *arguments, "--out", str(tmp_path / "out")])


def test_a_row_of_an_ablation_does_not_go_on_from_a_stage_of_other_settings(short_run, tmp_path):
    def run_row(steps):
        args = train.parse_args(["--ablate", "codebook", *short_run[2:], "--steps", steps])
        config = train.settings_for(argparse.Namespace(**{**vars(args), "stage": "1"}), "1")
        return train.run_row(args, tmp_path / "row", 0, [("1", config)])

    assert run_row("2") == run_row("2")  # what is done is not done again
    with pytest.raises(InputError, match="continues a run with its own settings"):
        run_row("3")


def test_the_collapse_is_drawn_and_its_codes_in_use_are_told(short_run, tmp_path, capsys):
    train.main(["--ablate", "collapse", *short_run[2:]])
    told = re.findall(r"(\d+) codes in use at step 0", capsys.readouterr().out)
    assert len(told) == 4 and all(1 <= int(count) <= 32 for count in told)
    assert Image.open(tmp_path / "run/collapse.png").size[0] > 200


def test_flags_do_not_turn_one_strategy_into_another():
    args = train.parse_args(["--ablate", "strategy", "--distillation-weight", "0.5", "--encoder-learning-rate", "0.1"])
    first = [stages[0][1] for _, _, stages in train.strategy_rows(args)][::3]
    assert [changes["encoder_learning_rate"] for changes in first] == [0, 0.1, 0.1, 0]
    assert [changes["distillation_weight"] for changes in first] == [0, 0, 1, 0]


def test_the_rows_of_the_ablations_are_those_of_the_papers_tables():
    args = train.parse_args(["--ablate", "codebook"])
    rows = list(train.codebook_rows(args))
    d, K = 192, PRESETS["tiny"]["1"].codebook_size
    shapes = {(row["dimension"], row["size"]) for row, _, _ in rows}
    assert {e for e, size in shapes if size == K} >= {16, d, 2 * d}
    assert {size for e, size in shapes if e == d} >= {512, K, 16384}
    assert {row["start"] for row, _, _ in rows} == {"data", "gaussian"}
    for _, _, runs in train.strategy_rows(train.parse_args(["--ablate", "strategy"])):
        assert sum(changes["steps"] for _, changes in runs) == 400


def test_the_rows_of_the_quantizer_ablation_differ_in_the_choice_and_in_nothing_else():
    rows = list(train.quantizer_rows(train.parse_args(["--ablate", "quantizer"])))
    by_name = {row["quantizer"]: stages[0][1] for row, _, stages in rows}
    assert {changes["steps"] for changes in by_name.values()} == {200}
    assert {changes["codebook_dim"] for changes in by_name.values()} == {64}
    assert not any("codebook_size" in changes for changes in by_name.values())  # K, the codes of all codebooks
    assert [by_name[f"mcq {m}"]["codebooks"] for m in (1, 2, 4, 8)] == [1, 2, 4, 8]
    for claimed in ("mcq 1", "mcq 8", "rq 8", "mcq 8, attention"):
        assert sum(row["quantizer"] == claimed for row, _, _ in rows) == 3
    with pytest.raises(SystemExit, match="--ablate quantizer chooses --codebooks itself"):
        train.main(["--ablate", "quantizer", "--codebooks", "4"])


@pytest.mark.parametrize("ablation", ["quantizer", "supervision"])
def test_these_ablations_end_in_a_table_and_a_plot(ablation, short_run, tmp_path, monkeypatch):
    make_rows, *others = train.ABLATIONS[ablation]
    monkeypatch.setattr(train, "UNITOK", {**train.UNITOK, "codebooks": 4, "codebook_dim": 12})
    every = 7 if ablation == "quantizer" else 1
    monkeypatch.setitem(train.ABLATIONS, ablation, (lambda args: list(make_rows(args))[::every], *others))
    at = short_run.index("--codebook-dim")
    train.main(["--ablate", ablation, *short_run[2:at], *short_run[at + 2:]])
    table = (tmp_path / "run/table.md").read_text()
    rows = train.ABLATIONS[ablation][0](train.parse_args(["--ablate", ablation]))
    names = {tuple(row.values()) for row, _, _ in rows}
    assert len(table.splitlines()) == 2 + len(names) and "nan" not in table
    assert (tmp_path / "run/plot.png").exists()
