"""Hook of mkdocs: the pages under docs/ are read on a code host as well, and stay as they are for that.

For the site, links that leave docs/ are turned, and what they lead to is taken along; the reference is made from
docstrings; diagrams that a code host draws in the browser are replaced by the drawn picture.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

REPO = Path(__file__).resolve().parent.parent
DOCS = "docs/"
PACKAGES = ("", "optim", "kernels", "autograd", "streaming", "schedule", "integrations")
FENCE = re.compile(r"^```.*?^```$|^~~~.*?^~~~$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")
MERMAID = re.compile(r"^```mermaid\n.*?^```$", re.DOTALL | re.MULTILINE)
# Shown with colours instead of handed out as a download.
SOURCE = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml"}

log = logging.getLogger("mkdocs.hooks.site")


def site_path(repo_path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    if repo_path.startswith(DOCS):
        return repo_path.removeprefix(DOCS)
    return repo_path + ".md" if posixpath.splitext(repo_path)[1] in SOURCE else repo_path


def repo_path(site_uri: str) -> str:
    """The file of the repository behind a page of the site: the inverse of `site_path` for pages."""
    return DOCS + site_uri if (REPO / DOCS / site_uri).exists() else site_uri


def links(text: str) -> Iterator[str]:
    """Relative targets of the links of a page, code left out."""
    for match in LINK.finditer(FENCE.sub("", text)):
        if not re.match(r"[a-z]+:|/", match[2]):
            yield match[2]


def target_of(page: str, link: str, root: Path = REPO) -> str:
    """The file of the repository that `link` on the page at `page` (path in the repository) means.

    Raises:
        FileNotFoundError: if there is no such file. A folder stands for its README.md and needs one.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (root / path).is_dir():
        path = posixpath.join(path, "README.md")
    if path.startswith("..") or not (root / path).is_file():
        raise FileNotFoundError(f"{page}: link to {link!r}: {path} is not a file of the repository")
    return path


def turned(text: str, page: str, root: Path = REPO) -> str:
    """The text of a page with its relative links turned from places in the repository to places in the site."""
    here = posixpath.dirname(site_path(page))

    def turn(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:|/", match[2]):
            return match[0]
        place = posixpath.relpath(site_path(target_of(page, match[2], root)), here or ".")
        return f"{match[1]}{place}{match[3] or ''})"

    pieces, end = [], 0
    for code in FENCE.finditer(text):
        pieces += [LINK.sub(turn, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(turn, text[end:])])


def public_names(module: Path) -> list[str]:
    """The names of `__all__` of a module, or else its public functions and classes; read, not imported."""
    body = ast.parse(module.read_text()).body
    for node in body:
        names = (
            [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
        )
        if isinstance(node, ast.Assign) and "__all__" in names:
            return list(ast.literal_eval(node.value))
    return [
        n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
    ]


def identifier(dotted: str, name: str, place: Path) -> str:
    """The dotted name of a public name of a package, which a module of the same name would otherwise hide."""
    return f"{dotted}.{name}.{name}" if (place / f"{name}.py").is_file() else f"{dotted}.{name}"


def reference(package: str, root: Path = REPO) -> str:
    """The page of the reference for one package: its public names, or those of its modules where it has none."""
    dotted = f"chunkft.{package}" if package else "chunkft"
    place = root / dotted.replace(".", "/")
    module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = [
        f"# {dotted}\n",
        f"::: {dotted}\n    options:\n      members: []\n      show_root_heading: false\n",
    ]
    if names := public_names(module):
        text += [f"::: {identifier(dotted, name, place)}\n" for name in names]
    for inner in sorted(place.glob("*.py")) if not names else ():
        if inner.stem != "__init__" and (found := public_names(inner)):
            text.append(f"## {dotted}.{inner.stem}\n")
            text += [
                f"::: {dotted}.{inner.stem}.{name}\n    options:\n      heading_level: 3\n" for name in found
            ]
    return "\n".join(text)


def reference_uri(package: str) -> str:
    """Place of the reference page of a package in the site."""
    return f"reference/{package or 'chunkft'}.md"


def expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """The navigation with each pattern (`trainers/*.md`) replaced by the pages that match and are named nowhere else;
    sections that stay empty are left out.
    """
    named = set(_leaves(nav))

    def walk(entries: list[Any]) -> list[Any]:
        found: list[Any] = []
        for entry in entries:
            if isinstance(entry, dict):
                ((title, inside),) = entry.items()
                inner = walk(inside) if isinstance(inside, list) else inside
                if inner:
                    found.append({title: inner})
            elif "*" in entry:
                match = re.compile(re.escape(entry).replace(r"\*", "[^/]*"))
                found += [page for page in pages if match.fullmatch(page) and page not in named]
            else:
                found.append(entry)
        return found

    return walk(nav)


def _leaves(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from _leaves(inside) if isinstance(inside, list) else [inside]


def on_config(config: Any) -> Any:
    """Fills in the patterns of the navigation."""
    docs = Path(config.docs_dir)
    pages = sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))
    pages += [reference_uri(package) for package in PACKAGES]
    config.nav = expanded(config.nav, pages)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the reference, and whatever of the repository the pages lead to."""
    for package in PACKAGES:
        files.append(File.generated(config, reference_uri(package), content=reference(package)))
    queue = ["README.md", *(DOCS + f.src_uri for f in files.documentation_pages() if f.generated_by is None)]
    files.append(File.generated(config, "README.md", abs_src_path=str(REPO / "README.md")))
    while queue:
        page = queue.pop()
        for link in links((REPO / page).read_text()):
            try:
                target = target_of(page, link)
            except FileNotFoundError as error:
                log.warning("%s", error)
                continue
            if files.get_file_from_path(site_path(target)) is None:
                files.append(_taken_along(config, target))
                if target.endswith(".md"):
                    queue.append(target)
    return files


def _taken_along(config: Any, target: str) -> File:
    language = SOURCE.get(posixpath.splitext(target)[1])
    shown = InclusionLevel.INCLUDED if target in _leaves(config.nav) else InclusionLevel.NOT_IN_NAV
    if language is None:
        return File.generated(config, site_path(target), abs_src_path=str(REPO / target), inclusion=shown)
    code = (REPO / target).read_text()
    content = f'# {posixpath.basename(target)}\n\n````{language} title="{target}"\n{code}````\n'
    return File.generated(config, site_path(target), content=content, inclusion=shown)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links, and puts the drawn picture in the place of a diagram that a script from elsewhere would draw."""
    source = repo_path(page.file.src_uri)
    if not (REPO / source).is_file():
        return markdown
    try:
        markdown = turned(markdown, source)
    except FileNotFoundError:  # on_files has warned
        return markdown
    if MERMAID.search(markdown) and page.file.src_uri == "streaming.md":
        markdown = MERMAID.sub("![The states of a page](images/page-states.svg)", markdown)
    return markdown
