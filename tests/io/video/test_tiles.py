"""HEIC and AVIF stills whose picture is cut into tiles, made by hand with JPEG inside."""

import struct

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

from flax_vae.io.video.draw import draw_frames
from flax_vae.io.video.heif import read_grid
from flax_vae.io.video_reader import probe, read_clip
from tests.clips import encode, noise

TILE = (48, 64)
ROTATE, MIRROR = b"irot", b"imir"


def box(name, content, version=None, flags=0):
    head = b"" if version is None else struct.pack(">I", version << 24 | flags)
    return struct.pack(">I", 8 + len(head) + len(content)) + name + head + content


def heif(path, tiles, rows, columns, size, turns=(), wide=False, external=False):
    """Writes tiles, the bytes of JPEG files, as items 1 to N of a grid with the last number; turns are (name, value).

    `wide`: numbers of items have 4 bytes; `external`: the grid is described behind the tiles, and not in idat.
    """
    grid, number = len(tiles) + 1, ">I" if wide else ">H"
    layout = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, size[1], size[0])
    entries = [struct.pack(number, i) + bytes(2) + b"jpeg\0" for i in range(1, grid)]
    entries += [struct.pack(number, grid) + bytes(2) + b"grid\0"]
    infe = b"".join(box(b"infe", entry, 3 if wide else 2) for entry in entries)
    sizes = [box(b"ispe", struct.pack(">II", width, height), 0) for height, width in (TILE, size)]
    properties = [*sizes, *(box(name, bytes([value])) for name, value in turns)]
    own = [(i, [1]) for i in range(1, grid)] + [(grid, range(2, len(properties) + 1))]
    ipma = struct.pack(">I", grid) + b"".join(struct.pack(number, i) + bytes([len(p), *p]) for i, p in own)
    iprp = box(b"ipco", b"".join(properties)) + box(b"ipma", ipma, 1 if wide else 0)
    dimg = struct.pack(number, grid) + struct.pack(">H", len(tiles))
    dimg += b"".join(struct.pack(number, i) for i in range(1, grid))

    def meta(begin):
        places, at = [], begin
        for content in [*tiles, layout]:
            in_idat = content is layout and not external
            places.append((int(in_idat), 0 if in_idat else at, len(content)))
            at += len(content)
        iloc = b"\x44\0" + struct.pack(number, grid)
        for i, (method, offset, length) in enumerate(places, 1):
            iloc += struct.pack(number, i) + struct.pack(">HHHII", method, 0, 1, offset, length)
        parts = [
            box(b"hdlr", bytes(4) + b"pict" + bytes(13), 0),
            box(b"pitm", struct.pack(number, grid), int(wide)),
            box(b"iloc", iloc, 2 if wide else 1),
            box(b"iinf", struct.pack(">I" if wide else ">H", grid) + infe, int(wide)),
            box(b"iprp", iprp),
            box(b"iref", box(b"dimg", dimg), int(wide)),
            box(b"idat", layout),
        ]
        return box(b"meta", b"".join(parts), 0)

    ftyp = box(b"ftyp", b"mif1\0\0\0\0mif1heic")
    begin = len(ftyp) + len(meta(0)) + 8
    path.write_bytes(ftyp + meta(begin) + box(b"mdat", b"".join([*tiles, layout])))
    return path


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Six tiles, as bytes of JPEG files, and as they decode."""
    folder = tmp_path_factory.mktemp("tiles")
    paths = [folder / f"{i}.jpg" for i in range(6)]
    for i, path in enumerate(paths):
        encode(path, noise(1, *TILE, seed=i) // 4 + 32 * i, "mjpeg", "yuvj420p", update="1")
    return [path.read_bytes() for path in paths], [read_clip(path)[0] for path in paths]


@pytest.mark.parametrize("form", [{}, {"external": True}])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (3, 2), (1, 6)])
def test_a_still_of_tiles_is_one_picture(tmp_path, tiles, rows, columns, form):
    coded, pixels = (each[: rows * columns] for each in tiles)
    size = rows * TILE[0] - 5, columns * TILE[1] - 9  # the last tiles stand over
    path = heif(tmp_path / "a.heic", coded, rows, columns, size, **form)
    whole = np.concatenate([np.concatenate(pixels[r * columns : (r + 1) * columns], 1) for r in range(rows)])
    info = probe(path)
    assert (info.height, info.width, info.frames, info.is_image) == (*size, 1, True)
    assert np.array_equal(read_clip(path)[0], whole[: size[0], : size[1]])
    assert np.array_equal(draw_frames(path, 1, size)[0], whole[: size[0], : size[1]])


def test_wide_numbers_say_the_same(tmp_path, tiles):
    """Of several such items FFmpeg cannot read the list."""
    grids = [read_grid(heif(tmp_path / "a.heic", tiles[0], 2, 3, (90, 180), wide=wide)) for wide in (False, True)]
    assert grids[0] == grids[1]
    assert grids[0] is not None
    assert grids[0].tiles == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("turns", "shown"),
    [
        ([(ROTATE, 1)], lambda x: np.rot90(x)),
        ([(ROTATE, 2)], lambda x: np.rot90(x, 2)),
        ([(ROTATE, 3)], lambda x: np.rot90(x, 3)),
        ([(MIRROR, 0)], lambda x: x[::-1]),
        ([(MIRROR, 1)], lambda x: x[:, ::-1]),
        ([(ROTATE, 1), (MIRROR, 0)], lambda x: np.rot90(x)[::-1]),
        ([(ROTATE, 3), (MIRROR, 1)], lambda x: np.rot90(x, 3)[:, ::-1]),
    ],
)
def test_a_still_of_tiles_is_turned_as_a_whole(tmp_path, tiles, turns, shown):
    coded, pixels = tiles
    plain = read_clip(heif(tmp_path / "a.heic", coded, 2, 3, (90, 180)))[0]
    path = heif(tmp_path / "b.heic", coded, 2, 3, (90, 180), turns)
    assert np.array_equal(read_clip(path)[0], shown(plain))
    assert (probe(path).height, probe(path).width) == shown(plain).shape[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.replace(b"dimg\0\x07\0\x06", b"dimg\0\x07\0\x05"),
            "how its tiles make a picture is damaged",
        ),
        (lambda data: data.replace(struct.pack(">HH", 180, 90), struct.pack(">HH", 65535, 65535)), "damaged"),
        (lambda data: data.replace(struct.pack(">HH", 180, 90), struct.pack(">HH", 180, 900)), "do not fill 900x180"),
        (lambda data: data.replace(b"iref", b"free"), "how its tiles make a picture is damaged"),
        (lambda data: data.replace(b"\0\x03\0\0jpeg", b"\0\x03\0\0mime"), "1 of 6 tiles are missing"),
        (lambda data: data[:-5000], "damaged or cut short|cut short"),
    ],
)
def test_a_still_of_tiles_that_is_damaged_is_refused(tmp_path, tiles, change, message):
    path = heif(tmp_path / "a.heic", tiles[0], 2, 3, (90, 180))
    data = change(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_clip(path)
    assert str(path) in str(caught.value)


def test_numbers_of_a_grid_that_are_cut_or_changed_are_an_error_or_nothing(tmp_path, tiles):
    path = heif(tmp_path / "a.heic", tiles[0], 2, 3, (90, 180), [(ROTATE, 1)])
    data = path.read_bytes()
    end = data.index(b"mdat")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(data)
        for at in rng.integers(24, end, 3):
            changed[at] = rng.integers(256)
        path.write_bytes(changed[: rng.integers(end, len(data))])
        try:
            read_grid(path)
        except ValueError as error:
            refused += str(path) in str(error)
    assert refused > 10
