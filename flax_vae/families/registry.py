"""All families by the `_class_name` of their config.json; from here a checkpoint finds its model."""

import contextlib
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import DTypeLike

from flax_vae.families.pyramid import CausalVideoVAE
from flax_vae.io import port
from flax_vae.io.checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint
from flax_vae.io.files import read_json
from flax_vae.io.foreign import hub, wrapped
from flax_vae.models.config import VAEConfig
from flax_vae.models.latents import LatentScaling
from flax_vae.models.vae import VideoVAE

FAMILIES: dict[str, type[VideoVAE]] = {family.__name__: family for family in (CausalVideoVAE,)}


def from_pretrained(
    path_or_hub_name: str | PathLike,
    subfolder: str | None = None,
    dtype: DTypeLike = jnp.float32,
    config: VAEConfig | None = None,
    variant: str | None = None,
    part: str | None = None,
) -> VideoVAE:
    """Loads a checkpoint of any family in a public torch layout, ready for inference (dropout off).

    The family is the one that `_class_name` in config.json names, or that the weights' names and shapes show.

    Args:
      path_or_hub_name: a directory with config.json and weights, a weights file, a name on the hub, as
        "owner/name[/folder]", or "default", the small model in this package. Weights are *.safetensors (also sharded),
        or .bin, .pt, .pth, .ckpt, also a trainer's own checkpoint.
      subfolder: the folder of the checkpoint in there, as "vae" in a pipeline.
      dtype: what the weights are cast to: float32, bfloat16, float16, or float64 where jax has it enabled.
      config: replaces config.json, for weights that come without one.
      variant: the copy of the weights that is meant, as "fp16", by default the one that is called no variant.
      part: the part of a trainer's checkpoint that is meant, by the prefix of its names, as "ema".

    Raises:
      FileNotFoundError: there is no such checkpoint. ValueError: an unknown family, a damaged or hostile file, an
      unsupported config, or tensors that are not exactly those of the model; all of them are listed.
    """
    source = open_source(path_or_hub_name, subfolder, variant, part)
    config = read_config(source) if config is None else config
    return family_of(config).load(source, config, dtype)


def open_source(
    path_or_hub_name: str | PathLike,
    subfolder: str | None = None,
    variant: str | None = None,
    part: str | None = None,
) -> Checkpoint:
    """Opens a checkpoint; the error of a directory without one names its subfolders that have one."""
    try:
        source = open_checkpoint(path_or_hub_name, subfolder, variant, part)
        if source.has_config():
            source.config(class_of)
        return source
    except (FileNotFoundError, ValueError) as error:
        folder, name = Path(path_or_hub_name, subfolder or ""), fspath(path_or_hub_name)
        if not Path(path_or_hub_name).exists() and error.__cause__ is None:  # otherwise the hub could not be asked
            folder = hub.configs(name, subfolder) or folder
        found = [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG_FILE}")) if is_known(path)]
        if not found:
            raise
        where = folder if Path(path_or_hub_name).exists() else name
        raise type(error)(f"{error}; {where} has checkpoints in {', '.join(found)}: name one as subfolder") from None


def is_known(path: Path) -> bool:
    """Whether a file is the config.json of a known family."""
    try:
        return bool(read_json(path, class_of))
    except ValueError:
        return False


def class_of(values: Mapping[str, Any]) -> type[VideoVAE]:
    """Returns the family that the contents of a config.json name, or, without `_class_name`, whose keys they are.

    Raises ValueError that lists the families there are.
    """
    name = values.get("_class_name")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    fitting = [family for family in FAMILIES.values() if family.config_class.takes(values)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    what = f"_class_name is {name!r}, no family of flax_vae" if name else "the config has no _class_name"
    raise ValueError(f"{what}: expected one of {', '.join(FAMILIES)}")


def family_of(config: VAEConfig) -> type[VideoVAE]:
    """Returns the class of the models that have a config."""
    return FAMILIES[config.class_name]


def abstract(config: VAEConfig) -> VideoVAE:
    """Returns a model of a config without values, for shapes and names."""
    return family_of(config).abstract(config)


def config_from_dict(values: Mapping[str, Any]) -> VAEConfig:
    """Reads the contents of a config.json of any family; ValueError for an unknown family or unsupported values."""
    return class_of(values).config_class.from_dict(values)


def config_from_json(path: str | PathLike) -> VAEConfig:
    """Reads a config.json of any family; ValueError names the file and what is wrong in it."""
    return read_json(Path(path), config_from_dict)


def read_config(source: Checkpoint) -> VAEConfig:
    """Returns the config of an open checkpoint: its config.json, or what the names and shapes of its weights show.

    Raises FileNotFoundError where there is no config.json and the weights are those of no family.
    """
    if source.has_config():
        return source.config(config_from_dict)
    shapes = source.shapes()
    for names in wrapped.branches(shapes):
        for family in FAMILIES.values():
            with contextlib.suppress(ValueError):
                config = family.config_class.from_shapes({name: shapes[held] for name, held in names.items()})
                port.match(family.abstract(config), {held: shapes[held] for held in names.values()})
                return config
    raise FileNotFoundError(
        f"no {CONFIG_FILE} beside the weights in {source.directory}, and their names and shapes are not those of "
        f"{', '.join(FAMILIES)}: add it or pass a config"
    )


def preset_names() -> list[str]:
    """Lists the presets of all families."""
    return [name for family in FAMILIES.values() for name in family.presets]


def preset(name: str) -> VAEConfig:
    """Returns the config of a preset, such as "pyramid-flow-tiny"; ValueError lists those there are."""
    for family in FAMILIES.values():
        if name in family.presets:
            return family.presets[name]()
    raise ValueError(f"model {name!r}: expected one of {', '.join(preset_names())}")


def released_scaling(variant: str) -> LatentScaling:
    """Returns the latent scaling that was released under a name, as "flux"; ValueError lists those there are."""
    scalings = {name: scaling for family in FAMILIES.values() for name, scaling in family.released_scalings.items()}
    if variant not in scalings:
        raise ValueError(f"variant must be one of {', '.join(sorted(scalings))}, got {variant!r}")
    return scalings[variant]
