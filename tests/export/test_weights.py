"""The registry: every entry is complete, consistent, and says what it does not know."""

from __future__ import annotations

import dataclasses
import re

import pytest

from matteserve_client import ModelContract
from matteserve_export import ExportError
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
def test_addresses_are_https_and_verifiable(weights: Weights) -> None:
    for source in weights.sources:
        if source.address is not None:
            assert source.address.startswith("https://")
            assert source.address.endswith("/" + source.file_name)
            assert source.verifiable
            assert source.size_bytes
        assert source.md5 is None or re.fullmatch(r"[0-9a-f]{32}", source.md5)
        assert source.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", source.sha256)


@ALL
def test_licences_are_named(weights: Weights) -> None:
    assert weights.code_licence
    assert weights.weights_licence
    assert weights.paper


def test_no_two_files_share_a_name() -> None:
    names = [source.file_name for weights in REGISTRY.values() for source in weights.sources]
    assert len(names) == len(set(names))


def test_unknown_weights() -> None:
    with pytest.raises(ExportError, match="no weights are called 'u3net'; known are: u2net, u2netp, "):
        find_weights("u3net")


def test_a_size_off_the_grid_is_refused() -> None:
    with pytest.raises(ExportError, match="size 321x320 is no multiple of 32"):
        dataclasses.replace(REGISTRY["u2net"], input_size=(321, 320))


def test_a_zero_std_is_refused() -> None:
    with pytest.raises(ExportError, match="must be positive"):
        dataclasses.replace(REGISTRY["u2net"], std=(0.1, 0.0, 0.1))
