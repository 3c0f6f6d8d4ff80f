"""Section 4.1's measures: of pixels, of the use of a codebook, and of what features understand."""

import torch
import torch.nn.functional as F

from support.files import InputError
from support.images import eight_bits, resize_to
from support.text import text_of


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * (x - y).pow(2).mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(x, y, window=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [0, 1], Gaussian window -> (B,).

    Raises InputError when a side of the images is smaller than the window.
    """
    if min(x.shape[-2:]) < window:
        raise InputError(f"SSIM needs images of at least {window} x {window} pixels")
    offset = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    weight = torch.exp(-offset.pow(2) / (2 * sigma**2))
    weight = weight / weight.sum()

    def blur(image):
        image = image.flatten(0, 1)[:, None]  # (3B, 1, H, W)
        image = F.conv2d(F.conv2d(image, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
        return image.unflatten(0, (-1, x.shape[1]))[:, :, 0]  # (B, 3, H - 10, W - 10)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def seam_errors(x, y, patch_size):
    """Squared error of the steps between neighbouring pixels of y, at the seams of patches and elsewhere -> (B,), (B,).

    Images x (the truth) and y (B, 3, H, W). Without a visible grid of patches the two are alike.
    """
    seams, elsewhere = 0, 0
    for error in (y - x, (y - x).transpose(-2, -1)):
        steps = error.diff(dim=-1).pow(2).mean((1, 2))  # (B, W - 1)
        at_seam = torch.arange(1, steps.shape[1] + 1, device=x.device) % patch_size == 0
        seams, elsewhere = seams + steps[:, at_seam].mean(1), elsewhere + steps[:, ~at_seam].mean(1)
    return seams, elsewhere


def codebook_usage(counts):
    """How often each code was chosen (K,) -> utilization in [0, 1] and perplexity in [1, K], as floats.

    Utilization is the share of codes chosen at least once; perplexity, exp of the entropy of the choices, is the number
    of codes that would be as hard to guess if all were equally frequent.
    """
    counts = counts.cpu().double()
    share = counts / counts.sum().clamp(min=1)
    return (counts > 0).double().mean().item(), torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def count_codes(model, images, batch_size=64, device="cpu", workers=0):
    """How often each code is chosen in one pass over an ImageSet, evaluation views -> (K,) int64."""
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    for x in images.views(batch_size, device, workers):
        counts += model.count(model.encode(x)[1]).cpu()
    return counts


def frechet_distance(x, y):
    """Frechet distance between Gaussians fitted to two sets of feature vectors (n, d), (m, d) -> float.

    On Inception features this is the FID; on any other encoder's features it is not, and must be named after it.
    """
    x, y = x.double(), y.double()
    # tr sqrt(A B) is the sum of the roots of the eigenvalues of the symmetric sqrt(A) B sqrt(A).
    cov_x, cov_y = x.T.cov(), y.T.cov()  # (d, d)
    values, vectors = torch.linalg.eigh(cov_x)  # (d,), (d, d)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # (d, d)
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).pow(2).sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return distance.item()


@torch.enable_grad()  # `understanding` calls it under no_grad
def linear_probe(train_features, train_labels, tests, test_labels, strengths=(0.001, 0.01, 0.1)):
    """Multinomial logistic regression on standardised features (n, d) -> its accuracy in [0, 1] on each of `tests`.

    `tests` is a list of features (m, d), several encoders' of the same m images: the probe is fitted once and applied
    to all of them unchanged. `strengths` are values of C, the weight of the data against half the squared norm of the
    weights; the one that is best for the first of `tests` counts, as for the figures in the README. The problem is
    convex, so the answer does not depend on a seed.
    """
    mean, std = train_features.double().mean(0), train_features.double().std(0) + 1e-6
    train, tests = (train_features.double() - mean) / std, [(test.double() - mean) / std for test in tests]
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(classes, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    accuracies = []
    for C in strengths:  # from the strongest regularisation on, each solution is the start of the next
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = train @ weight.T + bias  # (n, classes)
            loss = F.cross_entropy(logits, train_labels) + weight.pow(2).sum() / (2 * C * len(train))
            loss.backward()
            return loss

        optimizer.step(closure)
        guesses = [(test @ weight.T + bias).argmax(1) for test in tests]  # (m,) each
        accuracies.append([(guess == test_labels).double().mean().item() for guess in guesses])
    return max(accuracies, key=lambda accuracy: accuracy[0])


def nearest_neighbours(train_features, train_labels, test_features, test_labels, k=10):
    """Accuracy in [0, 1] on features (m, d) of the vote of their k most similar training features (n, d), in cosine."""
    similarity = F.normalize(test_features.float(), dim=1) @ F.normalize(train_features.float(), dim=1).T  # (m, n)
    similarity, index = similarity.topk(min(k, len(train_features)), dim=1)  # (m, k)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = torch.zeros(len(test_features), classes).scatter_add_(1, train_labels[index], similarity)  # (m, classes)
    return (votes.argmax(1) == test_labels).double().mean().item()


@torch.no_grad()
def understanding(model, teacher, train_images, test_images, batch_size=64, device="cpu", workers=0,
                  keys=("category", "subcategory")):
    """What can be read off the features: {"teacher", "continuous", "discrete"} -> {measure: value}.

    continuous: the model's Z_I; discrete: the features that its codes stand for, if it has codes; both, and the frozen
    teacher's, as the mean over an image's tokens. For those of the `keys` that the records of the two ImageSets have:
    NAME_transfer is the accuracy of a probe fitted to the teacher's training features and applied unchanged (Section
    3.4: the language model is not trained for the tokenizer), NAME_probe that of one fitted to these features,
    NAME_neighbours that of 10 nearest neighbours. cosine is the mean similarity of a token to the teacher's. Empty
    when there are fewer than two labels.
    """
    names = {}
    for key in keys:
        labels = [record.get(key, "") for images in (train_images, test_images) for record in images.records]
        if len(set(labels)) > 1:
            values = sorted(set(labels))
            names[key] = torch.tensor([values.index(label) for label in labels]).split(
                [len(train_images), len(test_images)])  # (n,), (m,)
    if not names:
        return {}
    pooled, cosines = {}, {}
    for images in (train_images, test_images):
        for x in images.views(batch_size, device, workers):
            features = {"teacher": teacher(x), "continuous": model.encoder(x)}
            z_q, indices, _, _ = model.quantizer(model.project_features(features["continuous"]))
            if indices is not None:
                features["discrete"] = model.features_of(z_q)
            for name, tokens in features.items():  # (B, N, d)
                pooled.setdefault(name, []).append(tokens.mean(1).cpu())
                if images is test_images:
                    cosine = F.cosine_similarity(tokens, features["teacher"], dim=-1)  # (B, N)
                    cosines.setdefault(name, []).append(cosine.mean(1).cpu())
    pooled = {name: torch.cat(parts).split([len(train_images), len(test_images)]) for name, parts in pooled.items()}
    result = {name: {} for name in pooled}
    for key, (train_labels, test_labels) in names.items():
        tests = [test for _, test in pooled.values()]
        transferred = linear_probe(pooled["teacher"][0], train_labels, tests, test_labels)
        for (name, (train, test)), transfer in zip(pooled.items(), transferred):
            result[name][f"{key}_transfer"] = transfer
            result[name][f"{key}_probe"] = (transfer if name == "teacher" else
                                            linear_probe(train, train_labels, [test], test_labels)[0])
            result[name][f"{key}_neighbours"] = nearest_neighbours(train, train_labels, test, test_labels)
    for name, values in cosines.items():
        result[name]["cosine"] = torch.cat(values).double().mean().item()
    return result


@torch.no_grad()
def evaluate(model, images, batch_size=64, device="cpu", workers=0, frechet_encoder=None, lpips=None,
             frechet_size=None):
    """Reconstruct every image of an ImageSet and return the metrics, averaged over images, as a dict of numbers.

    psnr, ssim, and seam_ratio, `seam_errors` at seams over those elsewhere (1: no visible grid). With a codebook also
    utilization, perplexity and tokens of this one pass. With `frechet_encoder`, the Frechet distance between its mean
    patch features of originals and reconstructions, shown to it with sides of `frechet_size` pixels or its own. With
    `lpips`, a function of two batches -> (B,), its mean.
    """
    scores, features, seams = {"psnr": [], "ssim": []}, ([], []), []
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    for x in images.views(batch_size, device, workers):
        out = model(x)
        y = eight_bits(out.reconstruction)
        x = resize_to(x, y)
        scores["psnr"].append(psnr(x, y).cpu())
        scores["ssim"].append(ssim(x, y).cpu())
        seams.append(torch.stack(seam_errors(x, y, model.config.output_patch_size)).cpu())
        if lpips is not None:
            scores.setdefault("lpips", []).append(lpips(x, y).cpu())
        if frechet_encoder is not None:
            for side, part in zip(features, (x, y)):
                side.append(pooled_features(frechet_encoder, [part], frechet_size))
        if out.indices is not None:
            counts += model.count(out.indices).cpu()
    result = {name: torch.cat(values).double().mean().item() for name, values in scores.items()}
    across, elsewhere = torch.cat(seams, dim=1).double().mean(1)
    if (across / elsewhere).isfinite():  # there are seams and there is an elsewhere
        result["seam_ratio"] = (across / elsewhere).item()
    if frechet_encoder is not None and len(images) > 1:
        result["frechet"] = frechet_distance(*map(torch.cat, features))
    if counts.sum():
        utilization, perplexity = codebook_usage(counts)
        result.update(utilization=utilization, perplexity=perplexity, tokens=int(counts.sum()))
    return {"images": sum(map(len, scores["psnr"])), **result}


@torch.no_grad()
def pooled_features(encoder, images, side=None):
    """Mean patch features (n, d) on the CPU of an iterable of float batches (B, 3, H, W) in [0, 1].

    Images are resized to `side` pixels, or to those that the encoder was trained with.
    """
    side, device = side or encoder.config.image_size, next(encoder.parameters()).device
    return torch.cat([encoder(F.interpolate(x.to(device), (side, side), mode="bicubic", antialias=True)).mean(1).cpu()
                      for x in images])


def nearest(features, gallery):
    """The most similar, in cosine, of the gallery's vectors (n, d) to each of the features (m, d) -> (m,).

    Channels are standardised over the gallery, for pooled features of all images have much in common.
    """
    mean, std = gallery.mean(0), gallery.std(0) + 1e-6
    return (F.normalize((features - mean) / std, dim=1) @ F.normalize((gallery - mean) / std, dim=1).T).argmax(1)


def retrieval(found, records):
    """Shares of pictures whose nearest real image, a record of `found`, shows what was asked for, one of `records`.

    name (the same picture, of any style), category and subcategory, as far as the records have them and differ in them.
    """
    return {key: sum(a.get(key) == b.get(key) for a, b in zip(found, records)) / len(records)
            for key in ("name", "category", "subcategory") if any(record.get(key) for record in found + records)}


def caption_accuracy(captioner, images, batch_size=64, device="cpu", workers=0):
    """Shares of an ImageSet's images whose caption the captioner writes exactly, and whose category."""
    text, right = captioner.lm.text, {"exact": 0, "category": 0}
    for batch, places in images.batches(range(len(images)), batch_size, workers, indices=True):
        for said, place in zip(captioner.caption(batch.to(device).float() / 255), places):
            wanted = text.decode(text.encode(text_of(images.records[place])).ids).strip()  # as the tokenizer spells it
            right["exact"] += said == wanted
            right["category"] += said.split(": ")[0] == wanted.split(": ")[0]
    return {name: count / len(images) for name, count in right.items()}
