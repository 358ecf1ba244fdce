"""What a build promises: it repeats, ships everything, and says what to install where something lacks."""

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import ninja
import pytest

import chunkft
from chunkft import _core

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command, cwd=ROOT, env=None, prelude=None):
    """Run a command; with a `prelude` of Python statements, setup.py with `command` as its arguments."""
    if prelude is not None:
        code = (
            f"import runpy, sys\n{prelude}\nsys.argv = {['setup.py', *command]!r}\nrunpy.run_path('setup.py')"
        )
        command = (sys.executable, "-c", code)
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )


def run_or_fail(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """An unpacked source distribution, so that what it lacks is missed."""
    place = tmp_path_factory.mktemp("sdist")
    run_or_fail(
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        place,
        "sdist",
        "--dist-dir",
        place,
        cwd=ROOT,
    )
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return place / f"chunkft-{PROJECT['project']['version']}"


def test_source_distribution_holds_what_a_build_needs(source_tree):
    tracked = run_or_fail("git", "ls-files", "csrc", "chunkft") if (ROOT / ".git").exists() else ""
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", *tracked.split()}
    missing = sorted(name for name in wanted if not (source_tree / name).is_file())
    assert missing == []


@pytest.mark.slow
def test_second_build_works_without_the_tools_of_the_first(source_tree, tmp_path):
    """An isolated build leaves a CMake cache that names tools which are gone afterwards."""
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    # Of the same version as the second build's: another one does not trust the log, and compiles everything again.
    shutil.copy2(Path(ninja.BIN_DIR) / "ninja", isolated / "ninja")
    first = f"import types; sys.modules['ninja'] = types.SimpleNamespace(BIN_DIR={str(isolated)!r})"
    build = ("-q", "build_ext", "--inplace")
    fast = {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}  # what is compiled is not what is tested

    done = run(*build, cwd=source_tree, env=fast, prelude=first)
    assert done.returncode == 0, done.stdout + done.stderr
    (extension,) = (source_tree / "chunkft").glob("_core.*.so")
    (object_file,) = (source_tree / "build").rglob("bindings.cpp.o")
    (cache,) = (source_tree / "build").rglob("CMakeCache.txt")
    assert str(isolated) in cache.read_text()
    assert re.search(r"^CMAKE_CXX_FLAGS_RELEASE:\w+=-O0$", cache.read_text(), re.MULTILINE)
    compiled = object_file.stat().st_mtime_ns
    shutil.rmtree(isolated)
    extension.write_bytes(b"stale")  # and newer than what was built

    done = run(*build, cwd=source_tree, env=fast, prelude="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert object_file.stat().st_mtime_ns == compiled, "nothing had changed, yet it was compiled again"
    assert extension.read_bytes() != b"stale", "the module in the source tree was not brought up to date"

    run_or_fail(
        sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path, cwd=source_tree, env=fast
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"chunkft/{extension.name}", "chunkft/py.typed", "chunkft/_core.pyi"}
    expected |= {"chunkft_bench/html_report.css"}
    expected |= {f"chunkft_bench/{file.name}" for file in (ROOT / "bench").glob("*.py")}
    assert [name for name in names if name.startswith("bench/") or "/results/" in name] == []
    data = source_tree / "chunkft" / "data"
    expected |= {str(file.relative_to(source_tree)) for file in data.rglob("*") if file.is_file()}
    assert expected - names == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import importlib.machinery as m, importlib.util as u; "
        "spec = u.spec_from_file_location('_core', sys.argv[1]); module = u.module_from_spec(spec); "
        "spec.loader.exec_module(module); print(module.__version__, module.HostArena(5).nbytes)"
    )
    assert run_or_fail(sys.executable, "-c", code, extension).split() == [PROJECT["project"]["version"], "5"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CXX": "/nonexistent/c++"}, r"CXX='/nonexistent/c\+\+' names no program"),
        ({"CXX": "", "PATH": ""}, r"the PATH has none of c\+\+, g\+\+, clang\+\+"),
    ],
    ids=["CXX", "PATH"],
)
def test_build_without_a_compiler_says_what_to_install(env, words):
    done = run(sys.executable, "setup.py", "build_ext", env=env)
    assert done.returncode != 0
    assert re.search(words, done.stderr)
    assert "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr


def test_arguments_for_cmake_that_are_not_quoted_as_in_a_shell_are_named():
    done = run(sys.executable, "setup.py", "build_ext", env={"CMAKE_ARGS": "-DA='b"})
    assert done.returncode != 0
    assert 'CMAKE_ARGS="-DA=\'b" must be words quoted as in a shell: No closing quotation' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("prelude", "words"),
    [
        (
            "import sysconfig; keep = sysconfig.get_path; "
            "sysconfig.get_path = lambda name: '/nonexistent' if name == 'include' else keep(name)",
            "/nonexistent/Python.h does not exist.*apt-get install python3-dev",
        ),
        ("sys.modules['cmake'] = None", "pip install cmake"),
        ("sys.modules['ninja'] = None", "pip install ninja"),
        ("sys.modules['pybind11'] = None", "pip install pybind11"),
    ],
    ids=["headers", "cmake", "ninja", "pybind11"],
)
def test_build_without_a_tool_says_what_to_install(prelude, words, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    done = run("build_ext", prelude=prelude, env={"PATH": str(tmp_path), "CXX": ""})
    assert done.returncode != 0
    assert re.search(words, done.stderr)


def test_compiler_that_is_too_old_is_refused_by_name(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or "Free Software Foundation" not in run(compiler, "--version").stdout:
        pytest.skip("needs GCC, whose version can be made to look old")
    old = tmp_path / "old-g++"
    old.write_text(f'#!/bin/sh\nexec {compiler} -U__GNUC__ -D__GNUC__=8 "$@"\n')
    old.chmod(0o755)
    cmake = shutil.which("cmake") or Path(sys.executable).with_name("cmake")
    done = run(
        *(
            cmake,
            "-S",
            ROOT,
            "-B",
            tmp_path / "build",
            f"-DCMAKE_CXX_COMPILER={old}",
            "-DCHUNKFT_BUILD_PYTHON=OFF",
        ),
    )
    text = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert re.search(r"chunkft needs a C\+\+20 compiler: GCC >= 11, .*old-g\+\+ is GNU 8", text)
    assert "apt-get install g++" in text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("memory", 'must be address, undefined, thread or address,undefined, got "memory"'),
        ("address,thread", 'address and thread exclude each other, got "address,thread"'),
    ],
)
def test_unknown_sanitizers_are_refused_by_name(value, words, tmp_path):
    cmake = shutil.which("cmake") or Path(sys.executable).with_name("cmake")
    done = run(cmake, "-S", ROOT, "-B", tmp_path, "-DCHUNKFT_BUILD_PYTHON=OFF", f"-DCHUNKFT_SANITIZE={value}")
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split())


def test_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert importlib.metadata.version("chunkft") == version
    assert chunkft.__version__ == version
    assert _core.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_command_is_an_entry_point():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="chunkft")
    assert entry.value == "chunkft.cli:main"
    assert callable(entry.load())


def test_import_takes_neither_trainers_nor_data_sets_nor_plots():
    heavy = ["accelerate", "datasets", "matplotlib", "transformers"]
    code = f"import sys, chunkft; print([name for name in {heavy} if name in sys.modules])"
    assert run_or_fail(sys.executable, "-c", code).strip() == "[]"


def test_every_import_is_a_declared_dependency():
    declared = {re.split(r"[<>=\[; ]", text)[0].lower() for text in PROJECT["project"]["dependencies"]}
    optional = {"triton"}  # imported where it is installed
    imported = {}
    for file in (ROOT / "chunkft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            imported.update({name.split(".")[0]: file.name for name in names})
    foreign = {name: file for name, file in imported.items() if name not in sys.stdlib_module_names}
    assert {"chunkft", "torch"} <= set(foreign)
    undeclared = {
        name: file for name, file in foreign.items() if name not in declared | optional | {"chunkft"}
    }
    assert undeclared == {}


def test_stub_names_what_the_native_module_has():
    stub = ast.parse((ROOT / "chunkft" / "_core.pyi").read_text())
    # Shapes of dicts and tuples that functions return have names in the stub only.
    classes = {
        node.name: node for node in stub.body if isinstance(node, ast.ClassDef) and not _is_shape(node)
    }
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert {*classes, *functions} == {name for name in vars(_core) if not name.startswith("_")}
    for name, node in classes.items():
        declared = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        actual = {member for member in vars(getattr(_core, name)) if not member.startswith("_")}
        assert {member for member in declared if not member.startswith("_")} == actual
        dunders = {"__dlpack__", "__dlpack_device__"} & set(vars(getattr(_core, name)))
        assert dunders <= declared


def _is_shape(node):
    return any(isinstance(base, ast.Name) and base.id in ("TypedDict", "NamedTuple") for base in node.bases)


def fake_python(directory, body):
    python = directory / "python3"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit 1", "needs Python 3.11 or newer.*apt-get install python3"),
        ('case "$*" in *ensurepip*) exit 1;; *) exit 0;; esac', "apt-get install python3-venv"),
    ],
    ids=["too_old", "no_venv"],
)
def test_make_without_a_usable_python_says_what_to_install(body, words, tmp_path):
    python = fake_python(tmp_path, body)
    done = run("make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert re.search(words, done.stderr)
    assert not (tmp_path / "venv").exists()


def test_make_leaves_no_half_made_environment(tmp_path):
    venv = tmp_path / "venv"
    python = fake_python(tmp_path, f'case "$*" in "-m venv"*) mkdir -p {venv}/bin; exit 1;; *) exit 0;; esac')
    assert run("make", "setup", f"PYTHON={python}", f"VENV={venv}").returncode != 0
    assert not venv.exists()


def test_make_does_not_touch_a_directory_that_is_no_environment(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = run("make", "setup", f"VENV={tmp_path}")
    assert done.returncode != 0
    assert f"VENV={tmp_path} exists but has no bin/python" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_make_checks_for_a_compiler_before_it_downloads_anything(tmp_path):
    bin_directory = tmp_path / "venv" / "bin"
    bin_directory.mkdir(parents=True)
    fake_python(bin_directory, f"touch {tmp_path}/ran").rename(bin_directory / "python")
    done = run("make", "setup", f"VENV={tmp_path / 'venv'}", env={"CXX": "/nonexistent/c++"})
    assert done.returncode != 0
    assert "CXX='/nonexistent/c++'" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_installed_benchmarks_run_without_a_checkout(tmp_path):
    """What an installation puts into chunkft_bench, in a place where no checkout is near."""
    place = tmp_path / "site-packages"
    files = [*(ROOT / "bench").glob("*.py"), ROOT / "bench" / "html_report.css"]
    (place / "chunkft_bench").mkdir(parents=True)
    for file in files:
        shutil.copy2(file, place / "chunkft_bench")
    shutil.copytree(ROOT / "chunkft", place / "chunkft", ignore=shutil.ignore_patterns("__pycache__"))
    env = {"PYTHONPATH": str(place)}
    out = tmp_path / "own"
    out.mkdir()
    command = ("bench", "memory", "--tiny", "--chunks", "4", "--threads", "1")
    code = f"import sys; from chunkft.cli import main; sys.argv = ['chunkft', *{command}]; sys.exit(main())"
    run_or_fail(sys.executable, "-c", code, cwd=out, env=env)
    text = (out / "bench-results" / "memory-cpu.json").read_text()
    assert '"command": "chunkft bench memory --tiny' in text
    assert '"commit": "unknown"' in text
    report = (
        "import sys; from chunkft.cli import main; sys.exit(main(['bench', 'report', '--out', sys.argv[1]]))"
    )
    run_or_fail(sys.executable, "-c", report, out / "r.html", cwd=out, env=env)
    assert "memory-cpu" in (out / "r.html").read_text()
