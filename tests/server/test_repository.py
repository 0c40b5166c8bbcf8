"""What is said about a repository before Triton sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from matteserve_server import RepositoryError, UnknownModelError
from matteserve_server.repository import Repository
from support.tiny_model import SIZE, write_repository


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


def test_aliases_are_the_default(path: Path) -> None:
    repository = Repository.read(path)
    assert repository.default_models() == ["tiny"]
    assert [engine.name for engine in repository.engines_of(["tiny"])] == ["tiny_onnx_fp32"]


def test_without_an_alias_everything_is_the_default(path: Path) -> None:
    shutil.rmtree(path / "tiny")
    assert Repository.read(path).default_models() == ["tiny_onnx_fp32"]


def test_tensor_bytes_are_those_of_the_largest_batch(path: Path) -> None:
    assert Repository.read(path).models["tiny_onnx_fp32"].tensor_bytes() == 8 * SIZE * SIZE * (3 + 1)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match=r"nowhere is not a directory; make one with `matteserve export`"):
        Repository.read(tmp_path / "nowhere")


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="has no models"):
        Repository.read(tmp_path)


def test_config_that_does_not_parse_names_file_and_line(path: Path) -> None:
    (path / "tiny" / "config.pbtxt").write_text('name: "tiny"\nplatfrom: "ensemble"\n')
    with pytest.raises(RepositoryError, match=r"tiny/config\.pbtxt is not a valid Triton model configuration: 2:1"):
        Repository.read(path)


def test_config_that_is_not_text(path: Path) -> None:
    (path / "tiny" / "config.pbtxt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RepositoryError, match="is not a valid Triton model configuration"):
        Repository.read(path)


def test_config_and_folder_disagree(path: Path) -> None:
    (path / "tiny").rename(path / "other")
    with pytest.raises(RepositoryError, match="names the model 'tiny', its folder is 'other'"):
        Repository.read(path)


def test_unknown_model_lists_what_there_is(path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"no model 'u3net' in .*; it has tiny, tiny_onnx_fp32"):
        Repository.read(path).check(["u3net"])


def test_alias_of_a_missing_engine(path: Path) -> None:
    shutil.rmtree(path / "tiny_onnx_fp32")
    with pytest.raises(UnknownModelError, match=r"alias 'tiny' .* points at tiny_onnx_fp32, which is not there"):
        Repository.read(path).check(["tiny"])


def test_engine_that_was_never_built(path: Path) -> None:
    (path / "tiny_onnx_fp32" / "1" / "model.onnx").unlink()
    with pytest.raises(RepositoryError, match=r"has no model\.onnx .*engines are built, not shipped"):
        Repository.read(path).check(["tiny"])


def test_model_without_a_version_folder(path: Path) -> None:
    (path / "tiny" / "1").rmdir()
    with pytest.raises(RepositoryError, match="has no version folder"):
        Repository.read(path).check(["tiny"])
