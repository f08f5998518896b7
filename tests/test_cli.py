"""The command line, run in this process as a shell would run it."""

import functools
import json
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from flax_vae import CausalVideoVAE, to_float, to_uint8
from flax_vae.cli import COMMANDS, main
from flax_vae.cli.model import cache_folder
from flax_vae.io import checkpoint, port
from flax_vae.io.files import replacing
from flax_vae.models.config import narrow

pytest.importorskip("tyro", reason="the command line needs tyro")
pytest.importorskip("rich", reason="the command line needs rich")

FRAMES, HEIGHT, WIDTH = 19, 42, 57
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # given, so it wins; empty, so there is none


@pytest.fixture(autouse=True)
def own_sigterm():
    """Gives the process its own way of ending back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `vae`, a checkpoint of random weights, and `other`, one of another config."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, widths in (("vae", (8, 8, 16, 16)), ("other", (8, 8, 8, 16))):
        config = narrow(widths, groups=4, encoder_layers=1, decoder_layers=1)
        shapes = port.parameters(nnx.eval_shape(lambda config=config: CausalVideoVAE(config, rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(1)
        drawn = {key: (0.2 * rng.standard_normal(p.torch_shape)).astype(np.float32) for key, p in shapes.items()}
        checkpoint.save(folder / name, config.to_dict(), port.Arrays(drawn))
    return folder


@pytest.fixture(scope="module")
def clip(folder) -> Path:
    """A clip with an odd number of odd-sized frames, stored without loss."""
    pytest.importorskip("av", reason="video files need PyAV")
    from flax_vae.io.writer import VideoWriter

    steps = np.random.default_rng(2).integers(-40, 40, (FRAMES, 6, 9, 3)).cumsum(axis=0) % 256
    frames = np.repeat(np.repeat(steps, 7, axis=1), 7, axis=2)[:, :HEIGHT, :WIDTH].astype(np.uint8)
    with VideoWriter(folder / "clip.mkv", Fraction(30000, 1001), HEIGHT, WIDTH, lossless=True) as writer:
        writer.write(frames)
    return folder / "clip.mkv"


@pytest.fixture
def run(capsys):
    """Runs a command and gives its exit code, output and messages."""

    def call(*args) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        return exit.value.code, *capsys.readouterr()

    return call


def tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / WEIGHTS)


def filled_whole(folder: Path, clip: Path, frames: int) -> tuple[CausalVideoVAE, np.ndarray, np.ndarray]:
    """The model, the clip as the command crops it, and the same filled to 8k + 1 frames, as a batch."""
    from flax_vae.io.video import read_clip

    pixels = read_clip(clip, (40, 56), frames)
    repeats = np.repeat(pixels[-1:], -(frames - 1) % 8, axis=0)
    return CausalVideoVAE.from_pretrained(folder / "vae"), pixels, to_float(np.concatenate([pixels, repeats]))[None]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_the_command_and_shows_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"usage: flax-vae {command}" in out
    assert f"Example:\n  flax-vae {command} " in out


def test_help_names_every_command_and_loads_nothing_heavy():
    script = (
        "import sys, types; package = types.ModuleType('flax_vae'); package.__path__ = ['flax_vae']\n"
        "sys.modules['flax_vae'] = package\n"
        "from flax_vae.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('loaded:', *({'jax', 'flax', 'torch', 'av', 'matplotlib', 'safetensors'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout
    assert all(command in out for command in COMMANDS)
    assert out.endswith("loaded:\n")


def test_info_counts_parameters_and_gives_the_latents_of_a_clip(run, folder):
    code, out, _ = run("info", folder / "vae", "--size", "40x57", "--frames", 19)
    assert code == 0
    assert f"{sum(tensor.size for tensor in tensors(folder / 'vae').values()):,}" in out
    assert "19 frames of 40x57, filled to 25" in out
    assert "4 x 5 x 8 x 16" in out
    assert "float32" in out


def test_info_lists_what_is_missing(run, folder, tmp_path):
    held = tensors(folder / "vae")
    del held["encoder.conv_in.conv.bias"]
    save_file(held, tmp_path / WEIGHTS)
    code, _, err = run("info", tmp_path, "--config", folder / "vae" / "config.json")
    assert code == 2
    assert "missing: encoder.conv_in.conv.bias (8,)" in err


def test_port_keeps_every_bit(run, folder, tmp_path):
    code, out, _ = run("port", folder / "vae", tmp_path / "ported")
    assert code == 0
    assert "float32" in out
    before, after = tensors(folder / "vae"), tensors(tmp_path / "ported")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert json.loads((tmp_path / "ported/config.json").read_text())["encoder_block_out_channels"] == [8, 8, 16, 16]


def test_port_rounds_to_the_precision_asked_for_and_keeps_it_from_then_on(run, folder, tmp_path):
    assert run("port", folder / "vae", tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert run("port", tmp_path / "half", tmp_path / "again")[0] == 0
    before, half, again = (tensors(path) for path in (folder / "vae", tmp_path / "half", tmp_path / "again"))
    for key, tensor in before.items():
        assert half[key].tobytes() == tensor.astype(ml_dtypes.bfloat16).tobytes() == again[key].tobytes()


def test_port_takes_bare_weights_with_another_prefix_and_a_config(run, folder, tmp_path):
    save_file({f"vae.{key}": tensor for key, tensor in tensors(folder / "vae").items()}, tmp_path / "x.safetensors")
    code, _, err = run("port", tmp_path / "x.safetensors", tmp_path / "ported")
    assert code == 2
    assert "config.json" in err
    config = folder / "vae" / "config.json"
    assert run("port", tmp_path / "x.safetensors", tmp_path / "ported", "--config", config)[0] == 0
    assert tensors(tmp_path / "ported").keys() == tensors(folder / "vae").keys()


def test_port_asks_for_one_precision_where_there_are_several(run, folder, tmp_path):
    held = tensors(folder / "vae")
    held["quant_conv.conv.bias"] = held["quant_conv.conv.bias"].astype(np.float16)
    save_file(held, tmp_path / "x.safetensors")
    code, _, err = run("port", tmp_path / "x.safetensors", tmp_path / "y", "--config", folder / "vae/config.json")
    assert code == 2
    assert "float16 and float32" in err
    assert "--dtype float32" in err


def test_port_replaces_a_checkpoint_only_when_told_and_nothing_else_ever(run, folder, tmp_path):
    target = tmp_path / "ported"
    run("port", folder / "other", target)
    code, _, err = run("port", folder / "vae", target)
    assert code == 2
    assert "--overwrite" in err
    assert tensors(target).keys() == tensors(folder / "other").keys()
    assert run("port", folder / "vae", target, "--overwrite")[0] == 0
    assert tensors(target)["encoder.conv_out.conv.weight"].tobytes() in {
        tensors(folder / "vae")["encoder.conv_out.conv.weight"].tobytes()
    }
    (target / "notes.txt").write_text("mine")
    assert run("port", folder / "vae", target, "--overwrite")[0] == 2
    assert (target / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["new", "held"])
def test_port_that_wrote_one_wrong_bit_fails_and_leaves_no_trace(run, folder, tmp_path, monkeypatch, target):
    run("port", folder / "other", tmp_path / "held")
    before = (tmp_path / "held" / WEIGHTS).read_bytes()
    save = CausalVideoVAE.save_pretrained

    def careless(self, path):
        save(self, path)
        data = bytearray((Path(path) / WEIGHTS).read_bytes())
        data[-1] ^= 1
        (Path(path) / WEIGHTS).write_bytes(data)

    monkeypatch.setattr(CausalVideoVAE, "save_pretrained", careless)
    code, _, err = run("port", folder / "vae", tmp_path / target, "--overwrite")
    assert code == 1
    assert "differ from their source: quant_conv.conv.weight" in err
    assert [path.name for path in tmp_path.iterdir()] == ["held"]
    assert (tmp_path / "held" / WEIGHTS).read_bytes() == before


def test_encode_and_decode_of_ten_frames_give_ten_frames_as_the_whole_clip_would(
    run, folder, clip, tmp_path, monkeypatch
):
    from flax_vae.io import video, writer

    monkeypatch.setattr(writer, "VideoWriter", functools.partial(writer.VideoWriter, lossless=True))
    latents, out = tmp_path / "clip.safetensors", tmp_path / "clip.mkv"
    code, _, err = run("encode", clip, latents, "--weights", folder / "vae", "--frames", 10)
    assert code == 0
    assert "42x57 (height x width), centre-cropped to 40x56" in err
    assert "10 frames are not 8k + 1: the last one is repeated to make 17" in err
    vae, pixels, whole = filled_whole(folder, clip, 10)
    posterior = nnx.jit(CausalVideoVAE.encode)(vae, whole)
    held = load_file(latents)
    assert held["mean"].shape == (1, 3, 5, 7, 16)
    assert np.allclose(held["mean"], posterior.mean, atol=1e-5 * float(jnp.abs(posterior.mean).max()))
    assert np.allclose(held["logvar"], posterior.logvar, atol=1e-5 * float(jnp.abs(posterior.logvar).max()))

    code, _, _ = run("decode", latents, out, "--weights", folder / "vae")
    assert code == 0
    assert video.probe(out).fps == Fraction(30000, 1001)
    decoded = to_uint8(nnx.jit(CausalVideoVAE.decode)(vae, posterior.mean))[0, :10]
    again = video.read_clip(out)
    assert again.shape == pixels.shape
    assert np.abs(again.astype(int) - decoded).max() <= 1


def test_decode_refuses_latents_of_a_model_of_another_config(run, folder, clip, tmp_path):
    latents = tmp_path / "clip.safetensors"
    assert run("encode", clip, latents, "--weights", folder / "vae", "--frames", 1)[0] == 0
    code, _, err = run("decode", latents, tmp_path / "clip.mp4", "--weights", folder / "other")
    assert code == 2
    assert "comes from a model of another config" in err
    assert [path.name for path in tmp_path.iterdir()] == ["clip.safetensors"]


def test_reconstruct_writes_clip_and_sheet_and_states_the_psnr_of_the_whole_clip(run, folder, clip, tmp_path):
    pytest.importorskip("matplotlib", reason="contact sheets need matplotlib")
    from flax_vae.io.picture import psnr
    from flax_vae.io.video import read_clip

    code, out, err = run("reconstruct", clip, tmp_path / "again.mp4", "--weights", folder / "vae")
    assert code == 0
    assert "19 frames are not 8k + 1: the last one is repeated to make 25" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.mp4", "again.png"]
    assert read_clip(tmp_path / "again.mp4").shape == (19, 40, 56, 3)
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")

    vae, pixels, whole = filled_whole(folder, clip, 19)
    again = to_uint8(nnx.jit(lambda vae, x: vae.decode(vae.encode(x).mode()))(vae, whole))[0]
    quality = [psnr(a, b) for a, b in zip(pixels, again[:19], strict=True)]
    (mean, _), (worst, frame) = re.findall(r"PSNR, \D+([\d.]+) dB(?: \(frame (\d+)\))?", out)
    assert float(mean) == pytest.approx(np.mean(quality), abs=0.02)
    assert float(worst) == pytest.approx(min(quality), abs=0.02)
    assert int(frame) == np.argmin(quality)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["reconstruct", "no.mp4", "{out}/a.mp4", "--weights", "{vae}"], "no.mp4: no such file"),
        (["reconstruct", "{text}", "{out}/a.mp4", "--weights", "{vae}"], "no video or image FFmpeg can read"),
        (["reconstruct", "{clip}", "{out}/a.gif", "--weights", "{vae}"], "a.gif: expected a name that ends in .mp4"),
        (["reconstruct", "{clip}", "{out}/no/a.mp4", "--weights", "{vae}"], "there is no folder"),
        (["reconstruct", "{clip}", "{clip}", "--weights", "{vae}"], "is the file that is read"),
        (["reconstruct", "{clip}", "{out}/a.mp4", "--weights", "{text}"], "text.mp4 is no weights file"),
        (["reconstruct", "{clip}", "{out}/a.mp4", "--weights", "{vae}", "--size", "4"], "multiples of 8"),
        (["reconstruct", "{clip}", "{out}/a.mp4", "--weights", "{vae}", "--size", "4by4"], "expected the short side"),
        (["encode", "{clip}", "{out}/a.mp4", "--weights", "{vae}"], "expected a name that ends in .safetensors"),
        (["encode", "{clip}", "{out}/a.safetensors", "--weights", "{vae}", "--frames", "0"], "expected 1 or more"),
        (["decode", "{vae}/diffusion_pytorch_model.safetensors", "{out}/a.mp4", "--weights", "{vae}"], "no latents"),
        (["decode", "{text}", "{out}/a.mp4", "--weights", "{vae}"], "not a latents file"),
        (["port", "{vae}", "{vae}", "--overwrite"], "is the checkpoint that is read"),
        (["port", "{out}", "{out}/a"], "no weights in"),
        (["info", "no such thing"], "no such thing is no file"),
    ],
)
def test_wrong_input_is_named_in_one_paragraph_and_leaves_no_trace(run, folder, clip, tmp_path, args, message):
    (folder / "text.mp4").write_text("this is no clip")
    names = {"out": tmp_path, "vae": folder / "vae", "clip": clip, "text": folder / "text.mp4"}
    code, out, err = run(*(arg.format(**names) for arg in args))
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out
    assert not list(tmp_path.iterdir())


def test_usage_errors_exit_with_2(run):
    assert run()[0] == run("recode")[0] == run("encode", "clip.mp4")[0] == 2


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_an_interrupted_command_exits_with_130_and_leaves_no_trace(run, folder, clip, tmp_path, monkeypatch, command):
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("flax_vae.runtime.stream.stream", interrupted_stream)
    out = tmp_path / ("a.mp4" if command == "reconstruct" else "a.safetensors")
    code, _, err = run(command, clip, out, "--weights", folder / "vae")
    assert code == 130
    assert "interrupted" in err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def python_signals():
    """Has signals handled as Python does by itself: a suite started in the background ignores SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("python_signals")
@pytest.mark.parametrize(
    ("number", "expected", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_removes_what_is_half_written_and_keeps_the_old_file(
    run, tmp_path, monkeypatch, number, expected, said
):
    def write_half(args):
        with replacing(tmp_path / "a.mp4") as part:
            part.write_bytes(b"half")
            signal.raise_signal(number)

    (tmp_path / "a.mp4").write_bytes(b"the old one")
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("flax_vae.cli.run", write_half)
    code, _, err = run()
    assert code == expected
    assert said in err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old one"]


def interrupted_stream(step, chunks):
    for chunk in chunks:
        yield step(chunk, None)[0]
        raise KeyboardInterrupt


def test_a_missing_package_is_named_with_the_extra_that_brings_it(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, err = run("encode", folder / "vae/config.json", tmp_path / "a.safetensors", "--weights", folder / "vae")
    assert code == 2
    assert 'pip install "flax_vae[video]"' in err


def test_a_bug_shows_its_traceback(folder, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("flax_vae.cli.decode.load_latents", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["decode", "a.safetensors", str(tmp_path / "a.mp4"), "--weights", str(folder / "vae")])


def test_compiled_programs_are_kept_unless_the_user_keeps_them_elsewhere(run, folder, clip, tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("flax_vae.runtime.stream.stream", interrupted_stream)
    monkeypatch.setattr("os._exit", sys.exit)
    args = "encode", clip, tmp_path / "a.safetensors", "--weights", folder / "vae", "--frames", 1
    run(*args)
    assert not settings
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    run(*args)
    assert settings == {"jax_compilation_cache_dir": str(tmp_path / "cache" / "flax_vae" / "xla")}


@pytest.mark.parametrize(
    ("platform", "expected"), [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")]
)
def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch, tmp_path, platform, expected):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / expected / "flax_vae" / "xla"


def test_samples_of_a_long_clip_are_evenly_spaced_and_few():
    from flax_vae.cli.reconstruct import SAMPLES, Samples

    samples = Samples()
    for i in range(1000):
        samples.add(np.array(i))
    assert samples.stride == 8
    assert [int(frame) for frame in samples.frames] == list(samples.numbers) == list(range(0, 1000, 8))
    assert len(samples.frames) <= SAMPLES
