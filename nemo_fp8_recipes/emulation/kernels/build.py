"""Compiling the kernels and keeping the result.

The file in the cache is named by a hash of what decides its content: source, compiler, flags and the CPU
that `-march=native` compiles for (a home directory may be shared by different machines). It is written under
another name and moved into place, so that processes that build at the same time cannot see half a file.
A family of kernels is a file, and the files are compiled side by side: somebody waits for it.
Where the cache cannot be written, the process builds into a directory of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = [
    "CannotBuildError",
    "SlowKernelsWarning",
    "cache_directory",
    "compile_units",
    "find_compiler",
    "kept_library",
    "load",
    "must_compile",
]

SOURCE = Path(__file__).parent / "source"
INTERFACE = 6
"""What `nemo_fp8_interface` of the library answers; raised when a function's arguments change."""

# IEEE arithmetic as torch's: fused multiply-add would round once where the reference rounds twice. That no
# floating-point trap is wanted lets compilers compute both sides of a choice; it changes no result.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
)
NATIVE = "-march=native"
TIMEOUT_SECONDS = 300.0


class SlowKernelsWarning(UserWarning):
    """The emulated device runs without its compiled kernels."""


class CannotBuildError(Exception):
    """Why there are no compiled kernels, in a few words."""


class CompilerFailedError(CannotBuildError):
    """The compiler refused the source or a flag."""


def kept_library(compiler: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the library that `compiler` makes on this machine is kept, once it is made.

    Raises:
        OSError: there is no home directory.
    """
    return cache_directory(environ) / f"kernels-{_fingerprint(compiler)}.so"


def must_compile(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `load` has to run the compiler first, which takes seconds."""
    compiler = find_compiler(environ)
    if compiler is None:
        return False
    try:
        return not kept_library(compiler, environ).exists()
    except OSError:
        return True  # for this process only, see `load`


def load(environ: Mapping[str, str] = os.environ) -> ctypes.CDLL:
    """The compiled library, built if the cache has none.

    Raises:
        CannotBuildError: no compiler, or it failed.
    """
    compiler = find_compiler(environ)
    if compiler is None:
        raise CannotBuildError("no C++ compiler was found (CXX, c++, g++, clang++)")
    try:
        kept = kept_library(compiler, environ)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            with contextlib.suppress(OSError):  # damaged, say: it is built again
                return _open(kept)
        _compile(compiler, kept)
        return _open(kept)
    except OSError:
        # Not writable, or a file system that forbids execution.
        return _load_private(compiler)


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/nemo_fp8_recipes`, by default below `~/.cache`.

    Raises:
        OSError: there is no home directory.
    """
    base = environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "nemo_fp8_recipes"
    try:
        return Path.home() / ".cache" / "nemo_fp8_recipes"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def find_compiler(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The C++ compiler: what `CXX` names, else the first of c++, g++ and clang++ on the path."""
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    found = (shutil.which(name, path=environ.get("PATH")) for name in names)
    return next((Path(path).resolve() for path in found if path is not None), None)


def _sources() -> list[Path]:
    return sorted(SOURCE.iterdir())


def _fingerprint(compiler: Path) -> str:
    about = compiler.stat()
    digest = hashlib.sha256(repr((str(compiler), about.st_size, about.st_mtime_ns, FLAGS, NATIVE)).encode())
    digest.update(_cpu().encode())
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _cpu() -> str:
    """What distinguishes the instruction sets of two CPUs."""
    lines = [platform.machine()]
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as cpuinfo:
            for line in cpuinfo:
                if line.startswith(("flags", "Features", "model name")):
                    lines.append(line)
                elif not line.strip():
                    break  # the first processor is enough
    except OSError:
        lines.append(platform.processor())
    return "\n".join(lines)


def _compile(compiler: Path, target: Path) -> None:
    """Compile into `target`, which appears complete or not at all.

    Raises:
        CannotBuildError: the compiler failed.
        OSError: the directory cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        result = Path(scratch) / target.name
        try:
            compile_units(compiler, (*FLAGS, NATIVE), result)
        except CompilerFailedError:  # a few compilers do not know the CPU they run on
            compile_units(compiler, FLAGS, result)
        result.replace(target)


def compile_units(compiler: Path, flags: Sequence[str], library: Path) -> None:
    """Compile the source files, as many at a time as there are processors, and link them into `library`; the
    objects are left beside it.

    Raises:
        CompilerFailedError: what it said.
        CannotBuildError: it took too long.
        OSError: the directory cannot be written.
    """

    def run(*arguments: str) -> None:
        command = [str(compiler), *flags, *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise CannotBuildError(f"{compiler} took more than {TIMEOUT_SECONDS:.0f} s") from None
        if done.returncode:
            said = done.stderr
            first_error = next((line for line in said.splitlines() if "error" in line), said.strip())
            raise CompilerFailedError(f"{compiler} failed: {first_error[:300]}")

    def compile_one(unit: Path) -> str:
        target = str(library.with_name(f"{unit.stem}.o"))
        run("-c", str(unit), "-o", target)
        return target

    units = [source for source in _sources() if source.suffix == ".cpp"]
    with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as threads:
        objects = list(threads.map(compile_one, units))
    run(*objects, "-o", str(library))


def _load_private(compiler: Path) -> ctypes.CDLL:
    """Build for this process only; the file is gone once it is loaded."""
    try:
        with tempfile.TemporaryDirectory(prefix="nemo_fp8_kernels-") as directory:
            target = Path(directory) / "kernels.so"
            _compile(compiler, target)
            return _open(target)
    except OSError as error:
        raise CannotBuildError(f"the compiled kernels cannot be loaded: {error}") from None


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    try:
        answer = library.nemo_fp8_interface()
    except AttributeError as error:
        raise OSError(str(error)) from error
    if answer != INTERFACE:
        raise OSError(f"{path} has interface {answer}, not {INTERFACE}")
    return library
