"""Balancers by name."""

from __future__ import annotations

import pytest

import fastmto
from fastmto import balancers
from fastmto.balancers.registry import METHODS, method

# fmt: off
KEYS = [
    "ls", "si", "rlw", "dwa", "uncertainty", "banditmtl", "imtl_l", "gradnorm", "famo", "ldc_mtl",
    "mgda", "mgda_ub", "pcgrad", "graddrop", "cagrad", "imtl_g", "imtl", "nashmtl", "upgrad",
    "dualproj", "fairgrad", "aligned_mtl", "db_mtl", "pub", "marigold",
]
# fmt: on


def test_every_method_is_there_once():
    assert fastmto.available() == KEYS
    for key in KEYS:
        balancer = fastmto.get(key, n_tasks=3)
        assert isinstance(balancer, balancers.Balancer)
        assert balancer.key == key
        assert balancer.n_tasks == 3
        assert getattr(balancers, METHODS[key]) is type(balancer)
        assert METHODS[key] in balancers.__all__


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("UW", "uncertainty"),
        ("EW", "ls"),
        ("scaleinvls", "si"),
        ("Nash_MTL", "nashmtl"),
        ("Nash-MTL", "nashmtl"),
        ("DB_MTL", "db_mtl"),
        ("Aligned_MTL", "aligned_mtl"),
        ("AlignedMTL", "aligned_mtl"),
        ("IMTL-G", "imtl_g"),
        ("IMTLL", "imtl_l"),
        ("MGDA-UB", "mgda_ub"),
        ("UPGrad", "upgrad"),
        ("Random", "rlw"),
        ("LDC-MTL", "ldc_mtl"),
    ],
)
def test_other_spellings(spelling, key):
    assert method(spelling).key == key


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"name must be one of ls, si, .*, got 'adam'"):
        fastmto.get("adam")
    with pytest.raises(ValueError, match="name must be a string, got 3"):
        fastmto.get(3)
    with pytest.raises(TypeError, match="momentum"):
        fastmto.get("cagrad", momentum=0.9)
