"""Section 4.1's measures: of pixels, of the use of a codebook, and of what features understand."""

import sys
from collections import Counter, defaultdict

import torch
import torch.nn.functional as F

# scikit-learn and torchmetrics are imported by the functions that use them: vqrae.py takes psnr from here, and their
# import would take longer than all else that it needs.
from support.files import InputError
from support.images import eight_bits, resize_to
from support.networks import lpips_vgg
from support.text import caption_of, text_of, tokens_of


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


def effective_dimension(vectors):
    """In how many directions vectors (n, e) vary, if they varied in all of them alike, from 1 to e, as a float.

    exp of the entropy of the shares that the principal axes have in the variance (Roy and Vetterli 2007).
    """
    variance = torch.linalg.eigvalsh(torch.cov(vectors.double().T).view(vectors.shape[1], -1)).clamp(min=0)  # (e,)
    return torch.special.entr(variance / variance.sum().clamp(min=1e-300)).sum().exp().item()


def usage(model, images, batch_size=64, device="cpu", workers=0):
    """Utilization, perplexity and tokens of one pass over an ImageSet, and with several codebooks those of each."""
    counts = count_codes(model, images, batch_size, device, workers)  # (K,)
    utilization, perplexity = codebook_usage(counts)
    result = {"utilization": utilization, "perplexity": perplexity, "tokens": int(counts.sum())}
    if hasattr(model.config, "codebooks"):
        each = [codebook_usage(part) for part in counts.view(model.config.codebooks, -1)]
        result["utilization_of_each"], result["perplexity_of_each"] = map(list, zip(*each))
    return result


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
    from torchmetrics.image.fid import FrechetInceptionDistance

    as_they_are = torch.nn.Identity()  # in place of Inception, for these are features already
    as_they_are.num_features = x.shape[1]
    distance = FrechetInceptionDistance(as_they_are).set_dtype(torch.float64)
    centre = x.double().mean(0)  # covariances come from sums of squares, which are exact where the mean is near 0
    distance.update(x.double() - centre, real=True)
    distance.update(y.double() - centre, real=False)
    return distance.compute().item()


def linear_probe(train_features, train_labels, tests, test_labels, groups=None, strengths=(0.001, 0.01, 0.1)):
    """Multinomial logistic regression on standardised features (n, d) -> its accuracy in [0, 1] on each of `tests`.

    `tests` is a list of features (m, d), several encoders' of the same m images: the probe is fitted once and applied
    to all of them unchanged. `strengths` are values of C, the weight of the data against half the squared norm of the
    weights. Cross-validation on the training features chooses among them, and the tests have no say; images of one of
    the `groups` (n,), as an emoji in its styles, stay on one side. The problem is convex, so the answer does not depend
    on a seed. Raises ValueError when all training labels are the same.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = train_features.float().numpy(), train_labels.numpy()
    groups = range(len(labels)) if groups is None else groups
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strengths[0], max_iter=1000, tol=1e-3))
    folds = min(3, len(set(groups)))
    splits = GroupKFold(folds).split(features, labels, groups) if folds > 1 else []
    splits = [(rest, fold) for rest, fold in splits if len(set(labels[rest])) > 1]
    if splits:
        search = GridSearchCV(probe, {"logisticregression__C": strengths}, cv=splits, refit=False)
        probe.set_params(**search.fit(features, labels).best_params_)
    probe.set_params(logisticregression__tol=1e-5)  # among strengths a looser fit chose alike in half the time
    probe.fit(features, labels)
    return [probe.score(test.float().numpy(), test_labels.numpy()) for test in tests]


def nearest_neighbours(train_features, train_labels, test_features, test_labels, k=10):
    """Accuracy in [0, 1] on features (m, d) of the vote of their k most similar training features (n, d), in cosine."""
    from sklearn.neighbors import KNeighborsClassifier

    def votes(distance):
        return (1 - distance).clip(1e-9)  # the cosine; scikit-learn refuses votes that are all 0

    neighbours = KNeighborsClassifier(min(k, len(train_features)), metric="cosine", weights=votes)
    neighbours.fit(train_features.float().numpy(), train_labels.numpy())
    return neighbours.score(test_features.float().numpy(), test_labels.numpy())


@torch.no_grad()
def fit_reading(model, images, batch_size=64, device="cpu", workers=0):
    """Fit what `features_of` of a model reads of the features from its codes, by least squares over an ImageSet.

    Not by inverting the way in: most of its singular values are small after training, and the inverse would amplify
    what codes get wrong.
    """
    squares = products = 0
    for x in images.views(batch_size, device, workers):
        features = model.encoder(x)  # (B, N, d)
        z_q, *_ = model.quantizer(model.project_features(features))  # (B, N, e)
        codes = F.pad(z_q, (0, 1), value=1.0).flatten(0, 1).cpu().double()  # (B * N, e + 1)
        squares = squares + codes.T @ codes  # (e + 1, e + 1)
        products = products + codes.T @ features.flatten(0, 1).cpu().double()  # (e + 1, d)
    reading = torch.linalg.pinv(squares, hermitian=True, rtol=1e-9) @ products  # (e + 1, d)
    model.reading.copy_(reading.to(model.reading.dtype))  # first, for mps knows no float64


@torch.no_grad()
def understanding(model, teacher, train_images, test_images, batch_size=64, device="cpu", workers=0,
                  keys=("category", "subcategory")):
    """What can be read off the features: {"teacher", "continuous", "discrete"} -> {measure: value}.

    continuous: the model's Z_I; discrete: what is read of them from its codes, if it has codes and a reading was fitted
    to them; both, and the frozen teacher's, as the mean over an image's tokens. For those of the `keys` that the
    records of the two ImageSets have: NAME_transfer is the accuracy of a probe fitted to the teacher's training
    features and applied unchanged (Section 3.4: the language model is not trained for the tokenizer), NAME_probe that
    of one fitted to these features, NAME_neighbours that of 10 nearest neighbours. cosine is the mean similarity of a
    token to the teacher's, and continuous tokens have the two of `drift` too. Empty when the training images have fewer
    than two labels. Raises InputError when features are not finite.
    """
    names = {}
    for key in keys:
        labels = [record.get(key, "") for images in (train_images, test_images) for record in images.records]
        if len(set(labels[:len(train_images)])) > 1:
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
            if indices is not None and model.reading.any():
                features["discrete"] = model.features_of(z_q)
            for name, tokens in features.items():  # (B, N, d)
                pooled.setdefault(name, []).append(tokens.mean(1).cpu())
                if images is test_images:
                    cosine = F.cosine_similarity(tokens, features["teacher"], dim=-1)  # (B, N)
                    cosines.setdefault(name, []).append(cosine.mean(1).cpu())
    if indices is not None and "discrete" not in pooled:
        print("understanding of discrete tokens is left out: the model was saved without what is read of features from "
              "codes, which train.py fits when a run ends", file=sys.stderr)
    pooled = {name: torch.cat(parts).split([len(train_images), len(test_images)]) for name, parts in pooled.items()}
    for name, parts in pooled.items():
        if not all(features.isfinite().all() for features in parts):
            raise InputError(f"the {name} features are not all finite numbers: nothing can be read off them")
    groups = [str(record.get("name", place)) for place, record in enumerate(train_images.records)]
    result = {name: {} for name in pooled}
    for key, (train_labels, test_labels) in names.items():
        tests = [test for _, test in pooled.values()]
        transferred = linear_probe(pooled["teacher"][0], train_labels, tests, test_labels, groups)
        for (name, (train, test)), transfer in zip(pooled.items(), transferred):
            result[name][f"{key}_transfer"] = transfer
            result[name][f"{key}_probe"] = (transfer if name == "teacher" else
                                            linear_probe(train, train_labels, [test], test_labels, groups)[0])
            result[name][f"{key}_neighbours"] = nearest_neighbours(train, train_labels, test, test_labels)
    for name, values in cosines.items():
        result[name]["cosine"] = torch.cat(values).double().mean().item()
    result["continuous"].update(drift(model.encoder, teacher, test_images, batch_size, device, workers))
    return result


@torch.no_grad()
def drift(encoder, teacher, images, batch_size=64, device="cpu", workers=0):
    """How far an encoder's patch tokens of an ImageSet are from a teacher's, before its last norm and behind it.

    {"drift_before_norm", "drift_behind_norm"} -> mean square error over the variance of the teacher's, both summed over
    channels. LLaVA reads before the norm.
    """
    sums = {}
    for x in images.views(batch_size, device, workers):
        pairs = zip(around_norm(encoder, x), around_norm(teacher, x))
        for where, pair in zip(("before_norm", "behind_norm"), pairs):
            moved, still = (tokens.flatten(0, 1).cpu().double() for tokens in pair)  # (B * N, d)
            parts = (moved - still).pow(2).sum(0), still.pow(2).sum(0), still.sum(0), len(still)
            sums[where] = [old + new for old, new in zip(sums.get(where, [0] * 4), parts)]
    found = {}
    for where, (error, squares, total, count) in sums.items():
        variance = squares / count - (total / count) ** 2  # (d,)
        found[f"drift_{where}"] = (error.sum() / count / variance.sum()).item()
    return found


def around_norm(encoder, images):
    """An encoder's patch tokens (B, N, d) before its last norm and behind it, whichever of the two it returns."""
    *_, x = encoder.hidden_states(images)
    first = encoder.config.class_token + encoder.config.registers
    return x[:, first:], encoder.norm(x)[:, first:]


@torch.no_grad()
def evaluate(model, images, batch_size=64, device="cpu", workers=0, frechet_encoder=None, lpips=None,
             frechet_size=None, rfid=None, model_size=None):
    """Reconstruct every image of an ImageSet and return the metrics, averaged over images, as a dict of numbers.

    psnr, ssim, and seam_ratio, `seam_errors` at seams over those elsewhere (1: no visible grid). With a codebook also
    utilization, perplexity and tokens of this one pass. With `frechet_encoder`, the Frechet distance between its mean
    patch features of originals and reconstructions, shown to it with sides of `frechet_size` pixels or its own. With
    `lpips`, a function of two batches -> (B,), its mean. With `rfid`, see `networks.inception`, originals as real and
    reconstructions as fake images, as bytes.

    With `model_size`, the model sees the images resized to that side, and what it makes of them is resized back before
    it is measured; for the seams there is no figure then.
    """
    scores, features, seams = {"psnr": [], "ssim": []}, ([], []), []
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    for x in images.views(batch_size, device, workers):
        out = model(x if model_size is None else resize_to(x, x.new_empty(model_size, model_size)))
        y = out.reconstruction.float()
        y = eight_bits(y if model_size is None else resize_to(y.clamp(0, 1), x))
        x = resize_to(x, y)
        scores["psnr"].append(psnr(x, y).cpu())
        scores["ssim"].append(ssim(x, y).cpu())
        seams.append(torch.stack(seam_errors(x, y, model.config.output_patch_size)).cpu())
        if rfid is not None:
            for part, real in ((x, True), (y, False)):
                rfid.update((255 * part).round().byte().to(rfid.device), real)
        if lpips is not None:
            scores.setdefault("lpips", []).append(lpips(x, y).cpu())
        if frechet_encoder is not None:
            for side, part in zip(features, (x, y)):
                side.append(pooled_features(frechet_encoder, [part], frechet_size))
        if out.indices is not None:
            counts += model.count(out.indices).cpu()
    result = {name: torch.cat(values).double().mean().item() for name, values in scores.items()}
    across, elsewhere = torch.cat(seams, dim=1).double().mean(1)
    if model_size is None and (across / elsewhere).isfinite():  # there are seams and there is an elsewhere
        result["seam_ratio"] = (across / elsewhere).item()
    if frechet_encoder is not None and len(images) > 1:
        result["frechet"] = frechet_distance(*map(torch.cat, features))
    if rfid is not None and len(images) > 1:
        result["rfid"] = rfid.compute().item()
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
            wanted = text.decode(tokens_of(text, text_of(images.records[place]))).strip()  # as the tokenizer spells it
            right["exact"] += said == wanted
            right["category"] += said.split(": ")[0] == wanted.split(": ")[0]
    return {name: count / len(images) for name, count in right.items()}


@torch.no_grad()
def generation(write, rebuild, encoder, train_images, val_images, count=None, batch_size=64, seed=0, frechet="frechet"):
    """Do pictures show what their captions say, and do they look like the held-out images of an ImageSet?

    `write` makes pictures (n, 3, H, W) of captions, `rebuild` is a tokenizer's reconstruction of images (B, 3, H, W);
    both end on the CPU. Of each split `count` captions are taken, or as many as there are held-out images.

    A picture counts for an emoji, a category or a subcategory when the real image of all splits that is nearest to it
    in the encoder's features does. Beside it the reconstructions of the images that the captions belong to (what codes
    can show when they are right: the reference), and the same pictures held against shuffled captions (what they would
    reach by chance: the floor). The Frechet distance to the held-out images, in the same features, is called `frechet`.
    -> {split: {"pictures": their number, kind: {measure: value}}}
    """
    sets = {"training captions": train_images, "held-out captions": val_images}
    real = {title: pooled_features(encoder, images.views(batch_size)) for title, images in sets.items()}  # (n, d) each
    gallery, gallery_records = torch.cat(list(real.values())), train_images.records + val_images.records
    result = {}
    for title, images in sets.items():
        chosen = images.spread_places(count or len(val_images))
        records = [images.records[place] for place in chosen]
        views = (batch.float() / 255 for batch in images.batches(chosen, batch_size))
        pictures = {"generated": write([caption_of(record) for record in records]),
                    "reconstructed (reference)": torch.cat([rebuild(x) for x in views])}
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = {}
        for kind, some in pictures.items():
            features = pooled_features(encoder, eight_bits(some).split(batch_size))  # (n, d)
            found, distance = [gallery_records[place] for place in nearest(features, gallery).tolist()], {}
            if min(len(chosen), len(val_images)) > 1:  # one picture has no covariance
                distance[frechet] = frechet_distance(features, real["held-out captions"])
            rows[kind] = {**retrieval(found, records), **distance}
            if kind == "generated":
                rows["shuffled captions (floor)"] = {**retrieval(found, [records[i] for i in order]), **distance}
        result[title] = {"pictures": len(chosen), **rows}
    return result


def lpips_distance(device):
    """LPIPS as a function of two batches -> (B,); InputError when VGG16's weights are not to be had."""
    network = lpips_vgg().to(device).eval()
    return lambda x, y: network(x, y, normalize=True).flatten()  # normalize: they are in [0, 1]


@torch.no_grad()
def clusters(model, images, count, batch_size=64, device="cpu"):
    """K-means of an ImageSet, on the mean over tokens of the continuous features and on that of the discrete tokens.

    Returns the images (n, 3, H, W) uint8, {"continuous", "discrete"} -> labels (n,) and distances to the centres (n,),
    and {"continuous", "discrete"} -> `cluster_measures`. Raises InputError when features are not finite.
    """
    from sklearn.cluster import KMeans

    everything, vectors, clusterings = [], {"continuous": [], "discrete": []}, {}
    for batch in images.batches(range(len(images)), batch_size):
        out = model(batch.to(device).float() / 255)
        everything.append(batch)
        vectors["continuous"].append(model.standardise(out.features).mean(1).cpu())  # (B, d)
        vectors["discrete"].append(out.z_q.mean(1).cpu())  # (B, e)
    everything = torch.cat(everything)
    for name, parts in vectors.items():
        vector = torch.cat(parts).double()
        if not vector.isfinite().all():
            raise InputError(f"the {name} features are not all finite numbers: they have no clusters")
        means = KMeans(min(count, len(everything)), random_state=0)
        distances = torch.from_numpy(means.fit_transform(vector.numpy()))  # (n, K)
        clusterings[name] = distances.argmin(1), distances.amin(1)
    return everything, clusterings, {name: cluster_measures(labels, everything, images.records)
                                     for name, (labels, _) in clusterings.items()}


def cluster_measures(labels, images, records):
    """What clusters follow: labels (n,) of images (n, 3, H, W) uint8 with their records -> {measure: share in [0, 1]}.

    NAME_purity: of the images, those whose category (style) is the most frequent one of their cluster; of categories
    and styles that differ. NAME_explained: of the variance of mean colour, and of roughness (mean squared step between
    neighbouring pixels), what lies between clusters.
    """
    result = {}
    for key in ("category", "style"):
        values = [record.get(key) for record in records]
        if len(set(values)) > 1:
            counters = defaultdict(Counter)
            for label, value in zip(labels.tolist(), values):
                counters[label][value] += 1
            result[f"{key}_purity"] = sum(max(counter.values()) for counter in counters.values()) / len(values)
    x = images.float() / 255
    roughness = x.diff(dim=-1).pow(2).mean((1, 2, 3)) + x.diff(dim=-2).pow(2).mean((1, 2, 3))  # (n,)
    for key, values in (("colour", x.mean((2, 3))), ("roughness", roughness[:, None])):
        groups = [values[labels == cluster] for cluster in labels.unique()]
        inside = sum((group - group.mean(0)).pow(2).sum() for group in groups)
        result[f"{key}_explained"] = (1 - inside / (values - values.mean(0)).pow(2).sum()).item()
    return result


@torch.no_grad()
def loss_on_codes(model, captions, codes, batch_size=64):
    """The mean loss in nats a token of a language model on images as codes (n, N), each behind its whole caption."""
    total = 0.0
    for i in range(0, len(codes), batch_size):
        prompts = [model.prompt(caption) for caption in captions[i:i + batch_size]]
        total += model.loss(*model.pack(prompts, codes[i:i + batch_size])).item() * len(prompts)
    return total / len(codes)


@torch.no_grad()
def loss_on_captions(captioner, images, batch_size=64, device="cpu", workers=0):
    """The mean loss in nats a token of a captioner on the captions of an ImageSet."""
    total, count = 0.0, 0
    for batch, places in images.batches(range(len(images)), batch_size, workers, indices=True):
        captions = [text_of(images.records[place]) for place in places]
        tokens = sum(len(captioner.tokens(caption)) for caption in captions)
        total += tokens * captioner.loss(batch.to(device).float() / 255, captions).item()
        count += tokens
    return total / count
