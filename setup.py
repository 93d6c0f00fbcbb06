"""Builds the two native extensions; everything else is in pyproject.toml.

Neither links against torch, so one build serves every torch version.
"""

import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup


def sources(folder: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob("*.cpp"))


def headers(folder: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob("*.h"))


# No contraction: every instruction set must round alike. errno and traps are not looked at.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# torch's Linux wheels carry libgomp, so the kernels share its threads; macOS has no OpenMP.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

# As many compilers as processors, or as many as the variable says.
ParallelCompile("FASTMTO_BUILD_JOBS", default=0).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "fastmto.solvers._solvers",
            sources("solvers"),
            depends=headers("solvers"),
            cxx_std=17,
            extra_compile_args=FLAGS,
        ),
        Pybind11Extension(
            "fastmto.ops._kernels",
            sources("kernels"),
            depends=headers("kernels"),
            cxx_std=17,
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
        ),
    ],
    cmdclass={"build_ext": build_ext},
)
