"""docs/vq.ipynb: it runs from top to bottom, and what its cells say is so."""

import functools
import json
import math
import time

import matplotlib
import pytest
import torch

from conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:__array")  # matplotlib takes tensors by NumPy's old protocol
NOTEBOOK = ROOT / "docs/vq.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SHIPPED = ROOT / "data/pretrained/stage2"


@functools.cache
def cells_run():
    """The names that are there after all cells, in a run with shorter trainings; and the seconds that it took."""
    if not any((place / "config.json").exists() for place in (SHIPPED, ROOT / "out/stage2")):
        pytest.skip("there is no model to look at, neither data/pretrained/stage2 nor out/stage2")
    names, begin = {}, time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "docs")  # as Jupyter starts it
        patch.setenv("VQ_STEPS", "200")
        backend = matplotlib.get_backend()
        matplotlib.use("agg")
        for cell in CODE:
            code = "".join(cell["source"])
            if (SHIPPED / "config.json").exists():  # whatever somebody has in out/
                code = code.replace('ROOT / "out/stage2", ', "")
            exec(code, names)
            matplotlib.pyplot.close("all")
        matplotlib.use(backend)
    return names, time.time() - begin


@pytest.fixture
def names():
    return cells_run()[0]


def test_a_shortened_run_takes_less_than_a_minute_of_this_processor():
    before = time.process_time()
    cells_run.cache_clear()
    cells_run()
    assert time.process_time() - before < 60


def test_codes_of_k_means_have_a_smaller_error_and_four_times_as_many_a_quarter_of_it(names):
    error, points = names["error"], names["points"]
    assert error(points, names["better"]) < 0.5 * error(points, points[:12])
    errors = names["errors"]
    for few, many in ((4, 16), (16, 64), (64, 256)):
        assert 2.5 < errors[few] / errors[many] < 6


def test_only_chosen_codes_have_a_gradient_in_plain_vq_and_one_point_moves_all_codes_of_simvq(names):
    assert names["with_gradient"] < 20
    assert names["moved"] == {"PlainVQ": 1, "SimVQ": 64}


def test_a_codebook_of_plain_vq_collapses_and_simvqs_does_not(names):
    plain, simvq = names["far_plain"][0], names["far_simvq"][0]
    assert max(plain) < 6 and simvq[-1] > 12
    assert names["far_simvq"][1] < 0.5 * names["far_plain"][1]


def test_growing_features_leave_codes_of_plain_vq_behind_and_not_those_of_simvq(names):
    plain, simvq = names["grown_plain"][0], names["grown_simvq"][0]
    assert plain[0] == simvq[0] == 128 and plain[-1] < 100 and min(simvq) > 115


def test_the_simvq_of_the_notebook_is_that_of_the_repository(names):
    q, tokens = names["ours"](names["points"])
    z_q, indices, *_ = names["theirs"](names["points"])
    assert torch.equal(indices, tokens) and torch.allclose(z_q, q, atol=1e-5)


def test_utilization_and_perplexity_by_hand_are_those_of_the_repository(names):
    for counts in (names["counts"], torch.tensor([3, 0, 1]), torch.tensor([5])):
        assert names["usage_by_hand"](counts.tolist()) == pytest.approx(names["codebook_usage"](counts), rel=1e-9)
    assert names["usage_by_hand"]([1] * 7) == pytest.approx((1, 7))
    assert math.isclose(names["counts"].sum(), 64 * len(names["images"]))


def test_near_codes_paint_nearly_alike_and_far_ones_do_not(names):
    swaps = list(names["swaps"].values())
    assert swaps == sorted(swaps, reverse=True) and swaps[0] - swaps[1] < 3 < swaps[0] - swaps[-1]


def test_more_codes_paint_better(names):
    assert list(names["quality"]) == [2, 16, 256, 4096]
    assert list(names["quality"].values()) == sorted(names["quality"].values())


def test_the_file_is_executed_in_order_small_and_without_errors():
    assert NOTEBOOK.stat().st_size < 1.5e6 and 25 <= len(CELLS) <= 36
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) > 8
