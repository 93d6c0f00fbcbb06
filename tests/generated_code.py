"""Reading the code that Triton generates: how wide memory is accessed, in how many bits offsets are
formed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# Registers of PTX, values of Triton's IR.
_REGISTER = re.compile(r"%\w+")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_LOCATION = re.compile(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")

#: `ld.global.cg.v2.b64 { ... }, [ %rd3 + 0 ];` and its like; the group after is the address.
_ACCESS = re.compile(
    r"\b(?:(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+) .*?\[\s*(%\w+)"
    r"|(cp)\.async\.c[ag]\.shared\.global \[[^]]*\], \[\s*(%\w+)[^]]*\], (0x\w+|\d+)"
    r"|(atom)\.global\S*?[a-z](\d+) .*?\[\s*(%\w+))"
)


def accesses(ptx: str, arguments: Iterable[str]) -> dict[str, dict[str, list[int]]]:
    """Bytes that a thread moves at a time: by argument whose memory it is, and by instruction.

    Args:
        ptx: one kernel.
        arguments: the names of its pointers, in the order of its parameters; "" for a parameter
            that is none.
    Returns:
        {"grads": {"ld": [16, 16]}, ...}; instructions are ld, st, cp (to shared memory) and atom.
    """
    pointers = list(arguments)
    needs: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    for line in ptx.splitlines():
        words = line.split("//")[0].strip()
        parameter = re.search(r"ld\.param\.\S+\s+(%\w+), \[\w+_param_(\d+)\]", words)
        if parameter:
            number = int(parameter[2])
            if number < len(pointers) and pointers[number]:
                bases[parameter[1]].add(pointers[number])
            continue
        words = re.sub(r"^@!?%\w+\s+", "", words)
        registers = _REGISTER.findall(words)
        if registers and not re.match(r"(ld|st|cp|atom|setp|bra)\b", words):
            needs[registers[0]].update(registers[1:])
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for match in _ACCESS.finditer(ptx):
        kind = match[1] or match[5] or match[8]
        address = match[4] or match[6] or match[10]
        if kind == "cp":
            width = int(match[7], 0)
        elif kind == "atom":
            width = int(match[9]) // 8
        else:
            width = int(match[2] or 1) * int(match[3]) // 8
        names = {name for register in _reached(address, needs) for name in bases[register]}
        if len(names) != 1:
            raise ValueError(f"no single argument is accessed by {match[0]}: {sorted(names)}")
        found[names.pop()][kind].append(width)
    return {name: dict(kinds) for name, kinds in found.items()}


def _reached(start: str, needs: dict[str, set[str]]) -> set[str]:
    seen, left = {start}, [start]
    while left:
        for name in needs[left.pop()] - seen:
            seen.add(name)
            left.append(name)
    return seen


class _Definitions:
    """Where every value of a kernel in Triton's IR comes from."""

    def __init__(self, ttgir: str) -> None:
        self.operation: dict[str, str] = {}
        self.operands: dict[str, list[str]] = defaultdict(list)
        self.type: dict[str, str] = {}
        self.line: dict[str, str] = {}
        self.addresses: list[tuple[str, str]] = []  # operation and address
        # Of every region that is open: what its yields feed, and its condition's.
        self.open: list[tuple[list[str], list[str]]] = []
        self.depths: list[int] = []
        depth = 0
        for raw in ttgir.splitlines():
            line = _LOCATION.sub("", raw).strip()
            if line.startswith(("#", "module", "//")):
                continue
            self._read(line, depth)
            depth += line.count("{") - line.count("}")
            while self.depths and depth <= self.depths[-1]:
                self.depths.pop()
                self.open.pop()

    def _add(self, name: str, operation: str, operands: list[str], kind: str, line: str) -> None:
        self.operation[name] = operation
        self.operands[name] += operands
        self.type[name] = kind
        self.line[name] = line

    def _read(self, line: str, depth: int) -> None:
        if line.startswith("tt.func"):
            for name, kind in re.findall(r"(%[\w$.-]+): (!tt\.ptr<\w+>|\w+)", line):
                self._add(name, "argument", [], kind, line)
            return
        match = re.match(r'(?:(%[\w$.-]+)(?::(\d+))? = )?"?([a-z_]+\.[a-z_.]+)"?(.*)', line)
        if match is None:
            self._read_border(line)
            return
        result, count, operation, rest = match.groups()
        if operation == "scf.for":
            self._read_for(result, count, rest, line, depth)
        elif operation == "scf.while":
            self._read_while(result, count, rest, line, depth)
        elif operation == "scf.if":
            results = self._results(result, count, re.search(r"-> \((.*?)\) \{", rest), line)
            self.open.append((results, []))
            self.depths.append(depth)
        elif operation == "scf.yield":
            if self.open:
                self._feed(self.open[-1][0], rest)
        elif operation == "scf.condition":
            self._feed(self.open[-1][1], rest[rest.index(")") :])
        elif result is not None:
            kind = re.split(r" -> | to |: ", rest)[-1].strip()
            self._add(result, operation, _VALUE.findall(rest), kind, line)
        if operation in ("tt.load", "tt.store", "tt.atomic_rmw", "ttg.async_copy_global_to_local"):
            self.addresses.append((operation, _VALUE.findall(rest)[0]))

    def _read_border(self, line: str) -> None:
        """The second region of a `while`, whose arguments are what the condition hands on."""
        block = re.match(r"\^bb\d+\((.*)\):", line)
        if block is None or not self.open or not self.open[-1][1]:
            return
        for source, (name, kind) in zip(
            list(self.open[-1][1]), re.findall(r"(%[\w$.-]+): ([^,]+)", block[1]), strict=False
        ):
            self._add(name, "same", [source], kind, line)

    def _results(
        self, result: str | None, count: str | None, types: re.Match[str] | None, line: str
    ) -> list[str]:
        """Names of a region's results, each the same as what is yielded to it."""
        if result is None:
            return []
        names = [result] if count is None else [f"{result}#{k}" for k in range(int(count))]
        kinds = _split(types[1]) if types is not None else []
        for name, kind in zip(names, kinds, strict=True):
            self._add(name, "same", [], kind, line)
        return names

    def _feed(self, names: list[str], values: str) -> None:
        for name, value in zip(names, _VALUE.findall(values.split(" : ")[0]), strict=False):
            self.operands[name].append(value)

    def _read_for(
        self, result: str | None, count: str | None, rest: str, line: str, depth: int
    ) -> None:
        head = re.match(r" (%\S+) = (%\S+) to (%\S+) step (%\S+)", rest)
        kind = re.search(r": (i\d+) \{$", rest)
        assert head is not None, line
        self._add(head[1], "counter", [head[2], head[4]], kind[1] if kind else "i32", line)
        names = self._results(result, count, re.search(r"-> \((.*)\)\s*:?", rest), line)
        carried = re.search(r"iter_args\((.*?)\) ->", rest)
        pairs = re.findall(r"(%\S+) = (%[\w$.#-]+)", carried[1]) if carried else []
        for name, (argument, first) in zip(names, pairs, strict=True):
            self._add(argument, "carried", [first, name], self.type[name], line)
        self.open.append((names, []))
        self.depths.append(depth)

    def _read_while(
        self, result: str | None, count: str | None, rest: str, line: str, depth: int
    ) -> None:
        pairs = re.findall(r"(%\S+) = (%[\w$.#-]+)", rest.split(" : ")[0])
        types = re.search(r": \((.*?)\) -> \((.*?)\) \{|: \((.*?)\) -> (.*?) \{", rest)
        kinds = _split(types[1] or types[3]) if types else []
        for (argument, first), kind in zip(pairs, kinds, strict=True):
            self._add(argument, "carried", [first], kind, line)
        after = (types[2] or types[4]) if types else ""
        names = []
        if result is not None:
            kinds = _split(after)
            names = [result] if count is None else [f"{result}#{k}" for k in range(int(count))]
            for name, kind in zip(names, kinds, strict=True):
                self._add(name, "same", [], kind, line)
        self.open.append(([argument for argument, _ in pairs], names))
        self.depths.append(depth)


def _split(types: str) -> list[str]:
    """Types between the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in types:
        depth += letter in "<({["
        depth -= letter in ">)}]"
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


#: What may be as large as the number of coordinates, or of programs.
_UNBOUNDED = {
    "tt.get_program_id",
    "tt.get_num_programs",
    "counter",
    "arith.trunci",
    "argument",
    "tt.load",
}
#: What an address does not depend on but through the value it reads.
_ENDS = {"tt.load", "argument"}


def narrow_offsets(ttgir: str, streams: Iterable[str]) -> tuple[list[str], int]:
    """Where offsets into (P,) memory are formed in 32 bits.

    An offset is a program's number or a loop's counter, times a block, plus the number of a lane.
    That product must be one of 64 bits, and no 32-bit offset may be carried from turn to turn.
    Products of lanes' numbers and constants are bounded, and may be narrow.

    Args:
        ttgir: one kernel in Triton's IR for GPUs.
        streams: the names of the arguments whose memory may have more than 2^31 elements.
    Returns:
        the offending lines, and how many accesses to streams were looked at.
    """
    kernel = _Definitions(ttgir)
    wanted = {f"%{s}" for s in streams if kernel.operation.get(f"%{s}") == "argument"}
    wrong: list[str] = []
    looked_at = 0
    for _, address in kernel.addresses:
        seen = _slice(kernel, address)
        if not wanted & seen:
            continue
        unknown = [name for name in seen if name not in kernel.operation]
        if unknown:
            raise ValueError(f"an address depends on values of unknown origin: {unknown}")
        products = [name for name in seen if kernel.operation[name] in ("arith.muli", "arith.shli")]
        looked_at += 1
        if not any("i64" in kernel.type[name] for name in products):
            wrong.append(kernel.line[address])
        for name in products:
            leaves = {kernel.operation[leaf] for leaf in _slice(kernel, name)}
            if "i64" not in kernel.type[name] and leaves & _UNBOUNDED:
                wrong.append(kernel.line[name])
        for name in seen:
            narrow = re.search(r"\bi32\b|xi32\b", kernel.type[name])
            if kernel.operation[name] == "carried" and narrow and "ptr" not in kernel.type[name]:
                wrong.append(kernel.line[name])
    return sorted(set(wrong)), looked_at


def _slice(kernel: _Definitions, start: str) -> set[str]:
    seen, left = {start}, [start]
    while left:
        name = left.pop()
        if kernel.operation.get(name) in _ENDS:
            continue
        for operand in kernel.operands[name]:
            if operand not in seen:
                seen.add(operand)
                left.append(operand)
    return seen
