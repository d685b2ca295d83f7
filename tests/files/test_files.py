"""Files are written whole or not at all."""

import pytest

import torchquant as tq
from torchquant.files.whole import write_whole


def test_a_file_is_moved_into_place_whole(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    assert write_whole(target, lambda part: part.write_bytes(b"new")) == target
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("broken")])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(part):
        part.write_bytes(b"half")
        raise error

    expected = tq.ArtifactError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected, match=r"No space left|broken"):
        write_whole(target, fail)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_missing_folder_and_a_folder_as_target_are_named(tmp_path):
    for target in (tmp_path / "none" / "a.bin", tmp_path):
        with pytest.raises(tq.ArtifactError, match=f"cannot write {target}"):
            write_whole(target, lambda part: part.write_bytes(b""))
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(tq.ArtifactError, match="cannot write"):
        write_whole(tmp_path / "file" / "a.bin", lambda part: part.write_bytes(b""))
