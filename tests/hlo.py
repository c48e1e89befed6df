"""What a compiled program says of itself."""

import re

COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(text):
    """`(op, shapes, depth)` of each collective, where depth counts the loops around it."""
    bodies = {}
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = bodies["entry"] = header[2]
            bodies[name] = []
        elif bodies:
            bodies[name].append(line)
    depths, todo = {}, [(bodies.pop("entry"), 0)]  # the entry comes last
    while todo:
        name, depth = todo.pop()
        if depths.get(name, -1) < depth:
            depths[name] = depth
            for line in bodies[name]:
                callees = [c for c in re.findall(r"%([\w.-]+)", line) if c in bodies]
                todo += [(callee, depth + (" while(" in line)) for callee in callees]
    found = []
    for name, depth in depths.items():
        for line in bodies[name]:
            match = COLLECTIVE.search(line)
            if match:
                shapes = re.findall(r"\w+\[([\d,]*)\]", match["result"])
                found.append(
                    (match["op"], [tuple(map(int, filter(None, s.split(",")))) for s in shapes], depth)
                )
    return found
