"""One update, by hand: parts of a batch, clipping, learning rates, decay, the average, and what a stage hands to it."""

import shutil
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import train
import unitok
import vqrae
from conftest import launch_ranks, make_run, small_captioner, small_vit, take_steps, text_lm, wait_for_ranks
from presets import PRESETS
from support.images import TrainingOrder
from support.metrics import codebook_usage
from support.run import Run


# --- a run of one vector, whose gradient is whatever a test likes ---


class Place(nn.Module):
    """Three numbers to move."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(3))


def plain_descent(module):
    return {"optimizer": torch.optim.SGD([{"params": list(module.parameters()), "lr": 1.0, "peak": 1.0}])}


def toy_run(**changes):
    """A Run of a Place under plain gradient descent at a rate of 1, unless `changes` say otherwise."""
    config = dict(batch_size=4, accumulate=1, steps=1000, warmup_steps=1, end_factor=1.0, max_grad_norm=1e9,
                  ema_decay=0.0)
    args = SimpleNamespace(device="cpu", precision="fp32", seed=0, log=None)
    run = Run(args, SimpleNamespace(**{**config, **changes}))
    place = Place()
    run.train(place, plain_descent(place))
    return run


def update(run, gradient, beside=None):
    """One update, by a loss of this gradient and perhaps another's of a second network."""
    for _ in run.parts(run.config.batch_size):
        run.backward((run.model.at * torch.as_tensor(gradient)).sum())
        if beside is not None:
            run.backward((run.kept["other"].at * torch.as_tensor(beside)).sum(), name="other_loss")
    run.update()


gradients = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3)


# --- parts of a batch ---


@given(count=st.integers(1, 12), parts=st.integers(1, 12), name=st.sampled_from(["loss", "discriminator_loss"]))
def test_every_loss_of_a_batch_in_parts_has_gradient_and_value_of_the_mean_over_its_images(count, parts, name):
    run, images = toy_run(accumulate=parts), torch.arange(3.0 * count).view(count, 3)
    for part in run.parts(count):
        run.backward((run.model.at + images[part]).pow(2).mean(0).sum(), {"double": 2 * images[part].mean()}, name)
    torch.testing.assert_close(run.model.at.grad, 2 * images.mean(0))
    torch.testing.assert_close(run.terms[name], images.pow(2).mean(0).sum())
    torch.testing.assert_close(run.terms["double"], 2 * images.mean())


@given(gradient=gradients)
def test_an_update_forgets_the_gradients_before_it(gradient):
    run = toy_run()
    for _ in range(3):
        update(run, gradient)
    torch.testing.assert_close(run.model.at.detach(), -3 * torch.tensor(gradient))


# --- clipping ---


@given(gradient=gradients, limit=st.floats(1e-3, 20))
def test_a_gradient_longer_than_the_limit_is_brought_to_it_and_a_shorter_one_left_as_it_is(gradient, limit):
    run = toy_run(max_grad_norm=limit)
    update(run, gradient)
    gradient = torch.tensor(gradient)
    expected = -gradient * min(1.0, limit / max(gradient.norm().item(), 1e-9))
    torch.testing.assert_close(run.model.at.detach(), expected, rtol=1e-3, atol=1e-5)
    assert run.model.at.norm() <= limit * 1.001
    torch.testing.assert_close(run.window["grad_norm"][0], gradient.norm())  # logged as it was


def test_two_networks_are_clipped_each_on_its_own():
    run, other = toy_run(max_grad_norm=1.0), Place()
    run.train_beside("other", other, plain_descent(other), start=0)
    update(run, [0.5, 0.0, 0.0], beside=[0.0, 100.0, 0.0])
    torch.testing.assert_close(run.model.at.detach(), torch.tensor([-0.5, 0.0, 0.0]))
    torch.testing.assert_close(other.at.detach(), torch.tensor([0.0, -1.0, 0.0]))


# --- the average ---


@given(gradient=gradients, most=st.one_of(st.just(0.999), st.floats(0, 1)))
def test_the_average_is_short_at_first_and_never_longer_than_its_decay(gradient, most):
    run, average, at = toy_run(ema_decay=most), torch.zeros(3), torch.zeros(3)
    for old in (2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15):  # what is left of the old average at steps 1 to 5
        update(run, gradient)
        at = at - torch.tensor(gradient)
        average = min(old, most) * average + (1 - min(old, most)) * at
        torch.testing.assert_close(run.average.at.detach(), average, rtol=1e-4, atol=1e-4)
    assert torch.equal(run.average.at, run.model.at.detach()) == (most == 0 or not any(gradient))


def test_the_average_is_another_model_that_never_trains():
    run = toy_run()
    assert run.average.at.data_ptr() != run.model.at.data_ptr() and not run.average.training


# --- learning rates ---


@given(steps=st.integers(1, 60), warmup=st.integers(1, 100), start=st.integers(0, 50), end=st.floats(0, 1))
def test_a_warm_up_takes_no_more_than_half_of_what_is_left_and_counts_from_the_start(steps, warmup, start, end):
    run = toy_run(steps=start + steps, warmup_steps=warmup, end_factor=end)
    rates = [run.schedule(step, start) for step in range(start, start + steps)]
    rising = min(warmup, max(1, steps // 2))
    assert rates[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)])
    assert all(a >= b for a, b in zip(rates[rising - 1:], rates[rising:]))
    assert run.schedule(start + steps, start) == pytest.approx(end) or steps == 1  # which has no time to fall
    falling = steps - rising
    if falling and falling % 2 == 0:
        assert run.schedule(start + rising + falling // 2, start) == pytest.approx((1 + end) / 2)


def test_a_network_that_sets_in_late_rests_till_then_and_warms_up_from_there():
    run, other, moved = toy_run(warmup_steps=4), Place(), []
    run.train_beside("other", other, plain_descent(other), start=2)
    for _ in range(4):
        before = [run.model.at.detach().clone(), other.at.detach().clone()]
        update(run, [1.0, 0.0, 0.0], beside=[1.0, 0.0, 0.0])
        moved.append([round((old - new.detach())[0].item(), 6) for old, new in zip(before, (run.model.at, other.at))])
    assert moved == [[0.25, 0.0], [0.5, 0.0], [0.75, 0.25], [1.0, 0.5]]
    assert run.window["other_grad_norm"][1] == 2  # and is not clipped before


# --- chance ---


@given(seed=st.integers(0, 2**60), done=st.integers(0, 1000))
def test_what_a_step_draws_depends_on_seed_and_step_and_on_nothing_else(seed, done):
    run, draws = toy_run(), []
    for run.args.seed, run.done in ((seed, done), (seed, done), (seed, done + 1), (seed + 1, done)):
        torch.rand(3)
        draws.append([torch.rand(2, generator=run.generator()).tolist(), torch.rand(2).tolist()])
    assert draws[0] == draws[1]
    assert all(draws[0][i] != other[i] for other in draws[2:] for i in (0, 1))


# --- what the stages hand to an update ---


@pytest.fixture
def everything(short_run):
    """Arguments of a run of all that a tokenizer can have from its first step on, and each weight other than 1."""
    return short_run + ["--encoder-learning-rate", "1e-4", "--distillation-weight", "0.7", "--adversarial-weight",
                        "0.3", "--discriminator-learning-rate", "3e-4", "--discriminator-width", "32",
                        "--quantizer-weight", "0.5", "--perceptual-weight", "2.5", "--precision", "fp32"]


def test_the_loss_of_stage_1_is_the_sum_of_its_terms_by_the_weights_that_were_asked_for(short_run):
    for terms in take_steps(*make_run(short_run + ["--quantizer-weight", "0.5", "--perceptual-weight", "2.5"]), 2):
        assert terms["loss"] == pytest.approx(
            terms["mse"] + 2.5 * terms["perceptual"] + 0.5 * (terms["codebook"] + terms["commitment"]), rel=1e-4)


def test_the_loss_of_stage_2_is_the_sum_of_its_terms_by_the_weights_that_were_asked_for(everything):
    terms = take_steps(*make_run(everything + ["--encoder-learning-rate", "3e-2", "--warmup-steps", "1"]), 3)[-1]
    assert terms["distillation"] > 1e-2 * terms["loss"] and abs(terms["adversarial"]) > 1e-2 * terms["loss"]
    assert terms["loss"] == pytest.approx(
        terms["mse"] + 2.5 * terms["perceptual"] + 0.5 * (terms["codebook"] + terms["commitment"])
        + 0.7 * terms["distillation"] + 0.3 * terms["adversarial"], rel=1e-4)


def test_a_log_line_tells_quality_lengths_and_codes_of_the_steps_since_the_last_one(short_run):
    run, stage = make_run(short_run + ["--accumulate", "2", "--perceptual", "none", "--precision", "fp32"])
    batches = stage.batches()
    for steps in (2, 1):
        psnr, z_norm, code_norm, indices = [], [], [], []
        for _ in range(steps):
            batch, places = next(batches)
            with torch.no_grad():
                images = batch.float() / 255
                out = run.model(images)
            error = (out.reconstruction.clamp(0, 1) - images).pow(2).mean((1, 2, 3))
            psnr.append(-10 * error.log10().mean().item())
            z_norm.append(out.z.norm(dim=-1).mean().item())
            code_norm.append(out.z_q.norm(dim=-1).mean().item())
            indices.append(out.indices.flatten())
            stage.step((batch, places))
        line, counts = run.log(123.0), torch.cat(indices).bincount(minlength=32)
        found = [line[name] for name in ("train_psnr", "z_norm", "code_norm")]
        assert found == pytest.approx([np.mean(values) for values in (psnr, z_norm, code_norm)], rel=1e-4)
        assert (line["train_utilization"], line["train_perplexity"]) == pytest.approx(codebook_usage(counts))
        assert line["step"] == run.done and line["images_per_second"] == 123.0
        assert line["lr"] == pytest.approx(run.config.learning_rate * run.schedule(run.done - 1))


def test_a_step_of_the_discriminator_tells_originals_from_reconstructions(everything, monkeypatch):
    seen, real = {}, vqrae.Discriminator.loss
    monkeypatch.setattr(vqrae.Discriminator, "loss", lambda discriminator, *images, **options: (
        seen.update(real=images[0], fake=images[1]), real(discriminator, *images, **options))[1])
    run, stage = make_run(everything)
    batch, places = next(stage.batches())
    with torch.no_grad():
        expected = run.model(batch.float() / 255).reconstruction
    stage.step((batch, places))
    torch.testing.assert_close(seen["real"], batch.float() / 255)
    torch.testing.assert_close(seen["fake"], expected)


@pytest.mark.parametrize("parts", ["2", "4"])
def test_the_discriminators_gradient_of_a_batch_in_parts_is_that_of_the_whole(everything, parts):
    found = []
    for accumulate in ("1", parts):
        run, stage = make_run(everything + ["--accumulate", accumulate, "--max-grad-norm", "1e9", "--perceptual",
                                            "none"])
        take_steps(run, stage, 1)
        found.append(torch.cat([p.grad.flatten() for p in run.kept["discriminator"].parameters()]))
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_the_perceptual_loss_sees_with_the_frozen_encoder_not_with_the_one_that_learns(everything, monkeypatch):
    eyes, real = [], vqrae.VFMPerceptual
    monkeypatch.setattr(vqrae, "VFMPerceptual", lambda encoder: eyes.append(encoder) or real(encoder))
    run, stage = make_run(everything)
    assert eyes == [stage.teacher] and stage.teacher is not run.model.encoder
    assert not any(p.requires_grad for p in stage.teacher.parameters())


def rates_of(run):
    """{optimizer: {parameter's name: its rate now over the schedule's factor}}."""
    names = {p: name for kind in ("model", "discriminator") for name, p in run.kept[kind].named_parameters(kind)}
    return {kind: {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
            for network in run.networks for kind, optimizer in network.optimizers.items()}


def test_encoder_muon_discriminator_and_all_else_have_rates_of_their_own_and_follow_one_schedule(everything):
    run, stage = make_run(everything + ["--learning-rate", "1e-3", "--muon-learning-rate", "2e-2", "--warmup-steps",
                                        "2", "--discriminator-start", "2"])
    for step in range(4):
        take_steps(run, stage, 1)
        rates, factor, late = rates_of(run), run.schedule(step), run.schedule(step, 2)
        for name, rate in rates["optimizer"].items():
            peak = 1e-4 if name.startswith("model.encoder.") else 1e-3
            assert rate == pytest.approx(peak * factor), name
        assert [*rates["muon"].values()] == pytest.approx([2e-2 * factor] * len(rates["muon"]))
        if step >= 2:
            [rate] = set(rates["discriminator_optimizer"].values())
            assert rate == pytest.approx(3e-4 * late) and late != factor
    assert all(name.startswith("discriminator.") for name in rates["discriminator_optimizer"])


def test_stage_ar_reads_codes_as_they_are_misread_and_writes_them_as_they_are(ar_run, monkeypatch):
    run, stage = make_run(ar_run + ["--code-noise", "0.25"])
    asked, packed, pack = [], [], run.model.pack
    monkeypatch.setattr(train, "misread", lambda codes, most, generator: asked.append(most) or (codes + 1) % 32)
    monkeypatch.setattr(run.model, "pack", lambda prompts, codes: packed.append(codes) or pack(prompts, codes))
    take_steps(run, stage, 1)
    written, read = packed
    assert asked == [0.25] and torch.equal(read, (written + 1) % 32)


@pytest.mark.parametrize("dropout, expected", [("0", {"noto class0", "noto class1"}), ("1", {"class0", "class1"})])
def test_styles_are_left_out_as_often_as_asked(ar_run, dropout, expected, monkeypatch):
    run, stage = make_run(ar_run + ["--caption-dropout", "0", "--style-dropout", dropout])
    for record in run.train_images.records:
        record["style"] = "noto"
    asked, prompt = set(), run.model.prompt
    monkeypatch.setattr(run.model, "prompt", lambda caption: asked.add(caption) or prompt(caption))
    take_steps(run, stage, 3)
    assert asked == expected


def test_captions_of_a_batch_in_parts_weigh_by_their_tokens(caption_run, photo_folder, tmp_path):
    for name, new in (("class0", "one"), ("class1", "quite another class of pictures")):
        shutil.copytree(photo_folder / name, tmp_path / "photos" / new)
    found = []
    for parts in ("1", "3", "4"):  # in the end each alone
        run, stage = make_run(caption_run + ["--data", str(tmp_path / "photos"), "--accumulate", parts,
                                             "--max-grad-norm", "1e9", "--precision", "fp32"])
        [terms] = take_steps(run, stage, 1)
        found.append((terms["loss"], torch.cat([p.grad.flatten() for p in run.networks[0].parameters])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)


def test_adamw_has_the_betas_and_the_epsilon_of_the_settings():
    config = SimpleNamespace(**{**vars(PRESETS["tiny"]["2"]), "betas": (0.7, 0.8), "adam_epsilon": 0.125})
    optimizer = train.make_optimizers(Place(), config, 1e-3, bf16=False)["optimizer"]
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.7, 0.8), 0.125)}


# --- decay ---


def decay_of(module, **changes):
    """{parameter's name: its weight decay} of all optimizers, where 0.5 was asked for."""
    config = SimpleNamespace(**{**vars(PRESETS["tiny"]["2"]), "weight_decay": 0.5, **changes})
    names = {p: name for name, p in module.named_parameters()}
    return {names[p]: group["weight_decay"] for optimizer in train.make_optimizers(
        module, config, config.learning_rate, bf16=False).values() for group in optimizer.param_groups
        for p in group["params"]}


def assert_decayed(module, expected):
    """Of every parameter exactly those named decay, with and without Muon."""
    for muon in (0.0, 1e-3):
        decay = decay_of(module, muon_learning_rate=muon)
        assert decay.keys() == {name for name, _ in module.named_parameters()}
        assert {name for name, value in decay.items() if value == 0.5} == set(expected)
        assert set(decay.values()) <= {0.0, 0.5}


VIT_MATRICES = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
LM_MATRICES = ("attention.q", "attention.k", "attention.v", "attention.out", "gate", "up", "down")


def of_blocks(prefix, matrices, depth=2):
    return [f"{prefix}blocks.{i}.{matrix}.weight" for i in range(depth) for matrix in matrices]


@pytest.mark.parametrize("quantizer", ["simvq", "vq"])
def test_matrices_of_a_tokenizer_decay_but_not_W_nor_codes_nor_embeddings_nor_vectors(quantizer):
    vit = small_vit()
    vit.registers, vit.family = 2, "dinov2_with_registers"
    model = vqrae.VQRAE(vqrae.VQRAEConfig(vit, 16, 4, codebook_size=40, codebook_dim=12, quantizer=quantizer))
    assert_decayed(model, [
        *of_blocks("encoder.", VIT_MATRICES), "project_in.weight", "project_out.weight",
        *of_blocks("decoder.", VIT_MATRICES), "decoder.head.weight"])


def test_matrices_of_a_language_model_decay_but_not_its_embedding():
    assert_decayed(text_lm(), of_blocks("", LM_MATRICES))


def test_matrices_of_a_captioner_decay_but_not_its_embedding():
    model = small_captioner()
    model.encoder.requires_grad_(False)
    del model.encoder
    assert_decayed(model, ["projector.0.weight", "projector.2.weight", *of_blocks("lm.", LM_MATRICES)])


def test_matrices_of_a_text_tower_decay_but_not_its_embedding():
    text = text_lm().text
    tower = vqrae.LMConfig(text.get_vocab_size(), 0, 16, 1, 2, 1, 8, 24)
    model = unitok.UniTok(unitok.UniTokConfig(small_vit(), 16, 4, codebook_size=40, codebook_dim=12, quantizer="mcq",
                                              codebooks=4, text=tower), text)
    expected = of_blocks("tower.lm.", LM_MATRICES, depth=1) + ["tower.out.weight", "image_head.weight"]
    decayed = {name for name, value in decay_of(model).items() if value}
    assert {name for name in decayed if name.startswith(("tower.", "image_head."))} == set(expected)


# --- before the first step, and behind it ---


def test_the_start_looks_at_as_many_training_tokens_as_asked_and_at_every_image_of_an_epoch(short_run, monkeypatch):
    run, stage = make_run(short_run + ["--start-tokens", "300"])
    seen = []
    monkeypatch.setattr(run.model, "start", lambda features, patches, *rest: seen.append((features, patches)))
    stage.start()
    [(features, patches)] = seen
    keys = iter(TrainingOrder(len(run.train_images), 0, 0))
    batches = [next(run.train_images.batches([next(keys) for _ in range(4)], 4)).float() / 255 for _ in range(5)]
    with torch.no_grad():  # 16 tokens an image, 4 images a batch: 300 tokens are in 5 batches
        torch.testing.assert_close(features, torch.cat([run.model.encoder(x).flatten(0, 1) for x in batches]))
    squares = [image[:, y:y + 4, x:x + 4] for image in torch.cat(batches) for y in (0, 4, 8, 12) for x in (0, 4, 8, 12)]
    assert torch.equal(patches, torch.stack(squares).flatten(1))  # of the same tokens


def test_the_start_is_the_averages_too(short_run):
    run, stage = make_run(short_run)
    stage.start()
    for (name, tensor), started in zip(run.average.state_dict().items(), run.model.state_dict().values()):
        assert torch.equal(tensor, started), name
    assert run.average.feature_std.ne(1).any()


@pytest.mark.parametrize("kind", ["short_run", "ar_run", "caption_run"])
def test_figures_and_exports_are_of_the_average_and_not_of_the_model(kind, request, tmp_path):
    run, stage = make_run(request.getfixturevalue(kind))
    run.args.out.mkdir(exist_ok=True)
    with torch.no_grad():
        for p in run.networks[0].parameters:
            p.fill_(torch.nan)  # whoever looks at it comes away with nothing
    stage.export()  # which in stage 1 fits what the summary may read
    for figures in (stage.evaluate(), stage.summarise()):
        assert figures and all(np.isfinite(value) for value in figures.values())
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run/model.safetensors").values())


# --- ranks that hang ---


def test_ranks_that_hang_end_with_their_launcher_when_its_time_is_over(tmp_path):
    (tmp_path / "hang.py").write_text("import os, pathlib, sys, time\n"
                                      "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
                                      "time.sleep(600)\n")
    (tmp_path / "ranks").mkdir()
    launcher = launch_ranks(tmp_path / "hang.py", tmp_path / "ranks")
    while launcher.poll() is None and not all((tmp_path / "ranks" / rank).exists() for rank in "01"):
        time.sleep(0.05)
    ranks = [int(path.read_text() or 0) for path in (tmp_path / "ranks").iterdir()]
    assert len(ranks) == 2 and all(alive(rank) for rank in ranks)
    with pytest.raises(subprocess.TimeoutExpired):
        wait_for_ranks(launcher, limit=0.1)
    assert launcher.poll() is not None and not any(alive(rank) for rank in ranks)


def alive(pid):
    """Whether a process runs, and is not only waiting to be counted."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
