"""CausalConv3d against a convolution written out in numpy, and the promises of its carry. B T H W C, float64.

T is in frames, H W in pixels; a plan is the lengths of the chunks of a clip.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae.layers.conv import CausalConv3d, Conv3d

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.usefixtures("float64")

IN, OUT, HEIGHT, WIDTH = 4, 6, 4, 5
Size = int | tuple[int, ...]


def triple(value):
    return (value,) * 3 if isinstance(value, int) else value


def conv(kernel: Size = 3, **options):
    return lambda rngs: CausalConv3d(IN, OUT, kernel, **options, rngs=rngs)


def padded(x, axis, before, after, mode):
    """Extends an axis by the frames or pixels that each pad mode defines, one index at a time."""
    last = x.shape[axis] - 1
    source = {
        "replicate": lambda i: min(max(i, 0), last),
        "reflect": lambda i: last - abs(last - abs(i)),
        "circular": lambda i: i % (last + 1),
        "constant": lambda i: i if 0 <= i <= last else None,
    }[mode]
    indices = [source(i) for i in range(-before, last + 1 + after)]
    parts = [np.zeros_like(x.take([0], axis)) if i is None else x.take([i], axis) for i in indices]
    return np.concatenate(parts, axis)


def convolve(x, kernel, bias, stride, dilation, groups):
    """Sums input times weight over the taps of the kernel and the channels of each group, without any padding."""
    spans = [(k - 1) * d for k, d in zip(kernel.shape, dilation, strict=False)]
    size = [(n - span - 1) // s + 1 for n, span, s in zip(x.shape[1:4], spans, stride, strict=True)]
    total = np.zeros((x.shape[0], *size, groups, kernel.shape[4] // groups))
    for tap in np.ndindex(kernel.shape[:3]):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        seen = [slice(at, at + (n - 1) * s + 1, s) for at, n, s in zip(starts, size, stride, strict=True)]
        values = x[:, *seen].reshape(x.shape[0], *size, groups, -1)
        total += np.einsum("bthwgi,igo->bthwgo", values, kernel[tap].reshape(kernel.shape[3], groups, -1))
    return total.reshape(x.shape[0], *size, -1) + bias


def expected(layer, x, kernel, stride=1, dilation=1, groups=1, bias=True, pad_mode="constant"):
    """Gives what the options of a causal convolution mean, with the weights of `layer`."""
    x, (kt, kh, kw), dilation = np.asarray(x), triple(kernel), triple(dilation)
    stride = (stride, 1, 1) if isinstance(stride, int) else stride
    before = dilation[0] * (kt - 1)
    mode = "constant" if before >= x.shape[1] else pad_mode
    for axis, pad in ((1, (before, 0)), (2, (kh // 2, kh // 2)), (3, (kw // 2, kw // 2))):
        x = padded(x, axis, *pad, mode)
    weights, offset = np.asarray(layer.conv.kernel[...]), np.asarray(layer.conv.bias[...]) if bias else 0.0
    return convolve(x, weights, offset, stride, dilation, groups)


def apart(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3},
        {"kernel": 1},
        {"kernel": (1, 3, 3)},
        {"kernel": (3, 1, 1)},
        {"kernel": (2, 3, 5)},
        {"kernel": 3, "stride": 2},
        {"kernel": 3, "stride": (1, 2, 2)},
        {"kernel": (2, 3, 3), "stride": (3, 2, 1)},
        {"kernel": (3, 1, 3), "dilation": 2},
        {"kernel": 3, "dilation": (2, 1, 1)},
        {"kernel": 3, "groups": 2},
        {"kernel": 3, "bias": False},
        {"kernel": 3, "pad_mode": "replicate"},
        {"kernel": 3, "pad_mode": "reflect", "stride": (2, 1, 2)},
        {"kernel": (2, 5, 3), "pad_mode": "reflect"},
        {"kernel": (2, 3, 5), "pad_mode": "circular"},
        {"kernel": (4, 3, 3), "pad_mode": "replicate", "dilation": (1, 2, 1)},
    ],
    ids=str,
)
def test_convolution_is_the_sum_over_taps(options, frames, noise, randomized):
    layer = randomized(conv(**options))
    x = noise((2, frames, HEIGHT, WIDTH, IN))
    assert apart(layer(x)[0], expected(layer, x, **options)) < 1e-13


MISTAKES = {
    "height and width swapped": lambda layer: set_kernel(layer, layer.conv.kernel[...].swapaxes(1, 2)),
    "time reversed": lambda layer: set_kernel(layer, layer.conv.kernel[...][::-1]),
    "groups swapped": lambda layer: set_kernel(layer, jnp.roll(layer.conv.kernel[...], OUT // 2, axis=4)),
    "time padded on both sides": lambda layer: setattr(layer, "padding", ((1, 1), (1, 1), (1, 1))),
    "zeros for the edge": lambda layer: setattr(layer, "pad_mode", "constant"),
    "no bias": lambda layer: setattr(layer.conv, "bias", None),
}


def set_kernel(layer, kernel):
    layer.conv.kernel[...] = kernel


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_sum_over_taps_tells_a_mistaken_convolution(mistake, noise, randomized):
    options = {"kernel": 3, "groups": 2, "pad_mode": "replicate"}
    layer = randomized(conv(**options))
    x = noise((1, 5, HEIGHT, WIDTH, IN))
    wanted = expected(layer, x, **options)
    MISTAKES[mistake](layer)
    assert apart(layer(x)[0], wanted) > 1e-2


@st.composite
def streams(draw, modes=("constant", "replicate", "reflect")):
    """Draws the options of a convolution, and a plan whose first chunk is as long as its pad mode asks for."""
    before_and_after = st.sampled_from([1, 3])
    options = {
        "kernel": (draw(st.integers(1, 4)), draw(before_and_after), draw(before_and_after)),
        "stride": (draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "dilation": (draw(st.integers(1, 3)), draw(st.integers(1, 2)), 1),
        "groups": draw(st.integers(1, 2)),
        "pad_mode": draw(st.sampled_from(modes)),
    }
    shortest = 1 if options["pad_mode"] == "constant" else span(options)
    first = draw(st.integers(shortest, shortest + 4))
    return options, [first, *draw(st.lists(st.integers(0, 4), max_size=3))]


def span(options):
    return options["dilation"][0] * (options["kernel"][0] - 1) + 1


def length(carry):
    return 0 if isinstance(carry, tuple) else carry.shape[1]


@settings(max_examples=20)
@given(streams())
def test_chunks_give_the_whole(noise, randomized, stream, jit, case):
    options, plan = case
    both_ways = jit(lambda layer, x: (layer(x), stream(layer, x, plan)), randomized(conv(**options)))
    (whole, carry), (chunked, last) = both_ways(noise((2, sum(plan), HEIGHT, WIDTH, IN)))
    assert chunked.shape == whole.shape
    assert apart(chunked, whole) < 1e-12
    assert length(last) == length(carry)


@given(streams(), st.integers(0, 3))
def test_carry_keeps_only_what_the_next_outputs_need(case, more):
    options, plan = case
    stride, frames = options["stride"][0], plan[0] + more * options["stride"][0]
    clip = jax.ShapeDtypeStruct((1, frames, HEIGHT, WIDTH, IN), jnp.float32)
    y, carry = nnx.eval_shape(lambda x: conv(**options)(nnx.Rngs(0))(x), clip)
    assert y.shape[1] == -(-frames // stride)
    if frames % stride == 1 % stride:  # k * stride + 1 frames: no frame waits for others
        assert length(carry) == max(0, span(options) - stride)
    assert length(carry) <= max(span(options), stride) - 1


@settings(max_examples=10)
@given(streams(modes=["constant", "replicate"]), st.data())  # a reflection shows the first frames what comes after them
def test_no_output_sees_a_later_frame(noise, randomized, jit, case, data):
    options, plan = case
    layer, stride = jit(lambda layer, x: layer(x)[0], randomized(conv(**options))), options["stride"][0]
    x = noise((1, sum(plan), HEIGHT, WIDTH, IN))
    changed = data.draw(st.integers(0, x.shape[1] - 1))
    earlier = -(-changed // stride)
    y, z = layer(x), layer(x.at[:, changed].add(1.0))
    assert jnp.array_equal(y[:, :earlier], z[:, :earlier])
    if changed % stride == 0:  # the frame under the newest tap of the kernel
        assert not jnp.array_equal(y[:, earlier], z[:, earlier])


@pytest.mark.parametrize(
    "options", [{"kernel": 3}, {"kernel": 3, "stride": 2}, {"kernel": (2, 1, 1), "dilation": 3}], ids=str
)
def test_prefix_of_clip_gives_prefix_of_outputs(options, noise, randomized):
    layer = randomized(conv(**options))
    x = noise((1, 7, HEIGHT, WIDTH, IN))
    whole = layer(x)[0]
    for frames in range(1, 7):
        prefix = layer(x[:, :frames])[0]
        assert apart(prefix, whole[:, : prefix.shape[1]]) < 1e-13


TAMPERED = {
    "zeroed": jnp.zeros_like,
    "a frame late": lambda carry: jnp.roll(carry, 1, axis=1),
    "a frame too long": lambda carry: jnp.concatenate([carry[:, :1], carry], axis=1),
    "a frame too short": lambda carry: carry[:, 1:],
}


@pytest.mark.parametrize("tamper", TAMPERED)
def test_chunks_with_another_carry_give_something_else(tamper, noise, randomized, stream):
    layer = randomized(conv((3, 3, 3), stride=(1, 2, 2)))
    x = noise((1, 6, HEIGHT, WIDTH, IN))
    whole, chunked = layer(x)[0], stream(layer, x, [3, 3], TAMPERED[tamper])[0]
    assert chunked.shape != whole.shape or apart(chunked, whole) > 1e-2


def test_gradients_reach_earlier_chunks_through_the_carry(noise, randomized, stream, jit):
    x, weights = noise((1, 6, HEIGHT, WIDTH, IN)), noise((1, 3, HEIGHT, WIDTH, OUT), seed=1)

    def gradient(run):
        return jit(lambda layer, x: jax.grad(lambda x: (run(layer, x)[0] * weights).sum())(x), layer)(x)

    layer = randomized(conv((3, 3, 3), stride=2))
    whole = gradient(lambda layer, x: layer(x))
    assert apart(gradient(lambda layer, x: stream(layer, x, [2, 1, 3])), whole) < 1e-12
    assert apart(gradient(lambda layer, x: stream(layer, x, [2, 1, 3], jax.lax.stop_gradient)), whole) > 1e-2


def fresh(kernel: Size = 3, **options):
    return nnx.eval_shape(lambda: conv(kernel, **options)(nnx.Rngs(0)))


def clip(*shape, dtype=float):
    return jnp.zeros(shape, dtype)


REFUSED = {
    "an even height": (lambda: fresh((3, 2, 3)), r"must be odd, got \(3, 2, 3\)"),
    "two numbers for a kernel": (lambda: fresh((3, 3)), r"three .* got \(3, 3\)"),
    "groups that do not divide": (lambda: fresh(groups=3), "3 groups must divide both 4 input and 6 output"),
    "an unknown pad mode": (lambda: fresh(pad_mode="mirror"), "constant, replicate, reflect, circular, got 'mirror'"),
    "four axes": (lambda: fresh()(clip(3, 4, 5, 4)), r"expected \(batch, .*got \(3, 4, 5, 4\)"),
    "other channels": (lambda: fresh()(clip(1, 3, 4, 5, 3)), r"width, 4\) .*got \(1, 3, 4, 5, 3\)"),
    "no pixels": (lambda: fresh()(clip(1, 3, 0, 5, 4)), "at least one pixel"),
    "no batch": (lambda: fresh()(clip(0, 3, 4, 5, 4)), "at least one pixel"),
    "no frame at the start": (lambda: fresh()(clip(1, 0, 4, 5, 4)), "start with at least one frame"),
    "too few pixels for the dilation": (
        lambda: fresh(dilation=3)(clip(1, 3, 4, 5, 4)),
        "spans 7 .* use a larger input",
    ),
    "too few pixels to reflect": (
        lambda: fresh((1, 3, 3), pad_mode="reflect")(clip(1, 3, 1, 5, 4)),
        "reflect padding of 1 needs more than 1 rows",
    ),
    "too few pixels to go around": (
        lambda: fresh((1, 3, 7), pad_mode="circular")(clip(1, 3, 4, 2, 4)),
        "circular padding of 3 needs more than 2 columns",
    ),
    "a circle in a stream": (
        lambda: fresh(pad_mode="circular")(clip(1, 3, 4, 5, 4), clip(1, 2, 4, 5, 4)),
        "pass the whole clip",
    ),
    "the carry of a smaller clip": (
        lambda: fresh()(clip(1, 3, 4, 5, 4), clip(1, 2, 4, 4, 4)),
        r"carry of shape \(1, 2, 4, 4, 4\) .* chunk of shape \(1, 3, 4, 5, 4\)",
    ),
    "the carry of another batch": (
        lambda: fresh()(clip(1, 3, 4, 5, 4), clip(2, 2, 4, 5, 4)),
        "use the carry that the same stream returned last",
    ),
    "the carry of a 1x1x1 convolution": (
        lambda: fresh()(clip(1, 3, 4, 5, 4), ()),
        "use the carry that the same stream returned last",
    ),
    "a plain convolution of too few frames": (
        lambda: Conv3d(IN, OUT, 3, rngs=nnx.Rngs(0))(clip(1, 2, 4, 5, 4)),
        "a kernel of 3 .* but 2 with padding",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case):
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": (0, 1, 2), "stride": (2, 1, 2)}, {"groups": 2}], ids=str
)
def test_plain_convolution_pads_both_sides_with_zeros(options, noise, randomized):
    layer = randomized(lambda rngs: Conv3d(IN, OUT, 3, **options, rngs=rngs))
    x = noise((2, 4, HEIGHT, WIDTH, IN))
    around = np.asarray(x)
    for axis, pad in enumerate(triple(options.get("padding", 0))):
        around = padded(around, axis + 1, pad, pad, "constant")
    weights, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    wanted = convolve(around, weights, bias, triple(options.get("stride", 1)), (1, 1, 1), options.get("groups", 1))
    assert apart(layer(x), wanted) < 1e-13


@pytest.mark.parametrize("sizes", [{"kernel_size": 0}, {"stride": 0}, {"dilation": (1, 0, 1)}, {"groups": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match=r"at least 1|must divide"):
        Conv3d(2, 4, **({"kernel_size": 3} | sizes), rngs=nnx.Rngs(0))


def test_fresh_weights_are_normal_with_the_public_standard_deviation():
    kernel = np.asarray(Conv3d(24, 40, 3, rngs=nnx.Rngs(1)).kernel[...])
    assert kernel.dtype == np.float32
    assert abs(kernel.std() - 0.02) < 5e-4
    assert abs(kernel.mean()) < 5e-4
    assert np.unique(kernel).size > 0.99 * kernel.size
