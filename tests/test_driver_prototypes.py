"""What csrc declares of the CUDA driver by hand is what the public cuda.h says: every such header at hand is asked.

Triton's wheel and those of NVIDIA's runtime carry one, a toolkit another. Which functions there are is read from
driver_api.h, and each declaration is spoilt once: one that the header is not held against is found that way.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DECLARED = (ROOT / "csrc" / "driver_api.h").read_text()
FUNCTION = re.compile(r"X\((cu\w+), (\(.*\))\)(?=\s)")
CONSTANT = re.compile(r"inline constexpr (?:CuResult|unsigned|int) (k\w+) = (\w+);")
HANDLE = re.compile(r"using (Cu\w+) = ([^;]+);")
SYMBOLS = [name for name, _ in FUNCTION.findall(DECLARED)]
# Later headers map the name to a version that drivers before CUDA 12.8 lack; both are exported and have one signature.
KEPT = {"cuEventElapsedTime": "cuEventElapsedTime_v2"}


def cuda_headers():
    """Folders with a cuda.h: of this environment's packages, of $CUDA_HOME and $CUDA_PATH, below /usr/local."""
    found = []
    if triton := importlib.util.find_spec("triton"):
        found.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    if nvidia := importlib.util.find_spec("nvidia"):
        found += [path for root in nvidia.submodule_search_locations for path in Path(root).glob("*/include")]
    found += [
        Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    found += sorted(Path("/usr/local").glob("cuda*/include"))
    return list(dict.fromkeys(path.resolve() for path in found if (path / "cuda.h").is_file()))


HEADERS = cuda_headers()
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = [
    pytest.mark.skipif(not HEADERS, reason="no package, toolkit or variable here brings a cuda.h"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH: c++, g++ or clang++"),
]
every_header = pytest.mark.parametrize(
    "header", HEADERS, ids=lambda path: str(path).strip("/").replace("/", ".")
)


def compiled(header, source, *flags, include=()):
    """Runs the compiler on `source` against one cuda.h."""
    places = [
        f"-I{path}" for path in (*include, ROOT / "csrc", ROOT / "csrc" / "tests", ROOT / "csrc" / "fakecuda")
    ]
    command = [COMPILER, "-std=c++20", "-x", "c++", *flags, *places, "-isystem", header, "-"]
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, input=source, capture_output=True, text=True, env=environment)


def compared(header, declared, tmp_path):
    """What the compiler says of these declarations, put in the place of driver_api.h."""
    (tmp_path / "driver_api.h").write_text(declared)
    # the assertions stand beside it, since a header is looked for beside the one that includes it first
    shutil.copy(ROOT / "csrc" / "tests" / "driver_prototypes.h", tmp_path)
    return compiled(header, '#include "driver_prototypes.h"\n', "-fsyntax-only", include=[tmp_path])


def complaints(done, kind):
    """Names that failed assertions of one kind: signature of X, value of X, type X."""
    return set(re.findall(rf"static.assertion failed.*?{kind} (\w+) differs from", done.stderr))


def test_the_functions_are_found_in_the_header():
    assert len(SYMBOLS) == DECLARED.count("  X(cu")
    assert len(CONSTANT.findall(DECLARED)) == DECLARED.count("inline constexpr ")
    assert len(HANDLE.findall(DECLARED)) == DECLARED.count("\nusing ")


@every_header
def test_declarations_equal_those_of_cuda_h(header, tmp_path):
    done = compared(header, DECLARED, tmp_path)
    assert done.returncode == 0, done.stderr


def spoil_functions(text):
    """Every function takes one int more."""
    return FUNCTION.sub(lambda match: f"X({match[1]}, {match[2][:-1]}, int spoilt))", text)


def spoil_pointers(text):
    """Sizes are 32 bits wide, handles untyped, texts writable."""
    text = text.replace("std::size_t", "unsigned").replace("const char**", "char**")
    return re.sub(r"= (CU\w+_st)\*;", "= void*;", text)


def spoil_constants(text):
    return CONSTANT.sub(lambda match: match[0].replace(f"= {match[2]};", f"= {match[2]} + 1;"), text)


def spoil_handles(text):
    """Every handle is an untyped pointer, every number a short one."""
    return HANDLE.sub(lambda match: f"using {match[1]} = {'void*' if '*' in match[2] else 'short'};", text)


@every_header
def test_a_spoilt_declaration_of_every_function_is_found(header, tmp_path):
    assert complaints(compared(header, spoil_functions(DECLARED), tmp_path), "signature of") == set(SYMBOLS)


@every_header
def test_a_spoilt_value_of_every_constant_is_found(header, tmp_path):
    names = {name for name, _ in CONSTANT.findall(DECLARED)}
    assert complaints(compared(header, spoil_constants(DECLARED), tmp_path), "value of") == names


@every_header
def test_a_spoilt_type_of_every_handle_is_found(header, tmp_path):
    names = {name for name, _ in HANDLE.findall(DECLARED)}
    assert complaints(compared(header, spoil_handles(DECLARED), tmp_path), "type") == names


@every_header
def test_narrow_sizes_and_untyped_handles_are_found(header, tmp_path):
    touched = {
        name
        for name, types in FUNCTION.findall(DECLARED)
        if re.search(r"size_t|char\*\*|Cu(Context|Stream|Event)", types)
    }
    assert touched
    assert complaints(compared(header, spoil_pointers(DECLARED), tmp_path), "signature of") == touched


@every_header
def test_symbols_are_those_that_cuda_h_maps_the_names_to(header):
    bases = [re.sub(r"_v\d+$", "", symbol) for symbol in SYMBOLS]
    lines = "".join(f'"{base}" {base};\n' for base in bases)
    done = compiled(header, f"#include <cuda.h>\n{lines}", "-E", "-P")
    assert done.returncode == 0, done.stderr
    mapped = dict(re.findall(r'^"(cu\w+)" (cu\w+);$', done.stdout, re.MULTILINE))
    assert list(mapped) == bases
    wrong = {
        symbol: mapped[base]
        for symbol, base in zip(SYMBOLS, bases, strict=True)
        if mapped[base] not in (symbol, KEPT.get(symbol))
    }
    assert not wrong
    assert mapped["cuMemAlloc"] != "cuMemAlloc"  # macros were at work


@every_header
def test_the_fake_driver_gives_errors_their_true_numbers(header):
    table = re.findall(r'\{(\w+), "(CUDA_\w+)"', (ROOT / "csrc" / "fakecuda" / "abi.cpp").read_text())
    (no_device,) = re.findall(r"kCudaErrorNoDevice = (\d+);", (ROOT / "csrc" / "driver_api.cpp").read_text())
    assert len(table) > 10
    asserts = [
        f'static_assert({number} == {name}, "value of {name} differs from cuda.h");'
        for number, name in [*table, (no_device, "CUDA_ERROR_NO_DEVICE")]
    ]
    source = '#include <cuda.h>\n#include "call.h"\nusing namespace fakecuda;\n' + "\n".join(asserts)
    assert compiled(header, source, "-fsyntax-only").returncode == 0
    spoilt = compiled(header, re.sub(r"\((\w+) ==", r"(\1 + 1 ==", source), "-fsyntax-only")
    assert complaints(spoilt, "value of") == {name for _, name in table}
