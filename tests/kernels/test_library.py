"""The library of our kernels is one text of all files, each once, which the cache has as its key."""

from __future__ import annotations

import re

import pytest

from fxpasses.kernels import library

FILES = sorted(path.name for path in library._CPP.iterdir())


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The files at a place where they may be changed."""
    for path in library._CPP.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(library, "_CPP", tmp_path)
    return tmp_path


def test_every_file_is_in_the_text_once():
    begun = re.findall(r'^#line 1 "(.+)"$', library.source(), re.MULTILINE)
    assert sorted(begun) == FILES
    assert begun[0] == "operators.cpp"
    assert not re.search(r'^#include "|^#pragma once', library.source(), re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_a_change_of_any_file_changes_the_text(copied, name):
    before = library.source()
    with (copied / name).open("a", encoding="utf-8") as file:
        file.write("// changed\n")
    assert library.source() != before


def test_the_compiler_is_told_where_each_line_comes_from():
    name, at, places = "", 0, {}
    for line in library.source().splitlines():
        if marker := re.fullmatch(r'#line (\d+) "(.+)"', line):
            at, name = int(marker[1]), marker[2]
        else:
            places[name, at] = line
            at += 1
    for name in FILES:
        written = (library._CPP / name).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(written, 1):
            if line != "#pragma once" and not line.startswith('#include "'):
                assert places[name, number] == line


def test_each_file_begins_with_what_it_is_for_and_ends_in_sight():
    for name in FILES:
        text = (library._CPP / name).read_text(encoding="utf-8")
        assert text.startswith("// ")
        assert len(text.splitlines()) <= 450
