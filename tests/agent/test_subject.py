import pytest

from agent.subject import Kind, Subject, enclosing, subject_of


@pytest.mark.parametrize(
    ("code", "name", "parameters"),
    [
        ("def f(a, b=1, *args, c: int = 3, **kw):\n    pass", "f", ("a", "b", "args", "c", "kw")),
        ("async def g(self, x: dict[str, int]) -> None:", "g", ("x",)),
        ("    @cached\n    def h(\n        cls,\n        one,\n        two=(1, 2),\n    ):", "h", ("one", "two")),
        ("export function add(a: number, b?: string): void {", "add", ("a", "b")),
        ("const add = async (a, b) => {", "add", ("a", "b")),
        ("pub fn push(&mut self, value: T) -> bool {", "push", ("value",)),
        ("func (s *Server) Run(port int, name string) error {", "Run", ("port", "name")),
        ("public static int sum(int a, List<String> names) {", "sum", ("a", "names")),
        ('def join(items, sep=", ", end=")"):', "join", ("items", "sep", "end")),
        ("def f(a=1 << 3, b=2 > 1):", "f", ("a", "b")),
        ("fn f<T>(a: Vec<Vec<T>>, g: Fn(i32) -> i32) {", "f", ("a", "g")),
        ("int *find(const char *key, size_t n) {", "find", ("key", "n")),
    ],
)
def test_functions(code: str, name: str, parameters: tuple[str, ...]) -> None:
    assert subject_of(code) == Subject(Kind.FUNCTION, name, parameters)


@pytest.mark.parametrize("code", ["class Row(Base):", "export class Row {", "pub struct Row {", "interface Row {"])
def test_classes(code: str) -> None:
    assert subject_of(code) == Subject(Kind.CLASS, "Row")


@pytest.mark.parametrize(
    "code",
    [
        "x = 1\n",
        "if (a) {\n",
        "for (i = 0; i < n; i++) {",
        "return f(x)",
        "",
        "print(f(1))",
        "raise ValueError(a, b)",
        "await foo(a, b)",
    ],
)
def test_code_that_defines_nothing(code: str) -> None:
    assert subject_of(code).kind is Kind.CODE


PYTHON = """\
import os

@cached
@other
def first(a):
    if a:

        return 1
    return 2

class Row:
    def get(self):
        return 1

    def put(self, x):
        self.x = x

VALUE = 3
""".split("\n")

BRACES = """\
function f(a) {
  if (a) {
    return 1;
  }
  return 2;
}

int main(void)
{
    return 0;
}
""".split("\n")


@pytest.mark.parametrize(
    ("lines", "line", "first", "last"),
    [
        (PYTHON, 4, "@cached", "    return 2"),
        (PYTHON, 7, "@cached", "    return 2"),
        (PYTHON, 6, "@cached", "    return 2"),
        (PYTHON, 10, "class Row:", "        self.x = x"),
        (PYTHON, 15, "    def put(self, x):", "        self.x = x"),
        (BRACES, 2, "function f(a) {", "}"),
        (BRACES, 9, "int main(void)", "}"),
    ],
)
def test_enclosing(lines: list[str], line: int, first: str, last: str) -> None:
    begin, after = enclosing(lines, line)
    assert (lines[begin], lines[after - 1]) == (first, last)


def test_long_lines_take_no_time() -> None:
    for line in ("def f" + " " * 20_000 + "x(", "a" * 20_000 + "(", "a " * 10_000 + "(", "def f(" + "a=(" * 10_000):
        assert subject_of(line).parameters in ((), ("a",))


def test_nothing_encloses_the_top_level() -> None:
    assert enclosing(PYTHON, 17) == (0, len(PYTHON))
    assert enclosing(PYTHON, 99) == (0, len(PYTHON))
    assert enclosing([], 0) == (0, 0)
