"""info and port on weights as other people keep them: parts, variants, values that are not finite."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def tensors(checkpoints):
    return load_file(checkpoints / "vae" / WEIGHTS)


@pytest.fixture
def config(checkpoints):
    return checkpoints / "vae" / "config.json"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("command", ["info", "port"])
def test_weights_that_are_not_finite_are_named_in_a_warning(
    run, checkpoints, tensors, config, tmp_path, command, value
):
    target = [tmp_path / "ported"] if command == "port" else []
    assert "not finite" not in run(command, checkpoints / "vae", *target)[2]
    tensors["encoder.conv_out.conv.bias"][0] = value
    save_file(tensors, tmp_path / "x.safetensors")
    target = [tmp_path / "damaged"] if command == "port" else []
    code, _, err = run(command, tmp_path / "x.safetensors", *target, "--config", config)
    assert code == 0
    assert "1 tensor of the weights not finite" in err
    assert "encoder.conv_out.conv.bias" in err
    if command == "port":
        assert np.array_equal(
            load_file(tmp_path / "damaged" / WEIGHTS)["encoder.conv_out.conv.bias"][:1], [value], True
        )


@pytest.mark.filterwarnings("default:this file holds several models")
def test_the_part_and_the_variant_that_are_named_are_ported(run, tensors, config, tmp_path):
    other = {key: array + 1 for key, array in tensors.items()}
    both = {f"model.{key}": array for key, array in tensors.items()} | {f"ema.{key}": x for key, x in other.items()}
    save_file(both | {"steps": np.array(3)}, tmp_path / "model.fp16.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    for part, expected in {"model": tensors, "ema": other}.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        assert run("port", tmp_path, tmp_path / "out" / part, "--variant", "fp16", "--part", part)[0] == 0
        ported = load_file(tmp_path / "out" / part / WEIGHTS)
        assert all(np.array_equal(ported[key], array) for key, array in expected.items())
    code, _, err = run("port", tmp_path, tmp_path / "out" / "no", "--variant", "fp16", "--part", "vae")
    assert (code, "has no part 'vae': expected one of ema, model, steps" in err) == (2, True)
    code, out, err = run("info", tmp_path, "--variant", "fp16")
    assert (code, f"{len(tensors) + 1} tensors of other parts left out" in out) == (0, True)
    assert "\nflax-vae: warning: this file holds several models" in f"\n{err}"
    assert "'ema', the averaged weights, is taken\n" in err


@pytest.mark.parametrize("size", ["0", "0x32", "32x0", "00"])
def test_a_size_of_no_pixels_is_refused(run, checkpoints, size):
    code, out, err = run("info", checkpoints / "vae", "--size", size)
    assert (code, out) == (2, "")
    assert f"--size {size}: expected 1 pixel or more" in err
