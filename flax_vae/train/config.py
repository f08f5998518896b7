"""All settings of a training run, which `flax-vae train` shows by their docstrings, and the presets."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the command line reads this file before anything heavy is loaded
    from flax_vae.models.config import VAEConfig

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ClipConfig:
    """What is drawn from the data: clips and images, from random crops and moments."""

    frames: int = 17
    """frames of a clip, as many as make whole latents: 8k + 1 for Pyramid-Flow"""
    size: int = 256
    """height and width in pixels, a multiple of what a latent spans: a clip is scaled to cover it, and cropped"""
    zoom: float = 1.0
    """a clip is scaled up to this many times larger, at random, but not beyond its own size"""
    fps: float | None = None
    """frames per second of the clips drawn; None takes every frame"""
    batch: int = 8
    """clips of a batch"""
    images: float = 0.1
    """share of the batches that are images"""
    image_batch: int = 64
    """images of a batch"""
    flip: bool = True
    """mirror every second clip"""
    workers: int = 0
    """processes that read; 0 reads in threads"""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the reconstruction loss."""

    l1: float = 0.0
    """mean absolute error"""
    mse: float = 10.0
    """mean squared error"""
    lpips: float = 1.0
    """perceptual distance, on VGG16"""
    kl: float = 1e-12
    """divergence of the posterior, summed over a clip's latents, averaged over channels"""
    lpips_frames: int = 16
    """frames at a time through VGG16; fewer take less memory"""


@dataclass(frozen=True)
class GanConfig:
    """The discriminator, and the weight of its loss."""

    kind: Literal["none", "frames", "causal"] = "frames"
    """what it sees: frames, each by itself, or clips, in causal convolutions"""
    init: str | None = None
    """checkpoint of one that sees frames to start from, also a training checkpoint with the VAE, in place of random
    weights"""
    start: int = 0
    """the step from which on it takes part"""
    weight: float = 0.5
    """share of the adaptive weight, which makes its gradient at the last layer as long as the reconstruction's"""
    regularizer: Literal["none", "r1", "lecam"] = "none"
    """r1 keeps its gradient at clips short, lecam its logits close to each other"""
    regularizer_weight: float = 1.0
    """weight of the regularizer"""

    def takes_part(self, step: int) -> bool:
        """Whether a step trains with the discriminator."""
        return self.kind != "none" and step >= self.start


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with warm-up and cosine decay, of the VAE and of the discriminator."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon learns faster per step where steps are few; its kernels' steps have all directions of equal length"""
    learning_rate: float = 1e-4
    """after the warm-up"""
    final_learning_rate: float = 1e-5
    """at the last step"""
    warmup: int = 2000
    """steps over which the learning rate rises, the first of which has an n-th of it"""
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-3
    """of kernels, not of biases and norm scales"""
    clip: float = 1.0
    """length at which gradients are cut"""
    accumulate: int = 1
    """batches whose gradients are averaged for a step of the optimizer"""
    ema: float = 0.999
    """share that the exponential moving average of the weights keeps at each step"""


@dataclass(frozen=True)
class TrainConfig:
    """A training run; a run of the same config, data and seed is the same run."""

    model: str = "pyramid-flow"
    """preset of the model, as pyramid-flow, pyramid-flow-small or pyramid-flow-tiny"""
    init: str | None = None
    """checkpoint to start from, in place of random weights"""
    init_std: float | None = 0.02
    """standard deviation of random kernels; None takes 1/sqrt(inputs of an output), without which narrow models learn
    slowly"""
    steps: int = 100_000
    """batches to train on"""
    seed: int = 0
    """of weights, data and noise"""
    precision: Precision = "bfloat16"
    """what is computed in; weights are float32"""
    remat: bool = True
    """recompute activations for the gradient, and save their memory"""
    frame_by_frame: bool = False
    """compute each block one frame after the other: the same gradients in less memory, for large frames"""
    chunk: int | None = None
    """frames to compute at a time, a multiple of what a latent spans, with the gradients of the whole; None takes the
    clip as a whole"""
    save_every: int = 1000
    """steps from one checkpoint to the next"""
    keep: int = 3
    """checkpoints to keep beside the best"""
    picture_every: int = 500
    """steps from one picture to the next"""
    clips: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


STAGE1 = TrainConfig()
PRESETS = {
    "tiny": TrainConfig(
        model="pyramid-flow-tiny",
        init_std=None,
        steps=2000,
        precision="float32",
        remat=False,
        save_every=200,
        picture_every=200,
        clips=ClipConfig(frames=9, size=64, zoom=4.0, batch=4, image_batch=16),
        loss=LossConfig(lpips=0.0),
        gan=GanConfig(kind="none"),
        optimizer=OptimizerConfig("muon", learning_rate=1e-3, warmup=100),
    ),
    "stage1": STAGE1,
    "stage2": replace(STAGE1, clips=replace(STAGE1.clips, frames=57, batch=4, images=0.0)),
}

COUNTS = "steps save_every keep picture_every clips.batch clips.image_batch optimizer.accumulate loss.lpips_frames"
RULES: list[tuple[str, str, Callable[[Any], bool]]] = [  # setting, what it must be, whether it is
    *((name, "at least 1", lambda value: value >= 1) for name in [*COUNTS.split(), "clips.zoom"]),
    ("clips.fps", "above 0, or None", lambda value: value is None or value > 0),
    ("clips.images", "from 0 to 1", lambda value: 0 <= value <= 1),
    ("gan", "kind frames where it has an init", lambda value: value.init is None or value.kind == "frames"),
    ("init_std", "above 0, or None", lambda value: value is None or value > 0),
    ("clips.workers", "at least 0", lambda value: value >= 0),
    ("optimizer.learning_rate", "above 0", lambda value: value > 0),
    ("optimizer.ema", "from 0 to 1", lambda value: 0 <= value <= 1),
]

# Names and values in the config.json of runs that an earlier version began, and those of today
RENAMED_SETTINGS = {"spread": "init_std"}
RENAMED_MODELS = {"full": "pyramid-flow", "small": "pyramid-flow-small", "tiny": "pyramid-flow-tiny"}


def check(config: TrainConfig, model: "VAEConfig") -> None:
    """Raises ValueError that lists all settings that a run of this model cannot have."""
    values = {name: attrgetter(name)(config) for name, *_ in RULES}
    wrong = [f"{name} is {values[name]}, expected {rule}" for name, rule, holds in RULES if not holds(values[name])]
    frames, size, chunk = config.clips.frames, config.clips.size, config.chunk
    factor, side = model.temporal_factor, model.spatial_factor
    if frames < 1 or (frames - 1) % factor:
        wrong.append(f"clips.frames is {frames}, expected {model.frame_law()}")
    if size < 2 * side or size % side:
        wrong.append(f"clips.size is {size}, expected a multiple of {side}, at least {2 * side}")
    if chunk is not None and (chunk < factor or chunk % factor):
        wrong.append(f"chunk is {chunk}, expected a multiple of {factor}, or None")
    if wrong:
        raise ValueError(f"cannot train so: {'; '.join(wrong)}")


def upgraded(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings in a run's config.json by their names and values of today."""
    settings = {RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}
    if "model" in settings:
        settings["model"] = RENAMED_MODELS.get(settings["model"], settings["model"])
    return settings
