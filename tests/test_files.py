"""write_whole: a file is whole at any moment, whoever writes it."""

import os
import threading

import pytest

from kerastrip._files import write_whole


def test_writers_of_one_file_do_not_meet(tmp_path):
    path, failed = tmp_path / "page.html", []
    texts = {letter * 200_000 for letter in "abcd"}
    write_whole(path, "a" * 200_000)

    def write(text):
        try:
            for _ in range(20):
                write_whole(path, text)
                assert path.read_text() in texts
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_link_at_the_name_of_a_part_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "page.html.part").symlink_to(victim)
    write_whole(tmp_path / "page.html", "new")
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (tmp_path / "page.html.guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "page.html", "newer")
    assert victim.read_text() == "mine"
    assert (tmp_path / "page.html").read_text() == "new"


def test_the_file_that_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    real, link = tmp_path / "there" / "real.html", tmp_path / "linked.html"
    real.parent.mkdir()
    link.symlink_to(real)
    for text in ("new", "newer"):  # at first the link leads nowhere
        write_whole(link, text)
        assert link.is_symlink()
        assert real.read_text() == text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_or_device_is_neither_read_nor_replaced(tmp_path):
    from kerastrip import Augmentation
    from kerastrip.callbacks import TrainingReport
    from kerastrip.sources import TFRecordSource, ZipImages

    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        for use in (
            lambda path: write_whole(path, "new"),
            TrainingReport,
            Augmentation.none().save,
            Augmentation.load,
            TFRecordSource,
            lambda path: ZipImages(path, size=8),
        ):
            with pytest.raises(ValueError, match=f"{path.name}', a pipe or device"):
                use(path)
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_whole(path, "old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_lone_surrogate_becomes_an_escape(tmp_path):
    name = os.fsdecode(b"caf\xe9") + " café"
    write_whole(tmp_path / "page.html", name)
    assert (tmp_path / "page.html").read_text("utf-8") == r"caf\udce9 café"
