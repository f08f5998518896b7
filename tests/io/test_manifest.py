"""Lists of clips, and logs of what was done to them."""

import json
import multiprocessing
import os

import pytest

from flax_vae.io.manifest import Entry, Log, read_entries, read_log, read_settings, write_lines
from tests.patience import PATIENCE

SETTINGS = {"size": None, "frames": 17, "tiles": (1, 2)}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_a_folder_gives_all_its_clips_by_kind_sorted_with_names_of_their_own(tmp_path):
    touch(tmp_path, "b.MP4", "a.png", "deep/er/a.png", "notes.txt", ".hidden.mp4", ".cache/c.mp4", "no_suffix")
    (tmp_path / "folder.mp4").mkdir()
    entries = read_entries(tmp_path)
    assert [(entry.kind, entry.name) for entry in entries] == [
        ("image", "a.png"),
        ("video", "b.MP4"),
        ("image", "deep/er/a.png"),
    ]
    assert all(entry.path == tmp_path / entry.name for entry in entries)


def test_a_manifest_gives_its_clips_in_order_from_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    manifest = tmp_path / "lists" / "all.jsonl"
    lines = [
        '{"video": "../b.mp4", "text": "a caption", "latent": "x.pt"}',
        "",
        '{"image": "/elsewhere/b.png"}',
        '{"video": "../b.mp4"}',
        '{"video": "caf\u00e9.mp4"}',
    ]
    manifest.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir("/")
    entries = read_entries(manifest)
    assert [(entry.kind, str(entry.path)) for entry in entries] == [
        ("video", f"{tmp_path}/lists/../b.mp4"),
        ("image", "/elsewhere/b.png"),
        ("video", f"{tmp_path}/lists/caf\u00e9.mp4"),
    ]


def test_clips_of_one_name_in_several_folders_get_names_of_their_own(tmp_path):
    manifest = tmp_path / "all.jsonl"
    write_lines(manifest, [{"video": f"{folder}/clip.mp4"} for folder in ("a", "b", "a/b")])
    names = [entry.name for entry in read_entries(manifest)]
    assert len(set(names)) == 3
    assert all(name.startswith("clip-") and name.endswith(".mp4") and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "a.mp4"}\n{"video": 3}\n', r"line 2: expected \{\"video\": path\}"),
        ('{"video": "a.mp4", "image": "a.png"}\n', "line 1: expected"),
        ('{"vide": "a.mp4"}\n', "line 1: expected"),
        ("[1]\n", "line 1: expected"),
        ('{"video": "a.mp4"}\n\nnot json\n', "line 3: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        (b"\xff\xfe\x00", "line 1: not JSON"),
        ('{"video": "a.mp4"}\n' * 3 + "\u0000", "line 4: not JSON"),
        ("\n\n", "lists no video and no image"),
        ("", "lists no video and no image"),
    ],
)
def test_a_manifest_that_is_something_else_is_refused_by_line(tmp_path, text, message):
    manifest = tmp_path / "all.jsonl"
    manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_entries(manifest)
    assert str(manifest) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.MP4", "video"), ("a.png", "image"), ("a.m2ts", "video"), ("a.heic", "image")]
)
def test_a_clip_alone_is_a_data_set(tmp_path, monkeypatch, name, kind):
    touch(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    assert read_entries(name) == [Entry(kind, tmp_path / name, name)]


def test_a_clip_without_its_suffix_is_refused_with_what_is_expected(tmp_path):
    (tmp_path / "clip").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(range(256)))
    with pytest.raises(ValueError, match=r"line 1: not JSON .*a folder, or a clip that ends in \.mp4"):
        read_entries(tmp_path / "clip")


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "all.jsonl").write_text('{"video": "a.mp4"}\n', encoding="utf-8-sig")
    assert read_entries(tmp_path / "all.jsonl")[0].path == tmp_path / "a.mp4"


def test_a_folder_without_clips_and_no_folder_are_refused(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match="lists no video and no image"):
        read_entries(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder or manifest"):
        read_entries(tmp_path / "none")


def test_a_log_is_gone_on_with_and_a_torn_line_is_forgotten(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path, SETTINGS) as log:
        log.add({"path": "a"})
        log.add({"path": "b"})
        assert [line["path"] for line in read_log(path)] == ["a", "b"]  # at once
    whole = path.read_bytes()
    for length in range(whole.rindex(b'{"path"'), len(whole)):
        path.write_bytes(whole[:length])
        assert [line["path"] for line in read_log(path)] == ["a"]
        with Log(path, SETTINGS) as log:
            log.add({"path": "c"})
        assert [line["path"] for line in read_log(path)] == ["a", "c"]


@pytest.mark.parametrize("length", range(8))
def test_a_log_torn_in_its_first_line_is_begun_anew(tmp_path, length):
    path = tmp_path / "log.jsonl"
    with Log(path, SETTINGS):
        whole = path.read_bytes()
    path.write_bytes(whole[:length])
    assert read_settings(path) is None
    with Log(path, SETTINGS) as log:
        log.add({"path": "a"})
    assert path.read_bytes().startswith(whole)
    assert [line["path"] for line in read_log(path)] == ["a"]


def test_a_log_begun_otherwise_is_refused_and_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path, SETTINGS) as log:
        log.add({"path": "a"})
    before = path.read_bytes()
    for _ in range(2):  # the lock is given back
        with (
            pytest.raises(ValueError, match=r'begun otherwise, with .*"frames": 17'),
            Log(path, {**SETTINGS, "size": 8}),
        ):
            pass
    assert path.read_bytes() == before
    with Log(path, SETTINGS):
        pass


def test_no_log_has_no_lines(tmp_path):
    assert list(read_log(tmp_path / "none.jsonl")) == []
    assert read_settings(tmp_path / "none.jsonl") is None


def occupy(path, is_taken, may_end):
    with Log(path, SETTINGS):
        is_taken.set()
        may_end.wait(PATIENCE)


def test_a_log_has_one_writer_and_any_readers(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    is_taken, may_end = spawn.Event(), spawn.Event()
    process = spawn.Process(target=occupy, args=(tmp_path / "log.jsonl", is_taken, may_end))
    process.start()
    assert is_taken.wait(PATIENCE)
    with pytest.raises(ValueError, match="another process is writing it"), Log(tmp_path / "log.jsonl", SETTINGS):
        pass
    assert json.loads(json.dumps(SETTINGS)) == read_settings(tmp_path / "log.jsonl")
    may_end.set()
    process.join(PATIENCE)
    with Log(tmp_path / "log.jsonl", SETTINGS):
        pass


def test_lines_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "manifest.jsonl"
    write_lines(path, [{"video": "caf\u00e9 \u2028.mp4"}])
    assert read_entries(path)[0].path == tmp_path / "caf\u00e9 \u2028.mp4"
    with pytest.raises(ZeroDivisionError):
        write_lines(path, ({"video": 1 / n} for n in (1, 0)))
    assert len(read_entries(path)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.jsonl"]


@pytest.mark.parametrize("name", ["\ud800.mp4", "deep/\udfff.mp4"])
def test_a_name_that_no_file_can_have_is_refused_by_its_line(tmp_path, name):
    path = tmp_path / "all.jsonl"
    path.write_text(json.dumps({"video": "a.mp4"}) + "\n" + json.dumps({"video": name}) + "\n")
    with pytest.raises(ValueError, match=r"all\.jsonl, line 2: no file can be named"):
        read_entries(path)


def test_a_name_that_is_not_unicode_is_listed(tmp_path):
    path = tmp_path / "all.jsonl"
    write_lines(path, [{"video": "caf\udce9.mp4"}])
    (entry,) = read_entries(path)
    assert os.fsencode(entry.path) == os.fsencode(tmp_path) + b"/caf\xe9.mp4"


@pytest.mark.parametrize(
    ("line", "said"), [("{torn", "not JSON"), ("[1]", "got a list"), ("\x00\x00", "not JSON"), ("[" * 9999, "not JSON")]
)
def test_a_damaged_line_of_a_log_is_named(tmp_path, line, said):
    path = tmp_path / "log.jsonl"
    path.write_text('{"settings": 1}\n' + line + '\n{"path": "a"}\n')
    assert read_settings(path) == {"settings": 1}
    with pytest.raises(ValueError, match=rf"log\.jsonl, line 2: .*{said}"):
        list(read_log(path))
