"""Reading the code that Triton generates: how wide memory is accessed, in how many bits offsets are
formed."""

from __future__ import annotations

import dataclasses
import itertools
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
        Accesses whose address was itself exchanged between threads stand under "".
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
        if len(names) > 1:
            raise ValueError(f"no single argument is accessed by {match[0]}: {sorted(names)}")
        found[names.pop() if names else ""][kind].append(width)
    return {name: dict(kinds) for name, kinds in found.items()}


def _reached(start: str, needs: dict[str, set[str]]) -> set[str]:
    seen, left = {start}, [start]
    while left:
        for name in needs[left.pop()] - seen:
            seen.add(name)
            left.append(name)
    return seen


@dataclasses.dataclass
class _Region:
    """A region of a kernel that is being read."""

    names: dict[str, str]  # text -> unique name of the values defined in it
    yields: list[str]  # what its yields feed
    conditions: list[str]  # what the condition of a `while` hands on


class _Definitions:
    """Where every value of a kernel in Triton's IR comes from.

    Names of values repeat in regions beside each other: here every one has a number of its own.
    """

    def __init__(self, ttgir: str) -> None:
        self.operation: dict[str, str] = {}
        self.operands: dict[str, list[str]] = {}
        self.type: dict[str, str] = {}
        self.line: dict[str, str] = {}
        self.addresses: list[str] = []
        self.arguments: dict[str, str] = {}
        self._regions = [_Region({}, [], [])]
        for raw in ttgir.splitlines():
            line = _LOCATION.sub("", raw).strip()
            if line and not line.startswith(("#", "//", "module")):
                self._read(line)

    def _value(self, text: str) -> str:
        for region in reversed(self._regions):
            if text in region.names:
                return region.names[text]
        raise ValueError(f"value {text} is used and not defined")

    def _values(self, text: str) -> list[str]:
        return [self._value(value) for value in _VALUE.findall(text)]

    def _add(self, text: str, operation: str, operands: list[str], kind: str, line: str) -> str:
        name = f"{text} {len(self.operation)}"
        self._regions[-1].names[text] = name
        self.operation[name] = operation
        self.operands[name] = operands
        self.type[name] = kind
        self.line[name] = line
        return name

    def _read(self, line: str) -> None:
        region = self._regions[-1]
        if line.startswith("}"):
            self._regions.pop()
            if line.startswith("})"):  # the end of a reduction, which says what it gives
                kinds = _split(line.split(" -> ")[-1].strip("() "))
                self.type.update(zip(region.yields, kinds, strict=True))
            if line.endswith("{"):  # else and do
                self._regions.append(_Region({}, region.yields, region.conditions))
            return
        if line.startswith("^bb"):
            for text, kind, source in itertools.zip_longest(
                re.findall(r"(%[\w$.-]+): ", line), _block_types(line), region.conditions
            ):
                self._add(text, "same", [source] if source else [], kind, line)
            return
        if line.startswith("tt.func"):
            self._regions.append(_Region({}, [], []))
            for text, kind in re.findall(r"(%[\w$.-]+): (!tt\.ptr<\w+>|\w+)", line):
                self.arguments[text[1:]] = self._add(text, "argument", [], kind, line)
            return
        match = re.match(r'(?:(%[\w$.-]+)(?::(\d+))? = )?"?([a-z_]+\.[a-z_.]+)"?(.*)', line)
        if match is None:
            raise ValueError(f"not understood: {line}")
        result, count, operation, rest = match.groups()
        if operation == "scf.yield":
            self._feed(region.yields, rest)
        elif operation == "scf.condition":
            self._feed(region.conditions, rest[rest.index(")") :])
        elif operation == "scf.for":
            self._read_for(result, count, rest, line)
        elif operation in ("scf.while", "scf.if"):
            self._read_branch(operation, result, count, rest, line)
        elif line.endswith("({"):
            operands = self._values(rest)
            texts = _results_of(result, count)
            reduced = [self._add(text, operation, operands, "", line) for text in texts]
            self._regions.append(_Region({}, reduced, []))
        elif result is not None:
            kind = re.split(r" -> | to |: ", rest)[-1].strip()
            self._add(result, operation, self._values(rest), kind, line)
        if operation in ("tt.load", "tt.store", "tt.atomic_rmw", "ttg.async_copy_global_to_local"):
            self.addresses.append(self._value(_VALUE.findall(rest)[0]))

    def _feed(self, names: list[str], values: str) -> None:
        for name, value in zip(names, self._values(values.split(" : ")[0]), strict=True):
            self.operands[name].append(value)

    def _results(self, result: str | None, count: str | None, types: str, line: str) -> list[str]:
        """Names of what a region gives: the same as what is yielded to it."""
        return [
            self._add(text, "same", [], kind, line)
            for text, kind in zip(_results_of(result, count), _split(types), strict=True)
        ]

    def _read_for(self, result: str | None, count: str | None, rest: str, line: str) -> None:
        head = re.match(r" (%\S+) = (%\S+) to (%\S+) step (%\S+)", rest)
        kind = re.search(r": (i\d+) \{$", rest)
        given = re.search(r"-> \((.*)\) ", rest)
        carried = re.search(r"iter_args\((.*?)\) ->", rest)
        if head is None or kind is None:
            raise ValueError(f"not understood: {line}")
        bounds = self._values(f"{head[2]} {head[4]}")
        pairs = re.findall(r"(%\S+) = (%[\w$.#-]+)", carried[1]) if carried else []
        firsts = [self._value(first) for _, first in pairs]
        names = self._results(result, count, given[1] if given else "", line)
        self._regions.append(_Region({}, names, []))
        self._add(head[1], "counter", bounds, kind[1], line)
        for name, (text, _), first in zip(names, pairs, firsts, strict=True):
            self._add(text, "carried", [first, name], self.type[name], line)

    def _read_branch(
        self, operation: str, result: str | None, count: str | None, rest: str, line: str
    ) -> None:
        head, _, types = rest.removesuffix(" {").partition(" : ")
        before, _, after = (types or head).partition(" -> ")
        pairs = re.findall(r"(%\S+) = (%[\w$.#-]+)", head)
        firsts = [self._value(first) for _, first in pairs]
        names = self._results(result, count, after.strip("() "), line)
        self._regions.append(_Region({}, names, []))
        if operation == "scf.while":
            kinds = _split(before.strip("() "))
            arguments = [
                self._add(text, "carried", [first], kind, line)
                for (text, _), first, kind in zip(pairs, firsts, kinds, strict=True)
            ]
            self._regions[-1] = _Region(self._regions[-1].names, arguments, names)


def _results_of(result: str | None, count: str | None) -> list[str]:
    """What an operation's results are called where they are used."""
    if result is None:
        return []
    return [result] if count is None else [f"{result}#{k}" for k in range(int(count))]


def _block_types(line: str) -> list[str]:
    return re.findall(r"%[\w$.-]+: ([^,)]+)", line)


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
    *("tt.get_program_id", "tt.get_num_programs", "counter", "arith.trunci"),
    *("argument", "tt.load"),
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
    wanted = {kernel.arguments[name] for name in streams if name in kernel.arguments}
    wrong: set[str] = set()
    looked_at = 0
    for address in kernel.addresses:
        seen = _slice(kernel, address)
        if not wanted & seen:
            continue
        looked_at += 1
        products = [name for name in seen if kernel.operation[name] in ("arith.muli", "arith.shli")]
        if not any("i64" in kernel.type[name] for name in products):
            wrong.add(kernel.line[address])
        for name in products:
            leaves = {kernel.operation[leaf] for leaf in _slice(kernel, name)}
            if "i64" not in kernel.type[name] and leaves & _UNBOUNDED:
                wrong.add(kernel.line[name])
        for name in seen:
            kind = kernel.type[name]
            if kernel.operation[name] == "carried" and re.search(r"(\b|x)i32\b", kind):
                wrong.add(kernel.line[name])
    return sorted(wrong), looked_at


def _slice(kernel: _Definitions, start: str) -> set[str]:
    """The values that `start` is made of, itself included."""
    seen, left = {start}, [start]
    while left:
        name = left.pop()
        if kernel.operation[name] in _ENDS:
            continue
        for operand in kernel.operands[name]:
            if operand not in seen:
                seen.add(operand)
                left.append(operand)
    return seen
