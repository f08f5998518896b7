"""The command line, run in this process as a shell would run it."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.cli import COMMANDS, main
from flax_vae.io.files import replacing
from flax_vae.jobs.model import cache_folder
from tests.slow import some_slow

pytest.importorskip("tyro", reason="the command line needs tyro")
pytest.importorskip("rich", reason="the command line needs rich")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / WEIGHTS)


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
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout
    assert all(command in out for command in COMMANDS)
    assert out.endswith("loaded:\n")


def test_info_counts_parameters_and_gives_the_latents_of_a_clip(run, checkpoints):
    code, out, _ = run("info", checkpoints / "vae", "--size", "40x57", "--frames", 19)
    assert code == 0
    assert f"{sum(tensor.size for tensor in tensors(checkpoints / 'vae').values()):,}" in out
    assert "19 frames of 40x57, filled to 25" in out
    assert "4 x 5 x 8 x 16" in out
    assert "float32" in out


def test_info_lists_what_is_missing(run, checkpoints, tmp_path):
    held = tensors(checkpoints / "vae")
    del held["encoder.conv_in.conv.bias"]
    save_file(held, tmp_path / WEIGHTS)
    code, _, err = run("info", tmp_path, "--config", checkpoints / "vae" / "config.json")
    assert code == 2
    assert "missing: encoder.conv_in.conv.bias (4,)" in err


def test_port_keeps_every_bit(run, checkpoints, tmp_path):
    code, out, _ = run("port", checkpoints / "vae", tmp_path / "ported")
    assert code == 0
    assert "float32" in out
    before, after = tensors(checkpoints / "vae"), tensors(tmp_path / "ported")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert json.loads((tmp_path / "ported/config.json").read_text())["encoder_block_out_channels"] == [4, 4, 6]


def test_port_rounds_to_the_precision_asked_for_and_keeps_it_from_then_on(run, checkpoints, tmp_path):
    assert run("port", checkpoints / "vae", tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert run("port", tmp_path / "half", tmp_path / "again")[0] == 0
    before, half, again = (tensors(path) for path in (checkpoints / "vae", tmp_path / "half", tmp_path / "again"))
    for key, tensor in before.items():
        assert half[key].tobytes() == tensor.astype(ml_dtypes.bfloat16).tobytes() == again[key].tobytes()


def test_port_takes_bare_weights_with_another_prefix_and_a_config(run, checkpoints, tmp_path):
    save_file(
        {f"vae.{key}": tensor for key, tensor in tensors(checkpoints / "vae").items()}, tmp_path / "x.safetensors"
    )
    code, _, err = run("port", tmp_path / "x.safetensors", tmp_path / "ported")
    assert code == 2
    assert "config.json" in err
    config = checkpoints / "vae" / "config.json"
    assert run("port", tmp_path / "x.safetensors", tmp_path / "ported", "--config", config)[0] == 0
    assert tensors(tmp_path / "ported").keys() == tensors(checkpoints / "vae").keys()


def test_port_asks_for_one_precision_where_there_are_several(run, checkpoints, tmp_path):
    held = tensors(checkpoints / "vae")
    held["quant_conv.conv.bias"] = held["quant_conv.conv.bias"].astype(np.float16)
    save_file(held, tmp_path / "x.safetensors")
    code, _, err = run("port", tmp_path / "x.safetensors", tmp_path / "y", "--config", checkpoints / "vae/config.json")
    assert code == 2
    assert "float16 and float32" in err
    assert "--dtype float32" in err


def test_port_replaces_a_checkpoint_only_when_told_and_nothing_else_ever(run, checkpoints, tmp_path):
    target = tmp_path / "ported"
    run("port", checkpoints / "other", target)
    code, _, err = run("port", checkpoints / "vae", target)
    assert code == 2
    assert "--overwrite" in err
    assert tensors(target).keys() == tensors(checkpoints / "other").keys()
    assert run("port", checkpoints / "vae", target, "--overwrite")[0] == 0
    assert tensors(target)["encoder.conv_out.conv.weight"].tobytes() in {
        tensors(checkpoints / "vae")["encoder.conv_out.conv.weight"].tobytes()
    }
    (target / "notes.txt").write_text("mine")
    assert run("port", checkpoints / "vae", target, "--overwrite")[0] == 2
    assert (target / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["new", "held"])
def test_port_that_wrote_one_wrong_bit_fails_and_leaves_no_trace(run, checkpoints, tmp_path, monkeypatch, target):
    run("port", checkpoints / "other", tmp_path / "held")
    before = (tmp_path / "held" / WEIGHTS).read_bytes()
    save = CausalVideoVAE.save_pretrained

    def careless(self, path):
        save(self, path)
        data = bytearray((Path(path) / WEIGHTS).read_bytes())
        data[-1] ^= 1
        (Path(path) / WEIGHTS).write_bytes(data)

    monkeypatch.setattr(CausalVideoVAE, "save_pretrained", careless)
    code, _, err = run("port", checkpoints / "vae", tmp_path / target, "--overwrite")
    assert code == 1
    assert "differ from their source: quant_conv.conv.weight" in err
    assert [path.name for path in tmp_path.iterdir()] == ["held"]
    assert (tmp_path / "held" / WEIGHTS).read_bytes() == before


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, clip):
    """Files and folders that will not do, and what to make them of."""
    av = pytest.importorskip("av", reason="video files need PyAV")
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.mp4").write_text("this is no clip")
    (folder / "empty.mp4").touch()
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "file").write_text("mine")
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(str(folder / "whole.mp4"), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(40):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = (folder / "whole.mp4").read_bytes()
    (folder / "none.mp4").write_bytes(data[: data.index(b"moof") - 4])
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        for number in range(9):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


RECONSTRUCT, ENCODE = (
    [command, "{clip}", f"{{out}}/{name}", "--weights", "{vae}"]
    for command, name in (("reconstruct", "a.mp4"), ("encode", "a"))
)


def reading(command, path):
    return [command[0], path, *command[2:]]


def writing(command, path):
    return [*command[:2], path, *command[3:]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (reading(RECONSTRUCT, "no.mp4"), "no.mp4: no such file"),
        (reading(RECONSTRUCT, "{in}/text.mp4"), "no video or image FFmpeg can read"),
        (reading(ENCODE, "{in}/text.mp4"), "no video or image FFmpeg can read"),
        (reading(ENCODE, "{in}/empty.mp4"), "the file is empty"),
        (reading(ENCODE, "{in}/none.mp4"), "no frame decodes"),
        (reading(RECONSTRUCT, "{in}/none.mp4"), "no frame decodes"),
        (reading(ENCODE, "{in}/sound.mp4"), "has no video, only audio"),
        (reading(ENCODE, "{in}/notes"), "a folder without images"),
        (writing(RECONSTRUCT, "{out}/a.gif"), "a.gif: expected a name that ends in .mp4"),
        (writing(RECONSTRUCT, "{out}/a.png"), "a.png: expected a name that ends in .mp4"),
        (writing(RECONSTRUCT, "{out}/no/a.mp4"), "there is no folder"),
        (writing(RECONSTRUCT, "{clip}"), "is the file that is read"),
        (writing(ENCODE, "{in}/file"), "file: is a file; give a folder to write"),
        (writing(ENCODE, "{in}/notes"), "notes: holds other files than latents, a.txt"),
        (writing(ENCODE, "{out}/no/a"), "there is no folder"),
        ([*RECONSTRUCT[:4], "{in}/text.mp4"], "text.mp4 is no weights file"),
        ([*RECONSTRUCT, "--size", "4"], "multiples of 8"),
        ([*RECONSTRUCT, "--size", "4by4"], "expected the short side"),
        ([*ENCODE, "--frames", "0"], "expected 1 or more"),
        ([*ENCODE, "--memory", "plenty"], "'plenty' is no amount of memory: expected a number and one of B, KB"),
        ([*ENCODE, "--memory", "0GiB"], "is no amount of memory"),
        ([*ENCODE, "--memory", "5MiB"], "needed for one latent at a time, and 5 MiB may be used"),
        ([*RECONSTRUCT, "--memory", "5MiB"], "needed for one latent at a time, and 5 MiB may be used"),
        ([*RECONSTRUCT, "--measure-tiles"], "--measure-tiles measures --lossy-tiles: give both"),
        ([*ENCODE, "--scaling", "sdxl"], "one of flux, sd3, got 'sdxl'"),
        ([*ENCODE, "--scaling", "{vae}/config.json"], "config.json: holds no statistics of latents"),
        ([*ENCODE, "--scaling", "{in}/text.mp4"], "text.mp4: holds no statistics of latents"),
        (["decode", "{vae}/diffusion_pytorch_model.safetensors", *RECONSTRUCT[2:]], "no latents"),
        (["decode", "{in}/text.mp4", *RECONSTRUCT[2:]], "is not valid safetensors"),
        (["decode", "{in}/no", *RECONSTRUCT[2:]], "no such file or folder; flax-vae encode"),
        (["decode", "{in}/notes", *RECONSTRUCT[2:]], "a.txt is not valid safetensors"),
        (["extract", "{in}/no", *ENCODE[2:]], "no such folder or manifest"),
        (["extract", "{in}/notes", *ENCODE[2:]], "lists no video and no image"),
        (["extract", "{in}/text.mp4", *ENCODE[2:]], "text.mp4: no video or image FFmpeg can read"),
        (["extract", "{vae}/config.json", *ENCODE[2:]], "config.json, line 1: not JSON"),
        (["extract", "{in}", "{in}/file", *ENCODE[3:]], "file: is a file; give a folder to write"),
        (["extract", "{in}", "{out}/no/a", *ENCODE[3:]], "there is no folder"),
        *(
            (["extract", "{in}", *ENCODE[2:], "--part", part], f"--part {part}: expected the number of this part")
            for part in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3")
        ),
        (["port", "{vae}", "{vae}", "--overwrite"], "is the folder that is read"),
        (["port", "{out}", "{out}/a"], "no weights in"),
        (["info", "no such thing"], "no such thing is no file"),
    ],
    ids=lambda value: " ".join(value).replace("{", "").replace("}", "")[:60] if isinstance(value, list) else "",
)
def test_wrong_input_is_named_in_one_paragraph_and_leaves_no_trace(
    run, checkpoints, clip, inputs, tmp_path, contents, small_pieces, args, message
):
    before = contents(inputs)
    names = {"out": tmp_path, "vae": checkpoints / "vae", "clip": clip, "in": inputs}
    code, out, err = run(*(arg.format(**names) for arg in args))
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out
    (said,) = [line for line in err.splitlines() if line.startswith("flax-vae: ")]
    assert err.endswith(said + "\n")
    assert not list(tmp_path.iterdir())
    assert contents(inputs) == before


@pytest.mark.parametrize("command", [pytest.param("encode", marks=pytest.mark.slow), "reconstruct"])
def test_a_clip_cut_in_the_middle_of_a_packet_gives_its_whole_frames_when_told_how_many(
    run, checkpoints, inputs, tmp_path, small_pieces, command
):
    from flax_vae.io.latents import Latents
    from flax_vae.io.video_reader import read_clip

    target = tmp_path / ("a" if command == "encode" else "a.mp4")
    args = command, inputs / "cut.mp4", target, "--weights", checkpoints / "vae"
    code, _, err = run(*args)
    assert code == 2
    assert "cut.mp4: damaged or cut short after 18 frames (a packet is incomplete); read at most 18 frames, or" in err
    assert "9 frames are done, and kept to go on from with --resume" in err
    assert not target.exists()
    assert run(*args, "--resume", "--frames", 18)[0] == 0
    assert (Latents(target).frames if command == "encode" else len(read_clip(target))) == 18


@pytest.fixture
def full_disk():
    """Returns a function that lets no file grow over so many bytes, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
@pytest.mark.parametrize("size", some_slow([400, 1700, 6000, 40_000], (400, 6000)))
def test_a_full_disk_ends_in_a_clear_error_and_nothing_half_written(
    run, checkpoints, clip, tmp_path, contents, small_pieces, full_disk, command, size
):
    pytest.importorskip("matplotlib", reason="contact sheets need matplotlib")
    whole, folder = tmp_path / "whole", tmp_path / "full"
    whole.mkdir()
    folder.mkdir()
    name = "a" if command == "encode" else "a.mp4"
    args = "--weights", checkpoints / "vae"
    assert run(command, clip, whole / name, *args)[0] == 0
    biggest = max(map(len, contents(whole).values()))
    full_disk(size)
    code, out, err = run(command, clip, folder / name, *args)
    full_disk(resource.RLIM_INFINITY)
    assert "Traceback" not in err + out
    assert code == 2 or size > biggest
    if code:
        assert "File too large" in err
        assert str(folder / f".{name}.part") in err
        assert not [path for path in contents(folder) if not path.startswith(".a")]
        assert ("--resume" in err) == (folder / f".{name}.part" / "progress.safetensors").exists()
        assert run(command, clip, folder / name, *args, "--resume")[0] == 0
    assert contents(folder) == contents(whole)


def test_usage_errors_exit_with_2(run):
    assert run()[0] == run("recode")[0] == run("encode", "clip.mp4")[0] == 2


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
    monkeypatch.setattr("flax_vae.cli.call", write_half)
    code, _, err = run()
    assert code == expected
    assert said in err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old one"]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(run, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    vae = checkpoints / "vae"
    code, _, err = run("encode", vae / "config.json", tmp_path / "a", "--weights", vae)
    assert code == 2
    assert 'pip install "flax_vae[video]"' in err


def test_a_bug_shows_its_traceback(run, checkpoints, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("flax_vae.io.latents.Latents.__init__", lambda self, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["decode", "a", str(tmp_path / "a.mp4"), "--weights", str(checkpoints / "vae")])


def test_compiled_programs_are_kept_unless_the_user_keeps_them_elsewhere(run, checkpoints, clip, tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("flax_vae.families.registry.from_pretrained", interrupted)
    args = "encode", clip, tmp_path / "a", "--weights", checkpoints / "vae", "--frames", 1
    assert run(*args)[0] == 130
    assert not settings
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert run(*args)[0] == 130
    assert settings == {"jax_compilation_cache_dir": str(tmp_path / "cache" / "flax_vae" / "xla")}


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("given", "shape", "said"),
    [
        (None, (16, 24), "18x25 (height x width), scaled and cropped to 16x24, multiples of 8"),
        ("18x24", (16, 24), "18x25 (height x width), scaled and cropped to 16x24, multiples of 8"),
        ("8", (8, 8), "18x25 (height x width), scaled and cropped to 8x8, multiples of 8"),
    ],
)
def test_what_is_cropped_is_said(checkpoints, clip, given, shape, said):
    from flax_vae.jobs.clip import open_clip
    from flax_vae.jobs.model import read_config

    opened = open_clip(clip, read_config(str(checkpoints / "vae")), given, None)
    assert (opened.height, opened.width) == shape
    assert opened.about == f"{clip}: {said}"


@pytest.mark.parametrize("command", ["encode", "reconstruct", "decode", "extract", "eval"])
def test_a_model_of_other_pixels_than_rgb_is_refused_before_any_work(run, checkpoints, tmp_path, monkeypatch, command):
    monkeypatch.setattr(CausalVideoVAEConfig, "pixel_channels", property(lambda config: 4))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no image")
    target = tmp_path / ("out.mp4" if command in ("decode", "reconstruct") else "out")
    words = [tmp_path / "in", target, "--weights", checkpoints / "vae"]
    if command == "eval":
        words = [checkpoints / "vae", tmp_path / "in", "--out", target]
    code, _, err = run(command, *words)
    assert code == 2
    assert "a CausalVideoVAE of 4 channels a pixel: clips are read and written as RGB, which has 3" in err
    assert "loading" not in err
    assert not target.exists()


def test_a_larger_clip_is_only_cropped_and_a_large_one_made_smaller(checkpoints, tmp_path):
    from flax_vae.io.video_writer import write_image
    from flax_vae.jobs.clip import open_clip
    from flax_vae.jobs.model import read_config

    config = read_config(str(checkpoints / "vae"))
    for (height, width), said in (
        ((130, 142), "130x142 (height x width), centre-cropped to 128x136, multiples of 8"),
        ((128, 136), "128x136 (height x width), as it is"),
        ((300, 400), "300x400 (height x width), scaled and cropped to 256x336, multiples of 8"),
        ((5, 9), "5x9 (height x width), scaled and cropped to 8x8, multiples of 8"),
    ):
        write_image(tmp_path / "a.png", np.zeros((height, width, 3), np.uint8))
        assert open_clip(tmp_path / "a.png", config, None, None).about == f"{tmp_path / 'a.png'}: {said}"


@pytest.mark.parametrize(
    ("platform", "expected"), [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")]
)
def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch, tmp_path, platform, expected):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / expected / "flax_vae" / "xla"
