"""The documentation site builds without a warning, its links lead somewhere, and nothing is fetched from elsewhere."""

import fcntl
import html.parser
import http.server
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from functools import partial
from pathlib import Path

import pytest
from browser import WIDER_THAN_PAGE, Browser

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import draw_docs  # noqa: E402
import site_hook  # noqa: E402


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site as `make docs` does. Not with --quiet: mkdocs then counts no warnings, and nothing is strict."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The site, built once for all workers of the session."""
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == "master" else base.parent) / "site"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.with_suffix(".built").exists():
            built = build(ROOT, out)
            assert built.returncode == 0, built.stderr
            out.with_suffix(".built").touch()
    return out


def test_a_link_that_leads_nowhere_stops_the_build(tmp_path):
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "docs", "scripts", "chunkft", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "scripts").unlink()
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "docs" / "trainers").mkdir(exist_ok=True)
    (tmp_path / "docs" / "trainers" / "mine.md").write_text("# Mine\n\n[lost](../../examples/lost.py)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert "docs/trainers/mine.md: link to '../../examples/lost.py'" in built.stderr


class Addresses(html.parser.HTMLParser):
    """What a page links to, what it loads, and which places in it have names."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if found.get("id"):
            self.names.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(found["href"])


def test_every_link_and_picture_of_the_site_leads_somewhere(site):
    pages = {page: Addresses(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) >= 20
    lost = []
    for page, found in pages.items():
        for address in [*found.links, *found.loaded]:
            parts = urllib.parse.urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            named = parts.fragment.startswith("__") or not parts.fragment or target not in pages
            if not target.is_file() or not (named or parts.fragment in pages[target].names):
                lost.append(f"{page.relative_to(site)}: {address}")
    assert lost == []


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        elsewhere = [a for a in Addresses(page).loaded if urllib.parse.urlsplit(a).netloc]
        assert elsewhere == [], page
    for style in site.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)", style.read_text()) == [], style


def test_every_public_name_is_in_the_reference(site):
    for package in site_hook.PACKAGES:
        dotted = f"chunkft.{package}" if package else "chunkft"
        names = Addresses(site / site_hook.reference_uri(package).replace(".md", ".html")).names
        module = ROOT / dotted.replace(".", "/")
        init = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        public = site_hook.public_names(init)
        # a module of the same name stands before the function in the package's namespace
        hidden = {name for name in public if (module / f"{name}.py").is_file()}
        found = [f"{dotted}.{name}.{name}" if name in hidden else f"{dotted}.{name}" for name in public]
        if not found:
            inner = [p for p in module.glob("*.py") if p.stem != "__init__"]
            found = [f"{dotted}.{p.stem}.{name}" for p in inner for name in site_hook.public_names(p)]
        assert found, package
        assert [name for name in found if name not in names] == []


def test_every_page_is_in_the_navigation(site):
    index = Addresses(site / "index.html")
    linked = {urllib.parse.urlsplit(a).path.removeprefix("./") for a in index.links}
    pages = {
        p.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for p in (ROOT / "docs").rglob("*.md")
    }
    assert pages <= linked


@pytest.mark.parametrize(
    ("page", "link", "turned"),
    [
        ("docs/quality.md", "../bench/results/x.png", "bench/results/x.png"),
        ("docs/trainers/trl.md", "../../bench/results/x.png", "../bench/results/x.png"),
        ("docs/trainers/trl.md", "../method.md", "../method.md"),
        ("docs/method.md", "quality.md", "quality.md"),
        ("docs/method.md", "../README.md", "README.md"),
        ("docs/method.md", "../examples/loop.py", "examples/loop.py.md"),
        ("README.md", "docs/method.md", "method.md"),
        ("README.md", "bench/results/x.png", "bench/results/x.png"),
        ("CONTRIBUTING.md", "docs/trainers/trl.md", "trainers/trl.md"),
        ("bench/README.md", "../docs/method.md", "../method.md"),
        ("docs/method.md", "../bench", "bench/README.md"),
        ("docs/method.md", "https://example.org/a.png", "https://example.org/a.png"),
    ],
)
def test_links_are_turned_from_the_repository_to_the_site(page, link, turned, tmp_path):
    for name in (
        "bench/results/x.png",
        "bench/README.md",
        "examples/loop.py",
        "README.md",
        "docs/quality.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("docs/method.md", "docs/trainers/trl.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = f"see [it]({link}#place) and ![x]({link})\n\n```\n[a]({link})\n```\n`[b]({link})`\n"
    assert site_hook.turned(text, page, tmp_path) == (
        f"see [it]({turned}#place) and ![x]({turned})\n\n```\n[a]({link})\n```\n`[b]({link})`\n"
    )


@pytest.mark.parametrize("link", ["absent.md", "../absent.png", "../../outside.md", "../docs"])
def test_a_link_to_nothing_is_refused_by_name(link, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").touch()
    with pytest.raises(FileNotFoundError, match=re.escape(repr(link))):
        site_hook.turned(f"[x]({link})", "docs/page.md", tmp_path)


def test_patterns_of_the_navigation_take_pages_that_are_named_nowhere_else():
    nav = ["README.md", {"A": ["a.md", "*.md"]}, {"T": ["t/*.md"]}, {"Empty": ["e/*.md"]}, {"One": "c.md"}]
    pages = ["a.md", "b.md", "c.md", "t/x.md", "t/y.md"]
    assert site_hook.expanded(nav, pages) == [
        "README.md",
        {"A": ["a.md", "b.md"]},
        {"T": ["t/x.md", "t/y.md"]},
        {"One": "c.md"},
    ]


@pytest.mark.parametrize("name", sorted(draw_docs.PICTURES))
def test_committed_pictures_are_what_their_sources_draw(name, tmp_path):
    draw_docs.PICTURES[name](tmp_path / name)
    assert (tmp_path / name).read_text() == (ROOT / "docs" / "images" / name).read_text(), (
        "draw it anew: python scripts/draw_docs.py"
    )


def test_a_diagram_with_a_state_that_has_no_place_is_refused():
    page = (ROOT / "docs" / "streaming.md").read_text()
    assert len(draw_docs.changes(page)) >= 16
    with pytest.raises(ValueError, match="LOST"):
        draw_docs.changes(page.replace("HOST --> LOADING", "LOST --> LOADING"))
    with pytest.raises(ValueError, match="no mermaid"):
        draw_docs.changes("no diagram")


@pytest.fixture(scope="module")
def served(site):
    """Address of the site on this machine: its search works over HTTP only."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


PAGES = ("index", "tutorial", "recipes", "comparison", "streaming", "reference/chunkft")


def test_pages_render_on_a_phone_without_errors_or_requests_elsewhere(site, served, tmp_path):
    browser = Browser(tmp_path)
    try:
        for page in PAGES:
            browser.open(f"{served}/{page}.html", width=375, height=812)
            assert browser.evaluate("document.documentElement.scrollWidth") <= 375, (
                page,
                browser.evaluate(WIDER_THAN_PAGE),
            )
            assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), page
        assert browser.errors == []
        assert [u for u in browser.requests if not u.startswith((served, "data:", "blob:"))] == []
    finally:
        browser.close()
