"""Two ranks: what only a batch as a whole can tell, and how they end together."""

import json

import train
from conftest import assert_same_log, log_of, several_runs, torchrun

def test_captions_of_all_ranks_are_negatives_and_a_loss_that_is_infinite_on_one_ends_both(short_run, tmp_path):
    runs = {form: short_run[:-1] + [str(tmp_path / form), "--quantizer", "mcq", "--codebooks", "4", "--precision",
                                    "fp32", "--contrastive", form] for form in ("sigmoid", "softmax")}
    for form, arguments in runs.items():
        train.main(arguments)
        runs[form] = [str(tmp_path / "ranks" / form) if word == str(tmp_path / form) else word for word in arguments]
    script = several_runs(tmp_path / "runs.py", before_last="vqrae.stage1_loss = infinite_on_one_rank")
    result = torchrun(script, json.dumps([*runs.values(), short_run[:-1] + [str(tmp_path / "infinite")]]))
    assert result.returncode != 0 and "has lost another rank" not in result.stderr
    assert result.stderr.count("error: the loss or its gradient is not finite at step 2") == 2, result.stderr
    for form in runs:
        assert_same_log(tmp_path / form, tmp_path / "ranks" / form)
        assert all("contrastive" in line for line in log_of(tmp_path / form))
