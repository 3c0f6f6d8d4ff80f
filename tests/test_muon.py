"""Muon: singular values near 1, and torch's own steps."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import seeds
from support.muon import Muon


@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12), seeds)
def test_muon_steps_along_the_singular_vectors_with_all_singular_values_near_1(count, rows, columns, seed):
    x = np.random.RandomState(seed % 2**32).randn(count, rows, columns)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    assume((s[:, -1] > 0.02 * s[:, 0]).all())  # what is far smaller grows too, but not so far
    y = Muon([torch.zeros(2, 2)], torch.float32, 0.95).orthogonalise(torch.tensor(x).float()).double().numpy()
    turned = u.transpose(0, 2, 1) @ y @ vt.transpose(0, 2, 1)  # (count, rank, rank)
    values = turned.diagonal(axis1=1, axis2=2)
    assert (values > 0.18).all() and (values < 1.9).all()
    np.testing.assert_allclose(turned, values[..., None] * np.eye(values.shape[1]), atol=1e-3)


@given(st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=4), seeds)
@settings(max_examples=10)
def test_muon_in_bf16_is_torchs_muon_when_it_takes_that_ones_polynomial(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    torchs = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    muon = Muon([{"params": ours, "lr": 0.01, "weight_decay": 0.1}], torch.bfloat16, momentum=0.9)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        torchs.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("support.muon.POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
            muon.step()
    for p, q in zip(ours, theirs):
        # Far less than the steps taken, each of which moves an entry by 0.01 * 0.2 and more.
        torch.testing.assert_close(p, q, rtol=1e-3, atol=5e-4)
