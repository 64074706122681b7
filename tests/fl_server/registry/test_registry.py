import os
import signal
from pathlib import Path

import pytest

from fl_server.registry.registry import Registry, RegistryError
from models.contract.encoding import build_digest
from models.contract.manifest import FileEntry, Lineage, ModelManifest, build_manifest
from models.tensors.spec import TensorSpec


def write_version(
    directory: Path, version: int, *, content: bytes = b"graph", run: str | None = None, number: int | None = None
) -> Path:
    directory.mkdir(parents=True)
    (directory / "inference.onnx").write_bytes(content)
    manifest = ModelManifest(
        model="digits",
        version=version,
        runtime="onnx",
        inputs=(TensorSpec("x", ("batch", 2), "float32"),),
        outputs=(TensorSpec("y", ("batch", 2), "float32"),),
        files={"inference.onnx": FileEntry(digest=build_digest(content), size_bytes=len(content))},
        lineage=Lineage(run=run, round=number),
    )
    (directory / "manifest.json").write_bytes(build_manifest(manifest))
    return directory


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def test_registered_version_is_a_copy_of_the_source_folder(registry, tmp_path):
    source = write_version(tmp_path / "v1", 1)
    version = registry.create_model_version(source)
    (source / "inference.onnx").write_bytes(b"changed")
    assert (version.directory / "inference.onnx").read_bytes() == b"graph"
    assert version.load_manifest().version == 1
    assert registry.get_next_version("digits") == 2
    assert registry.search_registered_models() == ["digits"]


def test_same_bytes_twice_are_the_same_version_and_other_bytes_are_refused(registry, tmp_path):
    first = registry.create_model_version(write_version(tmp_path / "v1", 1))
    assert registry.create_model_version(tmp_path / "v1") == first
    with pytest.raises(RegistryError, match="package it as version 2"):
        registry.create_model_version(write_version(tmp_path / "other", 1, content=b"other"))


def test_version_whose_file_is_not_what_the_manifest_says_is_not_registered(registry, tmp_path):
    source = write_version(tmp_path / "v1", 1)
    (source / "inference.onnx").write_bytes(b"tampered")
    with pytest.raises(RegistryError, match="digest"):
        registry.create_model_version(source)
    assert registry.search_model_versions("digits") == []


def test_folder_without_a_manifest_is_refused_with_its_path(registry, tmp_path):
    with pytest.raises(RegistryError, match=str(tmp_path / "nothing")):
        registry.create_model_version(tmp_path / "nothing")


def test_new_champion_makes_the_old_one_previous(registry, tmp_path):
    for number in (1, 2):
        registry.create_model_version(write_version(tmp_path / f"v{number}", number))
        registry.set_registered_model_alias("digits", "champion", number)
    assert registry.get_model_version_by_alias("digits", "champion").version == 2
    assert registry.get_model_version_by_alias("digits", "previous").version == 1
    registry.set_registered_model_alias("digits", "champion", 2)
    assert registry.get_model_version_by_alias("digits", "previous").version == 1


def test_alias_cannot_stand_for_a_version_that_does_not_exist(registry):
    with pytest.raises(RegistryError, match="no version 3"):
        registry.set_registered_model_alias("digits", "champion", 3)
    with pytest.raises(RegistryError, match="no champion"):
        registry.get_model_version_by_alias("digits", "champion")


def test_versions_are_found_by_the_round_that_made_them(registry, tmp_path):
    registry.create_model_version(write_version(tmp_path / "v1", 1))
    registry.create_model_version(write_version(tmp_path / "v2", 2, run="run-1", number=1))
    registry.create_model_version(write_version(tmp_path / "v3", 3, run="run-1", number=2))
    assert [found.version for found in registry.search_model_versions("digits")] == [1, 2, 3]
    assert [found.version for found in registry.search_model_versions("digits", run="run-1")] == [2, 3]
    assert [found.version for found in registry.search_model_versions("digits", run="run-1", round=2)] == [3]


def test_manifest_changed_after_registration_is_noticed(registry, tmp_path):
    version = registry.create_model_version(write_version(tmp_path / "v1", 1))
    (version.directory / "manifest.json").write_bytes(b"{}")
    with pytest.raises(RegistryError, match="was changed"):
        version.load_manifest()


@pytest.mark.parametrize("killed_after", ["staging", "folder"])
def test_kill_before_the_index_leaves_no_version_and_the_next_try_succeeds(tmp_path, killed_after):
    source = write_version(tmp_path / "v1", 1)
    child = os.fork()
    if child == 0:
        with Registry(tmp_path / "registry") as registry:
            copy = registry._copy

            def copy_and_die(*arguments):
                if killed_after == "staging":
                    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                copy(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            registry._copy = copy_and_die
            registry.create_model_version(source)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = {path.name for path in (tmp_path / "registry" / "versions" / "digits").iterdir()}
    assert left == ({".1.staging"} if killed_after == "staging" else {"1"})
    with Registry(tmp_path / "registry") as registry:
        assert registry.search_model_versions("digits") == []
        assert registry.search_registered_models() == []
        assert registry.get_next_version("digits") == 1
        assert registry.create_model_version(source).load_manifest().version == 1
    assert {path.name for path in (tmp_path / "registry" / "versions" / "digits").iterdir()} == {"1"}


def test_challenger_that_becomes_the_champion_is_no_challenger_any_more_and_may_be_withdrawn(registry, tmp_path):
    for number in (1, 2, 3):
        registry.create_model_version(write_version(tmp_path / f"v{number}", number))
    registry.set_registered_model_alias("digits", "champion", 1)
    registry.set_registered_model_alias("digits", "challenger", 2)
    registry.set_registered_model_alias("digits", "champion", 2)
    assert registry.get_model_version_by_alias("digits", "champion").version == 2
    assert registry.get_model_version_by_alias("digits", "previous").version == 1
    with pytest.raises(RegistryError, match="has no challenger; release one first"):
        registry.get_model_version_by_alias("digits", "challenger")
    registry.set_registered_model_alias("digits", "challenger", 3)
    registry.set_registered_model_alias("digits", "champion", 1)
    assert registry.get_model_version_by_alias("digits", "challenger").version == 3
    registry.delete_registered_model_alias("digits", "challenger", version=2)
    assert registry.get_model_version_by_alias("digits", "challenger").version == 3, "another one's withdrawal"
    for _ in range(2):
        registry.delete_registered_model_alias("digits", "challenger", version=3)
    with pytest.raises(RegistryError, match="no challenger"):
        registry.get_model_version_by_alias("digits", "challenger")


def test_tags_belong_to_a_version_and_the_last_one_counts(registry, tmp_path):
    registry.create_model_version(write_version(tmp_path / "v1", 1))
    assert registry.get_model_version_tags("digits", 1) == {}
    for value in ("first", "second"):
        registry.set_model_version_tag("digits", 1, "split", value)
    assert registry.get_model_version_tags("digits", 1) == {"split": "second"}
    with pytest.raises(RegistryError, match="no version 2"):
        registry.set_model_version_tag("digits", 2, "split", "x")
