"""Where the product says what went wrong: every place that makes an error or a warning, from the
sources, and the same code with a mark at each that tells when it was reached.

A place is a call: of a class of errors; of what warns or complains; of print to standard error.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

PACKAGE = Path(__file__).resolve().parent.parent / "blktrack"
ROOTS = {"BlktrackError", "ArgumentTypeError"}
SAYERS = {"warn", "_complain", "complain", "Problem", "_problem"}
MARK = "__reached__"  # in the globals of a marked module: a byte for each of its places

_CLASS = re.compile(r"^class (\w+)\(([\w., ]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Site:
    module: str  # "ship.target"
    function: str  # "Target.check", "" at the top
    what: str  # what is called
    text: str  # what the message begins with, as far as it is written there
    line: int

    def __str__(self) -> str:
        path = PACKAGE.name + "/" + self.module.replace(".", "/")
        return f"{path}.py:{self.line}: {self.function}: {self.what}({self.text!r})"

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it when lines have moved."""
        return self.module, self.function, self.text


def error_classes(package: Path = PACKAGE) -> set[str]:
    """The names of all classes of errors that a user can meet."""
    bases = {
        name: {base.strip().rpartition(".")[2] for base in above.split(",")}
        for path in package.rglob("*.py")
        for name, above in _CLASS.findall(path.read_text(encoding="utf-8"))
    }
    found = set(ROOTS)
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


class _Finder(ast.NodeTransformer):
    """Lists the places of a module, and marks them if it is told to."""

    def __init__(self, module: str, errors: set[str], *, mark: bool) -> None:
        self.sites: list[Site] = []
        self._module, self._errors, self._mark = module, errors, mark
        self._inside: list[str] = []

    def _within(self, node: ast.ClassDef | ast.FunctionDef) -> ast.AST:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._within(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._within(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if not self._says(node, called):
            return node
        site = Site(self._module, ".".join(self._inside), called, _text(node), node.lineno)
        self.sites.append(site)
        if not self._mark:
            return node
        reached = f"{MARK}.__setitem__({len(self.sites) - 1}, 1)"
        marked = ast.parse(f"({reached}, 0)[1]", mode="eval").body
        assert isinstance(marked, ast.Subscript) and isinstance(marked.value, ast.Tuple)
        marked.value.elts[1] = node
        for made in (marked, marked.value, marked.slice, *ast.walk(marked.value.elts[0])):
            ast.copy_location(made, node)
        return marked

    def _says(self, node: ast.Call, called: str) -> bool:
        name = called.rpartition(".")[2]
        if name == "print":
            return any(ast.unparse(word.value) == "sys.stderr" for word in node.keywords)
        return name in self._errors or name in SAYERS or called.endswith(
            ("parser.error", "warnings.append")
        )  # fmt: skip


def _text(node: ast.Call) -> str:
    """The first words of the first argument, without what is put in."""
    for argument in node.args:
        for part in ast.walk(argument):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                return part.value.strip()
    return ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sites_of(path: Path, errors: set[str]) -> list[Site]:
    """The places in one module, in the order of their marks."""
    return sites_in(path.read_text(encoding="utf-8"), module_name(path), errors)


def sites_in(source: str, module: str, errors: set[str]) -> list[Site]:
    """The same of a text."""
    finder = _Finder(module, errors, mark=False)
    finder.visit(ast.parse(source))
    return finder.sites


def marked_code(source: bytes, path: str, errors: set[str] | None = None) -> CodeType:
    """The code of a module, with a mark at each place."""
    finder = _Finder(module_name(Path(path)), errors or error_classes(), mark=True)
    tree = finder.visit(ast.parse(source))
    code: CodeType = compile(tree, path, "exec", dont_inherit=True)
    return code
