"""Measures of pixels, of the use of a codebook, and of what features understand, each against a reference."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vqrae
from conftest import seeds, small_captioner, small_model, small_vit, text_lm
from support.files import InputError
from support.images import ImageSet
from support.metrics import (caption_accuracy, cluster_measures, clusters, drift, effective_dimension, evaluate,
                            fit_reading, frechet_distance, generation, linear_probe, loss_on_captions,
                            loss_on_codes, nearest, nearest_neighbours, psnr, retrieval, seam_errors, ssim,
                            understanding, usage)


# --- pixels ---


@given(st.integers(11, 40), st.integers(11, 40), seeds, st.floats(0.001, 1))
def test_psnr_and_ssim_equal_those_of_scikit_image(height, width, seed, noise):
    from skimage import metrics

    rng = np.random.default_rng(seed)
    x = rng.random((2, 3, height, width))
    y = np.clip(x + noise * rng.standard_normal(x.shape), 0, 1)
    ours = psnr(torch.tensor(x), torch.tensor(y)), ssim(torch.tensor(x), torch.tensor(y))
    for i in range(2):
        assert ours[0][i].item() == pytest.approx(metrics.peak_signal_noise_ratio(x[i], y[i], data_range=1), abs=1e-4)
        expected = metrics.structural_similarity(x[i], y[i], data_range=1, channel_axis=0, gaussian_weights=True,
                                                 sigma=1.5, use_sample_covariance=False)
        assert ours[1][i].item() == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 8), st.integers(0, 4), seeds)
def test_the_effective_dimension_of_a_cloud_that_varies_alike_in_some_directions_is_their_number(rank, more, seed):
    axes = np.linalg.qr(np.random.RandomState(seed % 2**32).randn(rank + more, rank + more))[0][:rank]
    cross = np.concatenate([np.eye(rank), -np.eye(rank)]) @ axes  # two points on every axis
    assert effective_dimension(torch.tensor(cross + 3)) == pytest.approx(rank, rel=1e-6)


def test_the_effective_dimension_is_exp_of_the_entropy_of_the_squared_singular_values():
    x = np.random.RandomState(0).randn(50, 6) * [5, 3, 1, 1, 0.1, 0]
    share = np.linalg.svd(x - x.mean(0), compute_uv=False)**2
    share = share[:5] / share.sum()
    assert effective_dimension(torch.tensor(x)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_a_grid_of_patches_shows_in_the_seam_ratio_and_plain_noise_does_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 32, 32, generator=generator)
    noise = 0.1 * torch.randn(x.shape, generator=generator)
    offsets = 0.1 * torch.randn(4, 3, 4, 4, generator=generator)  # one wrong tone per patch of 8 x 8
    ratio = [torch.stack(seam_errors(x, x + error, 8)).mean(1) for error in
             (noise, F.interpolate(offsets, scale_factor=8) + 0.1 * noise)]
    assert (ratio[0][0] / ratio[0][1]).item() == pytest.approx(1, abs=0.1)
    assert ratio[1][0] > 10 * ratio[1][1]


@torch.no_grad()
def test_the_figures_of_a_tokenizer_are_means_over_images_of_what_a_file_would_hold(photo_folder):
    from skimage import metrics

    model, encoder, images = small_model(q=6), small_model(seed=1).encoder, ImageSet(photo_folder, "all", 16)
    x = torch.cat(list(images.views()))
    found = evaluate(model, images, batch_size=5, frechet_encoder=encoder, lpips=lambda x, y: (x - y).mean((1, 2, 3)))
    out = model(x)
    x = F.interpolate(x, (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    y = (out.reconstruction.clamp(0, 1) * 255).round() / 255
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(x, y)]
    scores = [metrics.peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    assert found["psnr"] == pytest.approx(np.mean(scores), abs=1e-3) and found["images"] == 12
    scores = [metrics.structural_similarity(a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                            use_sample_covariance=False) for a, b in pairs]
    assert found["ssim"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert found["lpips"] == pytest.approx((x - y).mean().item(), abs=1e-5)
    error = (y - x).numpy()
    steps = [np.diff(error, axis=axis) ** 2 for axis in (2, 3)]
    seams = sum(np.take(step, [5, 11, 17], axis).mean() for axis, step in zip((2, 3), steps))  # patches of 6 x 6
    others = sum(np.delete(step, [5, 11, 17], axis).mean() for axis, step in zip((2, 3), steps))
    assert found["seam_ratio"] == pytest.approx(seams / others, rel=1e-3)
    counts = out.indices.flatten().bincount(minlength=40).double()
    share = counts[counts > 0] / counts.sum()
    assert found["tokens"] == 12 * 16 and found["utilization"] == pytest.approx((counts > 0).double().mean().item())
    assert found["perplexity"] == pytest.approx(np.exp(-(share * share.log()).sum().item()))
    seen = [encoder(F.interpolate(side, (16, 16), mode="bicubic", antialias=True)).mean(1) for side in (x, y)]
    assert found["frechet"] == pytest.approx(frechet_distance(*seen), rel=1e-3)
    passed = usage(model, images, batch_size=7)
    assert passed == {name: found[name] for name in ("utilization", "perplexity", "tokens")}


# --- distances between sets of pictures ---


@given(st.integers(2, 8), seeds)
def test_the_frechet_distance_equals_its_formula_with_scipys_matrix_root(d, seed):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((50, d)), 1.5 * rng.standard_normal((60, d)) + rng.standard_normal(d)
    a, b = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(torch.tensor(x), torch.tensor(x)) == pytest.approx(0, abs=1e-6)


@given(st.integers(2, 8), st.floats(-1e4, 1e4), seeds)
def test_the_frechet_distance_does_not_depend_on_where_the_features_lie(d, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(50, d, generator=generator).double(), torch.randn(60, d, generator=generator).double()
    assert frechet_distance(x + shift, y + shift) == pytest.approx(frechet_distance(x, y), rel=1e-6)


@given(seed=seeds, d=st.integers(2, 8), n=st.integers(2, 20))
def test_the_nearest_picture_to_one_of_the_gallery_is_itself(seed, d, n):
    gallery = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    found = nearest(gallery, gallery).tolist()
    z = (gallery - gallery.mean(0)) / (gallery.std(0) + 1e-6)
    z = F.normalize(z, dim=1).double().numpy()
    assert np.allclose([z[i] @ z[j] for i, j in enumerate(found)], 1, atol=1e-5)


@given(seed=seeds, d=st.integers(2, 8), n=st.integers(3, 20))
def test_the_nearest_picture_is_by_cosine_of_channels_standardised_over_the_gallery(seed, d, n):
    rng = np.random.default_rng(seed)
    scale, shift = 10.0 ** rng.integers(-2, 3, d), 10 * rng.standard_normal(d)
    gallery, features = (rng.standard_normal((count, d)) * scale + shift for count in (n, 5))
    a, b = ((x - gallery.mean(0)) / gallery.std(0, ddof=1) for x in (features, gallery))
    cosine = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    found = nearest(torch.tensor(features), torch.tensor(gallery)).numpy()
    assert (cosine[np.arange(5), found] >= cosine.max(1) - 1e-3).all()


def test_retrieval_counts_names_categories_and_subcategories():
    apple = {"name": "apple", "category": "food", "subcategory": "fruit", "style": "noto"}
    pear, cat = {**apple, "name": "pear"}, {"name": "cat", "category": "animals", "subcategory": "mammals"}
    asked = [apple, apple, apple, apple]
    found = retrieval([{**apple, "style": "fluent"}, pear, cat, apple], asked)
    assert found == {"name": 0.5, "category": 0.75, "subcategory": 0.75}
    assert retrieval([{"name": "a"}], [{"name": "b"}]) == {"name": 0.0}


# --- what features understand ---


def linear_classes(n, d, classes, seed=0):
    """Gaussian features (n, d), and the labels (n,) that a random linear map gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x, (x @ torch.randn(d, classes, generator=generator)).argmax(1)


def test_a_linear_probe_reads_linear_classes_and_guesses_at_noise():
    x, labels = linear_classes(600, 10, 3)
    assert linear_probe(x[:400], labels[:400], [x[400:]], labels[400:])[0] > 0.85
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    assert linear_probe(x[:400], shuffled[:400], [x[400:]], shuffled[400:])[0] < 0.6


def test_a_probe_is_fitted_once_and_applied_to_other_features_unchanged():
    x, labels = linear_classes(600, 10, 3)
    own, turned, same = linear_probe(x[:400], labels[:400], [x[400:], -x[400:], x[400:].clone()], labels[400:])
    assert own == same > 0.85 and turned < 0.2


@given(seed=seeds, C=st.sampled_from([0.001, 0.01, 0.1, 1]))
def test_a_probe_of_given_strength_is_the_minimum_of_the_summed_cross_entropy_and_half_the_squared_norm(seed, C):
    x, labels = linear_classes(200, 5, 3, seed)
    x, test, labels = x[:100].double(), x[100:].double(), labels[:100]
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()], max_iter=500, tolerance_grad=1e-9,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = C * F.cross_entropy(standard @ weight + bias, labels, reduction="sum") + weight.pow(2).sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        logits = ((test - x.mean(0)) / x.std(0, correction=0)) @ weight + bias
    (first, second), guess = logits.topk(2).values.T, logits.argmax(1)
    sure = first - second > 0.01 * first.abs()
    assert linear_probe(x, labels, [test[sure]], guess[sure], strengths=[C]) == [1.0]


def noisy_copies(emoji, copies, generator):
    """Features (emoji * copies, 60) and labels: every channel tells a little of the class and much of the emoji."""
    labels = torch.arange(emoji) % 2
    x = torch.randn(emoji, 60, generator=generator) + 0.2 * (2 * labels[:, None] - 1)
    x, labels = x.repeat_interleave(copies, 0), labels.repeat_interleave(copies)
    return x + 0.01 * torch.randn(x.shape, generator=generator), labels


def test_the_strength_of_a_probe_is_chosen_with_the_images_of_a_group_on_one_side():
    generator = torch.Generator().manual_seed(0)
    (x, labels), (test, truth) = noisy_copies(90, 3, generator), noisy_copies(1000, 1, generator)
    by_heart, careful = (linear_probe(x, labels, [test], truth, strengths=[C]) for C in (100, 1e-3))
    assert careful[0] > by_heart[0] + 0.02
    names = [f"emoji {i // 3}" for i in range(270)]
    assert linear_probe(x, labels, [test], truth, names, strengths=(1e-3, 100)) == careful
    assert linear_probe(x, labels, [test], truth, strengths=(1e-3, 100)) == by_heart  # its copies were on both sides


@given(seed=seeds)
@settings(max_examples=5)
def test_the_features_tested_have_no_say_in_the_strength_of_a_probe(seed):
    generator = torch.Generator().manual_seed(seed)
    x, labels = noisy_copies(30, 1, generator)
    (test, truth), other = noisy_copies(60, 1, generator), torch.randn(60, 60, generator=generator)
    assert linear_probe(x, labels, [test, other], truth) == linear_probe(x, labels, [other, test], truth)[::-1]


@pytest.mark.parametrize("count, names", [(2, None), (6, ["the same"] * 6)])
def test_a_probe_is_fitted_where_there_is_too_little_to_choose_its_strength_by(count, names):
    labels = torch.arange(count) % 2
    assert linear_probe(labels[:, None] * 2.0, labels, [labels[:, None] * 2.0], labels, names) == [1.0]


@given(seed=seeds, k=st.integers(1, 12))
def test_nearest_neighbours_vote_as_in_a_float64_brute_force(seed, k):
    rng = np.random.RandomState(seed % 2**32)
    train_x, test_x, labels = rng.randn(30, 4), rng.randn(9, 4), rng.randint(0, 3, 30)
    expected = []
    for x in test_x:
        cosine = train_x @ x / np.linalg.norm(train_x, axis=1) / np.linalg.norm(x)
        near = np.argsort(-cosine)[:k]
        expected.append(np.argmax([cosine[near][labels[near] == c].sum() for c in range(3)]))
    truth = rng.randint(0, 3, 9)
    found = nearest_neighbours(torch.tensor(train_x), torch.tensor(labels), torch.tensor(test_x), torch.tensor(truth),
                               k)
    assert found == pytest.approx((np.array(expected) == truth).mean())


def test_neighbours_of_features_that_are_all_zero_still_vote():
    assert nearest_neighbours(torch.zeros(4, 3), torch.tensor([1, 1, 1, 0]), torch.zeros(2, 3), torch.ones(2)) == 1


def test_an_unchanged_encoder_understands_what_its_teacher_does(photo_folder):
    model, images = small_model(), ImageSet(photo_folder, "all", 16)
    fit_reading(model, images)
    rows = understanding(model, model.encoder, images, images)
    assert rows["continuous"].pop("drift_before_norm") == rows["continuous"].pop("drift_behind_norm") == 0
    assert rows["continuous"] == rows["teacher"] and rows["teacher"]["cosine"] == pytest.approx(1)
    assert rows["teacher"]["category_transfer"] == rows["teacher"]["category_probe"]
    assert 0 < rows["discrete"]["cosine"] < 0.99


def test_codes_that_nothing_reads_have_no_row(photo_folder):
    images = ImageSet(photo_folder, "all", 16)
    assert set(understanding(small_model(), small_model().encoder, images, images)) == {"teacher", "continuous"}


@torch.no_grad()
def test_understanding_is_of_means_over_tokens_and_of_distances_on_held_out_images_alone(photo_folder):
    model, teacher = small_model(), small_model(seed=1).encoder
    train, test = (ImageSet(photo_folder, split, 16) for split in ("train", "all"))
    fit_reading(model, train)
    rows = understanding(model, teacher, train, test, batch_size=5)
    seen, labels = [torch.cat(list(images.views())) for images in (train, test)], []
    for images in (train, test):
        labels.append(torch.tensor([int(record["category"] == "class1") for record in images.records]))
    out = model(seen[1])
    ours = {"teacher": teacher(seen[1]), "continuous": out.features, "discrete": model.features_of(out.z_q)}
    groups = [record["name"] for record in train.records]
    for name, tokens in ours.items():
        a, b = tokens.double().numpy(), ours["teacher"].double().numpy()
        cosine = (a * b).sum(2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
        assert rows[name]["cosine"] == pytest.approx(cosine.mean(), abs=1e-5)
        [transfer] = linear_probe(teacher(seen[0]).mean(1), labels[0], [tokens.mean(1)], labels[1], groups)
        assert rows[name]["category_transfer"] == transfer
    trained = {"continuous": model.encoder(seen[0]).mean(1), "discrete": model.features_of(model(seen[0]).z_q).mean(1)}
    for name, features in trained.items():
        assert [rows[name]["category_probe"]] == linear_probe(features, labels[0], [ours[name].mean(1)], labels[1],
                                                              groups)
        votes = nearest_neighbours(features, labels[0], ours[name].mean(1), labels[1])
        assert rows[name]["category_neighbours"] == votes
    moved, still = ours["continuous"].double(), ours["teacher"].double()
    drift = ((moved - still)**2).sum() / ((still - still.mean((0, 1)))**2).sum()
    # Means are of each batch, so the variance is near the whole's.
    assert rows["continuous"]["drift_behind_norm"] == pytest.approx(drift.item(), rel=0.1)


def test_drift_before_the_norm_is_seen_where_the_norm_hides_it(photo_folder):
    model, images = small_model(), ImageSet(photo_folder, "all", 16)
    teacher = small_model().encoder
    with torch.no_grad():  # what the blocks write is scaled by 3: LayerNorm takes it back
        model.encoder.patch_embed.weight.mul_(3), model.encoder.patch_embed.bias.mul_(3)
        model.encoder.positions.mul_(3), model.encoder.cls_token.mul_(3)
        for block in model.encoder.blocks:
            for layer in (block.attention.out, block.mlp[2]):
                layer.weight.mul_(3), layer.bias.mul_(3)
    row = understanding(model, teacher, images, images)["continuous"]
    assert row["drift_before_norm"] > 1 and row["drift_behind_norm"] < 1e-3


@torch.no_grad()
def test_what_is_read_from_codes_is_numpys_least_squares(photo_folder):
    model, images = small_model(), ImageSet(photo_folder, "train", 16)
    fit_reading(model, images, batch_size=4)
    out = model(torch.cat(list(images.views())))
    codes = np.concatenate([out.z_q.flatten(0, 1), np.ones((16 * len(images), 1))], axis=1).astype(np.float64)
    features = out.features.flatten(0, 1).double().numpy()
    weights = np.linalg.lstsq(codes, features, rcond=3e-5)[0]  # less is rounding of float32
    least = ((codes @ weights - features) ** 2).sum()
    reached = ((model.features_of(out.z_q).flatten(0, 1).numpy() - features) ** 2).sum()
    assert reached == pytest.approx(least, rel=0.01) and least > 0.01


def test_without_labels_there_is_nothing_to_understand(tmp_path, photo_folder):
    (tmp_path / "flat").mkdir()
    for path in photo_folder.glob("class0/*.png"):
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    images = ImageSet(tmp_path / "flat", "all", 16)
    assert understanding(small_model(), small_model().encoder, images, images) == {}


def test_features_that_are_no_numbers_are_one_sentence(photo_folder):
    model, images = small_model(), ImageSet(photo_folder, "all", 16)
    teacher = small_model().encoder
    with torch.no_grad():
        next(teacher.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="the teacher features are not all finite numbers"):
        understanding(model, teacher, images, images)


# --- clusters ---


@given(st.integers(2, 30), st.integers(1, 5), seeds)
def test_what_clusters_follow_equals_scikit_learns_contingencies_and_numpys_variances(n, count, seed):
    from sklearn.metrics.cluster import contingency_matrix

    rng = np.random.default_rng(seed)
    labels, images = rng.integers(count, size=n), rng.integers(256, size=(n, 3, 6, 6), dtype=np.uint8)
    records = [{"category": f"category {rng.integers(3)}"} for _ in range(n)]
    found = cluster_measures(torch.tensor(labels), torch.tensor(images), records)
    categories = [record["category"] for record in records]
    if len(set(categories)) > 1:
        purity = contingency_matrix(categories, labels).max(0).sum() / n
        assert found["category_purity"] == pytest.approx(purity)
    colour = images.mean((2, 3)) / 255  # (n, 3)
    centres = np.stack([colour[labels == label].mean(0) for label in labels])
    explained = 1 - ((colour - centres) ** 2).mean(0).sum() / colour.var(0).sum()
    assert found["colour_explained"] == pytest.approx(explained, abs=1e-4)
    rough = sum((np.diff(images / 255, axis=axis) ** 2).mean((1, 2, 3)) for axis in (2, 3))  # (n,)
    centres = np.array([rough[labels == label].mean() for label in labels])
    assert found["roughness_explained"] == pytest.approx(1 - ((rough - centres)**2).mean() / rough.var(), abs=1e-3)


def test_clusters_of_which_each_has_one_colour_and_one_category_explain_both():
    labels = torch.tensor([0, 0, 1, 1, 2])
    images = (80 * labels).byte()[:, None, None, None].expand(-1, 3, 8, 8)
    found = cluster_measures(labels, images, [{"category": str(label)} for label in labels.tolist()])
    assert found["category_purity"] == 1 and found["colour_explained"] == pytest.approx(1)


def test_every_image_is_in_the_cluster_whose_mean_is_the_nearest(photo_folder):
    model, photos = small_model(), ImageSet(photo_folder, "all", 16)
    images, clusterings, _ = clusters(model, photos, 3)
    with torch.no_grad():
        out = model(images.float() / 255)
    vectors = {"continuous": model.standardise(out.features).mean(1), "discrete": out.z_q.mean(1)}
    for name, (labels, distances) in clusterings.items():
        means = torch.stack([vectors[name][labels == label].mean(0) for label in range(3)])
        expected = torch.cdist(vectors[name], means).min(1)
        assert torch.equal(expected.indices, labels)
        torch.testing.assert_close(expected.values, distances.float(), rtol=1e-3, atol=1e-4)


# --- generated pictures ---


def test_a_generator_that_writes_the_very_images_of_the_captions_is_right_and_shuffled_captions_are_less(
        photo_folder, tmp_path):
    for i, path in enumerate(sorted(photo_folder.rglob("*.png"))):  # a class for each, so that a caption names an image
        (tmp_path / f"class{i}").mkdir()
        shutil.copy(path, tmp_path / f"class{i}")
    photos = ImageSet(tmp_path, "all", 16)
    pictures = {record["category"]: image for record, image in zip(photos.records, photos.spread(12))}
    found = generation(lambda captions: torch.stack([pictures[caption] for caption in captions]), lambda x: x,
                       small_model().encoder, photos, photos)
    for rows in found.values():
        assert rows["pictures"] == 12 and rows["generated"] == rows["reconstructed (reference)"]
        assert rows["generated"]["category"] == 1 > rows["shuffled captions (floor)"]["category"]
        assert rows["generated"]["frechet"] == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_generated_pictures_are_held_against_held_out_images_and_all_real_ones_are_their_gallery(photo_folder):
    encoder, photos = small_model().encoder, ImageSet(photo_folder, "all", 16)
    train_images, val_images = ImageSet(photo_folder, "all", 16), ImageSet(photo_folder, "all", 16)
    for images, places in ((train_images, range(7)), (val_images, range(7, 12))):
        images.sources = [photos.sources[place] for place in places]
    drawn = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = generation(lambda captions: drawn, lambda x: x, encoder, train_images, val_images, batch_size=3)
    real = [torch.cat([encoder(x) for x in images.views()]).mean(1) for images in (train_images, val_images)]
    written, gallery = encoder((drawn * 255).round() / 255).mean(1), torch.cat(real)
    expected = frechet_distance(written, real[1])
    right = [(train_images.records + val_images.records)[place]["category"] for place in nearest(written, gallery)]
    for title, images in (("training captions", train_images), ("held-out captions", val_images)):
        asked = [images.records[place]["category"] for place in images.spread_places(5)]
        assert found[title]["generated"]["frechet"] == pytest.approx(expected, rel=1e-3)
        assert found[title]["generated"]["category"] == np.mean([a == b for a, b in zip(asked, right)])


# --- what language models write ---


@given(batch=st.integers(1, 8), seed=seeds)
@settings(max_examples=5)
def test_the_loss_on_codes_is_a_mean_over_images_whatever_the_batch(batch, seed):
    model, generator = text_lm(seed), torch.Generator().manual_seed(seed)
    codes = torch.randint(20, (7, 9), generator=generator)
    captions = ["red apple", "cat", "", "flag: Chile", "red", "cat face", "noto red apple"]
    alone = []
    with torch.no_grad():
        for caption, row in zip(captions, codes):
            tokens, _ = model.pack([model.prompt(caption)], row[None])
            log_p = model(tokens).double().log_softmax(-1)[0]
            end = len(tokens[0])
            alone.append(-np.mean([log_p[i - 1, tokens[0, i]].item() for i in range(end - 9, end)]))
    assert loss_on_codes(model, captions, codes, batch) == pytest.approx(np.mean(alone), rel=1e-4)


def photos_of_words(photo_folder, folder):
    """The photos in classes of names of one and of several tokens."""
    for name, new in (("class0", "cat"), ("class1", "flag of a quite other kind")):
        shutil.copytree(photo_folder / name, folder / new)
    return ImageSet(folder, "all", 16)


def test_the_loss_on_captions_is_a_mean_over_their_tokens_whatever_the_batch(photo_folder, tmp_path):
    captioner, images = small_captioner(), photos_of_words(photo_folder, tmp_path)
    total = count = 0
    with torch.no_grad():
        for x, record in zip(torch.cat(list(images.views())), images.records):
            tokens = len(captioner.tokens(record["category"]))
            total += tokens * captioner.loss(x[None], [record["category"]]).item()
            count += tokens
    for batch in (1, 5, 64):
        assert loss_on_captions(captioner, images, batch) == pytest.approx(total / count, rel=1e-4)


def test_a_caption_is_right_only_when_every_letter_is_and_its_category_when_what_stands_before_the_colon_is(
        photo_folder, monkeypatch):
    captioner, images = small_captioner(), ImageSet(photo_folder, "all", 16)
    images.records = [{"category": "food", "caption": "red apple"} for _ in range(12)]
    said = ["food: red apple"] * 3 + ["food: red appl"] * 2 + ["food"] * 1 + ["animals: red apple"] * 6
    monkeypatch.setattr(captioner, "caption", lambda x: [said.pop(0) for _ in x])
    assert caption_accuracy(captioner, images, batch_size=5) == {"exact": 3 / 12, "category": 6 / 12}


@torch.no_grad()
@pytest.mark.parametrize("final_norm", ["tokens", "class", "none"])
def test_drift_is_the_square_error_over_the_teachers_variance_however_images_come_in_batches(final_norm, photo_folder):
    images, config = ImageSet(photo_folder, "all", 16), replace(small_vit(), final_norm=final_norm)
    torch.manual_seed(0)
    moved, still = vqrae.Encoder(config), vqrae.Encoder(config)
    x = torch.cat(list(images.views()))
    before = [list(encoder.hidden_states(x))[-1][:, 1:].double() for encoder in (moved, still)]
    behind = [encoder.norm(tokens.float()).double() for encoder, tokens in zip((moved, still), before)]
    expected = {name: (((a - b) ** 2).mean((0, 1)).sum() / b.flatten(0, 1).var(0, unbiased=False).sum()).item()
                for name, (a, b) in (("drift_before_norm", before), ("drift_behind_norm", behind))}
    for batch_size in (5, 64):
        assert drift(moved, still, images, batch_size) == pytest.approx(expected, rel=1e-4)
    assert drift(still, still, images) == {"drift_before_norm": 0, "drift_behind_norm": 0}


def test_a_model_without_a_reading_says_that_discrete_understanding_is_left_out(photo_folder, capsys):
    images, model = ImageSet(photo_folder, "all", 16), small_model()
    assert "discrete" not in understanding(model, model.encoder, images, images)
    [line] = capsys.readouterr().err.splitlines()
    assert "understanding of discrete tokens is left out" in line
    for told in (small_model(quantizer="none"), small_model()):
        fit_reading(told, images)
        understanding(told, told.encoder, images, images)
        assert not capsys.readouterr().err


@torch.no_grad()
def test_codes_are_read_where_the_inverse_of_the_way_in_would_amplify_noise(photo_folder):
    model, images = small_model(codebook_dim=24), ImageSet(photo_folder, "all", 16)
    u, scale, v = torch.linalg.svd(model.project_in.weight)
    scale[4:] = 1e-4  # as after training: most of the singular values are small
    model.project_in.weight.copy_(u @ scale.diag() @ v)
    out = model(torch.cat(list(images.views())))
    inverse = (out.z_q - model.project_in.bias) @ torch.linalg.pinv(model.project_in.weight).T
    fit_reading(model, images)
    read, inverted = (F.cosine_similarity(found, out.features, dim=2).mean() for found in (
        model.features_of(out.z_q), inverse))
    assert read > 0.7 and read > inverted + 0.3


def test_a_caption_that_looks_like_a_control_token_can_be_told_right(photo_folder, tmp_path, monkeypatch):
    for name in ("class0", "class1"):
        shutil.copytree(photo_folder / name, tmp_path / f"<|endoftext|> {name}")
    model, images = small_captioner(), ImageSet(tmp_path, "all", 16)
    monkeypatch.setattr(model, "caption", lambda batch: ["<|endoftext|> class1"] * len(batch))
    assert caption_accuracy(model, images) == {"exact": 0.5, "category": 0.5}
    monkeypatch.setattr(model, "caption", lambda batch: ["class1"] * len(batch))
    assert caption_accuracy(model, images) == {"exact": 0.0, "category": 0.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_in_other_precisions_are_measured_like_others(dtype, photo_folder):
    images, model = ImageSet(photo_folder, "all", 16), small_model()
    fit_reading(model, images)
    expected, other = evaluate(model, images), copy.deepcopy(model).to(dtype)
    assert evaluate(other, images, frechet_encoder=other.encoder)["psnr"] == pytest.approx(expected["psnr"], rel=0.01)
    cosines = [understanding(one, one.encoder, images, images)["discrete"]["cosine"] for one in (model, other)]
    assert cosines[1] == pytest.approx(cosines[0], abs=0.05)
    usage(other, images), clusters(other, images, 2), fit_reading(other, images)
    captioner = small_captioner().to(dtype)
    assert 0 < loss_on_captions(captioner, images) and 0 <= caption_accuracy(captioner, images)["exact"] <= 1
