"""The kernels and the operator are each one text of their files, for which a library's name stands."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fxpasses.kernels import build, library

FILES = sorted(path.name for path in build._CPP.iterdir())


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The files at a place where they may be changed."""
    for path in build._CPP.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "_CPP", tmp_path)
    return tmp_path


def files_of(main):
    return re.findall(r'^#line 1 "(.+)"$', build.source(main), re.MULTILINE)


@pytest.mark.parametrize("main", [build.KERNELS, build.OPERATOR])
def test_every_file_that_is_included_is_in_the_text_once(main):
    begun = files_of(main)
    assert begun[0] == main
    assert len(set(begun)) == len(begun) > 3
    assert not re.search(r'^#include "|^#pragma once', build.source(main), re.MULTILINE)


def test_no_file_is_in_neither_text_and_the_kernels_see_no_header_of_torch():
    assert {*files_of(build.KERNELS), *files_of(build.OPERATOR)} == set(FILES)
    included = r"^#include <(torch|ATen|c10)/"
    assert not re.search(included, build.source(build.KERNELS), re.MULTILINE)
    found = re.findall(included + r"(.+)>", build.source(build.OPERATOR), re.MULTILINE)
    assert found
    assert all(path.startswith("csrc/stable/") for _, path in found)


@pytest.mark.parametrize("name", files_of(build.KERNELS))
def test_a_change_of_any_file_changes_the_name_of_the_library(copied, name):
    before = build.prebuilt("AVX2").name
    with (copied / name).open("a", encoding="utf-8") as file:
        file.write("// changed\n")
    assert build.prebuilt("AVX2").name != before


def test_a_change_of_a_flag_or_of_the_compiler_changes_the_name_of_the_library(monkeypatch, tmp_path):
    names = {build.prebuilt(vectors).name for vectors in build.VECTOR_FLAGS}
    names.add(build.cached("AVX2", tmp_path, "g++").name)
    other = tmp_path / "g++"
    other.write_text("#!/bin/sh\necho another version\n")
    other.chmod(0o755)
    names.add(build.cached("AVX2", tmp_path, str(other)).name)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    names.add(build.prebuilt("AVX2").name)
    assert len(names) == 5


@pytest.mark.parametrize("main", [build.KERNELS, build.OPERATOR])
def test_the_compiler_is_told_where_each_line_comes_from(main):
    name, at, places = "", 0, {}
    for line in build.source(main).splitlines():
        if marker := re.fullmatch(r'#line (\d+) "(.+)"', line):
            at, name = int(marker[1]), marker[2]
        else:
            places[name, at] = line
            at += 1
    for name in files_of(main):
        written = (build._CPP / name).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(written, 1):
            if line != "#pragma once" and not line.startswith('#include "'):
                assert places[name, number] == line


def test_each_file_begins_with_what_it_is_for_and_ends_in_sight():
    for name in FILES:
        text = (build._CPP / name).read_text(encoding="utf-8")
        assert text.startswith("// ")
        assert len(text.splitlines()) <= 450


# Where a library is found ----------------------------------------------------------------------------------

VECTORS = torch.backends.cpu.get_cpu_capability()
needs_kernels = pytest.mark.needs_kernels


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A cache of this test alone, and a compiler that notes in a file how often it compiled and may fail."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = tmp_path / "compiler"
    command.write_text(
        f"""#!/bin/sh
case $1 in --version) exec g++ --version;; esac
echo compiled >> {tmp_path}/compiled
test -e {tmp_path}/fails && exit 1
exec g++ "$@"
"""
    )
    command.chmod(0o755)
    (tmp_path / "compiled").touch()
    return str(command)


def compiled(folder):
    return len((folder / "compiled").read_text().splitlines())


@pytest.fixture
def small(monkeypatch):
    """A library that says for which vectors it is, and has no kernels, which take long to compile."""
    text = f'extern "C" int fxpasses_vector_length() {{ return {library.vector_length()}; }}'
    monkeypatch.setattr(build, "source", lambda main: text)


@needs_kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("is_torn", [False, True])
def test_a_library_is_compiled_once_for_all_who_ask(compiler, tmp_path, is_torn):
    """Where there is none, or a file that is none."""
    expected = build.cached(VECTORS, tmp_path / "cache" / "fxpasses" / "kernels", compiler)
    if is_torn:
        expected.parent.mkdir(parents=True)
        expected.write_text("not a library")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: library._kernels(VECTORS, compiler), range(4)))
    assert {one.fxpasses_vector_length() for one in found} == {library.vector_length()}
    assert compiled(tmp_path) == 1
    assert {path.suffix for path in expected.parent.iterdir()} == {".so", ".lock"}


@needs_kernels
@pytest.mark.full
def test_a_library_is_compiled_once_for_all_processes(compiler, tmp_path):
    program = (
        "from fxpasses.kernels import library\n"
        f"print(library._kernels({VECTORS!r}, {compiler!r}).fxpasses_vector_length())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert {int(process.communicate()[0]) for process in started} == {library.vector_length()}
    assert compiled(tmp_path) == 1


@needs_kernels
@pytest.mark.usefixtures("small")
def test_where_the_cache_cannot_be_written_the_process_has_kernels_all_the_same(compiler, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    assert library._kernels(VECTORS, compiler).fxpasses_vector_length() == library.vector_length()


@needs_kernels
@pytest.mark.usefixtures("small")
def test_a_library_of_the_package_is_taken_before_any_is_compiled(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    made = build.prebuilt(VECTORS)
    made.parent.mkdir()
    made.write_text("made for another C library")
    assert library._kernels(VECTORS, None) is None
    assert library._kernels(VECTORS, compiler) is not None
    assert compiled(tmp_path) == 1
    made.unlink()
    (built,) = (tmp_path / "cache" / "fxpasses" / "kernels").glob("*.so")
    built.rename(made)
    assert library._kernels(VECTORS, None).fxpasses_vector_length() == library.vector_length()
    assert compiled(tmp_path) == 1


def test_a_compiler_that_fails_or_that_there_is_none_of_means_no_kernels(compiler, tmp_path):
    (tmp_path / "fails").touch()
    assert library._kernels("AVX2", compiler) is None
    assert compiled(tmp_path) == 1
    assert library._kernels("AVX2", None) is None
    assert library._kernels("AVX2", str(tmp_path / "nowhere")) is None
