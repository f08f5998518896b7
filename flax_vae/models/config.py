"""What every VAE's config can tell, and how a config.json is read: T frames, H W pixels; t h w z of latents."""

import re
import types
import warnings
from collections.abc import Mapping
from dataclasses import Field, asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from flax_vae.io.files import read_json
from flax_vae.io.weights import Spec

ExtraFrames = Literal["error", "pad", "trim"]  # what to do with frames that do not complete a latent
Streams = Literal["exact", "lookahead", "by_chunk", "whole"]
Rounding = Literal["up", "down", "exact"]


HOW_TO_RUN = re.compile(  # keys of other libraries' configs that change no result, or only its rounding
    r"force_upcast|upcast_\w+|(torch_)?dtype|precision|device(_map)?|transformers_version|model_type|architectures|"
    r"((use|enable)_)?(tiling|slicing|checkpointing|(gradient|activation)_checkpointing|framewise_(en|de)coding)|"
    r"tile_\w+|(num_)?sample_(size|tsize|height|width|frames|posterior)"
)


class VAEConfig:
    """Base of the families' configs: frozen dataclasses whose fields are the public keys of a config.json.

    Attributes:
      class_name: the public `_class_name`, and the name of the model's class.
      streams: "exact", any chunks give the whole clip's result; "lookahead", exact but late: later frames are needed;
        "by_chunk", the family's own chunks are part of the function; "whole", no chunks.
      rounding: how latents count rows and columns that do not fill one: "up", "down", or "exact" where they must.
      pixel_channels, latent_channels: channels of a pixel and of a latent.
      temporal_factor, spatial_factor: frames that a latent spans, except the first; pixels on each side.
      sample_size: rows and columns of the clip that `flax-vae info` shows the latents of.
    """

    class_name: ClassVar[str]
    streams: ClassVar[Streams] = "exact"
    rounding: ClassVar[Rounding] = "up"
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # families are dataclasses

    pixel_channels: int
    latent_channels: int
    temporal_factor: int
    spatial_factor: int
    sample_size: int = 256

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Reads the contents of a config.json; ValueError names keys that are not public and unsupported values.

        Keys that are not public but change nothing are left out, with a warning: those that are null or false, or say
        how to run a model, such as `torch_dtype`.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a config must be an object of keys and values, got {type(values).__name__}")
        if not all(isinstance(key, str) for key in values):
            raise ValueError(f"config keys must be strings, got {', '.join(map(repr, values))}")
        if (name := values.get("_class_name", cls.class_name)) != cls.class_name:
            raise ValueError(f"_class_name is {name!r}, that of another model: expected {cls.class_name!r}")
        others = {key: value for key, value in values.items() if key not in cls.public_keys() and key[:1] != "_"}
        if unknown := sorted(key for key, value in others.items() if changes_function(key, value)):
            raise ValueError(f"unknown config keys: {', '.join(unknown)}; a config.json has no such settings")
        if others:
            what = f"left out of the config, null, false, or of how to run a model: {', '.join(sorted(others))}"
            warnings.warn(what, stacklevel=2)
        given = {key: tuple(x) if isinstance(x := values[key], list) else x for key in cls.public_keys() & set(values)}
        return cls(**given | {key: one_side(given[key]) for key in given.keys() & {"sample_size"}})

    @classmethod
    def takes(cls, values: Mapping[str, Any]) -> bool:
        """Whether some keys of a config.json are this config's, and no others change what a model computes."""
        given = {key: value for key, value in values.items() if not key.startswith("_")}
        others = given.keys() - cls.public_keys()
        return len(others) < len(given) and not any(changes_function(key, given[key]) for key in others)

    @classmethod
    def public_keys(cls) -> set[str]:
        """Returns the keys that a config.json may have."""
        return {field.name for field in fields(cls)}

    @classmethod
    def from_json(cls, path: str | PathLike) -> Self:
        """Reads a config.json; ValueError names the file and what is wrong in it."""
        return read_json(Path(path), cls.from_dict)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Spec]) -> Self:
        """Reads the config off the names and shapes of weights without config.json; ValueError where it cannot be."""
        raise ValueError(f"the config of a {cls.class_name} cannot be read off its weights: give its config.json")

    def to_dict(self) -> dict[str, Any]:
        """Returns every public key, as a config.json holds them."""
        public = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return public | {"_class_name": self.class_name}

    def describe(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Returns the columns and rows of a table that shows the config."""
        return ["", ""], [(key, str(value)) for key, value in self.to_dict().items() if not key.startswith("_")]

    def latent_frames(self, frames: int) -> int:
        """Returns the latent frames of a clip of temporal_factor * k + 1 frames: k + 1; ValueError for other numbers.

        The first frame is a latent of its own, every `temporal_factor` later frames are one more.
        """
        factor = self.temporal_factor
        if frames < 1 or (frames - 1) % factor:
            below = max(1, frames - (frames - 1) % factor)
            near = f"{below}" if frames <= below else f"{below} or {below + factor}"
            raise ValueError(f"a clip must have {self.frame_law()} frames, got {frames}: use {near}")
        return (frames - 1) // factor + 1

    def pixel_frames(self, latents: int) -> int:
        """Returns the frames that `latents` latent frames decode to; ValueError where there is no latent."""
        if latents < 1:
            raise ValueError(f"expected at least one latent frame, got {latents}")
        return self.temporal_factor * (latents - 1) + 1

    def chunk_frames(self, latents: int) -> int:
        """Returns the frames of a later chunk of a stream with `latents` latents; 1, a first chunk, for 0."""
        return max(latents * self.temporal_factor, 1)

    def frame_law(self, start: bool = True) -> str:
        """Returns, as text, the lengths that make whole latents: 8k + 1 at the start of a stream, 8k later."""
        return f"{self.temporal_factor}k + 1" if start else f"{self.temporal_factor}k"

    def fitted_frames(self, frames: int, extra_frames: ExtraFrames, start: bool = True) -> int:
        """Returns the number of frames to encode, of which whole latents come, in place of `frames`.

        Args:
          frames: those that are left of the stream.
          extra_frames: for frames that do not complete a latent, "pad" rounds up (the last frame is to be repeated),
            "trim" rounds down (they are to be left out), "error" raises.
          start: whether these frames start the stream: temporal_factor * k + 1 fit, otherwise temporal_factor * k.

        Raises:
          ValueError: frames that do not fit, with "error"; another policy.
        """
        if extra_frames not in get_args(ExtraFrames):
            raise ValueError(f"extra_frames must be one of {', '.join(get_args(ExtraFrames))}, got {extra_frames!r}")
        over = (frames - start) % self.temporal_factor
        if extra_frames == "error" and over:
            raise ValueError(
                f"a {'clip' if start else 'later chunk'} must have {self.frame_law(start)} frames, got {frames}; "
                f"extra_frames='pad' repeats the last, 'trim' leaves {over} out"
            )
        return frames + -over % self.temporal_factor if extra_frames == "pad" else frames - over

    def checked_chunk(self, frames: int) -> int:
        """Returns the frames of a chunk; ValueError unless whole latents come of them, and for `streams` "whole"."""
        factor = self.temporal_factor
        if self.streams == "whole":
            raise ValueError(f"a {self.class_name} cannot be computed in chunks: pass the whole clip")
        if frames < 1 or frames % factor:
            raise ValueError(f"chunk={frames}: expected a multiple of {factor}, at least {factor}")
        return frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the shape (t, h, w, z) of the latents of a clip.

        Raises:
          ValueError: frames that make no whole latents, or a size that makes none or, for `rounding` "exact", parts.
        """
        if min(height, width) < 1:
            raise ValueError(f"a frame must have at least one pixel, got {height}x{width}")
        factor = self.spatial_factor
        if self.rounding == "exact" and (height % factor or width % factor):
            raise ValueError(f"height and width must be multiples of {factor}, got {height}x{width}")
        if self.rounding == "down" and min(height, width) < factor:
            raise ValueError(f"a frame must have at least {factor}x{factor} pixels, got {height}x{width}")
        rows, columns = (-(-side // factor) if self.rounding == "up" else side // factor for side in (height, width))
        return self.latent_frames(frames), rows, columns, self.latent_channels

    def video_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the shape (T, H, W, C) of the clip that latents of `frames` x `height` x `width` decode to."""
        factor = self.spatial_factor
        return self.pixel_frames(frames), height * factor, width * factor, self.pixel_channels


def type_problems(config: VAEConfig) -> list[str]:
    """Lists the keys of a config whose value has the wrong type."""
    hints, values = get_type_hints(type(config)), vars(config)
    wrong = [key for key in values if not fits(values[key], hints[key])]
    return [f"{key} must be {type_name(hints[key])}, got {values[key]!r}" for key in wrong]


def changes_function(key: str, value: Any) -> bool:
    """Whether a setting that a config does not know may change what a model computes.

    What is null or false is off, as all is that a config does not know; but what is called causal is always on.
    """
    return value is not None and (value is not False or "causal" in key) and not HOW_TO_RUN.fullmatch(key)


def one_side(size: Any) -> Any:
    """Returns the larger side of a sample size that gives two, 256 for one that is null, and any other as it is."""
    if isinstance(size, tuple) and len(size) == 2 and all(type(side) is int for side in size):
        return max(size)
    return VAEConfig.sample_size if size is None else size


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config.json has a type: bool, int, float, str, a tuple of one of these, or a union."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and bool(value) and all(fits(entry, get_args(hint)[0]) for entry in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def type_name(hint: Any) -> str:
    """Returns a type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {type_name(get_args(hint)[0])}"
    return "null" if hint is types.NoneType else hint.__name__
