"""Two ranks: what only a batch as a whole can tell, and how they end together."""

import json

import pytest

import train
from conftest import ROOT, log_of, torchrun

RUNS = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import support.run
import train
import vqrae

class Left(Exception):
    pass

def leave(code):
    raise Left

def infinite_on_one_rank(*arguments):
    loss, terms = real(*arguments)
    steps.append(1)
    return loss + (torch.inf if os.environ["RANK"] == "1" and len(steps) == 3 else 0), terms  # with finite gradients

runs, real, steps = json.loads(sys.argv[1]), vqrae.stage1_loss, []
support.run.leave_ranks = leave  # a rank that is not the first would end its process with a run
with support.run.one_sentence_errors(), support.run.process_group("cpu"):
    for arguments in runs:
        if arguments is runs[-1]:
            vqrae.stage1_loss = infinite_on_one_rank
        args = train.parse_args(arguments)
        try:
            train.train(args, train.settings_for(args, args.stage))
        except Left:
            pass
"""


def test_captions_of_all_ranks_are_negatives_and_a_loss_that_is_infinite_on_one_ends_both(short_run, tmp_path):
    runs = {form: short_run[:-1] + [str(tmp_path / form), "--quantizer", "mcq", "--codebooks", "4", "--precision",
                                    "fp32", "--contrastive", form] for form in ("sigmoid", "softmax")}
    for form, arguments in runs.items():
        train.main(arguments)
        runs[form] = [str(tmp_path / "ranks" / form) if word == str(tmp_path / form) else word for word in arguments]
    (tmp_path / "runs.py").write_text(RUNS)
    last = short_run[:-1] + [str(tmp_path / "infinite")]
    result = torchrun(tmp_path / "runs.py", json.dumps([*runs.values(), last]))
    assert result.returncode != 0 and "has lost another rank" not in result.stderr
    assert result.stderr.count("error: the loss or its gradient is not finite at step 2") == 2, result.stderr
    for form in runs:
        one, two = log_of(tmp_path / form), log_of(tmp_path / "ranks" / form)
        assert len(one) == len(two) == 3 and all("contrastive" in line for line in one)
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            for name in a:
                rel = 1e-4 if "perplexity" in name else 1e-5
                assert b[name] == pytest.approx(a[name], rel=rel, abs=1e-5), (form, name)
