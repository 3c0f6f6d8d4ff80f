"""Settings: the paper's tables, flags made of them, and what is refused before anything starts."""

import json
import re

import pytest

import sample
import train
from presets import FIXED_BY_STAGE_1, PRESETS
from support.settings import flag


# --- presets ---

TABLE_7 = {  # SigLIP2-256, SigLIP2-512, InternViT-448; stage 1, then stage 2
    "image_size": [256, 512, 448, 256, 512, 448],
    "codebook_size": [16384] * 6,
    "codebook_dim": [1536] * 6,
    "discriminator_start": [None] * 3 + [50000, 50000, 30000],
    "adversarial_weight": [0] * 3 + [0.1] * 3,
    "distillation_weight": [0] * 3 + [1.0] * 3,
    "perceptual_weight": [1.1] * 6,
    "perceptual": ["lpips-convnext"] * 6,
    "encoder_learning_rate": [0] * 3 + [1e-5] * 3,
    "learning_rate": [4e-4] * 3 + [1e-4] * 3,
    "end learning rate": [1e-4] * 3 + [1e-5] * 3,
    "weight_decay": [1e-4] * 6,
    "discriminator_learning_rate": [0] * 3 + [4e-5] * 3,
    "betas": [(0.9, 0.999)] * 6,
    "warmup_steps": [2000] * 6,
    "max_grad_norm": [1.0] * 6,
    "batch_size": [1024, 1024, 768] * 2,
    "steps": [100000, 100000, 45000, 70000, 70000, 60000],
}


@pytest.mark.parametrize("row", TABLE_7)
def test_the_papers_presets_are_table_7(row):
    columns = [(name, stage) for stage in "12" for name in ("siglip2-256", "siglip2-512", "internvit-448")]
    for (name, stage), expected in zip(columns, TABLE_7[row]):
        config = PRESETS[name][stage]
        if expected is not None:
            value = (config.learning_rate * config.end_factor if row == "end learning rate" else getattr(config, row))
            assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), (name, stage)


def test_print_config_prints_a_preset(capsys):
    train.main(["--stage", "2", "--preset", "internvit-448", "--print-config"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 60000 and printed["encoder_learning_rate"] == 1e-5


def test_print_config_is_the_preset_with_the_flags_applied(capsys):
    train.main(["--stage", "1", "--print-config", "--codebook-dim", "77"])
    config = json.loads(capsys.readouterr().out)
    assert config["codebook_dim"] == 77 and config["codebook_size"] == PRESETS["tiny"]["1"].codebook_size


def test_a_preset_says_which_stages_it_has(ar_run):
    with pytest.raises(SystemExit, match="--preset qwen3-0.6b has no settings for --stage 1"):
        train.main(["--stage", "1", "--preset", "qwen3-0.6b"])
    train.main(["--stage", "ar", "--preset", "qwen3-0.6b", "--print-config"])


# --- flags ---


@pytest.mark.parametrize("extra, sentence", [
    (["--data", "/nowhere"], "no images at /nowhere"),
    (["--encoder", "{tmp}"], "cannot read .*config.json"),
    (["--image-size", "18"], "--image-size 18 is not a multiple, at least twice, of the encoder's patches of 4"),
    (["--image-size", "4"], "--image-size 4 is not a multiple, at least twice,"),
    (["--output-patch-size", "1"], "images of 4 pixels would come out; SSIM needs 11"),
    (["--device", "nonsense"], "--device nonsense is not available"),
])
def test_a_wrong_argument_of_train_is_one_sentence(short_run, tmp_path, extra, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        train.main(short_run + [part.format(tmp=tmp_path) for part in extra])
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("extra", [["--steps", "0"], ["--batch-size", "-1"], ["--quantizer", "fsq"], ["--seed", "-1"],
                                   ["--learning-rate", "x"], ["--learning-rate", "0"], ["--max-grad-norm", "0"],
                                   ["--end-factor", "2"], ["--ema-decay", "1.5"], ["--workers", "-1"]])
def test_a_value_out_of_range_is_refused_before_anything_starts(short_run, extra, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(short_run + extra)
    assert error.value.code == 2 and extra[0] in capsys.readouterr().err


@pytest.mark.parametrize("script, arguments", [(train, ["--stage", "1", "--steps=--"]),
                                               (sample, ["codes", "--data=--"])])
def test_two_dashes_are_no_value(script, arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "=--: expected a value" in capsys.readouterr().err


@pytest.mark.parametrize("extra, sentence", [
    (["--init", "/nowhere"], "no model at /nowhere"),
    (["--codebook-dim", "9"], "--codebook-dim is fixed by the model that stage 2 starts from"),
    (["--discriminator-width", "33"], "--discriminator-width 33 is not a multiple of 32"),
])
def test_a_wrong_argument_of_stage_2_is_one_sentence(second_stage, extra, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        train.main(second_stage + extra)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("extra, sentence", [
    (["--tokenizer", "/nowhere"], "no model at /nowhere"),
    (["--codebook-size", "9"], "--codebook-size is no setting of --stage ar"),
    (["--kv-heads", "3"], "heads .--heads. 2 must be a multiple of kv_heads 3"),
    (["--qwen3", "{tmp}/tokenizer"], "--text-vocabulary is fixed by the checkpoint of --qwen3"),
    (["--init", "/nowhere"], "--text-vocabulary is fixed by the model that stage ar starts from, --init"),
])
def test_a_wrong_argument_of_stage_ar_is_one_sentence(ar_run, extra, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence) as error:
        train.main(ar_run + [part.format(tmp=tmp_path) for part in extra])
    assert "\n" not in str(error.value)


# --- help ---


@pytest.fixture
def helped(capsys, monkeypatch):
    """A function that gives the lines of --help in 80 columns, behind other arguments."""
    monkeypatch.setenv("COLUMNS", "80")

    def lines(*arguments):
        with pytest.raises(SystemExit) as ended:
            train.main([*arguments, "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out.splitlines()

    return lines


def groups_of(lines):
    """The flags under each title of a --help."""
    groups = {}
    for line in lines:
        if title := re.fullmatch(r"(\w+):", line):
            groups[title[1]] = []
        elif shown := re.match(r"  (?:-h, )?(--[\w-]+)", line):
            list(groups.values())[-1].append(shown[1])
    return groups


@pytest.mark.parametrize("stage, asked", [("1", ["--codebooks", "1"]), ("2", []), ("ar", []), ("caption", [])])
def test_the_help_of_a_stage_has_the_settings_that_it_prints_and_none_of_other_stages(stage, asked, helped, capsys):
    groups = groups_of(helped("--stage", stage))
    train.main(["--stage", stage, "--print-config", *asked])  # with its second supervision, where it can have one
    printed = {flag(name) for name in json.loads(capsys.readouterr().out)} & {flag(name) for name in train.SETTINGS}
    assert set().union(*(groups[title] for title in ("images", "optimisation", "model", "loss") if title in groups)
                       ) == printed
    assert "--init" in groups["options"]
    assert {"--seed", "--out", "--resume", "--workers", "--device", "--precision"} <= set(groups["run"])


@pytest.mark.parametrize("stage", ["1", "2", "ar", "caption"])
def test_every_flag_in_a_help_is_shown_once_and_in_a_group(stage, helped):
    lines = helped("--stage", stage)
    groups = groups_of(lines)
    shown = sum(groups.values(), [])
    assert len(shown) == len(set(shown)) and len(groups) >= 4 and all(groups.values())
    assert set(shown) == {word for line in lines for word in re.findall(r"^ +(?:-h, )?(--[a-z0-9-]+)", line)}


@pytest.mark.parametrize("stage", ["1", "2", "ar", "caption"])
def test_the_help_of_a_stage_is_at_most_120_lines_of_80_columns(stage, helped):
    lines = helped("--stage", stage)
    assert len(lines) <= 120 and max(map(len, lines)) <= 80


def test_help_without_a_stage_tells_what_the_stages_are(helped):
    lines = helped()
    assert all(any(f"--stage {stage}" in line for line in lines) for stage in train.STAGES)
    assert groups_of(lines).keys() <= {"options", "run"}


@pytest.mark.parametrize("stage, words, sentence", [
    ("1", ["--tokenizer", "x"], "--tokenizer is no setting of --stage 1"),
    ("2", ["--quantizer", "mcq"], "--quantizer is fixed by the model that stage 2 starts from, --init"),
    ("ar", ["--perceptual", "vfm"], "--perceptual is no setting of --stage ar"),
    ("caption", ["--caption-dropout", "0.5"], "--caption-dropout is no setting of --stage caption"),
])
def test_a_flag_that_a_help_hides_is_refused_with_a_sentence(stage, words, sentence, helped):
    assert words[0] not in sum(groups_of(helped("--stage", stage)).values(), [])
    with pytest.raises(SystemExit, match=f"^error: {sentence}$"):
        train.main(["--stage", stage, *words])


def test_no_flag_that_stage_1_has_fixed_is_in_the_help_of_stage_2(helped):
    shown = sum(groups_of(helped("--stage", "2")).values(), [])
    assert not set(shown) & {flag(name) for name in FIXED_BY_STAGE_1}
