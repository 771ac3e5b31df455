"""The cache of converted annotations: written once and whole, renewed when its source changes."""

import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from iou_balanced_d2.data import conversion, prepare_dataset
from iou_balanced_d2.data.coco import CocoSource
from iou_balanced_d2.data.conversion import (
    cached_json,
    map_files,
    read_bytes,
    register_converted,
)
from iou_balanced_d2.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class ToySource:
    """One image; its class is the content of a file. Each conversion is logged beside it."""

    folder: str
    metadata: ClassVar[dict[str, Any]] = {}

    @property
    def path(self):
        return self.folder

    image_root = path

    def fingerprint(self):
        return [conversion.stamp(os.path.join(self.folder, "class.txt"))]

    def convert(self):
        time.sleep(0.2)
        with open(os.path.join(self.folder, "log.txt"), "a") as log:
            log.write("converted\n")
        name = Path(self.folder, "class.txt").read_text()
        if name == "broken":
            raise UserError("class.txt: broken")
        return {
            "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 3}],
            "annotations": [],
            "categories": [{"id": 1, "name": name}],
        }


@dataclass(frozen=True)
class SplitSource(ToySource):
    """A part of the same folder."""

    split: str


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/class.txt").write_text("cat")
    return ToySource(str(tmp_path / "data"))


@pytest.fixture
def name():
    yield "toy_converted"
    DatasetCatalog.pop("toy_converted", None)
    MetadataCatalog.pop("toy_converted", None)


def conversions(toy):
    log = Path(toy.folder, "log.txt")
    return len(log.read_text().split()) if log.exists() else 0


def caches(folder):
    return sorted(p.name for p in Path(folder).rglob("*.json*"))


def test_converted_once_beside_the_data(toy):
    first = cached_json("toy", toy)
    assert Path(first).parent == Path(toy.folder, "iou_balanced_cache")
    assert json.loads(Path(first).read_text())["categories"][0]["name"] == "cat"
    assert cached_json("toy", toy) == first
    assert conversions(toy) == 1
    left = {p.name for p in Path(first).parent.iterdir()}
    assert left == {Path(first).name, "toy.lock"}


def test_a_cache_that_another_user_wrote_is_read(toy, monkeypatch):
    path = cached_json("toy", toy)
    monkeypatch.setattr(conversion, "_is_writable", lambda *_: False)
    assert cached_json("toy", toy) == path


def test_a_changed_source_is_converted_anew_and_old_caches_go(toy):
    kept = Path(cached_json("toy-2", toy))
    old = cached_json("toy", toy)
    half = Path(old).with_name(f".{Path(old).name}.ab_c1.unfinished")
    half.write_text("a conversion was killed")
    Path(toy.folder, "class.txt").write_text("horse")
    new = cached_json("toy", toy)
    assert json.loads(Path(new).read_text())["categories"][0]["name"] == "horse"
    assert not Path(old).exists()
    assert not half.exists()
    assert caches(toy.folder) == sorted([kept.name, Path(new).name]), "another set's stays"


def test_other_sources_of_the_same_name_stay(toy, own_data):
    """Two config files of one's photos, say, each with images held out of its own."""
    (annotations, images), other = own_data, Path(own_data[0]).with_name("other.json")
    shutil.copy2(annotations, other)
    splits = [SplitSource(toy.folder, split) for split in ("train", "valid")]
    files = [CocoSource(path, images) for path in (annotations, str(other))]
    for sources in (splits, files):
        first, second = (Path(cached_json("toy", source)) for source in sources)
        assert first.exists()
        assert second.exists()
    other.write_text(other.read_text() + "\n")
    third = Path(cached_json("toy", files[1]))
    assert [path.exists() for path in (first, second, third)] == [True, False, True]


def test_a_set_that_is_moved_or_spelt_otherwise_keeps_its_cache(toy, own_data, tmp_path):
    Path(own_data[0]).rename(tmp_path / "data/a.json")
    path = cached_json("toy", CocoSource(str(tmp_path / "data/a.json"), own_data[1]))
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = cached_json("toy", CocoSource(str(tmp_path / "images/../moved/a.json"), "images"))
    assert Path(moved).name == Path(path).name


def test_the_same_size_at_another_time_is_a_change(toy):
    old = cached_json("toy", toy)
    Path(toy.folder, "class.txt").write_text("dog")
    os.utime(Path(toy.folder, "class.txt"), ns=(1, 1))
    assert cached_json("toy", toy) != old


def test_another_converter_is_a_change(toy, monkeypatch):
    old = cached_json("toy", toy)
    monkeypatch.setattr(conversion, "CONVERTER", "edited")
    assert cached_json("toy", toy) != old


def test_a_failed_conversion_leaves_no_cache(toy):
    Path(toy.folder, "class.txt").write_text("broken")
    with pytest.raises(UserError, match="broken"):
        cached_json("toy", toy)
    assert caches(toy.folder) == []


def test_an_interrupted_write_leaves_no_cache(toy, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached_json("toy", toy)
    assert caches(toy.folder) == []


def test_two_processes_convert_once(toy):
    # fork: a spawned process would import torch again, for seconds.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=cached_json, args=("toy", toy), daemon=True) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert conversions(toy) == 1
    assert len(caches(toy.folder)) == 1


def test_where_the_data_cannot_be_written_the_users_cache_is_used(toy, tmp_path, caplog):
    # A file in the folder's place: permissions would not stop a test run by root.
    Path(toy.folder, "iou_balanced_cache").write_text("")
    with caplog.at_level(logging.WARNING):
        path = cached_json("toy", toy)
    assert Path(path).is_relative_to(tmp_path / "user/iou_balanced_d2")
    assert "can't be written" in caplog.text
    assert cached_json("toy", toy) == path
    assert conversions(toy) == 1


def test_two_folders_of_one_name_keep_apart_in_the_users_cache(toy, tmp_path):
    other = ToySource(str(tmp_path / "other"))
    Path(other.folder).mkdir()
    for source, content in ((toy, "cat"), (other, "horse")):
        Path(source.folder, "class.txt").write_text(content)
        Path(source.folder, "iou_balanced_cache").write_text("")
    paths = [cached_json("toy", source) for source in (toy, other)]
    assert all(Path(path).exists() for path in paths)


def test_no_folder_that_can_be_written_is_one_line(toy, tmp_path):
    Path(toy.folder, "iou_balanced_cache").write_text("")
    (tmp_path / "user").write_text("")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        cached_json("toy", toy)


def test_a_spoilt_cache_says_so(toy, name):
    register_converted(name, toy)
    Path(cached_json(name, toy)).write_text("{")
    with pytest.raises(UserError, match=r"data set 'toy_converted': .*json: .* delete it"):
        prepare_dataset(name)


def test_odd_names_stay_in_the_cache_folder(toy):
    path = Path(cached_json("../a/b", toy))
    assert path.parent == Path(toy.folder, "iou_balanced_cache")


def test_preparing_completes_the_metadata_and_follows_changes(toy, name):
    register_converted(name, toy)
    metadata = MetadataCatalog.get(name)
    assert (metadata.evaluator_type, metadata.get("json_file")) == ("coco", None)
    assert conversions(toy) == 0
    prepare_dataset(name)
    assert metadata.thing_classes == ["cat"]
    assert Path(metadata.json_file).exists()
    assert len(DatasetCatalog.get(name)) == 1
    Path(toy.folder, "class.txt").write_text("horse")
    assert len(DatasetCatalog.get(name)) == 1
    assert metadata.thing_classes == ["horse"]
    assert Path(metadata.json_file).exists()


def test_preparing_any_other_data_set_does_nothing():
    prepare_dataset("coco_2017_val")
    prepare_dataset("no such set")


def test_a_name_is_registered_twice_for_the_same_source_alone(toy, name):
    register_converted(name, toy)
    register_converted(name, ToySource(toy.folder))
    with pytest.raises(UserError, match=r"KEY: the name 'toy_converted' is taken"):
        register_converted(name, ToySource("elsewhere"), key="KEY")


@pytest.mark.parametrize("count", [0, 1, 499, 500, 700])
def test_files_are_read_in_order(tmp_path, count):
    paths = [str(tmp_path / f"{i}") for i in range(count)]
    for i, path in enumerate(paths):
        Path(path).write_text(f"content {i}")
    parsed = map_files(lambda path: (path, read_bytes(path)), paths, title="")
    assert parsed == [(path, f"content {i}".encode()) for i, path in enumerate(paths)]


def test_the_first_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "0").write_text("")
    paths = [str(tmp_path / f"{i}") for i in range(1000)]
    with pytest.raises(UserError, match=r"/1: can't be read: No such file.*/5: .*\(999 such\)"):
        map_files(read_bytes, paths, title="")


def test_a_large_set_shows_its_progress(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_text("")
    for terminal, expected in ((True, "Title: 100%"), (False, "")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        map_files(read_bytes, [str(tmp_path / "a")] * 600, title="Title")
        shown = capsys.readouterr().err
        assert expected in shown if expected else shown == ""


def test_importing_reads_and_writes_nothing(tmp_path):
    code = """
import builtins, os, sys
import detectron2.data.datasets
touched = []
sys.addaudithook(lambda event, args: touched.append(str(args[0]))
                 if event in ("open", "os.listdir", "os.scandir", "os.mkdir") else None)
import iou_balanced_d2.data
from detectron2.data import DatasetCatalog
for name in ("voc_0712_trainval_coco", "voc_2007_test_coco", "cityscapes_fine_bbox_val"):
    assert name in DatasetCatalog
assert not [path for path in touched if "data_sets" in path], touched
"""
    (tmp_path / "data_sets").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": "data_sets"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "data_sets").iterdir()) == []
