"""Compile kernels for a GPU that is not here, and read what the assembler made of them.

Triton's wheel carries ptxas and nvdisasm, so registers, spills, shared memory, ptxas notes and
machine code can be checked on any machine. A wrong target aborts the whole process, so tests go
through `report` and `reports`, which compile in subprocesses:

    report("attn_ladder.stage5_everything:offline", {"headdim": 64, "causal": True})

where `offline(headdim=..., causal=...)` returns the fields of a `Source` as a dict. A stage needs
to import nothing from here, so that a change here leaves its kernel hash alone.

`python -m attn_ladder.offline module:function '{"headdim": 64}'` prints a report as JSON; more
arguments, more reports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one CTA can have on sm_90


@dataclass(frozen=True)
class Source:
    """A kernel to compile; `signature` has the Triton type of every argument but the constexprs."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4


@dataclass(frozen=True)
class Report:
    """What became of a kernel. `notes` are ptxas's remarks, `sass` is nvdisasm's text."""

    registers: int
    spill_bytes: int
    shared: int
    notes: tuple[str, ...]
    sass: str
    ptx: str


def descriptor(dtype: str, block: list[int], layout: Any) -> str:
    """The signature of a host TensorDescriptor: `descriptor("bf16", [1, 64, 1, 128], layout)`."""
    return f"tensordesc<{dtype}{block},{layout!r}>"


def compile_kernel(source: Source, capability: int = 90) -> tuple[Any, str]:
    """Triton's compiled kernel and what ptxas said, which is nothing if it came from a cache."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = source.kernel.arg_names
    known = {**source.signature, **dict.fromkeys(source.constexprs, "constexpr")}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{source.kernel.__name__}: no type or value for {', '.join(missing)}")
    make = GluonASTSource if source.kernel.is_gluon() else ASTSource
    constexprs = {(names.index(name),): value for name, value in source.constexprs.items()}
    ast_source = make(source.kernel, {name: known[name] for name in names}, constexprs, {})
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": source.num_warps}
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(ast_source, target=target, options=options)
    return compiled, log.getvalue()


def disassemble(cubin: bytes) -> str:
    """nvdisasm's text of a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def assemble(ptx: str, arch: str = "sm_90a") -> tuple[str, str]:
    """Messages of `ptxas -v`, called as Triton calls it, and nvdisasm's text."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [tools / "ptxas", "-lineinfo", "-v", f"--gpu-name={arch}", source, "-o", cubin]
        assembled = subprocess.run(command, capture_output=True, text=True)
        if assembled.returncode:
            raise RuntimeError(f"ptxas --gpu-name={arch} failed: {assembled.stderr[-2000:]}")
        disassembled = subprocess.run(
            [tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
        )
    return assembled.stderr, disassembled.stdout


def read_ptxas(log: str) -> tuple[int, int, tuple[str, ...]]:
    """Registers, bytes of spill stores and loads, and remarks (`(C7512) …`) from `ptxas -v`."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError(f"no register count in the output of ptxas -v: {log[-500:]!r}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    notes = tuple(
        line.split(":", 1)[1].strip() for line in log.splitlines() if re.search(r"\(C\d+\)", line)
    )
    return int(registers.group(1)), spills, notes


def compile_offline(source: Source, capability: int = 90, arch: str = "sm_90a") -> Report:
    """Compile and assemble in this process."""
    compiled, log = compile_kernel(source, capability)
    if "Used" in log:
        sass = disassemble(compiled.asm["cubin"])
    else:
        log, sass = assemble(compiled.asm["ptx"], arch)
    registers, spill_bytes, notes = read_ptxas(log)
    shared = compiled.metadata.shared
    return Report(registers, spill_bytes, shared, notes, sass, compiled.asm["ptx"])


def _compile_in_child(
    factory: str, arguments: Sequence[Mapping[str, Any]], timeout: float
) -> list[Report]:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    texts = [json.dumps(dict(values)) for values in arguments]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "attn_ladder.offline", factory, *texts],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environment, "TRITON_CACHE_DIR": cache},
        )
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(texts):
        raise RuntimeError(f"compiling {factory} {texts[len(lines)]} failed: {done.stderr[-3000:]}")
    read = [json.loads(line) for line in lines]
    return [Report(**{**values, "notes": tuple(values["notes"])}) for values in read]


def reports(
    factory: str, arguments: Sequence[Mapping[str, Any]], workers: int = 2, timeout: float = 300
) -> list[Report]:
    """Compile in subprocesses what `module:function` returns for each of `arguments`."""
    chunks = [list(arguments[i::workers]) for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda c: _compile_in_child(factory, c, timeout) if c else [], chunks))
    return [done[i % workers][i // workers] for i in range(len(arguments))]


def report(factory: str, arguments: Mapping[str, Any], timeout: float = 120) -> Report:
    """Compile in a subprocess what `module:function`, called with `arguments`, returns."""
    return _compile_in_child(factory, [arguments], timeout)[0]


def serialized(notes: tuple[str, ...]) -> list[str]:
    """Notes saying that ptxas serialized the matrix instructions (C7510 to C7514)."""
    return [
        note for note in notes if re.search(r"\(C751[0-4]\)", note) or "serializ" in note.lower()
    ]


_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.MULTILINE)


def instructions(sass: str) -> list[tuple[str, str]]:
    """`(opcode, operands)` of each instruction; a label is `("LABEL", name)`."""
    listing = []
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            listing.append(("LABEL", label.group(1)))
        elif match := _LINE.match(line):
            listing.append((match.group(1), match.group(2).strip()))
    return listing


_ADDRESS = re.compile(r"\[\s*(global_smem|%r\d+)\s*(?:\+\s*(-?\d+))?\s*\]")
_ACCESS = re.compile(
    r"\b(?:(?:ld|st|atom|red)\.(?:[\w:]+\.)*shared|(?:ld|st)matrix|cp\.async)[\w.:]*"
)
_SUM = re.compile(r"\b(?:add\.[su]32|or\.b32) (%r\d+), ([%\w]+), ([%\w-]+)$")
_KEPT = (
    re.compile(  # the operand whose constant a result keeps: swizzles, and products that are added
        r"\b(?:(?:mov\.[bu]32|xor\.b32) (?P<to>%r\d+), (?P<of>[%\w]+)"
        r"|mad\.lo\.[su]32 (?P<sum>%r\d+), [%\w]+, [%\w-]+, (?P<addend>[%\w]+))"
    )
)


def barrier_reuse(ptx: str) -> list[str]:
    """Accesses to shared memory that touch the words of an mbarrier and are no mbarrier's own.

    Triton gives the memory of barriers that nothing uses any more to other data. PTX wants
    `mbarrier.inval` before, which it does not emit.

    Found is what touches a barrier at the constant part of its address, as far as that follows from
    sums, swizzles and moves; not an index that reaches a barrier from below. Leaves out the byte in
    which Triton keeps a warp's partition, whose place is counted from the number of the warp.
    """
    place = {"global_smem": 0}  # of a register: the constants that were added up

    def value(operand: str) -> int:
        return int(operand) if re.fullmatch(r"-?\d+", operand) else place.get(operand, 0)

    words: set[int] = set()
    found: list[tuple[range, str]] = []
    text = re.sub(r"//[^\n]*", "", ptx)
    for statement in re.split(r"[;{}]\s", text):
        line = " ".join(statement.split())
        addresses = [value(a) + int(more or 0) for a, more in _ADDRESS.findall(line)]
        if total := _SUM.search(line):
            place[total[1]] = value(total[2]) + value(total[3])
        elif kept := _KEPT.search(line):
            place[kept["to"] or kept["sum"]] = value(kept["of"] or kept["addend"])
        elif "mbarrier.init" in line:
            words.update(range(addresses[0], addresses[0] + 8))
        elif "mbarrier." in line or "ld.shared.b8" in line:
            continue
        elif addresses and (access := _ACCESS.search(line)):
            stores = "global.shared" in access[0]  # in bulk: the address in shared memory is last
            first = addresses[-1 if stores else 0]
            found.append((range(first, first + _width(access[0])), line))
    return [line for touched, line in found if not words.isdisjoint(touched)]


def _width(access: str) -> int:
    """Bytes that one thread's access takes, or begins with."""
    count = re.search(r"\.v([24])", access)
    bits = re.search(r"\.[bsuf](8|16|32|64|128)\b", access)
    if "matrix" in access or bits is None:  # rows of 16 bytes; copies
        return 16
    return (int(count[1]) if count else 1) * int(bits[1]) // 8


def inner_loops(sass: str) -> list[list[tuple[str, str]]]:
    """Bodies of the innermost loops, each from a label to the branch back to it."""
    listing = instructions(sass)
    place = {name: i for i, (opcode, name) in enumerate(listing) if opcode == "LABEL"}
    spans = []
    for i, (opcode, operands) in enumerate(listing):
        target = re.search(r"\(?(\.L_x_\d+)\)?", operands) if opcode.startswith("BRA") else None
        if target and place.get(target.group(1), i) < i:
            spans.append((place[target.group(1)], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [listing[first : last + 1] for first, last in inner]


def overlapped(body: list[tuple[str, str]], opcode: str = "MUFU.EX2") -> int:
    """How many `opcode` stand between the last HGMMA issued and the wait for all of them."""
    count = best = 0
    flying = False
    for name, operands in body:
        if name.startswith("HGMMA"):
            flying, count = True, 0
        elif name.startswith("WARPGROUP.DEPBAR") and operands.endswith("0x0"):
            best, flying = (max(best, count) if flying else best), False
        elif flying and name.startswith(opcode):
            count += 1
    return best


def between(body: list[tuple[str, str]], first: str, last: str, opcode: str = "MUFU.EX2") -> int:
    """How many `opcode` a loop has from an instruction that matches `first` to the next one, maybe
    in the next iteration, that matches `last`. Raises `ValueError` if there is no such pair."""
    lines = [f"{name} {operands}" for name, operands in body]
    starts = [i for i, line in enumerate(lines) if re.match(first, line)]
    if not starts or not any(re.match(last, line) for line in lines):
        raise ValueError(f"no {first!r} or no {last!r} in a loop of {len(body)} instructions")
    turned = lines[starts[0] + 1 :] + lines[: starts[0] + 1]
    end = next(i for i, line in enumerate(turned) if re.match(last, line))
    return sum(line.startswith(opcode) for line in turned[:end])


def longest_run(body: list[tuple[str, str]], opcode: str = "MUFU.EX2") -> int:
    """The most `opcode` that follow each other with nothing in between."""
    runs = groupby(name.startswith(opcode) for name, _ in body)
    return max((len(list(run)) for found, run in runs if found), default=0)


def _main(factory: str, *arguments: str) -> None:
    module, function = factory.split(":")
    make = getattr(import_module(module), function)
    for values in arguments:
        compiled = compile_offline(Source(**make(**json.loads(values))))
        print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
