"""Builds the native module chunkft._core with CMake and Ninja; everything else is in pyproject.toml."""

import contextlib
import hashlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")


def cmake_arguments() -> list[str]:
    """Return the words of $CMAKE_ARGS, quoted as in a shell."""
    text = os.environ.get("CMAKE_ARGS", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SetupError(f"CMAKE_ARGS={text!r} must be words quoted as in a shell: {error}") from error


def find_compiler() -> str:
    """Return $CXX (a program, maybe with arguments), or the path of the first of c++, g++, clang++."""
    wanted = os.environ.get("CXX", "").strip()
    if wanted and shutil.which(wanted.split()[0]):
        return wanted
    for name in () if wanted else COMPILERS:
        if path := shutil.which(name):
            return path
    if wanted:
        looked = f"CXX={wanted!r} names no program"
    else:
        looked = f"the PATH has none of {', '.join(COMPILERS)}"
    raise SetupError(
        f"chunkft needs a C++20 compiler (GCC >= 11, Clang >= 14), but {looked}. "
        "Install one: Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
        "macOS: xcode-select --install; or point CXX to it."
    )


def check_python_headers() -> None:
    """Raise if the interpreter came without the headers that an extension module needs."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise SetupError(
            f"chunkft needs the headers of this Python, but {header} does not exist. Install them: "
            "Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel."
        )


def find_tool(name: str, directory_attribute: str) -> str:
    """Return the path of cmake or ninja, from the Python package of that name, else from the PATH.

    The package comes first: in a build without isolation the environment's scripts need not be on the PATH.
    """
    with contextlib.suppress(ImportError):
        directory = getattr(importlib.import_module(name), directory_attribute, None)
        if directory and (path := shutil.which(name, path=directory)):
            return path
    if path := shutil.which(name):
        return path
    raise SetupError(f"chunkft is built with {name}, which is missing: pip install {name}")


def pybind11_directory() -> str:
    """Return the directory of pybind11's CMake files."""
    try:
        return str(importlib.import_module("pybind11").get_cmake_dir())
    except ImportError:
        raise SetupError("chunkft is built with pybind11, which is missing: pip install pybind11") from None


class CMakeBuild(build_ext):
    """Runs CMake in a build directory that is kept, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        check_python_headers()
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        pybind11 = pybind11_directory()

        # CMake ties a build directory to its source, compiler and Python: each combination gets its own.
        # So do arguments: a cache keeps those of before.
        arguments = cmake_arguments()
        key = hashlib.sha256(f"{ROOT}\n{compiler}\n{sys.executable}\n{arguments}".encode()).hexdigest()[:8]
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{key}"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            # Passed each time: what the cache holds from an isolated build went away with its environment.
            *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-Dpybind11_DIR={pybind11}"),
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
            *arguments,
            f"-DCHUNKFT_VERSION={self.distribution.get_version()}",
        ]
        for command in (configure, [cmake, "--build", str(build), "--target", "_core"]):
            try:
                subprocess.run(command, check=True, env={**os.environ, "CXX": compiler})
            except subprocess.CalledProcessError as error:
                raise SetupError(
                    f"building chunkft._core failed: {' '.join(command)} ended with status "
                    f"{error.returncode}; the lines above say why"
                ) from None

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # With a new time stamp: setuptools updates the file in the source tree only if this one is newer.
        shutil.copy(build / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}", target)


setup(
    packages=[*find_packages(include=["chunkft", "chunkft.*"]), "chunkft_bench"],
    # The benchmarks run as `bench` from a checkout; a name as common as that is not for other people's environments.
    package_dir={"chunkft_bench": "bench"},
    ext_modules=[Extension("chunkft._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
