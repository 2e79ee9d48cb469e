"""Text from elsewhere for a prompt: real files, real links, real ignore files."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.repository import FileText, Repository, fitted
from agent.types import Snippet

ROOMY = 20_000
STORE = """class Store:
    def __init__(self, path: str) -> None:
        self.path = path
    def get(self, key: str) -> bytes:
        return b""

def open_store(path: str) -> Store:
    return Store(path)

def unrelated() -> None:
    pass
"""


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def declared(root: Path, document: str, prefix: str, language: str = "python", **more: object) -> dict[str, str]:
    found = Repository([root]).snippets(root / document, language, prefix, budget_chars=ROOMY, **more)  # type: ignore[arg-type]
    assert len({snippet.path for snippet in found}) == len(found)
    return {snippet.path: snippet.text for snippet in found}


def test_only_what_is_imported(tmp_path: Path) -> None:
    write(tmp_path, {"app/__init__.py": "", "app/store.py": STORE})
    told = "class Store:\n    def __init__(self, path: str) -> None: ...\n    def get(self, key: str) -> bytes: ..."
    for line in ("from app.store import Store", "from .store import Store", "from .store import Store as S"):
        assert declared(tmp_path, "app/main.py", f"{line}\n\nx = ") == {"app/store.py": told}


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ("main.py", "import app.store"),
        ("main.py", "import app.store as store"),
        ("main.py", "from app import store"),
        ("app/deep/main.py", "from .. import store"),
        ("app/deep/main.py", "from app.store import *"),
        ("app/main.py", "def f():\n    from . import store"),
    ],
)
def test_a_whole_module(tmp_path: Path, document: str, line: str) -> None:
    write(tmp_path, {"app/__init__.py": "", "app/deep/__init__.py": "", "app/store.py": STORE})
    (text,) = declared(tmp_path, document, f"{line}\n").values()
    assert [each.split("(")[0] for each in text.split("\n") if not each.startswith(" ")] == [
        "class Store:",
        "def open_store",
        "def unrelated",
    ]


def test_where_modules_lie(tmp_path: Path) -> None:
    files = {"src/one/a.py": "A = 1", "two/b.py": "B = 1", "scripts/c.py": "C = 1", "back/pkg/__init__.py": ""}
    write(tmp_path, {**files, "back/pkg/d.py": "D = 1", "back/pkg/sub/__init__.py": ""})
    lines = "from one.a import A\nfrom two.b import B\nfrom c import C\n"
    assert set(declared(tmp_path, "scripts/main.py", lines)) == {"src/one/a.py", "two/b.py", "scripts/c.py"}
    assert set(declared(tmp_path, "back/pkg/sub/m.py", "from pkg.d import D\n")) == {"back/pkg/d.py"}


def test_modules_of_the_standard_library_are_not_taken_from_the_workspace(tmp_path: Path) -> None:
    write(tmp_path, {"types.py": "class Mine: pass"})
    assert declared(tmp_path, "main.py", "from types import Mine\n") == {}


def test_names_that_are_passed_on(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "app/__init__.py": "from ._inner import *\nfrom .store import open_store as opened",
            "app/_inner/__init__.py": "from .tools import Tool",
            "app/_inner/tools.py": "class Tool: pass\nclass Other: pass",
            "app/store.py": STORE,
        },
    )
    assert declared(tmp_path, "main.py", "from app import Tool, opened\n") == {
        "app/_inner/tools.py": "class Tool: ...",
        "app/store.py": "def open_store(path: str) -> Store: ...",
    }


def test_modules_that_import_each_other(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.py": "from b import *\nfrom b import x\ndef f(): pass", "b.py": "from a import *\nfrom a import x"},
    )
    assert declared(tmp_path, "main.py", "from a import x, f\nfrom b import y\n") == {"a.py": "def f(): ..."}
    assert declared(tmp_path, "a.py", "from b import f\nimport a\n") == {}  # nothing of its own


def test_typescript(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "src/store.ts": "export class Store { get(key: string): Buffer { return x; } }\nexport const other = 1;",
            "src/ui/index.tsx": "export default function Panel(p: Props) { return <a/>; }",
            "src/all.js": "export { Store } from './store';\nexport * from './rest';",
            "src/rest.mjs": "export function rest(a) { }",
            "src/old.cjs": "exports.old = function (a) { };",
        },
    )
    prefix = """import { Store as S, rest } from './all.js';
import Panel from './ui';
import react from 'react';
const { old } = require('./old.cjs');
"""
    assert declared(tmp_path, "src/main.ts", prefix, "typescript") == {
        "src/store.ts": "export class Store {\n  get(key: string): Buffer;\n}",
        "src/rest.mjs": "export function rest(a);",
        "src/ui/index.tsx": "export default function Panel(p: Props);",
        "src/old.cjs": "exports.old = function (a) ...;",
    }


def test_what_is_used_next_to_the_cursor_comes_last(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}.py": f"def {name}_f(): pass\ndef {name}_g(): pass" for name in "abc"})
    prefix = "import c\nfrom b import b_f\nfrom a import a_f\n" + "\n" * 40
    found = Repository([tmp_path]).snippets(tmp_path / "m.py", "python", prefix + "x = b_f(c.c_g(", budget_chars=ROOMY)
    assert [snippet.path for snippet in found] == ["a.py", "b.py", "c.py"]
    assert found[-1].text == "def c_g(): ...\ndef c_f(): ..."


def test_an_open_document_counts_as_it_stands_in_the_editor(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "def saved(): pass"})
    open_documents = [
        FileText(tmp_path / "a.py", "def unsaved(): pass"),
        FileText(tmp_path / "new.py", "def new(): pass"),
    ]
    found = declared(tmp_path, "m.py", "import a, new\n", open_documents=open_documents)
    assert found == {"a.py": "def unsaved(): ...", "new.py": "def new(): ..."}


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    here = Repository([write(tmp_path, {"a.py": "def one(): pass"})])
    for text in ("one", "second", "third"):
        write(tmp_path, {"a.py": f"def {text}(): pass"})
        found = here.snippets(tmp_path / "m.py", "python", "import a\n", budget_chars=ROOMY)
        assert [snippet.text for snippet in found] == [f"def {text}(): ..."]


SIMILAR = "\n".join(f"    account_{n} = ledger.balance(account_id, currency, rounding_{n})" for n in range(6))


def pieces(root: Path, prefix: str, **more: object) -> list[Snippet]:
    return list(Repository([root]).snippets(root / "m.py", "python", prefix, budget_chars=ROOMY, **more))  # type: ignore[arg-type]


def test_similar_pieces_of_open_and_recent_files(tmp_path: Path) -> None:
    far = "unrelated = other(1)\n" * 60
    write(tmp_path, {"closed.py": f"{far}\n{SIMILAR}\n{far}", "new.py": "print(hello)\n"})
    open_documents = [FileText(tmp_path / "open.py", far), FileText(tmp_path / "m.py", SIMILAR)]
    prefix = "def total(ledger, account_id, currency):\n    subtotal = ledger.balance(account_id, currency, "
    (found,) = pieces(
        tmp_path, prefix, open_documents=open_documents, recent_files=[tmp_path / "closed.py", tmp_path / "new.py"]
    )
    assert found.path == "closed.py"
    assert SIMILAR.strip() in found.text
    assert found.text.count("\n") < 24


def test_a_copy_of_the_cursors_surroundings_is_left_out(tmp_path: Path) -> None:
    copy = FileText(tmp_path / "copy.py", SIMILAR)
    assert pieces(tmp_path, SIMILAR, open_documents=[copy]) == []
    other = "def total(ledger, account_id, currency):\n    subtotal = ledger.balance(account_id, "
    assert [each.path for each in pieces(tmp_path, other, open_documents=[copy])] == ["copy.py"]


def test_far_parts_of_the_same_document(tmp_path: Path) -> None:
    prefix = "def total(ledger, account_id, currency):\n    subtotal = ledger.balance(account_id, "
    far, near = "pass\n" * 600, "pass\n" * 40
    assert [each.path for each in pieces(tmp_path, f"{SIMILAR}\n{far}{prefix}")] == ["m.py"]
    assert [each.path for each in pieces(tmp_path, prefix, suffix=f")\n{far}{SIMILAR}\n")] == ["m.py"]
    assert pieces(tmp_path, f"{SIMILAR}\n{near}{prefix}", suffix=f")\n{near}{SIMILAR}\n") == []


def test_recent_edits(tmp_path: Path) -> None:
    edits = [
        FileText(tmp_path / "a.py", "timeout = 3\n"),
        FileText(tmp_path / "b.py", "def retry(times: int) -> None:"),
        FileText(tmp_path / "m.py", "the document's own edit"),
        FileText(tmp_path / "c.py", "def retry(times: int = 3) -> None:"),
        FileText(tmp_path / "d.py", "\n\n"),
        FileText(tmp_path / "e.py", "pasted\n" * 100),
    ]
    found = pieces(tmp_path, "x = ", recent_edits=edits)
    assert found == [Snippet("a.py", "timeout = 3"), Snippet("c.py", "def retry(times: int = 3) -> None:")]


def test_nothing_of_what_may_not_be_read(tmp_path: Path) -> None:
    root = write(
        tmp_path / "w",
        {".gitignore": "made.py\n", "made.py": STORE, "secrets.py": STORE, "shut.py": STORE, "fine.py": "x = 1"},
    )
    write(tmp_path, {"out.py": STORE, "outside/inner.py": STORE})
    (root / "link.py").symlink_to(tmp_path / "out.py")
    (root / "folder").symlink_to(tmp_path / "outside")
    names = ["made.py", "secrets.py", "shut.py", "link.py", "folder/inner.py", "../out.py"]
    here = Repository([root], exclude=["/shut.py"])
    prefix = (
        "from . import made, secrets, shut, link\nfrom .folder import inner\nfrom .. import out\nimport out\n"
        + STORE[:80]
    )
    texts = [FileText(root / name, STORE) for name in names]
    for each in texts:
        assert not here.may_read(each.path)
    paths = [each.path for each in texts]
    more = {"open_documents": texts, "recent_edits": texts, "recent_files": paths}
    for language in ("python", "typescript"):
        assert here.snippets(root / "m.py", language, prefix, budget_chars=ROOMY, **more) == ()  # type: ignore[arg-type]
    assert here.may_read(root / "fine.py")
    assert here.snippets(root / ".env", "python", "import fine\n", budget_chars=ROOMY) == ()


def test_files_that_are_no_readable_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    files: dict[str, str | bytes] = {
        "latin.py": "def latin(): 'é'".encode("latin-1"),
        "wide.py": "def wide(): pass".encode("utf-16"),
        "binary.py": b"def binary(): pass\0",
        "huge.py": b"def huge(): pass\n" + b"# filler\n" * (10 << 20 >> 3),
        "marked.py": b"\xef\xbb\xbfdef marked(): pass\r\nsecond = 2\r\n",
        "folder.py/keep": "",
    }
    write(tmp_path, files)
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "dangling.py").symlink_to("nowhere.py")
    (tmp_path / "loop.py").symlink_to("loop.py")
    names = ["latin", "wide", "binary", "huge", "folder", "pipe", "dangling", "loop", "missing", "marked"]
    recent = [tmp_path / f"{name}.py" for name in names]
    prefix = "".join(f"import {name}\n" for name in names)
    found = declared(tmp_path, "m.py", prefix, recent_files=recent)
    assert found == {"marked.py": "def marked(): ...\nsecond = ..."}
    assert "latin.py is not read: no UTF-8 text" in caplog.text
    assert "huge.py is not read" in caplog.text
    assert "def " not in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": STORE}).joinpath("a.py").chmod(0)
    assert declared(tmp_path, "m.py", "import a\n") == {}


def test_strange_names_break_nothing(tmp_path: Path) -> None:
    for module in ("./\0", "./" + "x" * 5000, "./" + "../" * 500 + "x", ".", "./."):
        assert declared(tmp_path, "m.ts", f"import a from '{module}';\n", "typescript") == {}
    assert (
        declared(
            tmp_path, "m.py", "from " + "." * 500 + " import x\nfrom \ud800 import y\nimport " + "a." * 3000 + "b\n"
        )
        == {}
    )


def test_one_call_reads_a_bounded_number_of_files(tmp_path: Path) -> None:
    write(tmp_path, {f"m{n}.py": f"def f{n}(): pass" for n in range(40)})
    here = Repository([tmp_path])
    prefix = "".join(f"import m{n}\n" for n in range(40))
    counts = [len(here.snippets(tmp_path / "m.py", "python", prefix, budget_chars=ROOMY)) for _ in range(3)]
    assert counts == [32, 40, 40]  # what one call leaves, the next one reads


def test_the_budget_is_kept_and_shared() -> None:
    long = "\n".join(f"line {n}" for n in range(100))
    kinds = ([Snippet("a", long), Snippet("b", "short")], [Snippet("c", long)], [Snippet("d", long)])
    for budget in (0, 10, 100, 400, 5000):
        chosen = fitted(kinds, budget)
        assert sum(len(each.path) + len(each.text) + 2 for each in chosen) <= budget
        assert all(long.startswith(each.text) or each.text == "short" for each in chosen)
    assert [each.path for each in fitted(kinds, 400)] == ["d", "c", "a"]
    assert [each.path for each in fitted(kinds, 5000)] == ["d", "c", "b", "a"]
    assert fitted(([Snippet("a", "a line\n@decorator\ndef f(): ...")], [], []), 50) == ()


def test_without_workspace_or_budget(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": STORE})
    document = tmp_path / "m.py"
    assert Repository([]).snippets(document, "python", "import a\n", budget_chars=ROOMY) == ()
    assert Repository([tmp_path]).snippets(document, "python", "import a\n", budget_chars=0) == ()
    assert Repository([tmp_path]).snippets(document, "cobol", "import a\n", budget_chars=ROOMY) == ()


def test_importing_it_loads_no_grammar() -> None:
    code = "import agent.repository, sys; print(sorted({'tree_sitter', 'pathspec', 'rapidfuzz', 'asyncio', 'torch', 'pygls'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
