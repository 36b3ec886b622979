"""Folders of images: what is taken, what is ignored and said, what is refused."""

import os
import shutil
import socket
import unicodedata

import numpy as np
import pytest
from PIL import Image

from tests.train.data.pictures import PICTURE, PNG, encoded, put
from train.data.check import check_images
from train.data.folders import scan
from train.data.sets import load_dataset


def taken(files):
    return sorted(file.path for file in files.found)


def refused(root, match, error=ValueError):
    with pytest.raises(error, match=match):
        scan(root)


def test_what_is_taken_is_said_once(root, capfd):
    put(root / "train" / "cat" / "notes.txt", b"no image")
    for _ in range(2):
        data = load_dataset("folder", str(root))
    assert data.classes == ("cat", "dog") and data.test_name == "val"
    assert capfd.readouterr().err.splitlines() == [
        f"{root}/train: 4 images of 2 classes (cat 2, dog 2)",
        f"{root}/train: ignored 1 no image (.txt 1)",
        f"{root}/val: 2 images of 2 classes (cat 1, dog 1)",
    ]


def test_training_images_among_the_test_images_are_told(root):
    for path, data in (("cat/a.png", PNG), ("dog/in/b.png", PNG + b"..")):
        put(root / "train" / path, data)
        put(root / "val" / path, data)
    put(root / "train" / "cat" / "c.png", PNG)
    put(root / "val" / "cat" / "c.png", PNG + b".")  # of another size
    (line,) = [x for x in scan(root).summary.splitlines() if "path and the size" in x]
    assert "2 of 5 images" in line and "(cat/a.png, dog/in/b.png)" in line


@pytest.mark.parametrize(
    "tool",
    [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", ".git", "#recycle"],
)
def test_folders_of_tools_are_no_classes(root, tool):
    before = scan(root)
    for place in ("train", "train/cat", "train/cat/inner", "val", "val/dog"):
        put(root / place / tool / "1.png")
    found = scan(root)
    assert found.classes == ("cat", "dog")
    assert taken(found.train) == taken(before.train)
    assert taken(found.test) == taken(before.test)
    assert "train: ignored 3 hidden or a tool's" in found.summary


@pytest.mark.parametrize(
    "name", ["._1.png", ".DS_Store", ".hidden.jpg", "Thumbs.db", "x.jpg.part", "x.png~"]
)
def test_files_of_tools_are_no_images(root, name):
    check_ignored(root, name, PNG)


@pytest.mark.parametrize(
    "name", ["notes.txt", "labels.csv", "x.npy", "a.mp4", "README"]
)
def test_other_files_are_no_images(root, name):
    check_ignored(root, name, b"no image, and long enough")


def check_ignored(root, name, data):
    before = scan(root)
    put(root / "train" / "cat" / name, data)
    put(root / "train" / name, data)
    found = scan(root)
    assert taken(found.train) == taken(before.train)
    assert "train: ignored" in found.summary


@pytest.mark.parametrize(
    "name, kind",
    [
        ("x.jfif", "jpeg"),
        ("x.JPE", "jpeg"),
        ("x.jp2", "jpeg2000"),
        ("x.pgm", "ppm"),
        ("x.avif", "avif"),
        ("x.webp", "webp"),
        ("x.tiff", "tiff"),
        ("x", "jpeg"),
        ("x.0", "png"),
        ("x.txt", "gif"),
        ("x.heic", "jpeg"),  # as some telephones name them
        ("x.bmp", "png"),
    ],
)
def test_content_says_what_an_image_is(root, name, kind):
    put(root / "train" / "cat" / name, encoded(PICTURE, kind))
    data = load_dataset("folder", str(root), image_size=4)
    [at] = [i for i, f in enumerate(data.train.source.found) if f.path == f"cat/{name}"]
    images, labels = data.train.read(np.array([at]))
    np.testing.assert_allclose(images[0, 2, 2], (200, 100, 50), atol=4)
    assert labels == 0
    check_images(data)


def test_images_in_folders_within_a_class(root):
    put(root / "train" / "eel" / "2020" / "may" / "1.png")
    put(root / "val" / "eel" / "2021" / "1.png")
    found = scan(root)
    assert found.classes == ("cat", "dog", "eel")
    at = taken(found.train).index("eel/2020/may/1.png")
    by_path = {
        file.path: label for file, label in zip(found.train.found, found.train.labels)
    }
    assert by_path["eel/2020/may/1.png"] == 2 and at == 4


@pytest.mark.parametrize("name", ["x.heic", "x.psd", "x.svg", "x.DNG", "x.jxl", "x"])
def test_pictures_that_are_not_read_are_refused(root, name):
    raw = {"x.DNG": encoded(PICTURE, "tiff"), "x": b"\0\0\0\x18ftypheic" + bytes(40)}
    for i in range(12):
        put(root / "train" / "dog" / str(i) / name, raw.get(name, b"other"))
    refused(root, rf"formats that are not read .*train: dog/0/{name}.* and 2 more")


def test_what_is_no_file_is_passed_by(root):
    """Nothing waits for a pipe, and no circle of links is walked for ever."""
    cat = root / "train" / "cat"
    os.mkfifo(cat / "x.jpg")
    os.mkfifo(cat / "y")
    (cat / "linked.jpg").symlink_to("x.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(cat)  # a socket's path may not be long
        try:
            server.bind("z.png")
        finally:
            os.chdir(here)
    (cat / "self").symlink_to(".")
    (cat / "up").symlink_to("../..")
    found = scan(root)
    assert taken(found.train)[:2] == ["cat/1.png", "cat/2.png"]
    assert "4 a pipe, socket or device" in found.summary
    assert "a link to a folder that it lies in" in found.summary


def test_links_are_followed(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    put(other / "7.png")
    (root / "train" / "eel").symlink_to(other)
    (root / "train" / "cat" / "link.png").symlink_to(other / "7.png")
    found = scan(root)
    assert {"eel/7.png", "cat/link.png"} <= set(taken(found.train))
    (root / "train" / "cat" / "gone.png").symlink_to(other / "8.png")
    refused(root, "links to files that are not there in .*train: cat/gone.png")


def test_one_folder_is_not_two_classes(root):
    (root / "train" / "zebra").symlink_to("cat")
    refused(root, "'cat' and 'zebra' of .*train are one and the same folder")
    (root / "train" / "zebra").unlink()
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("train")
    refused(root, "are those of .*train, by a link, in .*val: cat, dog")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("ünit", "ünit"), ("cat ", "cat"), ("É", "é")]
)
def test_classes_that_look_the_same(root, split, names):
    decomposed = unicodedata.normalize("NFD", names[1])
    for name in (names[0], decomposed):
        put(root / split / name / "1.png")
    refused(root, rf"names differ in case, spaces .* in .*{split}: ")


def test_a_class_of_val_that_train_writes_otherwise(root):
    put(root / "train" / unicodedata.normalize("NFC", "bär") / "1.png")
    put(root / "val" / unicodedata.normalize("NFD", "bär") / "1.png")
    refused(root, r"val that are not in .*train: .*Written otherwise: .*a\\u0308r")


@pytest.mark.parametrize("name", ["a\nb", "tab\t", os.fsdecode(b"caf\xe9")])
def test_names_that_cannot_be_written(root, name):
    put(root / "train" / name / "1.png")
    refused(root, "control characters or are not UTF-8")


def test_classes_without_images(root):
    (root / "train" / "eel").mkdir()
    refused(root, r"classes without images in .*train: eel\.")
    put(root / "val" / "eel" / "1.png")
    refused(root, r"classes without images in .*train: eel\.")
    put(root / "train" / "eel" / "notes.txt", b"no image")
    refused(root, r"in .*train: eel\.\n.*train: ignored 1 no image \(.txt 1\)$")
    put(root / "train" / "eel" / "1.png")
    assert scan(root).classes == ("cat", "dog", "eel")
    # Without test images a class can be learned, but it is said.
    (root / "val" / "eel" / "1.png").unlink()
    assert "val: NO images of eel" in scan(root).summary
    (root / "val" / "eel").rmdir()
    assert "val: NO images of eel" in scan(root).summary
    put(root / "val" / "fox" / "1.png")
    refused(root, "val that are not in .*train: fox")


def test_one_class_is_not_enough(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / split / "images" / "cat" / "1.png")
    refused(tmp_path, "train has one class, images; expected two or more")


def test_no_images_to_test(root):
    for name in ("cat", "dog"):
        (root / "val" / name / "9.png").unlink()
    refused(root, "no images in the folders of .*val", FileNotFoundError)


def test_missing_folders_are_shown_what_is_there(root):
    (root / "train").rename(root / "Train")
    refused(root, "with images in train/CLASS/; found Train, val", FileNotFoundError)
    refused(root / "nowhere", "found nothing", FileNotFoundError)


def test_files_are_checked_at_once(root):
    for i in range(13):
        put(root / "val" / "cat" / f"bad{i:02}.jpg", b"no image")
    put(root / "train" / "dog" / "empty.png", b"")
    put(root / "train" / "dog" / "cut.png", PNG[:20])
    data = load_dataset("folder", str(root))
    with pytest.raises(ValueError, match=r"^15 of 21 image files cannot") as error:
        check_images(data)
    lines = str(error.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 5 more"
    assert "train/dog/cut.png: Truncated File" in lines[1]
    assert "train/dog/empty.png: the file is empty" in lines[2]
    assert "val/cat/bad00.jpg: expected one of" in lines[3]
    small = load_dataset("folder", str(root), max_pixels=47)
    with pytest.raises(ValueError, match=r"21 of 21 .*\n.* 8 x 6 is 48 pixels"):
        check_images(small)


def test_files_that_may_not_be_read(root, monkeypatch):
    def open_image(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    put(root / "train" / "cat" / "nameless")
    monkeypatch.setattr("PIL.Image.open", open_image)
    refused(root, "Permission denied: .*train/cat/nameless", PermissionError)
    (root / "train" / "cat" / "nameless").unlink()
    with pytest.raises(ValueError, match=r"val/cat/9.png: .*Permission denied"):
        check_images(load_dataset("folder", str(root)))


def test_only_files_that_changed_are_read_again(root, monkeypatch):
    opened = []

    def check(path, max_pixels):
        opened.append(str(path.relative_to(root)))
        return False

    monkeypatch.setattr("train.data.check.check_file", check)

    def run(known, **options):
        opened.clear()
        return check_images(load_dataset("folder", str(root), **options), known)

    known = run(None)
    assert sorted(known) == ["train/cat", "train/dog", "val/cat", "val/dog"]
    assert len(opened) == 6
    assert run(known) == known and not opened
    os.utime(root / "train" / "dog" / "1.png", (1, 1))
    put(root / "val" / "cat" / "10.png")
    changed = run(known)
    assert sorted(opened) == [
        "train/dog/1.png",
        "train/dog/2.png",
        "val/cat/10.png",
        "val/cat/9.png",
    ]
    assert run(changed) == changed and not opened
    run(changed, max_pixels=100)
    assert len(opened) == 7
    assert check_images(load_dataset("digits")) == {}


def test_several_images_in_a_file_are_said(root, capfd):
    frames = [PICTURE, Image.new("RGB", (8, 6))]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    put(root / "train" / "cat" / "film.gif", data)
    check_images(load_dataset("folder", str(root)))
    assert "1 files hold several images each, of which" in "".join(capfd.readouterr())
