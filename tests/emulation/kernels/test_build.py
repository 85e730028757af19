"""Building the kernels: once, into a cache, by any number of processes, or not at all."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from nemo_fp8_recipes.emulation.kernels import build, library

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def compiler(tmp_path: Path) -> Mapping[str, str]:
    """An environment whose compiler takes a moment, notes each library and gives out the built one."""
    library()
    found = build.find_compiler()
    assert found is not None
    # By its name: other checkouts may keep theirs beside it.
    compiled = build.cache_directory() / f"kernels-{build._fingerprint(found)}.so"
    if not compiled.exists():
        pytest.skip("the cache of this machine cannot be written")
    fake = tmp_path / "slow-c++"
    fake.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        case " $* " in *" -c "*) ;; *) echo linked >> {tmp_path}/calls ;; esac
        while [ "$1" != -o ]; do shift; done
        head -c 1000 {compiled} > "$2"
        sleep 0.2
        cp {compiled} "$2"
        """)
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return {"PATH": "/bin:/usr/bin", "CXX": str(fake), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().splitlines())


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "nemo_fp8_recipes").iterdir())


def load_elsewhere(environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Load in a process of its own; of the file alone, because importing the package would import torch."""
    program = (
        "import runpy, sys; build = runpy.run_path(sys.argv[1]); "
        "assert build['load']().nemo_fp8_interface() == build['INTERFACE']"
    )
    return subprocess.Popen([sys.executable, "-c", program, build.__file__], env=dict(environ))


def test_it_is_compiled_once_and_kept(compiler: Mapping[str, str], tmp_path: Path) -> None:
    assert build.must_compile(compiler)
    for _ in range(3):
        build.load(compiler)
        assert not build.must_compile(compiler)
    assert calls(tmp_path) == 1
    assert len(cached(tmp_path)) == 1


def test_without_a_compiler_nobody_waits_for_one(tmp_path: Path) -> None:
    assert not build.must_compile({"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")})


def test_processes_that_build_at_once_all_get_a_whole_library(
    compiler: Mapping[str, str], tmp_path: Path
) -> None:
    started = [load_elsewhere(compiler) for _ in range(4)]
    assert [process.wait(timeout=60) for process in started] == [0, 0, 0, 0]
    assert len(cached(tmp_path)) == 1


@pytest.mark.parametrize("change", ["source", "flags", "cpu", "compiler"])
def test_another_source_compiler_or_cpu_is_compiled_again(
    change: str, compiler: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.load(compiler)
    if change == "source":
        copy = tmp_path / "source"
        shutil.copytree(build.SOURCE, copy)
        with (copy / "loops.hpp").open("a") as file:
            file.write("// changed\n")
        monkeypatch.setattr(build, "SOURCE", copy)
    elif change == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    elif change == "cpu":
        monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    else:
        with Path(compiler["CXX"]).open("a") as file:
            file.write("# a new version\n")
    build.load(compiler)
    assert calls(tmp_path) == 2
    assert len(cached(tmp_path)) == 2


def test_a_damaged_file_is_replaced(compiler: Mapping[str, str], tmp_path: Path) -> None:
    assert load_elsewhere(compiler).wait(timeout=60) == 0
    (kept,) = cached(tmp_path)
    kept.write_bytes(b"\x7fELF and nothing more")
    for _ in range(2):
        assert load_elsewhere(compiler).wait(timeout=60) == 0
    assert calls(tmp_path) == 2


def test_where_the_cache_cannot_be_written_it_is_built_for_the_process(
    compiler: Mapping[str, str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    build.load(compiler)
    build.load(compiler)
    assert calls(tmp_path) == 2


def test_a_compiler_that_fails_is_named_with_its_message(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(build.CannotBuildError, match=r"broken-c\+\+ failed: .*no such thing"):
        build.load({"CXX": str(broken), "XDG_CACHE_HOME": str(tmp_path / "cache")})
