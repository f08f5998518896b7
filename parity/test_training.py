"""Training is the same in both frameworks: every step's losses, and the weights that come of them."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity compares with torch")

import jax
import jax.numpy as jnp
import optax
import torch

from flax_vae.io import port
from flax_vae.metrics.lpips import LPIPS, package_file
from flax_vae.train import optimizer
from flax_vae.train.config import GanConfig
from flax_vae.train.discriminator import PatchDiscriminator
from parity import training
from parity.mistakes import IN_TRAINING, Mistake, made
from parity.rows.train import TorchLPIPS
from torch_ref.metrics import lpips as torch_lpips
from torch_ref.train import discriminator as torch_discriminator
from torch_ref.train.optimizer import learning_rate

LATER = GanConfig("frames", start=7)
RUNS = {
    "reconstruction": training.BASE,
    "frames": replace(training.BASE, gan=LATER),
    "causal": replace(training.BASE, gan=GanConfig("causal")),
    "r1": replace(training.BASE, gan=GanConfig("frames", regularizer="r1", regularizer_weight=0.1)),
    "lecam": replace(training.BASE, gan=GanConfig("causal", regularizer="lecam")),
    "accumulated": replace(training.BASE, gan=LATER, optimizer=replace(training.BASE.optimizer, accumulate=2)),
}
QUICK = ("reconstruction", "frames")
SEEDS = (0, 1, 2)


@lru_cache
def ours(name: str) -> training.Trajectory:
    """Returns our run in float64."""
    return training.run_flax(RUNS[name], "float64")[0]


@lru_cache
def reference(name: str, precision: training.Precision, seed: int = 0) -> training.Trajectory:
    """Returns torch's run."""
    return training.run_torch(RUNS[name], precision, seed)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "reconstruction")) for name in RUNS]
)
def test_same_trajectory_in_float64(name: str):
    training.check_same(ours(name), reference(name, "float64"))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", IN_TRAINING, ids=lambda mistake: mistake.cause.split(":")[0])
def test_float64_check_notices(mistake: Mistake):
    with made(mistake):
        wrong = training.run_torch(RUNS["frames"], "float64")
    with pytest.raises(AssertionError):
        training.check_same(ours("frames"), wrong)


def check_float32(name: str) -> None:
    """Checks runs in float32."""
    torch32, expected = ([reference(name, precision, seed) for seed in SEEDS] for precision in ("float32", "float64"))
    training.check_no_worse(training.run_flax(RUNS[name], "float32", SEEDS), torch32, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_trajectory_in_float32_is_no_worse_than_torch(name: str):
    check_float32(name)


@pytest.mark.slow
def test_float32_check_notices_a_rounded_bias_correction(monkeypatch):
    monkeypatch.setattr(optimizer, "scale_by_adam", optax.scale_by_adam)
    with pytest.raises(AssertionError, match="rms error"):
        check_float32("reconstruction")


@pytest.mark.parametrize(
    ("steps", "warmup", "accumulate"), [(20, 5, 1), (20, 0, 1), (20, 1, 3), (20, 20, 1), (7, 2000, 1), (1, 0, 1)]
)
def test_learning_rates_are_the_same(steps: int, warmup: int, accumulate: int):
    rates = replace(training.BASE.optimizer, warmup=warmup, accumulate=accumulate)
    recipe = training.recipe(replace(training.BASE, steps=steps, optimizer=rates))
    expected = [learning_rate(recipe, count) for count in range(steps)]
    np.testing.assert_allclose(optimizer.schedule(rates, steps)(jnp.arange(steps)), expected, rtol=1e-13)


def clips() -> tuple[np.ndarray, np.ndarray]:
    """Draws a clip, B T H W C, and one like it."""
    rng = np.random.default_rng(0)
    clip = rng.uniform(-1, 1, (1, 2, 32, 40, 3)).astype(np.float32)
    return clip, np.clip(clip + rng.normal(0, 0.3, clip.shape), -1, 1).astype(np.float32)


def as_torch(clip: np.ndarray) -> torch.Tensor:
    """Returns a clip as B C T H W."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(clip, -1, 1)))


def check_distances(lpips: LPIPS, torchs: torch.nn.Module) -> None:
    """Checks that both find clips equally different."""
    with torch.no_grad():
        expected = torchs(*map(as_torch, clips()))
    np.testing.assert_allclose(jax.jit(lpips)(*map(jnp.asarray, clips())), expected, rtol=1e-4)


@pytest.fixture(scope="module")
def random_lpips() -> torch_lpips.LPIPS:
    """LPIPS of torch_ref in its full width, with random weights that keep the size of features."""
    generator = torch.Generator().manual_seed(0)
    lpips = torch_lpips.LPIPS().requires_grad_(False)
    for name, parameter in lpips.named_parameters():
        parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1, generator=generator)
        if name.startswith("lin"):
            parameter.abs_()
    return lpips


def test_lpips_reads_checkpoints_of_the_torch_package(random_lpips, tmp_path):
    torch.save(random_lpips.state_dict(), tmp_path / "lpips.pt")
    check_distances(LPIPS.from_pretrained(tmp_path / "lpips.pt"), random_lpips)


def test_lpips_reads_vgg_and_linear_layers_from_two_files(random_lpips, tmp_path):
    tensors = random_lpips.state_dict()
    vgg = {f"features.{key.split('.', 2)[2]}": value for key, value in tensors.items() if key.startswith("net.")}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(3, 3)}, tmp_path / "vgg16.pth")
    torch.save({key: value for key, value in tensors.items() if key.startswith("lin")}, tmp_path / "vgg.pth")
    torch.save(tensors, tmp_path / "lpips.pt")
    both, one = (
        port.torch_layout(LPIPS.from_pretrained(*(tmp_path / name for name in names)))
        for names in (("vgg16.pth", "vgg.pth"), ("lpips.pt",))
    )
    assert both.keys() == one.keys()
    assert all(np.array_equal(value, one[key]) for key, value in both.items())


def test_public_weights_of_lpips_give_what_torch_gives():
    try:
        lpips = LPIPS.from_pretrained(package_file())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    torchs = TorchLPIPS(torch_lpips.WIDTHS)
    torchs.load_state_dict({key: torch.from_numpy(value) for key, value in port.torch_layout(lpips).items()})
    check_distances(lpips, torchs)


@pytest.mark.parametrize("prefix", ["", "loss.discriminator.", "module.loss.discriminator."])
@pytest.mark.parametrize("widths", [torch_discriminator.WIDTHS, (4, 6, 8, 8, 8)], ids=str)
def test_discriminator_is_as_deep_and_wide_as_its_checkpoint(widths, prefix, tmp_path):
    torchs = torch_discriminator.PatchDiscriminator(widths)
    tensors = {f"{prefix}{key}": value for key, value in torchs.state_dict().items()}
    others = {"vae.encoder.conv_in.conv.weight": torch.zeros(3), "loss.logvar": torch.zeros(())} if prefix else {}
    torch.save({"model": tensors | others}, tmp_path / "training.pt")
    ours = port.torch_layout(PatchDiscriminator.from_pretrained(tmp_path / "training.pt"))
    expected = torchs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(value, expected[key]) for key, value in ours.items())


def test_discriminator_judges_as_in_torch(tmp_path):
    torchs = torch_discriminator.PatchDiscriminator((4, 6, 8, 8))
    torch.save(torchs.state_dict(), tmp_path / "discriminator.pt")
    discriminator = PatchDiscriminator.from_pretrained(tmp_path / "discriminator.pt")
    clip = clips()[0]
    with torch.no_grad():
        expected = np.moveaxis(torchs(as_torch(clip)).numpy(), 1, -1)
    np.testing.assert_allclose(discriminator(jnp.asarray(clip)), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
