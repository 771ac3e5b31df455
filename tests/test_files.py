"""Files are written whole or not at all."""

import os
import resource
import stat
import threading

import pytest
import torch

from iou_balanced_d2.errors import UserError
from iou_balanced_d2.files import read_yaml, remove_unfinished, write_atomically


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("name", ["a.json", "-", "é ü.bin", "x" * 255])
def test_a_file_is_written_and_replaced(tmp_path, name):
    for content in (b"first and longer", b"second"):
        write_atomically(tmp_path / name, lambda f, content=content: f.write(content))
        assert (tmp_path / name).read_bytes() == content
    assert names(tmp_path) == [name]


def test_a_path_may_be_relative_and_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically("a", lambda f: f.write(b"x"))
    assert names(tmp_path) == ["a"]


def test_while_it_is_written_the_old_content_is_there(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(f):
        f.write(b"half")
        f.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"half"


def test_an_error_of_the_writer_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write(f):
        f.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "write",
    [lambda f: f.write(bytes(10**6)), lambda f: torch.save(torch.zeros(10**6), f)],
    ids=["bytes", "torch.save"],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, write):
    """A limit on the files' size stands for the full disk."""
    (tmp_path / "a").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError) as caught:
            write_atomically(tmp_path / "a", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"{str(tmp_path / 'a')!r} can't be written: File too large; files written before are whole"
    )
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"gone/a' can't be written: No such file or directory"):
        write_atomically(tmp_path / "gone/a", lambda f: f.write(b"x"))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", lambda f: f.write(b"x"))
        (tmp_path / "b").write_bytes(b"x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes == [0o666 & ~umask] * 2


def test_links_are_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "link", lambda f: f.write(b"new"))
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new"
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    """Each has a temporary file of its own; the last one wins with all of its content."""
    barrier = threading.Barrier(4)

    def write(f, byte):
        for _ in range(5):
            f.write(byte * 1000)
            f.flush()
            barrier.wait(60)

    threads = [
        threading.Thread(
            target=write_atomically, args=(tmp_path / "a", lambda f, b=bytes([i]): write(f, b))
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 5000
    assert len(set(content)) == 1
    assert names(tmp_path) == ["a"]


def test_what_a_kill_leaves_is_removed(tmp_path):
    def write(f):
        f.write(b"half")
        f.flush()
        os._exit(9)

    for name in ("a", ".hidden"):
        if (child := os.fork()) == 0:
            write_atomically(tmp_path / name, write)
        os.waitpid(child, 0)
    (tmp_path / "b").touch()
    assert len(names(tmp_path)) == 3
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["b"]
    remove_unfinished(tmp_path / "gone")


def test_a_key_that_a_yaml_file_has_twice_is_refused(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("names:\n  0: cat\n  1: dog\n  1: cow\n")
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert (
        str(caught.value) == f"{str(path)!r} has the key '1' twice, in lines 3 and 4: write it once"
    )


def test_merged_mappings_are_no_key_twice(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1}\nb: &b {y: 2, x: 2}\nc: {<<: *a, <<: *b, y: 3}\n")
    assert read_yaml(path)["c"] == {"x": 2, "y": 3}
