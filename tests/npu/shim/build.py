"""Build stand-in CANN libraries for an installed torch_npu, from the wheel's own undefined symbols.

::

    python tests/npu/shim/build.py FOLDER     # with a Python that has torch and torch_npu
    LD_LIBRARY_PATH=FOLDER python ...         # imports the real torch_npu

Three levels: a function that returns 0 for every symbol that no installed library has; a runtime in
host memory (`runtime.cc`); the aclnn host functions, which print each launch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_MAIN = "libascendcl.so"
_BY_NAME = re.compile(rb"\0((?:acl(?!nn)[a-z]{0,3}|Hccl)[A-Z]\w+)(?=\0)")
_LAUNCHES = re.compile(rb"\0(aclnn[A-Z]\w+)(?=\0)")
_HELPERS = re.compile(
    rb"\0(acl(?:Create|Destroy)[A-Z]\w+|aclSet\w+|InitHugeMemThreadLocal|UnInitHugeMemThreadLocal|"
    rb"ReleaseHugeMem|InitPTACacheThreadLocal|SetPTAHashKey|CanUsePTACache|PTAGetExecCache)(?=\0)"
)
_STUB = """#include <stdio.h>
#include <stdlib.h>
static long hit(const char*n){
  if(getenv("CANN_SHIM_TRACE"))fprintf(stderr,"[shim] %s\\n",n);return 0;}
"""
_LAUNCH = """#include <stdio.h>
#include <stdlib.h>
static long t(const char*n,void*s){
  if(getenv("CANN_SHIM_OPTRACE"))fprintf(stderr,"[op] %-34s stream=%p\\n",n,s);return 0;}
static char object[64];
"""


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path | str, which: str) -> dict[str, str]:
    """Name, without its version, to nm's type."""
    lines = (line.split() for line in run("nm", "-D", which, library).splitlines())
    return {words[-1].split("@")[0]: words[-2] for words in lines}


def needed(library: Path) -> set[str]:
    lines = run("readelf", "-d", library).splitlines()
    return {line.split("[")[1][:-1] for line in lines if "(NEEDED)" in line}


def installed(names: Iterable[str]) -> dict[str, str]:
    """Where the system has those of the libraries that it has."""
    ldconfig = "/sbin/ldconfig" if Path("/sbin/ldconfig").exists() else "ldconfig"
    lines = [line.split() for line in run(ldconfig, "-p").splitlines() if "=>" in line]
    found = {words[0]: words[-1] for words in lines}
    return {name: found[name] for name in names if name in found}


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    npu, torch_libraries = folder_of("torch_npu"), sorted(folder_of("torch").glob("lib/*.so*"))
    modules = sorted(npu.rglob("*.so"))
    own = {module.name for module in modules} | {library.name for library in torch_libraries}
    wanted = set().union(*map(needed, modules)) - own
    system = installed(wanted)
    missing = sorted(wanted - set(system))
    assert _MAIN in missing, f"{_MAIN} is installed: this machine has CANN"
    python = Path(os.path.realpath(sys.executable))
    others = [*modules, *torch_libraries, *system.values(), python]
    others += sorted(python.parent.parent.glob("lib/libpython3*.so*"))
    provided = {name for library in others for name in symbols(library, "--defined-only")}
    undefined = {
        name
        for module in modules
        for name, kind in symbols(module, "--undefined-only").items()
        if kind == "U"
    } - provided
    strings = b"".join(module.read_bytes() for module in modules if "libtorch_npu" in module.name)
    looked_up = {name.decode() for name in _BY_NAME.findall(strings)}
    runtime = _compile_runtime(out, npu)
    have = {line.split()[-1] for line in run("nm", "--defined-only", runtime).splitlines()}
    left = sorted((undefined | looked_up) - have)
    stubs = "".join(f'long {name}(void){{return hit("{name}");}}\n' for name in left)
    _link(out, _MAIN, _STUB + stubs, str(runtime), "-lstdc++")
    for name in missing:
        if name != _MAIN:
            _link(out, name, "", "-Wl,--no-as-needed", f"-L{out}", f"-l:{_MAIN}")
    _link(out, "libopapi.so", _launches(strings))


def _compile_runtime(out: Path, npu: Path) -> Path:
    compiled = out / "runtime.o"
    headers = npu / "include/third_party/acl/inc"
    source = Path(__file__).with_name("runtime.cc")
    flags = ["-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=1", "-O1", "-fPIC", "-fvisibility=default"]
    run("g++", *flags, f"-I{headers}", "-c", source, "-o", compiled)
    return compiled


def _launches(strings: bytes) -> str:
    names = sorted({name.decode() for name in _LAUNCHES.findall(strings)})
    sized = {name.removesuffix("GetWorkspaceSize") + "GetWorkspaceSize" for name in names}
    helpers = sorted({name.decode() for name in _HELPERS.findall(strings)})
    lines = [
        f'long {name}(void*w,unsigned long z,void*e,void*s){{return t("{name}",s);}}'
        for name in names
        if not name.endswith("GetWorkspaceSize")
    ]
    lines += [f"long {name}(void){{return 0;}}" for name in sorted(sized)]
    lines += [f"void* {n}(void){{return object;}}" for n in helpers if n.startswith("aclCreate")]
    return _LAUNCH + "\n".join(lines) + "\n"


def _link(out: Path, name: str, source: str, *flags: str) -> None:
    file = out / f"{name}.c"
    file.write_text(source, encoding="utf-8")
    base = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-fno-builtin"]
    run(*base, file, *flags, f"-Wl,-soname,{name}", "-o", out / name)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
