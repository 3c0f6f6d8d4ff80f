"""What must hold on the device that trains: `pytest tests/test_device.py --device cuda`; without the flag, the CPU.

The other test files ask more, and of the CPU alone, which is the reference here.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vqrae
from conftest import assert_resume_is_exact, make_run, seeds, small_lm, small_model, take_steps

kinds = st.sampled_from([vqrae.SimVQ, vqrae.VectorQuantizer])


def quantizer_on(device, kind, K, e, seed, tokens=64):
    """A random quantizer and features (tokens, e), made on the CPU: every device has the same."""
    torch.manual_seed(seed)
    quantizer, z = kind(K, e), torch.randn(tokens, e)
    return quantizer.to(device), z.to(device)


def codes_in_float64(quantizer):
    """All effective codes (K, e) by a product in float64, on the CPU since mps has none."""
    codes = quantizer.codebook.detach().cpu().double()
    if isinstance(quantizer, vqrae.SimVQ):
        codes = codes @ quantizer.W.weight.detach().cpu().double().T + quantizer.W.bias.detach().cpu().double()
    return codes


# --- the quantizer ---


@given(kinds, st.integers(1, 5000), st.sampled_from([1, 8, 33, 256]), seeds)
def test_the_chosen_code_is_the_nearest_by_float64_brute_force(device, kind, K, e, seed):
    quantizer, z = quantizer_on(device, kind, K, e, seed)
    indices = quantizer(z)[1].cpu()
    distance = torch.cdist(z.cpu().double(), codes_in_float64(quantizer)).square()
    chosen = distance.gather(1, indices[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 1e-5 * (1 + e)).all()


@given(kinds, seeds)
def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_the_feature(device, kind, seed):
    quantizer, z = quantizer_on(device, kind, 30, 8, seed)
    z_q, indices, _, _ = quantizer(z.requires_grad_())
    torch.testing.assert_close(z_q.cpu(), codes_in_float64(quantizer)[indices.cpu()].float())
    upstream = torch.randn_like(z_q)
    (gradient,) = torch.autograd.grad(z_q, z, upstream)
    assert torch.equal(gradient, upstream)


@given(st.integers(1, 200), st.integers(1, 40), seeds)
def test_the_gradient_of_W_is_that_of_the_codebook_loss_worked_in_float64(device, K, e, seed):
    quantizer, z = quantizer_on(device, vqrae.SimVQ, K, e, seed)
    z_q, indices, codebook_loss, commitment_loss = quantizer(z)
    (z_q.sum() + codebook_loss + commitment_loss).backward()
    base = quantizer.codebook.cpu().double()[indices.cpu()]  # (n, e), before W
    error = 2 * (codes_in_float64(quantizer)[indices.cpu()] - z.cpu().double()) / z.numel()  # (n, e)
    torch.testing.assert_close(quantizer.W.weight.grad.cpu().double(), error.T @ base, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.W.bias.grad.cpu().double(), error.sum(0), rtol=1e-4, atol=1e-6)


@given(kinds, seeds)
def test_the_search_ignores_autocast_since_bf16_would_pick_wrong_neighbours(device, kind, seed):
    quantizer, z = quantizer_on(device, kind, 200, 16, seed)
    with torch.autocast(device.type, torch.bfloat16):
        indices = quantizer(z)[1]
    assert torch.equal(indices, quantizer(z)[1])


@pytest.mark.parametrize("e", [8, 256])
def test_the_gradient_of_codes_is_the_same_every_time_however_many_tokens_share_one(device, e):
    quantizer, gradient = quantizer_on(device, vqrae.VectorQuantizer, 64, e, 0, tokens=8192)
    indices = torch.randint(64, (8192,)).to(device)
    first, *others = [torch.autograd.grad(quantizer.lookup(indices), quantizer.codebook, gradient) for _ in range(10)]
    assert all(other[0].equal(first[0]) for other in others)


@given(kinds, st.integers(1, 60), seeds)
def test_codes_started_on_data_are_all_in_use(device, kind, K, seed):
    quantizer, z = quantizer_on(device, kind, K, 6, seed, tokens=500)
    z = z * torch.tensor([3.0, 1, 1, 0.1, 0.1, 0.01], device=device) + 5  # a common mean, few directions
    vqrae.start_codebook(quantizer, z, generator=torch.Generator().manual_seed(seed))
    assert vqrae.codebook_usage(torch.bincount(quantizer.search(z), minlength=K))[0] >= 0.95


# --- the losses ---


def loss_and_gradients(device, seed, adversarial):
    """Eq. 4's terms or, with all that Eq. 6 adds, stage 2's, of a small random model; and all gradients."""
    model, teacher = small_model(seed), small_model(seed + 1).encoder
    torch.manual_seed(seed)
    images = torch.rand(5, 3, 16, 16)
    discriminator = vqrae.Discriminator(32) if adversarial else None
    model, teacher, images = model.to(device), teacher.to(device), images.to(device)
    perceptual, generator = vqrae.VFMPerceptual(teacher), torch.Generator().manual_seed(seed)
    out = model(images)
    if adversarial:
        discriminator.to(device)
        loss, terms = vqrae.stage2_loss(images, out, perceptual, generator=generator, teacher_features=teacher(images),
                                        discriminator=discriminator)
        loss = loss + discriminator.loss(images, out.reconstruction)[0]
    else:
        loss, terms = vqrae.stage1_loss(images, out, perceptual, generator=generator)
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in terms.items()}, gradients


@pytest.mark.parametrize("adversarial", [False, True], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_their_gradients_are_those_of_the_cpu(device, seed, adversarial):
    terms, gradients = loss_and_gradients(device, seed, adversarial)
    expected_terms, expected_gradients = loss_and_gradients(torch.device("cpu"), seed, adversarial)
    assert terms == pytest.approx(expected_terms, rel=1e-3, abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).norm() <= 2e-3 * expected.norm() + 1e-6, name


def test_reconstructions_and_codes_are_those_of_the_cpu(device):
    model = small_model()
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    there = copy.deepcopy(model).to(device)
    assert torch.equal(there.encode(images.to(device))[1].cpu(), model.encode(images)[1])
    torch.testing.assert_close(there(images.to(device)).reconstruction.cpu(), model(images).reconstruction, rtol=1e-3,
                               atol=1e-3)


# --- generation ---


@given(seeds)
def test_a_seed_repeats_the_codes_that_it_draws(device, seed):
    model = small_lm().to(device)
    one, two = (model.extend([[1, 2], [3]], 12, [4], cfg_scale=2.0, top_k=9, top_p=0.9,
                             generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(one, two) and 0 <= one.min() and one.max() < 20


@given(seeds)
def test_codes_written_greedily_are_those_of_the_cpu(device, seed):
    model = small_lm(seed)
    prompts = [[1, 2, 3], [4], [5, 6]]
    expected = model.extend(prompts, 12, temperature=0)
    assert torch.equal(copy.deepcopy(model).to(device).extend(prompts, 12, temperature=0).cpu(), expected)


def test_the_language_models_loss_and_its_gradient_are_those_of_the_cpu(device):
    model = small_lm()
    tokens, first = model.pack([[1, 2, 3], [4]], torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0)))
    there = copy.deepcopy(model).to(device)
    for each, inputs in ((model, (tokens, first)), (there, (tokens.to(device), first.to(device)))):
        each.loss(*inputs).backward()
    for expected, parameter in zip(model.parameters(), there.parameters()):
        torch.testing.assert_close(parameter.grad.cpu(), expected.grad, rtol=1e-3, atol=1e-5)


# --- training ---


@pytest.fixture
def deterministic(device):
    """Of operations that have several algorithms, those that end in the same bits; a CPU's all do."""
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on(device, arguments):
    """A run's arguments with another --device."""
    place = arguments.index("--device") + 1
    return [*arguments[:place], str(device), *arguments[place + 1:]]


@pytest.mark.parametrize("stage", ["short_run", "second_stage", "ar_run", "caption_run"])
def test_every_stage_takes_the_same_steps_when_it_is_begun_again(device, deterministic, stage, request):
    arguments = on(device, request.getfixturevalue(stage))
    terms = []
    for _ in range(2):
        run, stage = make_run(arguments)
        stage.start()
        terms.append(take_steps(run, stage, 4))
    assert terms[0] == terms[1]
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in terms[0])


@pytest.mark.parametrize("stage", ["short_run", "second_stage"])
def test_a_stopped_and_resumed_run_ends_bit_identical(device, deterministic, stage, request, tmp_path):
    assert_resume_is_exact(on(device, request.getfixturevalue(stage)), tmp_path)


def test_a_model_that_was_saved_there_is_loaded_on_the_cpu_as_the_same_model(device, tmp_path):
    model = small_model().to(device)
    model.save_pretrained(tmp_path / "model")
    for name, tensor in vqrae.VQRAE.from_pretrained(tmp_path / "model").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].cpu()), name


def test_a_product_in_fp32_is_not_rounded_to_tf32(device):
    x, y = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    error = (F.linear(x.to(device), y.to(device)).cpu().double() - x.double() @ y.double().T).abs().max()
    assert error < 1e-4
