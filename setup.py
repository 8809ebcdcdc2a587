"""Lists the packages and builds the native extension `commvq_core._C` where that is possible.

Everything else is in pyproject.toml. COMMVQ_BUILD says what to build:

- `auto` (default): CPU kernels, and CUDA kernels when torch was built for CUDA and nvcc is here.
  What cannot be built is left out with a line of warning: the PyTorch operators serve instead.
- `cpu`, `cuda`: the same, but fail when it cannot be built (`cuda` includes the CPU kernels).
- `off`: nothing.

The extension uses torch's stable ABI and no CPython API at all, so that one binary serves every
Python from 3.10 and every torch from 2.10.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, find_packages, setup

SETTINGS = ("auto", "cpu", "cuda", "off")
MINIMUM_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the oldest torch that the binary loads in
MINIMUM_PYTHON_ABI = "cp310"
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST names others

# GCC and Clang. Without contraction, a multiply and an add round the same on every SIMD level, so
# that codes do not depend on the machine that made them. Never -march=native.
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]


PROBE = "#include <concepts>\ntemplate <std::integral T> T f(T x) { return x; }\n"


class CannotBuildError(Exception):
    """Why the native extension cannot be built here, in one line."""


def setting() -> str:
    """The value of COMMVQ_BUILD; leaves with a clear message when it is none of ours."""
    value = os.environ.get("COMMVQ_BUILD", "auto").strip().lower() or "auto"
    if value not in SETTINGS:
        raise SystemExit(f"error: COMMVQ_BUILD={value}: use one of {', '.join(SETTINGS)}")
    return value


def check_torch() -> None:
    """Raises CannotBuildError unless a torch that we can build against is installed."""
    try:
        import torch
    except ImportError:
        raise CannotBuildError(
            f"torch is not installed in {sys.prefix}: run `pip install torch` first, then install "
            "commvq with `pip install --no-build-isolation` (or set COMMVQ_BUILD=off)"
        ) from None
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        raise CannotBuildError(
            f"torch {torch.__version__} is too old: install 2.10 or newer (or set COMMVQ_BUILD=off)"
        )


def check_compiler() -> None:
    """Raises CannotBuildError unless the C++ compiler that torch would call compiles C++20."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(
            "#include <concepts>\ntemplate <std::integral T> T f(T x) { return x; }\n"
        )
        command = [*compiler.split(), "-std=c++20", "-c", str(source), "-o", f"{folder}/probe.o"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        except FileNotFoundError:
            raise CannotBuildError(f"there is no C++ compiler ({compiler} not found)") from None
        except (OSError, subprocess.SubprocessError):
            raise CannotBuildError(
                f"the C++ compiler ({compiler}) does not compile C++20"
            ) from None


def cuda_sources() -> list[str]:
    return sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))


def check_cuda() -> None:
    """Raises CannotBuildError unless the CUDA kernels can be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not cuda_sources():
        raise CannotBuildError("there are no CUDA kernels in csrc/cuda")
    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} was built without CUDA")
    if CUDA_HOME is None:
        raise CannotBuildError("nvcc was not found (set CUDA_HOME)")


def extension(with_cuda: bool) -> Extension:
    """The extension as torch wants it described."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    arguments = {"cxx": CXX_FLAGS}
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += cuda_sources()
        headers += sorted(str(path) for path in Path("csrc").rglob("*.cuh"))
        arguments["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA"]
    kind = CUDAExtension if with_cuda else CppExtension
    return kind(
        name="commvq_core._C",
        sources=sources,
        depends=headers,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=arguments,
        py_limited_api=True,
    )


def plan(wanted: str) -> tuple[list[Extension], list[str]]:
    """What to build for this setting, and what is left out and why.

    Raises CannotBuildError when the setting demands what is not possible. Nothing is compiled here
    but a probe of a few lines.
    """
    if wanted == "off":
        return [], []
    check_torch()
    try:
        check_compiler()
    except CannotBuildError as error:
        if wanted != "auto":
            raise
        return [], [f"{error}: native kernels are left out, the slower PyTorch operators serve"]
    if wanted == "cpu":
        return [extension(with_cuda=False)], []
    try:
        check_cuda()
    except CannotBuildError:
        if wanted == "cuda":
            raise
        return [extension(with_cuda=False)], []  # no CUDA here is the usual case: no warning
    return [extension(with_cuda=True)], []


def build_command(wanted: str) -> type[Command]:
    """torch's build_ext, which under `auto` survives a build that fails."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if wanted != "auto":
                    raise
                cause = str(error).strip().splitlines() or [type(error).__name__]
                warn(f"compiling failed ({cause[0]}): native kernels are left out (see above)")
                self.extensions = []  # so that nobody looks for the missing file

    return BuildNative


def warn(text: str) -> None:
    print(f"commvq: warning: {text}", file=sys.stderr, flush=True)


def build_options() -> dict[str, Any]:
    """The arguments of setup() that concern the extension."""
    compiles = {"build_ext", "build", "bdist_wheel", "editable_wheel", "develop", "install"}
    if not compiles & set(sys.argv[1:]):  # metadata and sdist must not need torch or a compiler
        return {}
    wanted = setting()
    try:
        extensions, left_out = plan(wanted)
    except CannotBuildError as error:
        raise SystemExit(
            f"error: cannot build commvq with COMMVQ_BUILD={wanted}: {error}"
        ) from None
    for text in left_out:
        warn(text)
    if not extensions:
        return {}
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build_command(wanted)},
        "options": {"bdist_wheel": {"py_limited_api": MINIMUM_PYTHON_ABI}},
    }


setup(
    packages=[
        *find_packages(include=["commvq_core", "commvq_core.*"]),
        "commvq_cli",
        *(f"commvq_cli.{name}" for name in find_packages("cli")),
    ],
    package_dir={"commvq_cli": "cli"},
    **build_options(),
)
