"""Table 2's measures: rFID, LPIPS, and images compared at another size than the model's; nothing is downloaded."""

import json
import sys
from urllib.error import URLError

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as pixels

import sample
import vqrae
from conftest import needs, small_model
from support.images import ImageSet, eight_bits
from support.metrics import evaluate, psnr


@pytest.fixture
def without_network(monkeypatch):
    needs("torch_fidelity", "lpips")

    def refuse(*address, **how):
        raise URLError("no network here")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A folder in which torch.hub finds weights of Inception-v3, random ones, and their path in it."""
    needs("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    path = tmp_path_factory.mktemp("torch") / "hub/checkpoints" / inception.URL_INCEPTION_V3.split("/")[-1]
    path.parent.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:  # it loads weights when it is made, and there are none yet
        patch.setattr(inception, "load_state_dict_from_url", lambda *address, **how: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda network, weights: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() == 4:  # so that what differs among images is not lost on the way
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


class Bytes(torch.utils.data.Dataset):
    """Images (n, 3, H, W) in [0, 1] as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = (255 * images.clamp(0, 1)).round().to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        return self.images[place]


def evaluated(capsys, *arguments):
    sample.main(["evaluate", "--split", "all", "--device", "cpu", *map(str, arguments)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- rFID ---


def test_rfid_equals_torch_fidelitys_on_originals_and_reconstructions(
        random_inception, saved_model, photo_folder, encoder_folder, capsys, monkeypatch):
    import torch_fidelity

    monkeypatch.setenv("TORCH_HOME", str(random_inception.parents[2]))
    found = evaluated(capsys, "--model", saved_model, "--data", photo_folder, "--frechet-encoder", encoder_folder,
                      "--rfid", "--batch-size", 5)["rfid"]
    images = torch.cat(list(ImageSet(photo_folder, "all", 16).views()))
    with torch.no_grad():
        rebuilt = vqrae.VQRAE.from_pretrained(saved_model)(images).reconstruction
    expected = torch_fidelity.calculate_metrics(
        input1=Bytes(images), input2=Bytes(rebuilt), fid=True, cuda=False, cache=False, verbose=False,
        save_cpu_ram=True,  # and no worker processes
        feature_extractor_weights_path=str(random_inception))["frechet_inception_distance"]
    assert expected > 0.01 and found == pytest.approx(expected, abs=1e-4)


def test_without_the_flags_nothing_is_fetched_and_nothing_is_called_rfid_or_lpips(
        without_network, saved_model, photo_folder, encoder_folder, capsys):
    found = evaluated(capsys, "--model", saved_model, "--data", photo_folder, "--frechet-encoder", encoder_folder)
    assert not {"rfid", "fid", "lpips"} & set(found) and found[f"frechet_{encoder_folder.name}"] > 0


def test_lpips_is_that_of_originals_and_reconstructions_when_it_is_asked_for(saved_model, photo_folder, encoder_folder,
                                                                             capsys, monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, x, y, normalize):
            assert normalize and not self.training
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr("support.metrics.lpips_vgg", Network)
    found = evaluated(capsys, "--model", saved_model, "--data", photo_folder, "--frechet-encoder", encoder_folder,
                      "--lpips", "--batch-size", 5)["lpips"]
    images = torch.cat(list(ImageSet(photo_folder, "all", 16).views()))
    with torch.no_grad():
        rebuilt = eight_bits(vqrae.VQRAE.from_pretrained(saved_model)(images).reconstruction)
    assert found == pytest.approx((images - rebuilt).abs().mean().item(), abs=1e-5)


@pytest.mark.parametrize("flag, network", [("--rfid", "Inception-v3"), ("--lpips", "VGG16")])
def test_weights_that_cannot_be_had_are_one_sentence(flag, network, without_network, saved_model, photo_folder):
    with pytest.raises(SystemExit, match=f"error: the weights of {network}, .* cannot be fetched .*no network") as end:
        sample.main(["evaluate", "--model", str(saved_model), "--data", str(photo_folder), flag])
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("flag", ["--rfid", "--lpips"])
def test_a_missing_package_is_one_sentence(flag, saved_model, photo_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(SystemExit, match="needs a package more: pip install -r requirements-extra.txt ") as end:
        sample.main(["evaluate", "--model", str(saved_model), "--data", str(photo_folder), flag])
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("flag", ["--rfid", "--lpips", "--at=20"])
def test_a_generator_has_no_reconstructions_to_measure(flag, written_models, photo_folder):
    with pytest.raises(SystemExit, match=f"{flag.split('=')[0]} is not for a generator"):
        sample.main(["evaluate", "--model", written_models["ar"], "--data", str(photo_folder), flag])


# --- at another size than the model's ---


@pytest.mark.parametrize("side", [12, 16, 28])
def test_images_of_another_size_are_resized_for_the_model_and_what_it_makes_of_them_back(side, photo_folder):
    model, images = small_model(), ImageSet(photo_folder, "all", side)
    found = evaluate(model, images, batch_size=5, model_size=16)
    x = torch.cat(list(images.views()))

    def resized(x, side):
        return pixels.resize(x, [side, side], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)

    with torch.no_grad():
        y = resized(model(resized(x, 16)).reconstruction.clamp(0, 1), side)
    assert found["psnr"] == pytest.approx(psnr(x, eight_bits(y)).mean().item(), abs=1e-4)
    assert found["tokens"] == len(x) * 16


def test_at_prints_the_tokens_of_an_image_at_the_models_size(saved_model, photo_folder, encoder_folder, capsys):
    found = [evaluated(capsys, "--model", saved_model, "--data", photo_folder, "--frechet-encoder", encoder_folder,
                       *more) for more in ([], ["--at", 28], ["--at", 28, "--image-size", 32])]
    assert [result["tokens_per_image"] for result in found] == [16, 16, 64]
    assert len({result["psnr"] for result in found}) == 3
