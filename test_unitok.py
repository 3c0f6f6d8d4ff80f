"""Properties of UniTok's choices and of the quantizers beside VQRAE's, one a test; see test_vqrae.py."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sample
import train
import unitok
import vqrae
from conftest import (assert_paints_nearly_alike, assert_resume_is_exact, make_run, seeds, small_model, small_vit,
                      take_steps, text_lm)
from support.files import InputError
from support.images import ImageSet
from support.metrics import fit_reading
from support.text import train_text_tokenizer

kinds = st.sampled_from(list(unitok.QUANTIZERS))


def make_quantizer(kind, codebooks, seed, codes=6, dim=4):
    """A quantizer of `codebooks` of `codes` codes, of `dim` dimensions each or of as many in all, and z (50, e)."""
    torch.manual_seed(seed)
    quantizer = unitok.QUANTIZERS[kind](codebooks, codes * codebooks, dim * codebooks)
    return quantizer, torch.randn(50, dim * codebooks)


def small_unitok(seed=0, words=None, **changes):
    torch.manual_seed(seed)
    config = {"codebook_size": 40, "codebook_dim": 12, "quantizer": "mcq", "codebooks": 4, **changes}
    return unitok.UniTok(unitok.UniTokConfig(small_vit(), 16, 4, **config), words).eval()


# --- many codebooks ---


@given(st.integers(1, 60), st.integers(1, 20), seeds)
def test_the_chosen_code_has_the_largest_cosine_by_float64_brute_force(codes, dim, seed):
    torch.manual_seed(seed)
    quantizer, z = unitok.CosineVQ(codes, dim), torch.randn(30, dim)
    chosen = quantizer(z)[1].numpy()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z.double().numpy(),
                                                                  quantizer.codebook.detach().double().numpy())]
    cosine = unit[0] @ unit[1].T
    assert np.all(cosine[np.arange(30), chosen] >= cosine.max(1) - 1e-6)


@given(st.sampled_from([unitok.CosineVQ, vqrae.SimVQ, vqrae.VectorQuantizer]), seeds)
def test_mcq_with_one_codebook_is_the_single_quantizer(single, seed):
    torch.manual_seed(seed)
    alone, z = single(30, 8), torch.randn(5, 7, 8)
    many = unitok.MultiCodebook(1, 30, 8, single=single)
    many.parts[0].load_state_dict(alone.state_dict())
    z_q, indices, *losses = many(z)
    expected, expected_indices, *expected_losses = alone(z)
    assert torch.equal(z_q, expected) and torch.equal(indices, expected_indices[..., None])
    assert losses == expected_losses
    assert torch.equal(many.lookup(indices), alone.lookup(expected_indices))


@given(st.sampled_from(["mcq", "mcq-simvq"]), st.integers(2, 5), st.data(), seeds)
def test_each_chunk_is_quantized_independently_of_the_others(kind, codebooks, data, seed):
    quantizer, z = make_quantizer(kind, codebooks, seed)
    changed = data.draw(st.integers(0, codebooks - 1))
    other = z.clone().unflatten(1, (codebooks, -1))
    other[:, changed] = torch.randn_like(other[:, changed])
    kept = [m for m in range(codebooks) if m != changed]
    for before, after in zip(quantizer(z)[:2], quantizer(other.flatten(1))[:2]):
        before, after = (x.unflatten(1, (codebooks, -1))[:, kept] for x in (before, after))
        assert torch.equal(before, after)


@given(st.integers(1, 5), seeds)
def test_the_losses_of_mcq_are_unitoks_on_unit_vectors_averaged_over_codebooks(codebooks, seed):
    quantizer, z = make_quantizer("mcq", codebooks, seed)
    _, indices, codebook_loss, commitment_loss = quantizer(z)
    expected = 0.0
    for m in range(codebooks):
        chunk = z.double().numpy()[:, 4 * m:4 * m + 4]
        codes = quantizer.parts[m].codebook.detach().double().numpy()[indices[:, m]]
        chunk, codes = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (chunk, codes))
        expected += ((chunk - codes) ** 2).mean() / codebooks
    assert codebook_loss.item() == pytest.approx(expected, rel=1e-4)
    assert commitment_loss.item() == pytest.approx(0.25 * expected, rel=1e-4)


@given(st.sampled_from(["mcq", "mcq-simvq"]), st.integers(1, 4), seeds)
def test_quantizing_a_code_returns_that_code(kind, codebooks, seed):
    quantizer, _ = make_quantizer(kind, codebooks, seed)
    indices = torch.randint(6, (20, codebooks))
    z_q, found, codebook_loss, _ = quantizer(quantizer.lookup(indices))
    assert torch.equal(found, indices) and codebook_loss < 1e-10
    torch.testing.assert_close(z_q, quantizer.lookup(indices))


@given(kinds, st.integers(1, 4), seeds)
def test_the_value_is_that_of_the_codes_and_the_gradient_that_of_the_features(kind, codebooks, seed):
    quantizer, z = make_quantizer(kind, codebooks, seed)
    z.requires_grad_()
    z_q, indices, _, _ = quantizer(z)
    torch.testing.assert_close(z_q, quantizer.lookup(indices), rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(z_q)
    (gradient,) = torch.autograd.grad(z_q, z, upstream)
    straight = F.normalize(z.unflatten(1, (codebooks, -1)), dim=-1).flatten(1) if kind == "mcq" else z + 0.0
    torch.testing.assert_close(gradient, torch.autograd.grad(straight, z, upstream)[0])


@given(kinds, st.integers(1, 4), seeds)
def test_the_search_ignores_autocast(kind, codebooks, seed):
    quantizer, z = make_quantizer(kind, codebooks, seed)
    expected = quantizer(z)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z)[1], expected)


@given(st.sampled_from(["mcq", "mcq-simvq"]), st.integers(1, 4), seeds)
def test_codes_of_every_codebook_that_start_on_data_are_in_use(kind, codebooks, seed):
    quantizer, _ = make_quantizer(kind, codebooks, seed)
    z = torch.randn(400, 4 * codebooks) + 5
    quantizer.start(z, torch.Generator().manual_seed(seed))
    for chosen in quantizer(z)[1].T:
        assert len(chosen.unique()) == 6


@given(st.lists(st.integers(0, 9), min_size=4, max_size=40))
def test_every_codebook_is_counted_apart(chosen):
    indices = torch.tensor(chosen[:len(chosen) // 4 * 4]).view(1, -1, 4)
    counts = small_unitok().count(indices).view(4, 10)
    for m in range(4):
        assert counts[m].tolist() == [int((indices[..., m] == code).sum()) for code in range(10)]


def test_sizes_that_cannot_be_shared_out_are_one_sentence():
    for sizes in ({"codebook_size": 41}, {"codebook_dim": 13}):
        with pytest.raises(InputError, match="cannot be shared out evenly to 4 codebooks"):
            small_unitok(**sizes)
    with pytest.raises(InputError, match="--quantizer simvq has one codebook"):
        small_unitok(quantizer="simvq")


# --- residual quantization ---


@given(st.integers(1, 6), st.floats(0.01, 100), seeds)
def test_the_error_of_rq_never_grows_with_depth(depth, scale, seed):
    quantizer, z = make_quantizer("rq", depth, seed)
    for part in quantizer.parts:
        part.codebook.data.mul_(scale)  # codes far too long for what is left are no excuse
    indices = quantizer(z)[1]
    errors, q = [z.norm(dim=1)], torch.zeros_like(z)
    for m in range(depth):
        q = q + quantizer.parts[m].lookup(indices[:, m])
        errors.append((z - q).norm(dim=1))
    for before, after in zip(errors, errors[1:]):
        assert (after <= before + 1e-3 * (1 + scale)).all()


@given(st.integers(1, 4), seeds)
def test_every_depth_of_rq_takes_the_nearest_code_to_what_is_left_by_float64_brute_force(depth, seed):
    quantizer, z = make_quantizer("rq", depth, seed)
    z_q, indices, codebook_loss, commitment_loss = quantizer(z)
    left, losses = z.double().numpy(), []
    for m in range(depth):
        codes = quantizer.parts[m].codebook.detach().double().numpy()
        distance = ((left[:, None] - codes[None]) ** 2).sum(-1)
        assert np.all(distance[np.arange(50), indices[:, m]] <= distance.min(1) + 1e-5)
        left = left - codes[indices[:, m]]
        losses.append((left**2).mean())  # of z to the sum of the codes so far
    np.testing.assert_allclose(z_q.detach().numpy(), z.numpy() - left, atol=1e-5)
    assert codebook_loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert commitment_loss.item() == pytest.approx(0.25 * np.mean(losses), rel=1e-4)


@given(seeds)
def test_to_add_nothing_stays_a_choice_of_rq_whatever_it_learns(seed):
    quantizer, z = make_quantizer("rq", 3, seed)
    quantizer.start(z, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.1)
    for _ in range(3):
        _, _, codebook_loss, commitment_loss = quantizer(z)
        optimizer.zero_grad()
        (codebook_loss + commitment_loss).backward()
        optimizer.step()
    assert all((part.codebook[0] == 0).all() and (part.codebook[1:] != 0).any() for part in quantizer.parts)


# --- RAE's noise ---


@given(st.floats(0.1, 2.0), seeds)
def test_noise_is_for_training_alone_and_each_image_has_its_own_share_of_it(noise, seed):
    torch.manual_seed(seed)
    quantizer, z = unitok.NoisyLatent(noise), 3 * torch.randn(40, 16, 24)
    assert torch.equal(quantizer.eval()(z)[0], z)
    share = (quantizer.train()(z)[0] - z).std((1, 2)) / z.std()  # (40,)
    assert share.max() < 1.15 * noise and share.std() > 0.1 * noise
    assert share.mean().item() == pytest.approx(noise / 2, rel=0.4)
    assert torch.equal(unitok.NoisyLatent(0.0).train()(z)[0], z)


# --- attention projection ---


def projection_by_hand(p, x):
    """The projection in float64, head after head and token after token."""
    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, keepdim=True, unbiased=False) + layer.eps).sqrt()
        return scaled * layer.weight + layer.bias

    def linear(x, layer):
        return x @ layer.weight.T + layer.bias

    y, a = norm(x, p.norm1), p.attention
    wide, h = a.qkv.weight.shape[0] // 3, a.head_width
    q, k, v = (y @ a.qkv.weight.T).split(wide, dim=-1)
    q, v = q + a.q_bias, v + a.v_bias
    heads = []
    for i in range(wide // h):
        at = slice(i * h, (i + 1) * h)
        tokens = [sum(w * v[j, at] for j, w in enumerate(((q[t, at] @ k[:, at].T) / math.sqrt(h)).softmax(0)))
                  for t in range(len(x))]
        heads.append(torch.stack(tokens))
    mixed = sum(heads) / len(heads) if a.narrows else torch.cat(heads, dim=1)
    y = linear(norm(x, p.norm3), p.shortcut) + linear(mixed, a.out)
    z = norm(norm(y, p.norm2), p.mlp.norm)
    g = linear(z, p.mlp.w0)
    gate = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    return y + linear(gate * linear(z, p.mlp.w1), p.mlp.w2)


@given(st.sampled_from([(24, 6), (6, 24), (12, 12), (24, 24 // 3)]), st.integers(1, 6), seeds)
def test_the_attention_projection_is_unitoks_formula_by_hand(widths, tokens, seed):
    torch.manual_seed(seed)
    p = unitok.AttentionProjection(*widths).double()
    for parameter in p.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(tokens, widths[0], dtype=torch.float64)
    torch.testing.assert_close(p(x[None])[0], projection_by_hand(p, x), rtol=1e-4, atol=1e-5)  # softmax is in fp32


def test_unitoks_own_widths_give_the_shapes_of_its_code():
    down, up = unitok.AttentionProjection(1024, 64), unitok.AttentionProjection(64, 1024)
    assert down.attention.qkv.weight.shape == (3072, 1024) and down.attention.out.weight.shape == (64, 64)
    assert up.attention.qkv.weight.shape == (3072, 64) and up.attention.out.weight.shape == (1024, 1024)
    assert down.mlp.w0.weight.shape == (128, 64) and up.mlp.w2.weight.shape == (1024, 2048)


@given(seeds)
def test_an_attention_projection_starts_as_its_linear_shortcut(seed):
    torch.manual_seed(seed)
    p, x = unitok.AttentionProjection(24, 6), torch.randn(2, 5, 24)
    torch.testing.assert_close(p(x), F.linear(p.norm3(x), p.weight, p.bias))


def test_widths_that_do_not_divide_are_one_sentence():
    with pytest.raises(InputError, match="--projection attention is between widths .* not 24 and 10"):
        small_unitok(projection="attention", codebook_dim=10, codebooks=1)


# --- the tokenizer ---


@pytest.mark.parametrize("changes", [
    {}, {"quantizer": "mcq-simvq"}, {"quantizer": "rq"}, {"projection": "attention"},
    {"quantizer": "simvq", "codebooks": 1, "projection": "attention"},
    {"quantizer": "none", "codebooks": 1, "latent_noise": 0.8}, {"quantizer": "vq", "codebooks": 1}], ids=str)
def test_a_saved_unitok_is_loaded_as_the_same_and_its_codes_decode_to_its_reconstruction(changes, tmp_path):
    model, images = small_unitok(**changes), torch.rand(2, 3, 16, 16)
    model.reading.normal_()
    model.save_pretrained(tmp_path)
    again = unitok.load_tokenizer(tmp_path)
    with torch.no_grad():
        out, other = model(images), again(images)
        assert torch.equal(out.reconstruction, other.reconstruction)
        assert torch.equal(model.features_of(out.z_q), again.features_of(other.z_q))
        assert torch.equal(vqrae.load_encoder(tmp_path)(images), out.features)
    if out.indices is not None:
        codebooks = model.config.codebooks
        assert out.indices.shape == ((2, 16, codebooks) if model.config.quantizer in unitok.QUANTIZERS else (2, 16))
        assert torch.equal(model.encode(images)[1], out.indices)
        torch.testing.assert_close(model.decode(out.indices), out.reconstruction.clamp(0, 1), rtol=1e-4, atol=1e-4)
        assert model.bits_per_image(16) == pytest.approx(16 * codebooks * math.log2(40 / codebooks))


def test_a_vqrae_is_loaded_as_a_vqrae_and_damage_is_one_sentence(tmp_path):
    torch.manual_seed(0)
    vqrae.VQRAE(vqrae.VQRAEConfig(small_vit(), 16, 4, 40, 12)).save_pretrained(tmp_path / "vqrae")
    assert type(unitok.load_tokenizer(tmp_path / "vqrae")) is vqrae.VQRAE
    with pytest.raises(InputError, match="no model at .*nowhere"):
        unitok.load_tokenizer(tmp_path / "nowhere")
    small_unitok().save_pretrained(tmp_path / "unitok")
    path = tmp_path / "unitok/config.json"
    path.write_text(path.read_text().replace('"projection": "linear"', '"projections": "linear"'))
    with pytest.raises(InputError, match="config.json does not describe a UniTok: .*projections"):
        unitok.load_tokenizer(tmp_path / "unitok")


@pytest.mark.parametrize("changes", [{}, {"projection": "attention"}], ids=str)
def test_from_data_the_way_out_starts_where_the_codes_come_closest_to_the_features(changes):
    model = small_unitok(codebook_size=80, **changes)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    features, patches = torch.randn(3000, 24, generator=generator) @ mix, torch.rand(3000, 48, generator=generator)
    model.start(features, patches, projection_init="features", generator=generator)
    with torch.no_grad():
        wanted = model.standardise(features)

        def error():
            z_q = model.quantizer(model.project_features(features))[0]
            return (model.project_out(z_q[:, None])[:, 0] - wanted).pow(2).mean()

        best = error()
        assert best < 0.8  # 1 is what knowing nothing costs
        model.project_out.weight.add_(0.01 * torch.randn(24, 12, generator=generator))
        assert error() > best


CHOICES = [{}, {"quantizer": "mcq-simvq"}, {"quantizer": "rq"}, {"projection": "attention"},
           {"quantizer": "simvq", "codebooks": 1, "projection": "attention"}, {"quantizer": "vq", "codebooks": 1},
           {"quantizer": "none", "codebooks": 1, "latent_noise": 0.8}]


@pytest.mark.parametrize("dtype, alike, close", [(torch.float64, 1.0, 1e-5), (torch.float16, 0.95, 0.02),
                                                 (torch.bfloat16, 0.8, 0.05)])
@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_a_model_in_another_precision_encodes_decodes_and_paints_nearly_alike(changes, dtype, alike, close):
    assert_paints_nearly_alike(small_unitok(**changes), dtype, alike, close)


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_a_model_can_start_from_images_that_are_all_alike(changes):
    for images in (torch.ones(4, 3, 16, 16), torch.zeros(1, 3, 16, 16)):
        model, patches = small_unitok(**changes), torch.ones(64, 48)
        for features in (model.encoder(images).detach().flatten(0, 1), torch.ones(64, 24)):
            model.start(features.repeat(64 // len(features), 1), patches, generator=torch.Generator().manual_seed(0))
            out = model(images)
            (F.mse_loss(out.reconstruction, images) + out.codebook_loss + out.commitment_loss).backward()
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_folder_saved_before_there_was_a_reading_is_loaded_as_the_same_model_without_one(tmp_path):
    model, images = small_unitok(), torch.rand(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "reading"}, path)
    again = unitok.load_tokenizer(tmp_path)
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)
    with pytest.raises(InputError, match="no reading of features"):
        again.features_of(again(images).z_q)


def test_what_is_added_up_in_an_attention_projection_is_in_float32_under_autocast():
    model, seen = small_unitok(projection="attention"), []
    model.project_out.norm2.register_forward_hook(lambda module, given, result: seen.append(given[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, 3, 16, 16))
    assert seen == [torch.float32]


def test_what_is_read_from_codes_is_numpys_least_squares(photo_folder):
    model, images = small_unitok(), ImageSet(photo_folder, "train", 16)
    fit_reading(model, images, batch_size=4)
    with torch.no_grad():
        out = model(torch.cat(list(images.batches(range(len(images)), 4))).float() / 255)
    codes = np.concatenate([out.z_q.flatten(0, 1), np.ones((16 * len(images), 1))], axis=1).astype(np.float64)
    features = out.features.flatten(0, 1).double().numpy()
    least = ((codes @ np.linalg.lstsq(codes, features, rcond=None)[0] - features) ** 2).sum()
    reached = ((model.features_of(out.z_q).flatten(0, 1).numpy() - features) ** 2).sum()
    assert reached == pytest.approx(least, rel=0.01) and least > 0.01


# --- captions beside pixels ---


def test_contrastive_losses_have_the_values_worked_by_hand():
    images, texts = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [4.0, 3.0]])
    # Cosines: 1 and 0.8 for the first image, 0 and 0.6 for the second; with scale 5 and bias -2: 3, 2, -2, 1.
    sigmoid = unitok.contrastive_loss(images, texts, 5.0, -2.0, "sigmoid")
    assert sigmoid.item() == pytest.approx(sum(math.log1p(math.exp(x)) for x in (-3, 2, -2, -1)) / 2)
    softmax = unitok.contrastive_loss(images, texts, 5.0, -2.0, "softmax")
    rows = math.log1p(math.exp(2 - 3)) + math.log1p(math.exp(-2 - 1))
    columns = math.log1p(math.exp(-2 - 3)) + math.log1p(math.exp(2 - 1))
    assert softmax.item() == pytest.approx((rows + columns) / 4)


@given(st.sampled_from(["sigmoid", "softmax"]), st.integers(2, 8), seeds)
def test_the_contrastive_loss_does_not_know_the_order_of_the_batch_and_falls_when_pairs_agree(form, batch, seed):
    torch.manual_seed(seed)
    images, texts, order = torch.randn(batch, 16), torch.randn(batch, 16), torch.randperm(batch)
    loss = unitok.contrastive_loss(images, texts, 10.0, -5.0, form)
    torch.testing.assert_close(unitok.contrastive_loss(images[order], texts[order], 10.0, -5.0, form), loss)
    assert unitok.contrastive_loss(texts, texts, 10.0, -5.0, form) < loss


def with_tower(seed=0):
    words = train_text_tokenizer(["red apple", "green car"], 300)
    return small_unitok(seed, words, text=vqrae.LMConfig(words.get_vocab_size(), 0, 16, 1, 2, 1, 8, 24))


@given(seeds)
def test_a_tower_that_reads_along_changes_nothing_in_the_tokenizer(seed):
    model, z_q = with_tower(seed), torch.randn(2, 16, 12, requires_grad=True)
    model.contrast(z_q, ["red apple", "green car"], "sigmoid", read_along=True).backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert z_q.grad is None and learning <= {"tower", "image_head", "log_scale", "bias"} and "tower" in learning
    model.contrast(z_q, ["red apple", "green car"], "sigmoid").backward()
    assert z_q.grad.any() and model.project_out.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_captions_in_another_precision_agree_with_images_nearly_alike(form, dtype, close, photo_folder):
    model, images = with_tower(), torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other, captions = copy.deepcopy(model).to(dtype), ["red apple", "green car", ""]
    expected = model.contrast(model(images).z_q, captions, form)
    found = other.contrast(other(images).z_q, captions, form)
    assert found.item() == pytest.approx(expected.item(), rel=close)
    photos = ImageSet(photo_folder, "train", 16)
    assert 0 <= unitok.zero_shot(other, photos.records, photos) <= 1


@pytest.mark.parametrize("said, plain", [("red <|endoftext|> apple", "red < |endoftext|> apple"),
                                         ("<|vision_start|>", "< |vision_start|>"), ("red \udcff", "red \ufffd")])
def test_a_tower_reads_what_looks_like_a_control_token_as_text(said, plain):
    tower = with_tower().tower
    controls = {tower.lm.text.token_to_id(name) for name in ("<|endoftext|>", "<|vision_start|>")}
    assert not controls & set(tower.lm.prompt(said)[:-1]) and tower.lm.prompt(said)[-1] in controls
    if "\ufffd" in plain:
        torch.testing.assert_close(tower([said]), tower([plain]))


@given(seeds)
def test_a_caption_means_the_same_beside_longer_ones(seed):
    tower = with_tower(seed).tower
    together = tower(["apple", "green car and a red apple", ""])
    for i, caption in enumerate(["apple", "green car and a red apple", ""]):
        torch.testing.assert_close(tower([caption])[0], together[i], rtol=1e-4, atol=1e-5)


def test_zero_shot_asks_which_categorys_captions_are_nearest(photo_folder, monkeypatch):
    images = ImageSet(photo_folder, "train", 16)
    truth = [record["category"] for record in images.records]
    common = 5 * torch.ones(24)  # of all texts, and another of all images, as contrastive losses leave them
    direction = {"class0": torch.eye(24)[0] + common, "class1": torch.eye(24)[1] + common}
    model, seen = with_tower(), iter(truth)
    monkeypatch.setattr(model.tower, "forward", lambda captions: torch.stack([direction[name] for name in captions]))
    monkeypatch.setattr(model, "summarise", lambda z_q: torch.stack([direction[next(seen)] - 9 * torch.eye(24)[5]
                                                                   for _ in z_q]))
    records = [{"category": name} for name in ("class0", "class1", "class0")]
    assert unitok.zero_shot(model, records, images, batch_size=3) == 1.0
    seen = iter("class0" for _ in truth)
    assert unitok.zero_shot(model, records, images) == pytest.approx(truth.count("class0") / len(truth))


def test_every_caption_of_a_category_counts_alike_however_long_its_vector(photo_folder, monkeypatch):
    images, model = ImageSet(photo_folder, "train", 16), with_tower()
    axes = torch.eye(24)
    texts = {"ape": 100 * axes[0], "bear": axes[1], "cat": 2 * axes[0] + axes[1]}
    monkeypatch.setattr(model.tower, "forward", lambda captions: torch.stack([texts[name] for name in captions]))
    monkeypatch.setattr(model, "summarise", lambda z_q: (axes[0] + axes[1]).expand(len(z_q), -1))
    records = [{"category": "class0", "caption": "ape"}, {"category": "class0", "caption": "bear"},
               {"category": "class1", "caption": "cat"}]
    # Halfway between ape and bear as unit vectors; by their sum the ape alone would decide, and the cat be nearer.
    share = [record["category"] for record in images.records].count("class0") / len(images)
    assert unitok.zero_shot(model, records, images) == pytest.approx(share) and share not in (0, 1)
    assert unitok.zero_shot(model, records, images, batch_size=2) == pytest.approx(share)


@given(pixels=st.floats(0, 3), captions=st.floats(0.1, 3), perceptual=st.floats(0, 3), form=st.sampled_from(
    ["sigmoid", "softmax"]))
def test_the_two_supervisions_add_up_by_their_weights(pixels, captions, perceptual, form):
    model, z_q = with_tower(), torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0))
    images = SimpleNamespace(records=[{"caption": "red apple", "style": "noto"}, {}, {"category": "green_car"}])
    terms = {"mse": torch.tensor(2.0), "perceptual": torch.tensor(3.0)}
    config = SimpleNamespace(perceptual_weight=perceptual, reconstruction_weight=pixels, contrastive=form,
                             contrastive_weight=captions)
    before = 2.0 + 3.0 * perceptual + 0.5  # of stage 1, with 0.5 of the quantizer
    loss, found = model.supervise(torch.tensor(before), terms, SimpleNamespace(z_q=z_q), config, images, [0, 2])
    contrastive = model.contrast(z_q, ["red apple", "green car"], form).item()
    assert found["contrastive"].item() == pytest.approx(contrastive)
    assert loss.item() == pytest.approx(pixels * (2 + 3 * perceptual) + 0.5 + captions * contrastive, rel=1e-4)


def test_the_contrastive_loss_starts_as_siglips():
    model = with_tower()
    assert model.log_scale.exp().item() == pytest.approx(10) and model.bias.item() == -10


def test_a_text_tower_is_saved_with_its_words(tmp_path):
    model = with_tower()
    model.save_pretrained(tmp_path)
    again = unitok.load_tokenizer(tmp_path)
    assert torch.equal(again.tower(["red apple"]), model.tower(["red apple"]))


# --- several codes at every place: the depth head ---


def small_depth_lm(seed=0, codebooks=3, **changes):
    torch.manual_seed(seed)
    text = text_lm().text
    config = {"codebook_size": 7 * codebooks, "image_tokens": 5, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2,
              "head_width": 8, "mlp_width": 48, **changes}
    model = unitok.DepthLM(unitok.DepthLMConfig(text.get_vocab_size(), codebooks=codebooks, **config), text).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # logits far enough apart for their order to be certain
    return model


@given(seeds, st.integers(1, 4), st.sampled_from([1.0, 2.5]))
def test_what_the_depth_head_generates_is_what_it_predicts_under_teacher_forcing(seed, codebooks, cfg_scale):
    model = small_depth_lm(seed, codebooks)
    captions = ["class0", "a longer text of class1", ""]
    codes = model.generate(captions, cfg_scale=cfg_scale, temperature=0)  # (3, 5, M)
    assert codes.shape == (3, 5, codebooks)
    with torch.no_grad():
        given_text, without = (model(*model.pack([model.prompt(c) for c in texts], codes))[:, -5:]
                               for texts in (captions, [""] * 3))  # (3, 5, M, S)
    logits = without + cfg_scale * (given_text - without)
    best = logits.topk(2, dim=-1).values
    certain = best[..., 0] - best[..., 1] > 1e-3
    assert certain.float().mean() > 0.9 and torch.equal(logits.argmax(-1)[certain], codes[certain])


@given(seeds, st.integers(0, 4), st.integers(0, 2))
def test_neither_later_places_nor_later_codes_can_change_what_comes_before(seed, place, depth):
    model = small_depth_lm(seed)
    codes = torch.randint(7, (1, 5, 3))
    other = codes.clone()
    other[0, place, depth:] = (other[0, place, depth:] + 1) % 7
    other[0, place + 1:] = torch.randint(7, other[0, place + 1:].shape)
    prompt = [model.prompt("class0")]
    with torch.no_grad():
        before, after = (model(*model.pack(prompt, some))[0, -5:] for some in (codes, other))  # (5, M, S)
    torch.testing.assert_close(before[:place], after[:place])
    torch.testing.assert_close(before[place, :depth + 1], after[place, :depth + 1])
    if depth < 2:
        assert not torch.allclose(before[place, depth + 1:], after[place, depth + 1:])
    if place < 4:
        assert not torch.allclose(before[place + 1], after[place + 1])


@given(seeds, st.integers(1, 4))
def test_a_place_is_embedded_as_the_sum_of_its_codes_and_text_as_itself(seed, codebooks):
    model = small_depth_lm(seed, codebooks)
    V, table = model.config.text_vocabulary, model.embedding.weight
    codes = torch.randint(7, (1, 2, codebooks))
    tokens, _ = model.pack([[4, 9]], codes)
    embedded = model.embedding(tokens)[0]
    assert torch.equal(embedded[:2], table[[4, 9]])
    for place in range(2):
        expected = sum(table[V + 7 * m + codes[0, place, m]] for m in range(codebooks))
        torch.testing.assert_close(embedded[2 + place], expected)


@given(seeds)
def test_the_loss_is_the_mean_cross_entropy_of_all_codes_and_of_no_text(seed):
    model = small_depth_lm(seed)
    codes = torch.randint(7, (2, 5, 3))
    tokens, first = model.pack([model.prompt("class0"), model.prompt("a longer text")], codes)
    with torch.no_grad():
        log_p = model(tokens, first)[:, -5:].log_softmax(-1)  # (2, 5, 3, 7)
        expected = -log_p.gather(-1, codes[..., None]).mean()
        torch.testing.assert_close(model.loss(tokens, first), expected)
        misread = torch.randint(7, codes.shape)
        seen, _ = model.pack([model.prompt("class0"), model.prompt("a longer text")], misread)
        assert not torch.allclose(model.loss(tokens, first, seen), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.6)])
def test_a_depth_head_in_another_precision_predicts_nearly_alike_and_writes(dtype, close):
    model = unitok.DepthLM.around(text_lm(image_tokens=4), 4)
    other, codes = copy.deepcopy(model).to(dtype), torch.ones(1, 4, 4, dtype=torch.int64)
    tokens, _ = model.pack([model.prompt("red apple")], codes)
    torch.testing.assert_close(other(tokens).float(), model(tokens), rtol=0, atol=close)
    assert other.loss(tokens).item() == pytest.approx(model.loss(tokens).item(), rel=close)
    assert other.generate("red apple", cfg_scale=2.0).shape == (1, 4, 4)


def test_a_depth_head_around_a_language_model_keeps_all_it_knows(tmp_path):
    lm = text_lm(codebook_size=21, image_tokens=5)
    model = unitok.DepthLM.around(lm, 3)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in lm.state_dict().items())
    model.save_pretrained(tmp_path)
    again = unitok.load_language_model(tmp_path)
    assert torch.equal(again.generate(["class0"], seed=3), model.eval().generate(["class0"], seed=3))
    lm.save_pretrained(tmp_path / "lm")
    assert type(unitok.load_language_model(tmp_path / "lm")) is vqrae.VisualLM


def test_a_generator_writes_for_the_tokenizer_in_its_folder_and_only_a_shipped_one_for_that_beside_it(tmp_path,
                                                                                                      monkeypatch):
    text_lm(codebook_size=32, image_tokens=16).save_pretrained(tmp_path / "ar")
    small_model(codebook_size=32, seed=1).save_pretrained(tmp_path / "stage2")
    codes, own = torch.arange(16)[None], small_model(codebook_size=32, seed=2)
    with pytest.raises(InputError, match="no model at .*ar/vqrae"):
        unitok.load_generator(tmp_path / "ar", "cpu")  # whoever trained stage2 anew has other codes there
    with monkeypatch.context() as patch:
        patch.setattr(unitok, "PRETRAINED", tmp_path)
        _, found = unitok.load_generator(tmp_path / "ar", "cpu")
    assert torch.equal(found.decode(codes), small_model(codebook_size=32, seed=1).decode(codes))
    own.save_pretrained(tmp_path / "ar/vqrae")
    _, found = unitok.load_generator(tmp_path / "ar", "cpu")
    assert torch.equal(found.decode(codes), own.decode(codes))
    small_model(codebook_size=40).save_pretrained(tmp_path / "ar/vqrae")
    with pytest.raises(InputError, match="ar writes 32 codes, 1 at a place, and the tokenizer in .*vqrae has 40"):
        unitok.load_generator(tmp_path / "ar", "cpu")


# --- training ---


@pytest.mark.parametrize("extra", [
    ["--quantizer", "mcq", "--codebooks", "4", "--contrastive", "softmax"], ["--quantizer", "rq", "--codebooks", "2"],
    ["--quantizer", "mcq-simvq", "--codebooks", "2", "--projection", "attention"],
    ["--quantizer", "none", "--latent-noise", "0.8"]], ids=" ".join)
def test_every_choice_trains_and_resumes_bit_identical(extra, short_run, tmp_path, capsys):
    assert_resume_is_exact(extra + short_run, tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["quantizer"] == extra[1] and math.isfinite(summary["val_psnr"])
    if extra[1] != "none":
        each = summary["train_utilization_of_each"]
        assert len(each) == int(extra[3] if extra[2] == "--codebooks" else 1)
        assert sum(each) / len(each) == pytest.approx(summary["train_utilization"])
    model = unitok.load_tokenizer(tmp_path / "run")
    assert type(model) is unitok.UniTok and (model.reading != 0).any()


def test_without_a_flag_of_unitok_a_run_is_a_vqraes(short_run):
    run, _ = make_run(short_run)
    assert type(run.model) is vqrae.VQRAE


def test_without_captions_no_image_is_asked_for_its_record(short_run, monkeypatch):
    run, stage = make_run(short_run + ["--quantizer", "mcq", "--codebooks", "4"])
    monkeypatch.delattr(type(run.train_images), "records")  # as of streamed images, which have none
    run.train_images.__dict__.pop("records", None)
    take_steps(run, stage, 1)


def test_a_frozen_encoder_stays_as_it_is_beside_captions_too(short_run):
    run, stage = make_run([*short_run, "--contrastive", "sigmoid"])
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    take_steps(run, stage, 2)
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert not torch.equal(before["tower.out.weight"], after["tower.out.weight"])


def test_weights_of_the_supervisions_decide_who_learns(short_run):
    def moved(*extra):
        run, stage = make_run(short_run + ["--contrastive", "sigmoid", "--quantizer-weight", "0", *extra])
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        take_steps(run, stage, 1)
        return {name.split(".")[0] for name, p in run.model.named_parameters() if not torch.equal(before[name], p)}

    assert moved("--reconstruction-weight", "0", "--weight-decay", "0") == {
        "project_in", "project_out", "tower", "image_head", "log_scale", "bias"}
    assert moved("--contrastive-weight", "0") == {
        "project_in", "project_out", "decoder", "tower", "image_head", "log_scale", "bias"}


@pytest.fixture
def trained(short_run, tmp_path):
    train.main([*short_run[:-1], str(tmp_path / "mcq"), "--quantizer", "mcq", "--codebooks", "4"])
    return tmp_path / "mcq"


def test_stage_2_goes_on_with_many_codebooks(trained, short_run, tmp_path):
    common = short_run[short_run.index("--batch-size"):-1]  # to --out
    train.main(["--stage", "2", "--init", str(trained), "--data", short_run[5], *common, str(tmp_path / "two"),
                "--discriminator-start", "3"])
    assert unitok.load_tokenizer(tmp_path / "two").config.codebooks == 4
    assert json.loads((tmp_path / "two/summary.json").read_text())["quantizer"] == "mcq"


def test_stage_ar_writes_several_codes_a_place_and_sample_paints_them(trained, photo_folder, encoder_folder, tmp_path,
                                                                      capsys):
    assert_resume_is_exact([
        "--stage", "ar", "--tokenizer", str(trained), "--data", str(photo_folder), "--width", "32", "--depth", "1",
        "--heads", "2", "--kv-heads", "1", "--head-width", "8", "--mlp-width", "32", "--text-vocabulary", "300",
        "--batch-size", "4", "--log-every", "2", "--checkpoint-every", "3", "--device", "cpu", "--steps", "6",
        "--out", str(tmp_path / "run")], tmp_path)
    out = tmp_path / "run"
    assert type(unitok.load_language_model(out)) is unitok.DepthLM
    sample.main(["generate", "class0", "--model", str(out), "--count", "2", "--out", str(tmp_path / "pictures")])
    assert (tmp_path / "pictures/class0-1.png").exists()
    sample.main(["evaluate", "--model", str(out), "--data", str(photo_folder), "--frechet-encoder", str(encoder_folder),
                 "--count", "2"])
    assert "held-out captions" in capsys.readouterr().out


def test_sample_evaluates_shows_and_exports_many_codebooks(trained, photo_folder, encoder_folder, tmp_path,
                                                           capsys):
    common = ["--model", str(trained), "--data", str(photo_folder), "--out", str(tmp_path / "out")]
    sample.main(["evaluate", *common, "--frechet-encoder", str(encoder_folder), "--teacher", str(encoder_folder)])
    assert "discrete" in capsys.readouterr().out
    sample.main(["codes", *common, "--codebook", "3"])
    assert (tmp_path / "out/codes.png").exists()
    with pytest.raises(SystemExit, match="--codebook 4: .* has codebooks 0 to 3"):
        sample.main(["codes", *common, "--codebook", "4"])
    with pytest.raises(SystemExit, match="--format onnx is for models of VQRAE's quantizers; .* is mcq"):
        sample.main(["export", "--model", str(trained), "--out", str(tmp_path / "out"), "--format", "onnx"])
    sample.main(["export", *common, "--format", "tokens"])
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["codebooks"] == 4 and index["tokens_per_image"] == 16


@pytest.mark.parametrize("extra, sentence", [
    (["--quantizer", "mcq", "--codebooks", "3"], "cannot be shared out evenly to 3 codebooks"),
    (["--codebooks", "4"], "--quantizer simvq has one codebook"),
    (["--projection", "attention", "--codebook-dim", "10"], "--projection attention is between widths"),
])
def test_a_wrong_argument_is_one_sentence(short_run, extra, sentence):
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        train.main([*short_run, *extra])
    with pytest.raises(SystemExit, match="error: --codebooks is no setting of --stage 2"):
        train.main(["--stage", "2", "--codebooks", "4"])
