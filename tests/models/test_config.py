"""What every config can tell: keys and types of a config.json, frames, sizes and chunks, against counting by hand."""

import dataclasses
import json
from typing import ClassVar

import pytest

from flax_vae.models.config import VAEConfig, fits, type_name, type_problems

hypothesis = pytest.importorskip("hypothesis", reason="frames are drawn by hypothesis: pip install hypothesis")
given, st = hypothesis.given, hypothesis.strategies


@dataclasses.dataclass(frozen=True)
class LittleConfig(VAEConfig):
    """A config of a family that is nothing but its numbers."""

    class_name: ClassVar[str] = "Little"
    pixel_channels: int = 3
    latent_channels: int = 4
    temporal_factor: int = 8
    spatial_factor: int = 8
    names: tuple[str, ...] = ("a", "b")
    scale: float | None = None


class Down(LittleConfig):
    rounding = "down"


class Exact(LittleConfig):
    rounding = "exact"


class Whole(LittleConfig):
    class_name = "Whole"
    streams = "whole"


def of(factor: int) -> LittleConfig:
    """Returns a config whose latents span that many frames."""
    return LittleConfig(temporal_factor=factor)


# Keys and types


def test_lists_of_a_file_are_tuples_of_a_config_and_lists_again():
    values = {"names": ["x"], "scale": 0.5, "_class_name": "Little", "_diffusers_version": "0.1"}
    config = LittleConfig.from_dict(values)
    assert (config.names, config.scale, config.latent_channels) == (("x",), 0.5, 4)
    written = config.to_dict()
    assert written == json.loads(json.dumps(written))
    assert written == {
        "pixel_channels": 3,
        "latent_channels": 4,
        "temporal_factor": 8,
        "spatial_factor": 8,
        "names": ["x"],
        "scale": 0.5,
        "_class_name": "Little",
    }
    assert LittleConfig.from_dict(written) == config


def test_keys_are_the_fields_and_others_are_named():
    assert LittleConfig.public_keys() == {field.name for field in dataclasses.fields(LittleConfig)}
    with pytest.raises(ValueError, match=r"unknown config keys: streams, zoom; a config\.json has no such"):
        LittleConfig.from_dict({"streams": "exact", "zoom": 3, "scale": 1.0, "shift_factor": None})
    with pytest.raises(ValueError, match="config keys must be strings, got 3"):
        LittleConfig.from_dict({3: 4})
    with pytest.raises(ValueError, match="object of keys and values, got list"):
        LittleConfig.from_dict([])


RUNS = {
    "force_upcast": True,
    "use_tiling": True,
    "use_slicing": False,
    "tile_sample_min_height": 240,
    "torch_dtype": "bfloat16",
    "gradient_checkpointing": True,
    "enable_gradient_checkpointing": True,
    "sample_height": 480,
    "shift_factor": None,
    "latents_mean": None,
    "use_quant_conv": False,
}


def test_keys_that_are_null_false_or_of_how_to_run_are_left_out_and_named():
    with pytest.warns(UserWarning, match="left out of the config") as caught:
        assert LittleConfig.from_dict({"scale": 2.0} | RUNS) == LittleConfig(scale=2.0)
    assert all(key in str(caught[0].message) for key in RUNS)
    assert LittleConfig.takes({"scale": 2.0} | RUNS)
    assert not LittleConfig.takes(RUNS)


@pytest.mark.parametrize(
    ("key", "value"),
    [("shift_factor", 0.1), ("latents_mean", [0.0]), ("is_causal", False), ("causal", False), ("use_quant_conv", True)],
)
def test_keys_that_would_change_the_function_are_refused_by_name(key, value):
    assert not LittleConfig.takes({"scale": 2.0, key: value})
    with pytest.raises(ValueError, match=f"unknown config keys: {key};"):
        LittleConfig.from_dict(RUNS | {key: value})


@dataclasses.dataclass(frozen=True)
class SizedConfig(LittleConfig):
    """A config that says the size of its samples."""

    sample_size: int = 64


@pytest.mark.parametrize(("given_size", "side"), [([96, 96], 96), ([32, 80], 80), (48, 48), (None, 256)])
def test_a_sample_size_may_be_two_sides(given_size, side):
    assert SizedConfig.from_dict({"sample_size": given_size}).sample_size == side


@pytest.mark.parametrize("given_size", [[3, 4, 5], [3.5, 4], "256"])
def test_other_sample_sizes_reach_the_check_of_types(given_size):
    size = SizedConfig.from_dict({"sample_size": given_size}).sample_size
    assert type_problems(SizedConfig(sample_size=size)) == [f"sample_size must be int, got {size!r}"]


def test_another_family_s_config_is_refused():
    with pytest.raises(ValueError, match=r"_class_name is 'Whole', that of another model: expected 'Little'"):
        LittleConfig.from_dict({"_class_name": "Whole"})


def test_a_file_is_named_where_it_is_wrong(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"scale": null, "names": ["y"]}')
    assert LittleConfig.from_json(path) == LittleConfig(names=("y",))
    path.write_text('{"skale": 1}')
    with pytest.raises(ValueError, match=r"config\.json: unknown config keys: skale"):
        LittleConfig.from_json(str(path))


def test_a_config_that_weights_do_not_show_is_asked_for():
    with pytest.raises(ValueError, match=r"config of a Little cannot be read off its weights: give its config\.json"):
        LittleConfig.from_shapes({})


def test_the_table_of_a_config_shows_every_key():
    columns, rows = LittleConfig().describe()
    assert [key for key, _ in rows] == [field.name for field in dataclasses.fields(LittleConfig)]
    assert {len(row) for row in rows} == {len(columns)}


@pytest.mark.parametrize(
    ("value", "hint", "is_fitting"),
    [
        (3, int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (True, float, False),
        ("3", str, True),
        (False, bool, True),
        (0, bool, False),
        ((1, 2), tuple[int, ...], True),
        ((), tuple[int, ...], False),
        ((1, 2.5), tuple[int, ...], False),
        ((1, 2.5), tuple[float, ...], True),
        ([1, 2], tuple[int, ...], False),
        (None, int | None, True),
        (3, int | None, True),
        ("3", int | None, False),
        ((1,), tuple[int, ...] | None, True),
        (((1,),), tuple[int, ...] | None, False),
    ],
)
def test_values_fit_their_types(value, hint, is_fitting):
    assert fits(value, hint) == is_fitting


@pytest.mark.parametrize(
    ("hint", "words"),
    [(int, "int"), (tuple[bool, ...], "a list of bool"), (float | None, "float or null"), (int | str, "int or str")],
)
def test_types_have_names(hint, words):
    assert type_name(hint) == words


def test_every_wrong_type_is_named():
    config = LittleConfig(pixel_channels="3", names=[], scale="large")  # pyright: ignore[reportArgumentType]
    assert type_problems(config) == [
        "pixel_channels must be int, got '3'",
        "names must be a list of str, got []",
        "scale must be float or null, got 'large'",
    ]
    assert type_problems(LittleConfig()) == []


# Frames and latents


@given(st.integers(1, 10_000), st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_frames_and_latents_count_back_and_forth(latents, factor):
    frames = of(factor).pixel_frames(latents)
    assert of(factor).latent_frames(frames) == latents
    assert frames == 1 + factor * (latents - 1)


@given(st.integers(-20, 200), st.integers(2, 16))
def test_other_numbers_of_frames_are_refused_with_the_nearest_that_fit(frames, factor):
    fitting = range(1, 400, factor)
    if frames in fitting:
        assert of(factor).latent_frames(frames) == fitting.index(frames) + 1
        return
    with pytest.raises(ValueError, match=rf"{factor}k \+ 1 frames, got {frames}: use ") as caught:
        of(factor).latent_frames(frames)
    below, above = [n for n in fitting if n < frames][-1:], [n for n in fitting if n > frames][:1]
    advised = [int(number) for number in str(caught.value).split("use ")[1].split(" or ")]
    assert advised == (below + above if below else [1])


@pytest.mark.parametrize("latents", [0, -1])
def test_no_latents_decode_to_no_clip(latents):
    with pytest.raises(ValueError, match=f"at least one latent frame, got {latents}"):
        of(8).pixel_frames(latents)


@given(st.integers(1, 200), st.sampled_from([1, 2, 3, 4, 8]), st.booleans())
def test_extra_frames_are_padded_or_trimmed_to_the_nearest_that_fit(frames, factor, start):
    config, fitting = of(factor), range(int(start), 400, factor)
    assert config.fitted_frames(frames, "pad", start) == min(n for n in fitting if n >= frames)
    assert config.fitted_frames(frames, "trim", start) == max(n for n in fitting if n <= frames)
    if frames in fitting:
        assert config.fitted_frames(frames, "error", start) == frames
        return
    law, over = (f"{factor}k + 1" if start else f"{factor}k"), frames - max(n for n in fitting if n <= frames)
    assert config.frame_law(start) == law
    with pytest.raises(ValueError, match=f"a {'clip' if start else 'later chunk'} must have") as caught:
        config.fitted_frames(frames, "error", start)
    assert f"must have {law} frames, got {frames}; extra_frames='pad' repeats" in str(caught.value)
    assert f"'trim' leaves {over} out" in str(caught.value)


def test_an_unknown_policy_is_refused_with_the_known():
    with pytest.raises(ValueError, match="extra_frames must be one of error, pad, trim, got 'drop'"):
        of(8).fitted_frames(9, "drop")  # pyright: ignore[reportArgumentType]


# Chunks and sizes


def test_a_chunk_later_in_a_stream_has_whole_latents():
    assert [of(8).chunk_frames(latents) for latents in (0, 1, 3)] == [1, 8, 24]
    assert of(8).checked_chunk(16) == 16
    for frames in (0, -8, 12):
        with pytest.raises(ValueError, match=f"chunk={frames}: expected a multiple of 8, at least 8"):
            of(8).checked_chunk(frames)
    with pytest.raises(ValueError, match="a Whole cannot be computed in chunks: pass the whole clip"):
        Whole().checked_chunk(8)


@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([1, 2, 8]))
def test_sizes_round_as_the_family_says(height, width, factor):
    sides = height, width
    up, down, exact = (kind(spatial_factor=factor) for kind in (LittleConfig, Down, Exact))
    assert up.latent_shape(9, *sides) == (2, *(-(-side // factor) for side in sides), 4)
    if min(sides) < factor:
        with pytest.raises(ValueError, match=f"at least {factor}x{factor} pixels, got {height}x{width}"):
            down.latent_shape(9, *sides)
    else:
        assert down.latent_shape(9, *sides) == (2, height // factor, width // factor, 4)
    if height % factor or width % factor:
        with pytest.raises(ValueError, match=f"multiples of {factor}, got {height}x{width}"):
            exact.latent_shape(9, *sides)
    else:
        assert exact.latent_shape(9, *sides) == up.latent_shape(9, *sides)


def test_latents_decode_to_whole_multiples():
    assert of(8).video_shape(3, 5, 7) == (17, 40, 56, 3)
    with pytest.raises(ValueError, match="at least one pixel, got 0x8"):
        of(8).latent_shape(9, 0, 8)
    with pytest.raises(ValueError, match=r"8k \+ 1 frames, got 16: use 9 or 17"):
        of(8).latent_shape(16, 8, 8)
    with pytest.raises(ValueError, match="at least one latent frame"):
        of(8).video_shape(0, 8, 8)
