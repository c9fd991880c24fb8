"""Write the source tree in CONTRIBUTING.md: every module with the first line of its docstring.

python scripts/write_source_tree.py
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "CONTRIBUTING.md"
BEGIN: Final = "<!-- written by scripts/write_source_tree.py -->\n"
END: Final = "<!-- end of the source tree -->\n"
FLOORS: Final = ("promprune", "runtime", "export")
LINKS: Final = ("promprune/export", "promprune/runtime")  # the same files as those of the other two folders


def summary_of(path: Path) -> str:
    """Return the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def tree_of(floor: str) -> str:
    """List the files of one part, folder by folder; the docstring of a package describes its folder."""
    lines = []
    files = [path for path in sorted((ROOT / floor).rglob("*.py")) if not relative(path).startswith(LINKS)]
    for folder in sorted({path.parent for path in files}):
        about = folder / "__init__.py"
        lines.append(f"{relative(folder)}/".ljust(36) + (summary_of(about) if about.is_file() else ""))
        names = [path for path in files if path.parent == folder and path != about]
        lines += [f"  {path.name}".ljust(36) + summary_of(path) for path in names]
    return "\n".join(line.rstrip() for line in lines)


def relative(path: Path) -> str:
    """Return a path as it is written on the page."""
    return path.relative_to(ROOT).as_posix()


def fill(page: str) -> str:
    """Return the page with today's tree between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n```\n" + "\n".join(map(tree_of, FLOORS)) + "\n```\n\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
