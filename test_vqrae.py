"""Properties of VQRAE, one a test: read the names as a summary of the method.

    pytest test_vqrae.py

Hypothesis draws shapes, seeds and values. What is compared is an independent reference: float64 brute force,
transformers, scikit-image, scipy, or the lpips package, on random weights; nothing is downloaded.
"""

import copy
import itertools
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vqrae
from conftest import (ROOT, SIZES, assert_paints_nearly_alike, edit, family_twin, needs, normalise, seeds,
                      small_captioner, small_lm, small_model, small_vit, started_model, text_lm)
from export import save_encoder
from presets import PRESETS
from support.files import InputError
from support.text import END_OF_TEXT, START_OF_IMAGE


# --- the quantizer: Eq. 1 and Eq. 3 ---


def make_quantizer(kind, K, e, seed, **options):
    torch.manual_seed(seed)
    quantizer = {"simvq": vqrae.SimVQ, "vq": vqrae.VectorQuantizer}[kind](K, e, **options)
    return quantizer, torch.randn(64, e)


kinds = st.sampled_from(["simvq", "vq"])


@given(kinds, st.integers(1, 200), st.integers(1, 40), seeds)
def test_the_chosen_code_is_the_nearest_by_float64_brute_force(kind, K, e, seed):
    quantizer, z = make_quantizer(kind, K, e, seed)
    indices = quantizer(z)[1]
    codes = quantizer.codebook.detach().numpy().astype(np.float64)
    if kind == "simvq":
        codes = codes @ quantizer.W.weight.detach().numpy().astype(np.float64).T + quantizer.W.bias.detach().numpy()
    distance = ((z.numpy().astype(np.float64)[:, None] - codes[None]) ** 2).sum(-1)
    chosen = distance[np.arange(len(z)), indices.numpy()]
    assert np.all(chosen <= distance.min(1) + 1e-5 * (1 + e))


@given(kinds, st.integers(1, 100), st.integers(1, 20), st.integers(1, 120), st.integers(1, 70), seeds)
def test_streaming_over_codes_and_tokens_finds_what_the_full_search_finds(kind, K, e, code_chunk, token_chunk, seed):
    quantizer, z = make_quantizer(kind, K, e, seed)
    streamed = quantizer.lookup(quantizer.search(z, code_chunk, token_chunk))
    full = quantizer.lookup(quantizer.search(z, K, len(z)))
    torch.testing.assert_close((z - streamed).norm(dim=1), (z - full).norm(dim=1), rtol=1e-5, atol=1e-5)


@given(kinds, st.integers(2, 100), st.integers(2, 40), seeds)
def test_quantizing_a_code_returns_that_code(kind, K, e, seed):
    quantizer, _ = make_quantizer(kind, K, e, seed)
    indices = torch.arange(K)
    z_q, found, codebook_loss, commitment_loss = quantizer(quantizer.lookup(indices))
    assert torch.equal(found, indices)
    torch.testing.assert_close(z_q, quantizer.lookup(indices))
    assert codebook_loss < 1e-10 and commitment_loss < 1e-10


@given(kinds, seeds)
def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_the_feature(kind, seed):
    quantizer, z = make_quantizer(kind, 30, 8, seed)
    z.requires_grad_()
    z_q, indices, _, _ = quantizer(z)
    torch.testing.assert_close(z_q, quantizer.lookup(indices))
    upstream = torch.randn_like(z_q)
    (gradient,) = torch.autograd.grad(z_q, z, upstream)
    assert torch.equal(gradient, upstream)


@given(st.sampled_from(["commitment", "codebook"]), st.floats(0, 1), seeds)
def test_beta_weighs_one_side_which_only_gradients_can_tell(side, beta, seed):
    quantizer, z = make_quantizer("vq", 30, 8, seed, beta=beta, beta_side=side)
    z.requires_grad_()
    _, indices, codebook_loss, commitment_loss = quantizer(z)
    (codebook_loss + commitment_loss).backward()
    q = quantizer.codebook.detach()[indices]
    torch.testing.assert_close(codebook_loss + commitment_loss, (1 + beta) * F.mse_loss(z, q))  # the same on both sides
    towards_code = 2 * (z.detach() - q) / z.numel()
    towards_feature = torch.zeros_like(q).new_zeros(30, 8).index_add_(0, indices, -towards_code)
    weight_z, weight_code = (beta, 1.0) if side == "commitment" else (1.0, beta)
    torch.testing.assert_close(z.grad, weight_z * towards_code)
    torch.testing.assert_close(quantizer.codebook.grad, weight_code * towards_feature)


@given(seeds)
def test_W_learns_from_the_codebook_loss_and_from_nothing_else(seed):
    quantizer, z = make_quantizer("simvq", 30, 8, seed)
    z_q, _, codebook_loss, commitment_loss = quantizer(z.requires_grad_())
    assert all(g is None for g in torch.autograd.grad(z_q.pow(2).sum() + commitment_loss, quantizer.W.parameters(),
                                                      allow_unused=True, retain_graph=True))
    gradients = torch.autograd.grad(codebook_loss, quantizer.W.parameters(), retain_graph=True)
    assert all(g.abs().max() > 0 for g in gradients)
    assert torch.autograd.grad(codebook_loss, z, allow_unused=True) == (None,)


def one_step(quantizer, z):
    before = quantizer.lookup(torch.arange(len(quantizer.codebook))).detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    _, indices, codebook_loss, commitment_loss = quantizer(z)
    (codebook_loss + commitment_loss).backward()
    optimizer.step()
    after = quantizer.lookup(torch.arange(len(quantizer.codebook))).detach()
    never_chosen = torch.ones(len(before), dtype=torch.bool)
    never_chosen[indices.unique()] = False
    return (after - before).abs().amax(1), never_chosen


@given(seeds)
def test_moving_W_moves_codes_that_were_never_chosen(seed):
    quantizer, z = make_quantizer("simvq", 200, 8, seed)
    moved, never_chosen = one_step(quantizer, z)
    assert never_chosen.any() and (moved[never_chosen] > 0).all()


@given(seeds)
def test_in_plain_vq_codes_that_were_never_chosen_stay_put(seed):
    quantizer, z = make_quantizer("vq", 200, 8, seed)
    moved, never_chosen = one_step(quantizer, z)
    assert never_chosen.any() and (moved[never_chosen] == 0).all() and (moved[~never_chosen] > 0).all()


@pytest.mark.parametrize("e", [8, 256])
def test_the_gradient_of_codes_is_the_same_every_time_however_many_tokens_share_one(e):
    torch.manual_seed(0)
    quantizer, indices, gradient = vqrae.VectorQuantizer(64, e), torch.randint(64, (8192,)), torch.randn(8192, e)
    first, *others = [torch.autograd.grad(quantizer.lookup(indices), quantizer.codebook, gradient) for _ in range(20)]
    assert all(other[0].equal(first[0]) for other in others)


@given(seeds)
def test_the_base_codebook_of_simvq_never_changes_and_is_no_parameter(seed):
    quantizer, z = make_quantizer("simvq", 50, 8, seed)
    before = quantizer.codebook.clone()
    for _ in range(3):
        one_step(quantizer, z)
    assert torch.equal(quantizer.codebook, before)
    assert {name for name, _ in quantizer.named_parameters()} == {"W.weight", "W.bias"}


def test_only_chosen_codes_enter_the_graph_so_memory_does_not_grow_with_the_codebook():
    quantizer, z = make_quantizer("simvq", 5000, 8, 0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        quantizer(z.requires_grad_())
    assert max(saved) <= max(z.numel(), quantizer.W.weight.numel())


@given(kinds, seeds)
def test_the_search_ignores_autocast_since_bf16_would_pick_wrong_neighbours(kind, seed):
    quantizer, z = make_quantizer(kind, 100, 16, seed)
    expected = quantizer(z)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z)[1], expected)


# --- utilization and perplexity ---


@given(st.integers(1, 300), seeds)
def test_perplexity_is_the_number_of_codes_when_all_are_equally_frequent_and_less_otherwise(K, seed):
    utilization, perplexity = vqrae.codebook_usage(torch.full((K,), 7))
    assert utilization == 1 and perplexity == pytest.approx(K)
    counts = torch.randint(0, 9, (K,), generator=torch.Generator().manual_seed(seed))
    counts[0] = 1
    utilization, perplexity = vqrae.codebook_usage(counts)
    assert utilization == pytest.approx((counts > 0).sum().item() / K)
    assert 1 - 1e-9 <= perplexity <= (counts > 0).sum().item() + 1e-6
    assert vqrae.codebook_usage(torch.tensor([5, 0, 0, 0])) == (0.25, 1.0)


@given(kinds, st.integers(1, 60), seeds)
def test_codes_started_on_data_are_all_in_use(kind, K, seed):
    quantizer, _ = make_quantizer(kind, K, 6, seed)
    z = torch.randn(500, 6) * torch.tensor([3.0, 1, 1, 0.1, 0.1, 0.01]) + 5  # a common mean, few directions
    z[:250] = z[0]  # half of it one and the same background token
    vqrae.start_codebook(quantizer, z, generator=torch.Generator().manual_seed(seed))
    assert vqrae.codebook_usage(torch.bincount(quantizer.search(z), minlength=K))[0] >= 0.95
    if kind == "simvq":
        assert torch.equal(quantizer.lookup(torch.arange(K)), quantizer.codebook)  # W starts as the identity


def test_codes_from_a_gaussian_are_mostly_unused_on_features_with_a_common_mean():
    quantizer, _ = make_quantizer("simvq", 512, 32, 0)
    z = 0.3 * torch.randn(2000, 32) + 2 * torch.randn(32)
    assert vqrae.codebook_usage(torch.bincount(quantizer.search(z), minlength=512))[0] < 0.1
    vqrae.start_codebook(quantizer, z, generator=torch.Generator().manual_seed(0))
    assert vqrae.codebook_usage(torch.bincount(quantizer.search(z), minlength=512))[0] > 0.95


def test_codes_are_not_spent_on_plain_patches():
    model = small_model(codebook_size=64, codebook_dim=24)
    generator = torch.Generator().manual_seed(0)
    features, patches = torch.randn(4000, 24, generator=generator), torch.rand(4000, 48, generator=generator)
    features[:2000, :12] += 20  # plain patches are half of all, and the encoder tells them apart from the others
    patches[:2000] = patches[:2000, :1]
    model.start(features, patches, "data", "random", generator)
    with torch.no_grad():
        codes = model.quantizer.lookup(torch.arange(64)) - model.project_in.bias
        codes = codes @ torch.linalg.inv(model.project_in.weight).T * model.feature_std + model.feature_mean
    assert 1 <= (codes[:, :12].mean(1) > 10).sum() < 16


@given(kinds, st.integers(20, 60), seeds)
@settings(max_examples=10)
def test_no_code_that_starts_on_data_is_left_to_a_few_odd_tokens(kind, K, seed):
    quantizer, _ = make_quantizer(kind, K, 4, seed)
    z = torch.randn(3000, 4, generator=torch.Generator().manual_seed(seed)) ** 3  # some are far from all others
    z[:1000] = z[0]
    vqrae.start_codebook(quantizer, z, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(quantizer.search(z), minlength=K)
    assert counts.min() >= 0.05 * 3000 / K  # a twentieth of an equal share


@given(kinds, seeds)
@settings(max_examples=5)
def test_codes_that_started_on_data_are_the_means_of_their_tokens(kind, seed):
    quantizer, _ = make_quantizer(kind, 5, 3, seed)
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(seed))
    vqrae.start_codebook(quantizer, z, steps=60, generator=torch.Generator().manual_seed(seed))
    indices = quantizer.search(z)
    means = torch.stack([z[indices == code].mean(0) for code in range(5)])
    torch.testing.assert_close(quantizer.lookup(torch.arange(5)).detach(), means, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [[0], [1], [2], [0, 1], [1, 2]])
def test_a_patch_is_plain_only_where_all_three_channels_are(channels, monkeypatch):
    model, seen = small_model(codebook_size=8, codebook_dim=24), []
    monkeypatch.setattr(model.quantizer, "start", lambda z, generator: seen.append(len(z)))
    generator = torch.Generator().manual_seed(0)
    features, patches = torch.randn(2000, 24, generator=generator), torch.rand(2000, 3, 16, generator=generator)
    flat = patches.clone()
    flat[:, channels] = patches[:, channels, :1]
    plain = patches[:, :, :1].expand(-1, -1, 16)  # of any colour
    for some in (flat, plain):
        model.start(features, some.flatten(1), "data", "random", generator)
    assert seen[0] == 2000 and 30 < seen[1] < 95  # of plain ones, three of a hundred


def test_a_code_without_tokens_starts_again_where_tokens_lose_most_in_all():
    """Not at the odd token that is farthest from all codes, and not in the largest crowd, whose tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    crowd, cloud = torch.zeros(600, 2), torch.randn(300, 2, generator=generator) + torch.tensor([20.0, 0])
    z = torch.cat([crowd, cloud, torch.tensor([[0.0, 25.0]])])
    quantizer, _ = make_quantizer("vq", 4, 2, 0)
    vqrae.start_codebook(quantizer, z, generator=generator)
    assert (quantizer.codebook[:, 0] > 10).sum() >= 2  # the cloud has been divided
    assert torch.bincount(quantizer.search(z), minlength=4)[quantizer.codebook[:, 0] > 10].min() > 20


def test_codes_drawn_from_copies_of_one_token_are_drawn_again():
    quantizer, z = make_quantizer("vq", 20, 4, 0)
    vqrae.start_codebook(quantizer, torch.cat([z, z[:1].expand(200, -1)]))
    assert len(quantizer.codebook.unique(dim=0)) == 20


@pytest.mark.parametrize("quantizer", list(vqrae.QUANTIZERS))
@pytest.mark.parametrize("projection_init", ["pixels", "features", "random"])
def test_a_model_can_start_from_images_that_are_all_alike(quantizer, projection_init):
    for colours in (torch.ones(8, 3), torch.zeros(1, 3), torch.rand(8, 3)):
        model = small_model(quantizer=quantizer)
        images = colours[:, :, None, None].expand(-1, -1, 16, 16)
        with torch.no_grad():
            features = model.encoder(images).flatten(0, 1)
        for some in (features, features[:1].expand(64, -1)):  # and when tokens are all alike, too
            patches = F.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)[:1].expand(len(some), -1)
            some = torch.cat([some] * 4)
            model.start(some, torch.cat([patches] * 4), "data", projection_init, torch.Generator().manual_seed(0))
            out = model(images)
            F.mse_loss(out.reconstruction, images).backward()
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_codebook_larger_than_the_data_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="100 codes cannot start from 64 features"):
        vqrae.start_codebook(*make_quantizer("vq", 100, 4, 0))


# --- the encoder, and how pretrained ones are read ---


def transformers_twin(tmp_path, seed, layer_scale=0.7):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2,
                                       image_size=20, patch_size=4, layerscale_value=layer_scale)
    twin = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms away from their trivial start
    twin.save_pretrained(tmp_path)
    return twin


def assert_same_patch_tokens(encoder, twin, images):
    pixels = normalise(images)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), twin(pixels).last_hidden_state[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("height, width", [(20, 20), (12, 12), (32, 24)])
def test_patch_tokens_equal_those_of_transformers_at_native_and_other_sizes(tmp_path, height, width):
    twin = transformers_twin(tmp_path, seed=height)
    assert_same_patch_tokens(vqrae.load_encoder(tmp_path), twin, torch.rand(3, 3, height, width))


@pytest.mark.parametrize("height, width", [(20, 20), (12, 12), (32, 24)])
@pytest.mark.parametrize("family", ["dinov2_with_registers", "siglip_vision_model", "clip_vision_model",
                                    "internvl_vision"])
def test_every_family_equals_transformers_at_native_and_other_sizes(family, tmp_path, height, width):
    twin, patch_tokens = family_twin(family, seed=height)
    twin.save_pretrained(tmp_path)
    images = torch.rand(2, 3, height, width)
    encoder = vqrae.load_encoder(tmp_path)
    assert encoder.config.family == family
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), patch_tokens(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", ["siglip", "clip"])
def test_an_encoder_is_found_beside_its_text_half(whole, tmp_path):
    import transformers

    torch.manual_seed(0)
    kind = {"siglip": transformers.SiglipModel, "clip": transformers.CLIPModel}[whole]
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
            "vocab_size": 30, "max_position_embeddings": 8}
    model = kind(kind.config_class(text_config=text, vision_config={**SIZES, "intermediate_size": 48})).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1  # in shards, too
    images = torch.rand(2, 3, 20, 20)
    encoder = vqrae.load_encoder(tmp_path)
    with torch.no_grad():
        expected = model.vision_model((images - encoder.mean) / encoder.std).last_hidden_state
    torch.testing.assert_close(encoder(images), expected[:, -25:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_opengvlabs_names_of_internvit_load_too_alone_and_inside_internvl(inside, tmp_path):
    twin, patch_tokens = family_twin("internvl_vision")
    theirs, weights = twin.state_dict(), {}
    for i in range(3):
        for part in ("weight", "bias"):  # q, k and v stand stacked in one matrix there
            weights[f"encoder.layers.{i}.attn.qkv.{part}"] = torch.cat(
                [theirs.pop(f"encoder.layer.{i}.attention.{q}_proj.{part}") for q in "qkv"])
    for name, tensor in theirs.items():
        for old, new in (("embeddings.cls_token", "embeddings.class_embedding"), ("encoder.layer.", "encoder.layers."),
                         ("position_embeddings", "position_embedding"), ("layernorm_before", "norm1"),
                         ("patch_embeddings.projection", "patch_embedding"),
                         ("attention.projection_layer", "attn.proj"),
                         ("layernorm_after", "norm2"), ("lambda_1", "ls1"), ("lambda_2", "ls2")):
            name = name.replace(old, new)
        weights[name] = tensor
    config = {**SIZES, "model_type": "intern_vit_6b", "intermediate_size": 48, "hidden_act": "gelu", "qkv_bias": True,
              "qk_normalization": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6}
    if inside:
        config = {"model_type": "internvl_chat", "vision_config": config}
        weights = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
        weights["language_model.model.embed_tokens.weight"] = torch.zeros(3, 3)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for size in (20, 28):
        images = torch.rand(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(vqrae.load_encoder(tmp_path)(images), patch_tokens(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["siglip_vision_model", "clip_vision_model", "internvl_vision"])
def test_a_vqrae_around_every_family_trains_and_is_loaded_as_the_same_model(family, tmp_path):
    twin, _ = family_twin(family)
    twin.save_pretrained(tmp_path / "encoder")
    encoder = vqrae.load_encoder(tmp_path / "encoder")
    model = vqrae.VQRAE(vqrae.VQRAEConfig(encoder.config, 20, 4, codebook_size=16, codebook_dim=8)).eval()
    model.encoder = encoder
    images = torch.rand(2, 3, 20, 20)
    F.mse_loss(model(images).reconstruction, images).backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    model.save_pretrained(tmp_path / "model")
    again = vqrae.VQRAE.from_pretrained(tmp_path / "model")
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: edit(f / "config.json", '"use_qk_norm": false', '"use_qk_norm": true'), "asks for use_qk_norm True"),
    (lambda f: edit(f / "config.json", '"hidden_act": "gelu"', '"hidden_act": "relu"'), "asks for hidden_act 'relu'"),
    (lambda f: (f / "model.safetensors").rename(f / "model-1.safetensors") and (
        f / INDEX).write_text('{"weight_map": {"x": "model-2.safetensors"}}'),
     "cannot read the weights in .*model-2.safetensors"),
    (lambda f: (f / INDEX).write_text('{"weight_map": {"x": "../x"}}'), "is not in its"),
    (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
])
def test_a_damaged_checkpoint_of_another_family_is_one_sentence(damage, sentence, tmp_path):
    family_twin("internvl_vision")[0].save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=sentence) as error:
        vqrae.load_encoder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_encoder_equals_transformers_too():
    transformers = pytest.importorskip("transformers")
    folder = ROOT / "data/tiny_vit"
    twin, report = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same_patch_tokens(vqrae.load_encoder(folder), twin.eval(), torch.rand(2, 3, 64, 64))


def test_the_real_dinov2_equals_transformers_where_it_is_at_hand():
    folder = ROOT.parent / "shared/weights/dinov2-small"
    if not folder.exists():
        pytest.skip("no ../shared/weights/dinov2-small beside this checkout: the check on real weights was skipped")
    twin = pytest.importorskip("transformers").Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    for size in (518, 112):
        assert_same_patch_tokens(vqrae.load_encoder(folder), twin, torch.rand(1, 3, size, size))


def test_the_encoder_applies_its_own_mean_and_std(tmp_path):
    torch.manual_seed(1)
    config = small_vit()
    config.mean, config.std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)
    save_encoder(vqrae.Encoder(config), tmp_path)
    loaded = vqrae.load_encoder(tmp_path)
    assert loaded.config.mean == config.mean and loaded.config.std == config.std
    flat = torch.tensor(config.mean)[:, None, None].expand(1, 3, 16, 16)
    bias = loaded.patch_embed.bias.view(1, -1, 1, 1).expand(1, -1, 4, 4)
    torch.testing.assert_close(loaded.patch_embed((flat - loaded.mean) / loaded.std), bias)


@torch.no_grad()
def test_features_can_be_read_before_the_last_norm_and_the_norm_is_kept_for_who_reads_behind_it(tmp_path):
    config, images = replace(small_vit(), final_norm="class"), torch.rand(2, 3, 16, 16)
    model = vqrae.VQRAE(vqrae.VQRAEConfig(config, 16, 4, 40, 12)).eval()
    model.encoder.norm.weight.uniform_(0.5, 2)
    *_, last = model.encoder.hidden_states(images)
    assert torch.equal(model(images).features, last[:, 1:])
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(vqrae.load_encoder(tmp_path / "model")(images), last[:, 1:])
    save_encoder(model.encoder, tmp_path / "encoder")
    torch.testing.assert_close(vqrae.load_encoder(tmp_path / "encoder")(images), model.encoder.norm(last)[:, 1:])


def test_images_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(InputError, match="17 x 16 pixels do not divide into patches of 4"):
        small_model().encoder(torch.rand(1, 3, 17, 16))


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: (f / "model.safetensors").write_bytes(b"not a checkpoint"), "cannot read the weights"),
    (lambda f: os.truncate(f / "model.safetensors", 5000), "cannot read the weights"),
    (lambda f: (f / "model.safetensors").unlink(), "cannot read the weights"),
    (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: edit(f / "config.json", '"image_size"', '"size"'), "lacks 'image_size'"),
    (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "of type 'bert'"),
    (lambda f: edit(f / "config.json", 'hidden_layers": 2', 'hidden_layers": 3'), "no tensor 'encoder.layer.2"),
    (lambda f: edit(f / "config.json", 'hidden_size": 24', 'hidden_size": 26'), "has shape"),
])
def test_a_damaged_encoder_is_one_sentence_with_its_path(tmp_path, damage, sentence):
    save_encoder(vqrae.Encoder(small_vit()), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=sentence) as error:
        vqrae.load_encoder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_that_is_nowhere_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no model at 'nobody/nothing'"):
        vqrae.load_encoder("nobody/nothing")


def test_the_encoder_inside_a_vqrae_loads_like_any_encoder(tmp_path):
    model = small_model(3)
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vqrae.load_encoder(tmp_path)(images), model.encode(images)[0])


# --- the decoder ---


@pytest.mark.parametrize("q", [1, 3, 4, 8])
def test_q_scales_the_output_by_q_over_p(q):
    model, images = small_model(q=q), torch.rand(2, 3, 16, 24)
    assert model(images).reconstruction.shape == (2, 3, 16 * q // 4, 24 * q // 4)
    assert model.decode(model.encode(images)[1], rows=4).shape == (2, 3, 16 * q // 4, 24 * q // 4)


def test_every_token_writes_its_own_square_of_pixels():
    """With the blocks taken out, changing one token changes one q x q patch at its place and nothing else."""
    model = small_model(q=5)
    model.decoder.blocks = torch.nn.ModuleList()
    x = torch.randn(1, 6, 24)
    y = x.clone()
    y[0, 4] += torch.randn(24)
    changed = (model.decoder(x, 2, 3) != model.decoder(y, 2, 3)).any(1)[0]
    expected = torch.zeros(10, 15, dtype=torch.bool)
    expected[5:10, 5:10] = True  # token 4 of a grid of 2 x 3: second row, second column
    assert torch.equal(changed, expected)


@given(seeds, st.sampled_from([(4, 1), (4, 2), (5, 2), (8, 2), (3, 0)]), st.integers(1, 3), st.integers(1, 3))
def test_overlapping_patches_are_means_of_what_neighbours_paint_weighted_by_their_distance_to_the_edge(seed, sizes,
                                                                                                       rows, columns):
    torch.manual_seed(seed)
    q, m = sizes
    decoder, x = vqrae.Decoder(small_vit(), q, m), torch.randn(2, rows * columns, 24)
    decoder.blocks = torch.nn.ModuleList()
    side, painted, weights = q + 2 * m, np.zeros((2, 3, rows * q, columns * q)), np.zeros((rows * q, columns * q))
    with torch.no_grad():
        tokens = decoder.head(decoder.norm(x + vqrae.sincos_positions(rows, columns, 24))).double().numpy()
    for token in range(rows * columns):
        top, left = token // columns * q - m, token % columns * q - m
        for i, j in itertools.product(range(side), range(side)):
            if 0 <= top + i < rows * q and 0 <= left + j < columns * q:
                steps = [min(k + 0.5, side - k - 0.5) for k in (i, j)]  # to the nearer edge of what the token paints
                weight = math.prod(min(1, step / (2 * m)) for step in steps) if m else 1
                painted[:, :, top + i, left + j] += weight * tokens[:, token].reshape(2, 3, side, side)[:, :, i, j]
                weights[top + i, left + j] += weight
    np.testing.assert_allclose(decoder(x, rows, columns).detach().numpy(), painted / weights, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 9), st.data())
def test_away_from_the_images_edge_the_weights_of_overlapping_patches_add_up_to_1(q, data):
    decoder = vqrae.Decoder(small_vit(), q, data.draw(st.integers(0, q // 2)))
    weight = decoder.place(decoder.window.expand(1, -1, 9), 3, 3)
    torch.testing.assert_close(weight[..., q:2 * q, q:2 * q], torch.ones(1, 3, q, q))


def test_tokens_that_agree_leave_no_trace_of_their_patches_where_they_overlap():
    decoder = vqrae.Decoder(small_vit(), 4, 2)
    torch.nn.init.zeros_(decoder.head.weight)
    decoder.head.bias.data = torch.tensor([0.2, 0.5, 0.9]).repeat_interleave(64)
    image = decoder(torch.randn(1, 12, 24), 3, 4)
    torch.testing.assert_close(image, decoder.head.bias[::64].view(1, 3, 1, 1).expand(1, 3, 12, 16))


@given(row=st.integers(0, 20), column=st.integers(0, 20), quarter=st.integers(1, 12), data=st.data())
def test_a_position_is_the_sines_and_cosines_of_row_and_column_at_falling_frequencies(row, column, quarter, data):
    position = vqrae.sincos_positions(21, 23, 4 * quarter)[0, row * 23 + column]
    k = data.draw(st.integers(0, quarter - 1))
    angles = [place / 10000 ** (k / quarter) for place in (row, column)]
    expected = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    assert position[k::quarter].tolist() == pytest.approx(expected, abs=1e-5)


def test_positions_differ_everywhere_and_neighbours_resemble_each_other_most():
    positions = vqrae.sincos_positions(5, 7, 48)[0]
    similarity = (positions @ positions.T).fill_diagonal_(-1)
    best = similarity.argmax(1)
    rows, columns = torch.arange(35) // 7, torch.arange(35) % 7
    assert torch.all((rows - rows[best]).abs() + (columns - columns[best]).abs() == 1)


# --- the tokenizer as a whole ---


@given(seeds, st.sampled_from(["simvq", "vq"]))
@settings(max_examples=5)
def test_decoding_the_indices_gives_the_reconstruction_of_the_forward_pass(seed, kind):
    model, images = small_model(seed, quantizer=kind), torch.rand(3, 3, 16, 16)
    _, indices = model.encode(images)
    out = model(images)
    assert torch.equal(indices, out.indices)
    torch.testing.assert_close(model.decode(indices), out.reconstruction.clamp(0, 1), rtol=1e-5, atol=1e-6)


@given(seeds, st.permutations(range(6)), st.integers(1, 6))
@settings(max_examples=5)
def test_order_and_size_of_the_batch_do_not_change_an_image(seed, order, size):
    model = small_model(seed)
    images = torch.rand(6, 3, 16, 16)
    whole = model(images).reconstruction
    parts = torch.cat([model(part).reconstruction for part in images[list(order)].split(size)])
    torch.testing.assert_close(parts, whole[list(order)], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("part", ["encoder", "project_in", "quantizer", "project_out", "decoder"])
def test_one_part_of_a_model_may_be_in_half_precision(part):
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = started_model(small_model(), images)
    other, out = copy.deepcopy(model), model(images)
    getattr(other, part).half()
    assert (other.encode(images)[1] == out.indices).float().mean() > 0.95
    assert other(images).reconstruction.isfinite().all()
    torch.testing.assert_close(other.decode(out.indices), model.decode(out.indices), rtol=0, atol=0.01)


def test_a_saved_model_is_loaded_as_the_same_model(tmp_path):
    for quantizer in vqrae.QUANTIZERS:
        model, images = small_model(quantizer=quantizer, q=8), torch.rand(2, 3, 16, 16)
        model.save_pretrained(tmp_path)
        loaded = vqrae.VQRAE.from_pretrained(tmp_path)
        assert loaded.config == model.config
        assert torch.equal(loaded(images).reconstruction, model(images).reconstruction)


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16]))
def test_features_are_projected_in_float32_under_autocast_too(seed, dtype):
    model, generator = small_model(seed), torch.Generator().manual_seed(seed)
    model.feature_mean.normal_(generator=generator)
    features = torch.randn(2, 5, 24, generator=generator).to(dtype)
    with torch.no_grad():
        expected = model.project_features(features.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = model.project_features(features)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_without_a_quantizer_features_pass_unchanged():
    model = small_model(quantizer="none")
    out = model(torch.rand(2, 3, 16, 16))
    assert out.indices is None and torch.equal(out.z, out.z_q) and out.codebook_loss == out.commitment_loss == 0
    with pytest.raises(InputError):
        model.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_standardised_features_have_zero_mean_and_unit_variance_per_channel():
    model = small_model()
    features = model.encoder(torch.rand(32, 3, 16, 16)).detach().flatten(0, 1)
    model.start(features, torch.rand(len(features), 48), generator=torch.Generator().manual_seed(0))
    z = model.standardise(features)
    torch.testing.assert_close(z.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(24), atol=1e-3, rtol=0)


@given(st.integers(24, 60), seeds)
@settings(max_examples=5)
def test_distances_start_as_half_features_and_half_the_pixels_that_features_tell(e, seed):
    model = small_model(seed, codebook_dim=e)
    features = torch.randn(400, 24) @ torch.randn(24, 24) + torch.randn(24)
    patches = features @ torch.randn(24, 48) + 0.1 * torch.randn(400, 48)
    model.start(features, patches, codebook_init="gaussian", projection_init="features")
    f = model.standardise(features).numpy().astype(np.float64)
    told = f @ np.linalg.lstsq(f, patches.numpy() - patches.numpy().mean(0), rcond=None)[0]
    told *= np.sqrt((f**2).sum() / (told**2).sum())
    expected = 0.5 * ((f[0] - f) ** 2).sum(1) + 0.5 * ((told[0] - told) ** 2).sum(1)
    with torch.no_grad():
        z = model.project_in(model.standardise(features))
        restored = model.project_out(z)
    np.testing.assert_allclose((z[0] - z).pow(2).sum(1), expected, rtol=0.02)
    np.testing.assert_allclose(restored, f, atol=1e-2)  # the way out undoes the way in


@given(st.integers(4, 60), seeds)
@settings(max_examples=5)
def test_the_weightiest_third_of_the_directions_starts_in_full_and_the_rest_at_a_tenth(e, seed):
    model, whole = small_model(seed, codebook_dim=e), small_model(seed, codebook_dim=e)
    features = torch.randn(400, 24) @ torch.randn(24, 24) + torch.randn(24)
    patches = features @ torch.randn(24, 48) + 0.1 * torch.randn(400, 48)
    model.start(features, patches, codebook_init="gaussian")
    whole.start(features, patches, codebook_init="gaussian", projection_init="features")
    rank, major = min(e, 24), min(e, 8)
    scale = torch.linalg.svdvals(whole.project_in.weight.detach().double())[:rank]
    scale[major:] *= 0.1
    found = torch.linalg.svdvals(model.project_in.weight.detach().double())[:rank]
    torch.testing.assert_close(found, scale.sort(descending=True).values, rtol=1e-3, atol=1e-5)
    # The way out undoes the way in along that third, and leaves the rest to be learned.
    with torch.no_grad():
        around = model.project_out.weight.double() @ model.project_in.weight.double()  # (d, d)
    torch.testing.assert_close(around @ around, around, rtol=0, atol=1e-3)
    assert around.trace().item() == pytest.approx(major, abs=1e-3)


def test_features_are_read_of_codes_by_the_fitted_reading_and_by_nothing_else():
    model = small_model()
    z_q = model(torch.rand(2, 3, 16, 16)).z_q.detach()
    with pytest.raises(InputError, match="no reading of features"):
        model.features_of(z_q)
    model.reading.normal_()
    torch.testing.assert_close(model.features_of(z_q), z_q @ model.reading[:-1] + model.reading[-1])


def test_a_folder_saved_before_there_was_a_reading_is_loaded_as_the_same_model_without_one(saved_model):
    path, images = saved_model / "model.safetensors", torch.rand(2, 3, 16, 16)
    expected = small_model()(images).reconstruction
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "reading"}, path)
    model = vqrae.VQRAE.from_pretrained(saved_model)
    assert torch.equal(model(images).reconstruction, expected)
    with pytest.raises(InputError, match="no reading of features"):
        model.features_of(model(images).z_q)


# Other precisions: how many codes stay as they were, at least, and how far pixels may move.
PRECISIONS = [(torch.float64, 1.0, 1e-5), (torch.float16, 0.97, 0.01), (torch.bfloat16, 0.85, 0.05)]


@pytest.mark.parametrize("dtype, alike, close", PRECISIONS)
@pytest.mark.parametrize("quantizer", list(vqrae.QUANTIZERS))
def test_a_model_in_another_precision_encodes_decodes_and_paints_nearly_alike(quantizer, dtype, alike, close):
    assert_paints_nearly_alike(small_model(quantizer=quantizer), dtype, alike, close)


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 40), "cannot read the weights"),
    (lambda f: (f / "config.json").write_text("[]"), "does not describe a VQRAE"),
    (lambda f: edit(f / "config.json", '"codebook_size": 40', '"codebook_size": 41'), "has shape"),
    (lambda f: edit(f / "config.json", '"beta_side": "commitment"', '"beta_side": "comitment"'), "beta_side is 'comit"),
    (lambda f: edit(f / "config.json", '"final_norm": "tokens"', '"final_norm": "token"'), "final_norm 'token' is"),
    (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "does not exist"),
])
def test_a_damaged_model_is_one_sentence_with_its_path(tmp_path, damage, sentence):
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    damage(folder)
    with pytest.raises(InputError, match=sentence) as error:
        vqrae.VQRAE.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_what_is_not_pretrained_starts_small_and_codes_of_simvq_at_length_1():
    model, lm = small_model(codebook_size=500, codebook_dim=48), vqrae.VisualLM(small_lm().config)
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2) and not module.bias.any()
    for module in lm.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.quantizer.codebook.pow(2).sum(1).mean().item() == pytest.approx(1, rel=0.1)
    assert (model.feature_mean == 0).all() and (model.feature_std == 1).all()


# --- the losses of stage 1: Eq. 2 and Eq. 4 ---


def test_lpips_equals_the_lpips_package_on_random_weights():
    needs("lpips")
    import lpips

    torch.manual_seed(0)
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    x, y = torch.rand(2, 2, 3, 64, 64)
    with torch.no_grad():
        expected = network(2 * x - 1, 2 * y - 1).flatten()
        ours = vqrae.PaperPerceptual(network, torch.nn.Identity()).lpips(x, y)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_the_papers_perceptual_loss_at_its_weight_is_lpips_plus_a_tenth_of_the_convnext_logits():
    needs("lpips")
    import lpips

    from torchvision.models import convnext_small

    torch.manual_seed(0)
    perceptual = vqrae.PaperPerceptual(lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False), convnext_small())
    x, y = torch.rand(2, 1, 3, 32, 32)
    with torch.no_grad():
        logits = [perceptual.convnext(normalise(F.interpolate(image, size=224, mode="bilinear", antialias=True)))
                  for image in (x, y)]
        expected = perceptual.lpips(x, y).mean() + 0.1 * (logits[0] - logits[1]).pow(2).mean()
        torch.testing.assert_close(PRESETS["siglip2-256"]["1"].perceptual_weight * perceptual(x, y), expected)


def test_the_gradient_of_lpips_is_finite_where_all_features_are_zero():
    features = torch.zeros(1, 8, 2, 2, requires_grad=True)
    vqrae.unit(features, 1).sum().backward()
    assert torch.isfinite(features.grad).all()


def test_the_vfm_loss_is_zero_for_equal_images_and_leaves_no_gradient_on_the_encoder():
    encoder = small_model().encoder.requires_grad_(False)
    perceptual, x = vqrae.VFMPerceptual(encoder), torch.rand(2, 3, 16, 16)
    assert perceptual(x, x, torch.Generator().manual_seed(0)) < 1e-6
    y = torch.rand(2, 3, 16, 16, requires_grad=True)
    perceptual(x, y, torch.Generator().manual_seed(0)).backward()
    assert y.grad.abs().max() > 0 and all(p.grad is None for p in encoder.parameters())


def vfm_by_hand(encoder, x, y):
    """The VFM distance in float64 of one window of both images, without gradient term."""
    blocks = -(-encoder.config.depth // 6)  # a sixth of them
    states = [[x.detach().double().numpy() for x in encoder.hidden_states(image)][:blocks] for image in (x, y)]
    total = 0.0
    for a, b in zip(*states):  # (B, 1 + N, d) behind each block
        a, b = (tokens / np.linalg.norm(tokens, axis=2, keepdims=True) for tokens in (a, b))
        total += ((a - b) ** 2).sum(2).mean() / len(states[0]) / 2
    return total


@given(height=st.integers(8, 13), width=st.integers(8, 13), noise=st.floats(0.01, 1), seed=seeds)
@settings(max_examples=8)
def test_the_vfm_loss_is_half_of_unit_tokens_of_a_window_plus_twice_the_steps_of_pixels(height, width, noise, seed):
    encoder, generator = small_model(seed).encoder, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in encoder.blocks:  # tokens of many lengths, none of them 1
            block.mlp[2].bias.uniform_(-3, 3)
    x = torch.rand(2, 3, height, width, generator=generator)
    y = x + noise * torch.randn(x.shape, generator=generator)
    steps = [np.diff((y - x).double().numpy(), axis=axis) for axis in (2, 3)]
    expected, sides = [], [(size // 4 - 1) * 4 for size in (height, width)]
    for top in range(height - sides[0] + 1):
        for left in range(width - sides[1] + 1):
            window = slice(None), slice(None), slice(top, top + sides[0]), slice(left, left + sides[1])
            expected.append(vfm_by_hand(encoder, x[window], y[window]) + 2 * sum((step**2).mean() for step in steps))
    found = vqrae.VFMPerceptual(encoder)(x, y, generator).item()
    assert 0 < found < np.inf and min(abs(found - value) for value in expected) < 1e-3 * found
    assert max(expected) - min(expected) > 1e-3 * found  # the window matters


def test_the_vfm_loss_looks_through_windows_that_do_not_share_the_decoders_grid():
    perceptual = vqrae.VFMPerceptual(small_model().encoder)
    x, y = torch.rand(2, 1, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    assert len({round(perceptual(x, y, generator).item(), 7) for _ in range(20)}) > 5


def test_the_vfm_loss_takes_outputs_that_do_not_divide_into_patches():
    perceptual = vqrae.VFMPerceptual(small_model().encoder)
    assert perceptual(torch.rand(1, 3, 19, 14), torch.rand(1, 3, 19, 14)).isfinite()


weights = st.floats(0, 5)


@given(perceptual_weight=weights, quantizer_weight=weights, seed=seeds)
@settings(max_examples=5)
def test_the_stage_1_loss_is_mse_plus_weighted_perceptual_plus_both_weighted_quantizer_terms(perceptual_weight,
                                                                                             quantizer_weight, seed):
    model, images = small_model(seed), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    out = model(images)
    loss, terms = vqrae.stage1_loss(images, out, lambda x, y, generator: (x - y).abs().mean(), perceptual_weight,
                                    quantizer_weight)
    error = images - out.reconstruction
    expected = (error**2).mean() + perceptual_weight * error.abs().mean()
    torch.testing.assert_close(loss, expected + quantizer_weight * (out.codebook_loss + out.commitment_loss))
    assert set(terms) == {"mse", "perceptual", "codebook", "commitment"}
    assert terms["codebook"] == out.codebook_loss and terms["commitment"] == out.commitment_loss


@pytest.mark.parametrize("q", [3, 8])
def test_the_target_has_the_size_of_the_output_and_is_bicubic(q):
    images, model = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), small_model(q=q)
    out, seen = model(images), []
    _, terms = vqrae.stage1_loss(images, out, lambda x, y, generator: seen.append(x) or x.mean())
    target = F.interpolate(images, (4 * q, 4 * q), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(seen[0], target)
    torch.testing.assert_close(terms["mse"], (target - out.reconstruction).pow(2).mean())


def test_without_weights_of_ones_own_the_losses_have_the_papers():
    model, images = small_model(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out, discriminator = model(images), vqrae.Discriminator(32)

    def perceptual(x, y, generator):
        return (x - y).abs().mean()

    first, terms = vqrae.stage1_loss(images, out, perceptual)
    both_losses = out.codebook_loss + out.commitment_loss
    torch.testing.assert_close(first, terms["mse"] + 1.1 * terms["perceptual"] + both_losses)
    second, terms = vqrae.stage2_loss(images, out, perceptual, teacher_features=out.features.detach() + 1,
                                      discriminator=discriminator)
    torch.testing.assert_close(second, first + terms["distillation"] + 0.1 * terms["adversarial"])
    assert model.quantizer.beta == 0.25


# --- the losses of stage 2: Eq. 5, Eq. 6 and the adversarial term ---


@given(seed=seeds)
def test_distillation_is_the_mean_squared_distance_to_the_teacher(seed):
    a, b = np.random.RandomState(seed % 2**32).randn(2, 3, 5, 7)
    assert vqrae.distillation_loss(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(((a - b) ** 2).mean())


@given(quantizer=weights, distillation=weights, adversarial=weights, seed=seeds)
@settings(max_examples=5)
def test_the_stage_2_loss_is_stage_1s_plus_the_weighted_distillation_and_adversarial_terms(quantizer, distillation,
                                                                                           adversarial, seed):
    torch.manual_seed(seed)
    model, discriminator, images = small_model(seed), vqrae.Discriminator(32), torch.rand(2, 3, 16, 16)
    out, teacher = model(images), torch.randn(2, 16, 24)
    loss, terms = vqrae.stage2_loss(images, out, None, 1.1, quantizer, None, teacher, distillation, discriminator,
                                    adversarial)
    with torch.no_grad():
        expected = (((images - out.reconstruction) ** 2).mean() + quantizer * (out.codebook_loss + out.commitment_loss)
                    + distillation * ((out.features - teacher) ** 2).mean()
                    - adversarial * discriminator(out.reconstruction).mean())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert set(terms) == {"mse", "codebook", "commitment", "distillation", "adversarial"}


@pytest.mark.parametrize("term, reaches", [("pixels", True), ("commitment", True), ("codebook", False)])
def test_the_encoder_learns_from_pixels_through_the_straight_through_and_from_the_commitment(term, reaches):
    model = small_model()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    out = model(images)
    loss = {"pixels": F.mse_loss(out.reconstruction, images), "commitment": out.commitment_loss,
            "codebook": out.codebook_loss}[term]
    loss.backward()
    gradients = [parameter.grad for parameter in model.encoder.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in gradients) == reaches


def test_the_tokenizers_step_leaves_no_gradient_on_the_discriminator_but_feels_its_verdict():
    torch.manual_seed(0)
    discriminator, model = vqrae.Discriminator(32), small_model()
    images = torch.rand(2, 3, 16, 16)
    out = model(images)
    total, terms = vqrae.stage2_loss(images, out, None, discriminator=discriminator, adversarial_weight=0.1)
    plain, _ = vqrae.stage1_loss(images, out, None)
    assert terms["adversarial"].item() == pytest.approx(-discriminator(out.reconstruction).mean().item())
    assert (total - plain).item() == pytest.approx(0.1 * terms["adversarial"].item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(terms["adversarial"], out.reconstruction, retain_graph=True)
    assert gradient.abs().sum() > 0
    total.backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator.parameters())


def test_hinge_and_lecam_have_the_values_worked_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    # relu(1 - real) = 0, 0.5; relu(1 + fake) = 0, 2: half of 0.25 + 1
    assert vqrae.hinge_loss(real, fake).item() == pytest.approx(0.625)
    # mean real 1.25 lies 1.05 above 0.2; mean fake -1 lies 1.5 below 0.5
    lecam = vqrae.lecam_penalty(real, fake, real_average=torch.tensor(0.5), fake_average=torch.tensor(0.2))
    assert lecam.item() == pytest.approx(1.05**2 + 1.5**2)
    assert vqrae.lecam_penalty(fake, real, torch.tensor(0.5), torch.tensor(0.2)).item() == 0  # not punished at all


@torch.no_grad()
def test_lecam_compares_with_the_averages_of_earlier_batches_and_remembers_when_told():
    torch.manual_seed(0)
    discriminator = vqrae.Discriminator(32)
    real, fake = torch.rand(2, 2, 3, 32, 32)
    a, b = discriminator(real), discriminator(fake)
    for real_average, fake_average in ((0.0, 0.0), (0.1 * a.mean(), 0.1 * b.mean())):
        penalty = F.relu(a.mean() - fake_average) ** 2 + F.relu(real_average - b.mean()) ** 2
        for options, weight in (({"lecam_weight": 10.0}, 10), ({}, 0.001)):
            loss, terms = discriminator.loss(real, fake, **options)
            assert loss.item() == pytest.approx((vqrae.hinge_loss(a, b) + weight * penalty).item(), rel=1e-6)
        assert discriminator.real_average == real_average and discriminator.fake_average == fake_average
        discriminator.remember(terms["real_logit"], terms["fake_logit"], decay=0.9)
    discriminator.remember(torch.tensor(1.0) + discriminator.real_average, discriminator.fake_average)
    assert discriminator.real_average.item() == pytest.approx(0.19 * a.mean().item() + 0.001, rel=1e-4)


@torch.no_grad()
def test_the_discriminator_is_titoks_layer_by_layer():
    torch.manual_seed(0)
    model, x = vqrae.Discriminator(32), torch.rand(2, 3, 40, 32)
    weights = iter([p.add_(0.1 * torch.randn_like(p)) for p in model.parameters()])
    expected = F.leaky_relu(F.conv2d(x, next(weights), next(weights), padding=2), 0.1)
    for channels in (32, 64, 128):
        expected = F.conv2d(expected, next(weights), next(weights), padding=1)
        expected = vqrae.BlurHalf(channels)(expected)
        groups = expected.unflatten(1, (32, -1))
        mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
        expected = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        expected = expected * next(weights).view(-1, 1, 1) + next(weights).view(-1, 1, 1)
        expected = torch.where(expected > 0, expected, 0.1 * expected)
    expected = F.leaky_relu(F.conv2d(F.adaptive_max_pool2d(expected, 16), next(weights), next(weights)), 0.1)
    expected = F.conv2d(expected, next(weights), next(weights), padding=2)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@given(height=st.integers(16, 70), width=st.integers(16, 70))
@settings(max_examples=5)
def test_the_discriminator_gives_a_map_of_16_x_16_verdicts_at_any_size(height, width):
    assert vqrae.Discriminator(32)(torch.rand(2, 3, height, width)).shape == (2, 1, 16, 16)


@given(height=st.integers(4, 11), width=st.integers(4, 11), seed=seeds)
def test_the_blur_is_scipys_correlation_with_1_3_3_1_at_every_second_pixel(height, width, seed):
    from scipy.signal import correlate2d

    image = np.random.RandomState(seed % 2**32).rand(height, width)
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    expected = correlate2d(np.pad(image, ((1, 2), (1, 2))), taps, mode="valid")[::2, ::2]
    found = vqrae.BlurHalf(1)(torch.tensor(image, dtype=torch.float32)[None, None])[0, 0].numpy()
    assert found.shape == (-(-height // 2), -(-width // 2))
    np.testing.assert_allclose(found, expected[:found.shape[0], :found.shape[1]], atol=1e-6)


# --- generation: section 3.5 ---


@given(seed=seeds, batch=st.integers(1, 3), length=st.integers(1, 20))
def test_logits_equal_those_of_transformers_qwen3(qwen3_twin, seed, batch, length):
    twin, folder = qwen3_twin
    model = vqrae.load_qwen3(folder, codebook_size=7)
    tokens = torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert (model(tokens)[..., :50] - twin(tokens).logits).abs().max() < 1e-4


def test_a_greedy_continuation_is_transformers_own_token_for_token(qwen3_twin):
    twin, folder = qwen3_twin
    model = vqrae.load_qwen3(folder, codebook_size=7)
    model.config.text_vocabulary = 0  # every token may follow, as in the twin
    with torch.no_grad():
        model.embedding.weight[50:] = 0
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    theirs = twin.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:]
    assert torch.equal(model.extend(prompt.tolist(), 24, temperature=0)[0], theirs)


@given(seed=seeds, at=st.integers(1, 9))
def test_future_tokens_cannot_change_past_logits(seed, at):
    model = small_lm(seed)
    tokens = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(seed))
    changed = tokens.clone()
    changed[:, at:] = (changed[:, at:] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :at], after[:, :at]) and not torch.equal(before[:, at:], after[:, at:])


@given(seed=seeds, cfg_scale=st.sampled_from([1.0, 3.0]), top_k=st.sampled_from([0, 5]),
       lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_the_cache_and_the_padding_change_nothing(seed, cfg_scale, top_k, lengths):
    model, generator = small_lm(seed), torch.Generator().manual_seed(seed)
    prompts = [torch.randint(30, (length,), generator=generator).tolist() for length in lengths]
    draw = {"cfg_scale": cfg_scale, "top_k": top_k, "temperature": 0}
    together = model.extend(prompts, 8, without=[0], **draw)
    for prompt, found in zip(prompts, together):
        codes = []
        for _ in range(8):  # one prompt at a time, all logits anew, no cache
            with torch.no_grad():
                logits = model(torch.tensor([prompt + [30 + code for code in codes]]))[0, -1, 30:]
                if cfg_scale != 1:
                    plain = model(torch.tensor([[0] + [30 + code for code in codes]]))[0, -1, 30:]
                    logits = plain + cfg_scale * (logits - plain)
            codes.append(int(logits.argmax()))
        assert found.tolist() == codes


def test_the_memory_of_the_cache_is_allocated_once(monkeypatch):
    caches, real = [], vqrae.KeyValueCache.__init__

    def remember(cache, *rest):
        real(cache, *rest)
        caches.append((cache, cache.memory.data_ptr()))

    monkeypatch.setattr(vqrae.KeyValueCache, "__init__", remember)
    small_lm().extend([[1, 2, 3]], 10)
    ((cache, where),) = caches
    assert cache.memory.data_ptr() == where and cache.length == cache.memory.shape[4] - 1


def test_a_token_costs_more_in_a_longer_picture_by_no_more_than_its_length():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, cost = small_lm(), []
    for length in (64, 128, 192, 256):  # equally far apart
        cache = vqrae.KeyValueCache(model.config, 1, length, "cpu", torch.float32)
        with torch.no_grad():
            model(torch.zeros(1, length - 1, dtype=torch.int64), cache=cache)
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that it can count
                model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
        cost.append(counter.get_total_flops())
    assert len(set(np.diff(cost))) == 1 and cost[0] < cost[-1] < 4 * cost[0]


def test_only_codes_are_generated_and_a_seed_repeats_them():
    model = small_lm()
    draws = [model.extend([[1, 2], [3]], 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (2, 12) and 0 <= draws[0].min() and draws[0].max() < 20


@given(seed=seeds, top_k=st.integers(1, 8), levels=st.integers(1, 3))
def test_of_equally_likely_codes_top_k_leaves_no_more_than_asked(seed, top_k, levels):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (8,), generator=generator).float()  # most of them alike
    drawn = vqrae.choose(logits.expand(4000, -1), 1.0, top_k, 1.0, generator).bincount(minlength=8) > 0
    assert drawn.sum() == top_k and logits[drawn].min() >= logits[~drawn].amax() if top_k < 8 else drawn.all()


@given(seed=seeds, top_k=st.integers(0, 9), top_p=st.floats(0.05, 1), temperature=st.floats(0.5, 2))
def test_top_k_and_top_p_leave_the_likeliest_codes_and_all_of_them(seed, top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.rand(8, generator=generator)  # none of them rare: at least one in 500 draws
    share = np.exp(logits.double().numpy() / temperature)
    order = np.argsort(-share)[:top_k or 8]  # top-k first, then top-p of what it leaves
    share = share[order] / share[order].sum()
    before = np.cumsum(share) - share
    assume(np.abs(before - top_p).min() > 1e-5)
    drawn = vqrae.choose(logits.expand(8000, -1), temperature, top_k, top_p, generator).bincount(minlength=8)
    allowed = before < top_p
    assert set(drawn.nonzero()[:, 0].tolist()) == set(order[allowed].tolist())
    expected = np.zeros(8)
    expected[order[allowed]] = share[allowed] / share[allowed].sum()
    np.testing.assert_allclose(drawn.numpy() / 8000, expected, atol=0.03)  # five standard deviations


@given(seed=seeds, text=st.integers(1, 4), codes=st.integers(1, 5))
def test_the_loss_is_the_cross_entropy_of_visual_tokens_alone(seed, text, codes):
    model, generator = small_lm(seed), torch.Generator().manual_seed(seed)
    tokens = torch.cat([torch.randint(30, (2, text), generator=generator),
                        torch.randint(30, 50, (2, codes), generator=generator)], dim=1)
    with torch.no_grad():
        log_p = model(tokens).double().log_softmax(-1)
        expected = -np.mean([log_p[b, i - 1, tokens[b, i]].item() for b in range(2) for i in range(text, text + codes)])
        assert model.loss(tokens).item() == pytest.approx(expected, abs=1e-4)


@given(seed=seeds)
def test_what_is_misread_is_still_to_be_predicted_as_it_is(seed):
    model, generator = small_lm(seed), torch.Generator().manual_seed(seed)
    tokens, seen = torch.randint(30, 50, (2, 2, 6), generator=generator)
    with torch.no_grad():
        log_p = model(seen[:, :-1]).double().log_softmax(-1)
        expected = -log_p.gather(2, tokens[:, 1:, None]).mean().item()
        assert model.loss(tokens, seen=seen).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("spelling", ["Red apple", "a red apple", "A RED APPLE", "the red apple", "  red apple "])
def test_case_and_a_leading_article_do_not_matter(spelling):
    model = text_lm()
    assert model.prompt(spelling) == model.prompt("red apple")


def test_a_style_that_is_named_makes_another_prompt():
    model = text_lm()
    prompts = {tuple(model.prompt(f"{style} red apple")) for style in ("fluent", "noto", "twemoji")}
    assert len(prompts | {tuple(model.prompt("red apple")), tuple(model.prompt(""))}) == 5
    assert model.prompt("") == [model.text.token_to_id(START_OF_IMAGE)]


@given(image_tokens=st.integers(1, 20), most=st.integers(22, 60), words=st.integers(0, 60))
def test_text_and_image_together_have_at_most_max_tokens(image_tokens, most, words):
    model, caption = text_lm(image_tokens=image_tokens, max_tokens=most), "x" * words
    prompt, room, count = model.prompt(caption), most - image_tokens - 1, len(model.text.encode(caption).ids)
    assert len(prompt) == min(count, room) + 1 and prompt[-1] == model.text.token_to_id(START_OF_IMAGE)
    if count <= room:
        assert model.generate(caption, temperature=0).shape == (1, image_tokens)
    else:
        with pytest.raises(InputError, match=f"may have {room} tokens here, and 'x.* has more"):
            model.generate(["", caption])


def test_an_image_that_leaves_no_room_for_text_is_one_sentence():
    assert small_lm().config.max_tokens == 1536  # Table 9
    for make in (lambda: small_lm(image_tokens=1535), lambda: vqrae.CaptionerConfig(small_vit(), 160, replace(
            small_lm().config, image_tokens=0))):
        with pytest.raises(InputError, match="an image of 1[56].* tokens leaves no room for text in 1536"):
            make()


def test_a_captioner_is_taught_no_more_than_fits_behind_an_image():
    model = small_captioner()
    model.config.lm.max_tokens = 25  # 16 of the image, its start, the end, and 7
    tokens = model.tokens("red apple " * 99)
    assert len(tokens) == 8 and tokens[-1] == model.lm.text.token_to_id(END_OF_TEXT)
    assert tokens[:-1] == model.lm.text.encode("red apple " * 99).ids[:7]


@torch.no_grad()
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.5)])
def test_a_language_model_in_another_precision_predicts_nearly_alike_and_writes(dtype, close):
    model, captioner, images = text_lm(image_tokens=4), small_captioner(), torch.rand(2, 3, 16, 16)
    other, tokens = copy.deepcopy(model).to(dtype), torch.tensor([model.prompt("red apple") + [300, 310]])
    torch.testing.assert_close(other(tokens).float(), model(tokens), rtol=0, atol=close)
    assert other.loss(tokens).item() == pytest.approx(model.loss(tokens).item(), rel=close)
    assert other.generate(["red apple", ""], cfg_scale=2.0).shape == (2, 4)
    said = ["red apple", "cat"]
    expected, captioner = captioner.loss(images, said), captioner.to(dtype)
    assert captioner.loss(images, said).item() == pytest.approx(expected.item(), rel=close)
    assert len(captioner.caption(images, most=4)) == len(captioner.caption(images.to(dtype), most=4)) == 2


@torch.no_grad()
def test_what_is_added_up_in_the_transformers_is_in_float32_under_autocast():
    images, seen = torch.rand(2, 3, 16, 16), []
    model, captioner = small_model(), small_captioner()
    plain = vqrae.Decoder(replace(small_vit(), layer_scale=False), 4)
    for module in (*model.encoder.blocks, *model.decoder.blocks, *plain.blocks, *captioner.lm.blocks):
        module.register_forward_hook(lambda module, given, result: seen.append((given[0].dtype, result.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        plain(model(images).features.bfloat16(), 4, 4)
        captioner.loss(images, ["red apple", "cat"])
    assert len(seen) == 4 * 2 and set(seen) == {(torch.float32, torch.float32)}


@torch.no_grad()
def test_a_deep_decoder_without_layer_scale_loses_little_under_autocast():
    torch.manual_seed(0)
    decoder = vqrae.Decoder(vqrae.ViTConfig(16, 4, 64, 27, 4, 128, layer_scale=False), 4)
    x = torch.randn(4, 16, 64)
    expected = decoder(x, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder(x.bfloat16(), 4, 4)  # what project_out gives there
    assert (found - decoder(x.bfloat16().float(), 4, 4)).norm() < 0.007 * expected.norm()


def test_a_saved_language_model_is_loaded_as_the_same_model(tmp_path):
    model = text_lm()
    model.save_pretrained(tmp_path)
    again = vqrae.VisualLM.from_pretrained(tmp_path)
    draw = {"text": ["a red apple", ""], "cfg_scale": 2.0, "seed": 3}
    assert again.config == model.config and torch.equal(again.generate(**draw), model.generate(**draw))


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: edit(folder / "config.json", '"qwen3"', '"llama"'), "is of type 'llama'"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"), "cannot read the weights"),
    (lambda folder: edit(folder / "config.json", '"num_hidden_layers": 3', '"num_hidden_layers": 4'), "has no tensor"),
])
def test_a_damaged_qwen3_is_one_sentence(qwen3_twin, tmp_path, damage, sentence):
    shutil.copytree(qwen3_twin[1], tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(InputError, match=sentence):
        vqrae.load_qwen3(tmp_path / "copy", codebook_size=7)


def test_qwen3_brings_its_text_tokenizer_and_writes_codes_behind_it(qwen3_with_text):
    folder, text = qwen3_with_text
    model = vqrae.load_qwen3(folder, codebook_size=7, image_tokens=4)
    assert model.prompt("red apple") == [0, 1, 48] and model.generate(["red apple"]).max() < 7
    assert model.text.to_str() == text.to_str() and model.config.image_tokens == 4
    assert model.embedding.weight.shape == (57, 32)


# --- understanding: section 3.4 ---


@given(seed=seeds, batch=st.integers(1, 3))
def test_a_caption_is_the_likeliest_word_by_word_with_and_without_the_cache(seed, batch):
    model = small_captioner(seed)
    images = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    end = model.lm.text.token_to_id(END_OF_TEXT)
    for image, caption in zip(images, model.caption(images, most=6)):
        tokens = []
        with torch.no_grad():
            while len(tokens) < 6:  # one image at a time, everything anew, no cache
                x = model.read(model.encoder(image[None]))
                if tokens:
                    x = torch.cat([x, model.lm.embedding(torch.tensor([tokens]))], dim=1)
                tokens.append(int((model.lm.transform(x)[0, -1] @ model.lm.embedding.weight.T).argmax()))
                if tokens[-1] == end:
                    break
        assert caption == model.lm.text.decode([token for token in tokens if token != end]).strip()


@given(seed=seeds, captions=st.lists(st.sampled_from(["red apple", "cat", "flag: Chile", ""]), min_size=1, max_size=4))
def test_the_caption_loss_is_the_cross_entropy_of_words_and_ends_whatever_the_padding(seed, captions):
    model = small_captioner(seed)
    images = torch.rand(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    end, total, count = model.lm.text.token_to_id(END_OF_TEXT), 0.0, 0
    with torch.no_grad():
        for image, caption in zip(images, captions):
            tokens = model.lm.text.encode(caption).ids + [end]
            x = torch.cat([model.read(model.encoder(image[None])), model.lm.embedding(torch.tensor([tokens]))], dim=1)
            log_p = (model.lm.transform(x) @ model.lm.embedding.weight.T).double().log_softmax(-1)[0, -1 - len(tokens):]
            total -= sum(log_p[i, token].item() for i, token in enumerate(tokens))
            count += len(tokens)
        assert model.loss(images, captions).item() == pytest.approx(total / count, rel=1e-4)


def test_a_saved_captioner_is_loaded_as_the_same_captioner(tmp_path):
    model = small_captioner()
    model.save_pretrained(tmp_path)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert vqrae.Captioner.from_pretrained(tmp_path).caption(images) == model.caption(images)
