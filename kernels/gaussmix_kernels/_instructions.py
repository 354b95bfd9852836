"""The instructions of a compiled kernel, and how many loops they are in."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Code:
    """A compiled kernel's instructions: those outside of loops, and those of loops within one loop, within two, ..."""

    counts: tuple[int, ...]
    tensor: int
    spilled: int  # accesses of the stack within loops
    barriers: int  # within loops


def count(cubin: bytes) -> Code:
    """Count the instructions of a compiled kernel, as the disassembler that comes with Triton prints them."""
    return parsed(printed_by("nvdisasm", "-c", cubin))


def printed_by(tool: str, option: str, cubin: bytes) -> str:
    """What one of the tools that come with Triton prints of a compiled kernel."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def parsed(printed: str) -> Code:
    """Instructions by the number of loops that they are in."""
    labels: dict[str, int] = {}
    instructions: list[tuple[bool, str]] = []  # whether a predicate may skip it, and its text
    for line in printed.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([^;]+?)\s*;", line):
            instructions.append((instruction[1] is not None, instruction[2]))
    follows: list[list[int]] = []
    for at, (skipped, text) in enumerate(instructions):
        # A call of a label of the kernel itself is a way out of a loop: it does not return.
        target = re.match(r"(BRA|CALL)\S*(.*)`\((\.L_x_\d+)\)", text)
        ends = text.startswith(("EXIT", "RET")) or (target is not None and not target[2].strip())
        follows.append([at + 1] if at + 1 < len(instructions) and (skipped or not ends) else [])
        if target:
            follows[-1].append(labels[target[3]])
    depth = _loops(follows)
    inside = [text for (_, text), level in zip(instructions, depth, strict=True) if level]
    return Code(
        tuple(depth.count(level) for level in range(max(depth, default=0) + 1)),
        sum(text.startswith(("HGMMA", "HMMA", "DMMA", "UTCHMMA", "UTCQMMA")) for _, text in instructions),
        sum(text.startswith(("LDL", "STL")) for text in inside),
        sum(text.startswith("BAR") for text in inside),
    )


def _loops(follows: list[list[int]]) -> list[int]:
    """In how many loops each instruction is; -1 where none leads to it.

    `follows` has what may come after each instruction.
    What a depth-first walk comes back to while it is still on the way there is the head of a loop, and the loop all
    that leads to where it came back from, up to the head. Waits of up to three instructions are to run once: no loops.
    """
    before: list[list[int]] = [[] for _ in follows]
    backs: dict[int, list[int]] = {}
    state = [0] * len(follows)  # 1 while on the way, 2 once done
    way = [(0, iter(follows[0]))]
    state[0] = 1
    while way:
        at, rest = way[-1]
        following = next(rest, None)
        if following is None:
            state[at] = 2
            way.pop()
            continue
        before[following].append(at)
        if state[following] == 1:
            backs.setdefault(following, []).append(at)
        elif state[following] == 0:
            state[following] = 1
            way.append((following, iter(follows[following])))
    depth = [0 if reached else -1 for reached in state]
    for head, ends in backs.items():
        loop, todo = {head}, list(ends)
        while todo:
            at = todo.pop()
            if at not in loop:
                loop.add(at)
                todo += before[at]
        if len(loop) > 3:
            for at in loop:
                depth[at] += 1
    return depth
