"""Products of few rows: they are torch's, and leave nothing behind."""

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import seeds, small_lm
from support import quick


@given(rows=st.integers(1, 40), inputs=st.integers(1, 70), outputs=st.integers(1, 300), seed=seeds,
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_quick_product_of_few_rows_is_the_product(rows, inputs, outputs, seed, dtype):
    torch.manual_seed(seed)
    x, weight = torch.randn(2, rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    exact = (x.double() @ weight.double().T).to(dtype)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(quick.few_rows(weight)(x), exact, atol=tolerance, rtol=tolerance)


def step_of(model):
    torch.manual_seed(1)
    model.loss(torch.randint(0, 5, (2, 6)) + model.config.text_vocabulary).backward()
    torch.optim.AdamW(model.parameters(), lr=0.5).step()


def filled(model):
    torch.manual_seed(2)
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("change", [
    step_of, lambda model: model.load_state_dict(filled(model)), lambda model: model.bfloat16().float(),
    lambda model: model.load_state_dict(filled(model), assign=True), lambda model: model.double()])
def test_quick_products_follow_weights_that_change_and_leave_nothing_behind(change):
    model = small_lm()
    names = set(model.state_dict())
    for times in range(2):  # once with nothing kept, then with what the first image left
        for other in (model, copy.deepcopy(model)):
            if times:
                change(other)
            tokens = [1, 2]
            for code in other.extend([[1, 2]], 5, temperature=0)[0].tolist():  # all logits anew, by torch's product
                assert other(torch.tensor([tokens]))[0, -1, model.config.text_vocabulary:].argmax() == code
                tokens.append(model.config.text_vocabulary + code)
    assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())


def test_layouts_of_weights_are_kept_from_one_image_to_the_next(monkeypatch):
    model, laid_out, real = small_lm(), [], quick.few_rows
    monkeypatch.setattr(quick, "few_rows", lambda weight: laid_out.append(weight.shape) or real(weight))
    first = model.extend([[1, 2]], 5, temperature=0)
    count = len(laid_out)
    assert count and torch.equal(model.extend([[1, 2]], 5, temperature=0), first) and len(laid_out) == count


def test_a_model_that_is_gone_takes_its_layouts_with_it():
    gc.collect()
    before, model = len(quick.ARRANGED), small_lm()
    model.extend([[1, 2]], 5)
    assert len(quick.ARRANGED) > before
    del model
    gc.collect()
    assert len(quick.ARRANGED) == before


def test_an_error_in_between_gives_torchs_products_back():
    model = small_lm()
    with pytest.raises(KeyError), quick.quick_products(model, model.embedding.weight):
        assert any("forward" in vars(module) for module in model.modules())
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
