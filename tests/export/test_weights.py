"""The registry: every entry is complete, consistent, and says what it does not know."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from matteserve_client import ModelContract
from matteserve_export import ExportError
from matteserve_export.models import MODEL_BUILDERS
from matteserve_export.sizing import giga_macs
from matteserve_export.weights import REGISTRY, Weights, find_weights

ALL = pytest.mark.parametrize("weights", REGISTRY.values(), ids=REGISTRY)


@ALL
def test_an_entry_makes_a_contract(weights: Weights) -> None:
    height, width = weights.input_size
    contract = ModelContract(
        height, width, 8, weights.resample, weights.alpha_resample, weights.architecture, weights.name
    )
    assert contract.input_shape == (height, width, 3)


@ALL
def test_addresses_are_https_and_named_as_they_are_kept(weights: Weights) -> None:
    for source in weights.sources:
        assert source.page
        assert source.kind == ("onnx" if source.file_name.endswith(".onnx") else "checkpoint")
        if source.address is not None:
            assert source.address.startswith("https://")
            assert Path(source.address).suffix == Path(source.file_name).suffix
        assert source.size_bytes is None or source.size_bytes > 0
        assert source.md5 is None or re.fullmatch(r"[0-9a-f]{32}", source.md5)
        assert source.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", source.sha256)


@ALL
def test_an_address_without_a_digest_is_one_whose_server_announces_it_or_is_not_pulled_first(weights: Weights) -> None:
    source = weights.downloadable
    assert source is None or source.verifiable or source.address.startswith("https://huggingface.co/")


@ALL
def test_a_fixed_revision_has_a_digest(weights: Weights) -> None:
    for source in weights.sources:
        revision = re.search(r"/resolve/(\w+)/", source.address or "")
        assert revision is None or (revision.group(1) == "main") == (source.sha256 is None)


@ALL
def test_only_patches_have_an_order_and_it_has_a_reason(weights: Weights) -> None:
    assert weights.has_patch_order == bool(weights.patch_order_basis)
    assert weights.patch_order is None or weights.has_patch_order


def test_every_architecture_can_be_exported_by_name() -> None:
    assert {weights.architecture for weights in REGISTRY.values()} >= set(MODEL_BUILDERS)


def test_the_order_follows_from_the_date() -> None:
    for weights in REGISTRY.values():
        for date in re.findall(r"\d{4}-\d\d-\d\d", weights.patch_order_basis):
            assert weights.patch_order == ("legacy" if date < "2024-11-05" else "current")


@ALL
def test_an_architecture_has_code_or_the_weights_have_an_onnx(weights: Weights) -> None:
    assert weights.architecture in MODEL_BUILDERS or weights.source("onnx") is not None
    assert giga_macs(weights.architecture, *weights.input_size) > 0


@ALL
def test_licences_are_named(weights: Weights) -> None:
    assert weights.code_licence
    assert weights.weights_licence
    assert weights.paper


def test_no_two_files_share_a_name() -> None:
    names = [source.file_name for weights in REGISTRY.values() for source in weights.sources]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("u2net", "u2net"),
        ("birefnet-general", "birefnet"),
        ("birefnet-general-lite", "birefnet_lite"),
        ("BiRefNet_lite-2K", "birefnet_lite_2k"),
        ("BiRefNet-DIS5K-TR_TEs", "birefnet_massive"),
        ("isnet-general-use", "isnet"),
        ("isnet-anime", "isnet_anime"),
        ("bria-rmbg", "rmbg_2"),
    ],
)
def test_names_that_people_know(name: str, expected: str) -> None:
    assert find_weights(name).name == expected


# What rembg calls its sessions; the ones left out have several outputs, need a prompt, or take one's own file.
@pytest.mark.parametrize(
    "name",
    [
        *("u2net", "u2netp", "u2net_human_seg", "silueta", "isnet-general-use", "isnet-anime", "birefnet-general"),
        *("birefnet-general-lite", "birefnet-portrait", "birefnet-dis", "birefnet-hrsod", "birefnet-cod"),
        *("birefnet-massive", "bria-rmbg"),
    ],
)
def test_every_model_of_rembg_is_there_with_its_file(name: str) -> None:
    source = next(source for source in find_weights(name).sources if source.page.endswith("danielgatis/rembg"))
    assert source.kind == "onnx"
    assert source.verifiable


def test_no_name_is_taken_twice() -> None:
    names = [name for w in REGISTRY.values() for name in (w.name, *w.aliases)]
    plain = [name.lower().replace("-", "_") for name in names]
    assert len(plain) == len(set(plain))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("u3net", r"did you mean u2net\b.*\? known are: u2net, u2netp, "),
        ("birefnet_ligth", "did you mean birefnet_lite"),
        ("birefnet-portait", "did you mean birefnet_portrait"),
        ("modnet_webcam", "'modnet_webcam'; known are: "),
    ],
)
def test_unknown_weights(name: str, hint: str) -> None:
    with pytest.raises(ExportError, match=hint):
        find_weights(name)


def test_non_commercial_weights_must_be_asked_for() -> None:
    closed = [weights.name for weights in REGISTRY.values() if weights.non_commercial]
    assert closed == ["rmbg_2"]
    with pytest.raises(ExportError, match=r"under CC-BY-NC-4.0, which forbids commercial use.*--accept-non-commercial"):
        find_weights("rmbg_2").require_acceptance(False)
    find_weights("rmbg_2").require_acceptance(True)
    find_weights("u2net").require_acceptance(False)


def test_a_size_off_the_grid_is_refused() -> None:
    with pytest.raises(ExportError, match="size 321x320 is no multiple of 32"):
        dataclasses.replace(REGISTRY["u2net"], input_size=(321, 320))


def test_a_zero_std_is_refused() -> None:
    with pytest.raises(ExportError, match="must be positive"):
        dataclasses.replace(REGISTRY["u2net"], std=(0.1, 0.0, 0.1))
