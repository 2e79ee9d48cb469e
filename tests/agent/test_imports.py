"""What texts import, and where that may lie."""

from pathlib import Path

import pytest

from agent.imports import EVERYTHING, Import, candidates, imports, submodule


def test_python() -> None:
    text = """
import a.b as c, d
from ..x import (y as z,  # why
    w)
from . import q
from k import *
from __future__ import annotations
def f():
    from l import m
    broken(
"""
    assert imports(text, "python") == (
        Import("a.b", None, "c"),
        Import("d", None, "d"),
        Import("..x", "y", "z"),
        Import("..x", "w", "w"),
        Import(".", "q", "q"),
        Import("k", EVERYTHING, EVERYTHING),
        Import("l", "m", "m"),
    )


@pytest.mark.parametrize("language", ["typescript", "typescriptreact"])
def test_typescript(language: str) -> None:
    text = """
import d, { a, b as c, type T, /* why */ } from './x';
import * as ns from '../y';
import req = require('./z');
import './effect';
import react from 'react';
export { a as e } from './v';
export * from './u';
export * as all from './t';
"""
    assert imports(text, language) == (
        Import("./x", "default", "d"),
        Import("./x", "a", "a"),
        Import("./x", "b", "c"),
        Import("./x", "T", "T"),
        Import("../y", None, "ns"),
        Import("./z", None, "req"),
        Import("./v", "a", "e"),
        Import("./u", EVERYTHING, EVERYTHING),
        Import("./t", None, "all"),
    )


@pytest.mark.parametrize("language", ["javascript", "javascriptreact", "typescript"])
def test_require(language: str) -> None:
    text = (
        "const { p, q: r } = require('./w'), w = require(`./w`), fs = require('fs'), n = require(), o = other('./w');"
    )
    assert imports(text, language) == (Import("./w", "p", "p"), Import("./w", "q", "r"), Import("./w", None, "w"))


def test_other_languages_have_none() -> None:
    assert imports("import java.util.List;", "java") == ()
    assert imports("import os", "plaintext") == ()


def files(module: str, language: str, importer: str, *bases: str) -> list[str]:
    return [str(path) for path in candidates(module, language, Path(importer), [Path(base) for base in bases])]


def test_python_files() -> None:
    assert files("a.b", "python", "/w/p/m.py", "/w", "/w/src")[:4] == [
        "/w/a/b.py",
        "/w/a/b/__init__.py",
        "/w/a/b.pyi",
        "/w/src/a/b.py",
    ]
    assert files(".", "python", "/w/p/m.py", "/w") == ["/w/p/__init__.py"]
    assert files("..x", "python", "/w/p/m.py", "/w") == ["/w/x.py", "/w/x/__init__.py", "/w/x.pyi"]
    assert files("." * 9 + "x", "python", "/w/p/m.py", "/w") == []
    assert files("json.decoder", "python", "/w/p/m.py", "/w") == []  # the standard library's


def test_script_files() -> None:
    found = files("./x", "typescript", "/w/p/m.ts")
    assert found[:3] == ["/w/p/x.ts", "/w/p/x.tsx", "/w/p/x.d.ts"]
    assert "/w/p/x/index.js" in found
    assert files("../x.js", "typescript", "/w/p/m.ts")[:3] == ["/w/x.ts", "/w/x.tsx", "/w/x.js"]
    assert files("react", "typescript", "/w/p/m.ts", "/w") == []


def test_submodule() -> None:
    assert [submodule(".", "a"), submodule("..b", "a"), submodule("b", "a")] == [".a", "..b.a", "b.a"]
