"""The house as numbers: the import graph of our code, its floors, and how many files one has to open for what.

python -m tests.house       prints what CONTRIBUTING.md says
"""

from __future__ import annotations

import ast
import re
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOMES = {"sdkernels": "kernels/sdkernels", "sdkit": "sdkit", "finetune": "finetune"}
"""Package -> folder."""

FLOORS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "sdkit": (
        ("errors", "importing", "version"),
        ("checks", "files", "graphs", "model_lock"),
        ("devices",),
        ("adapter_kinds", "images", "typed_json"),
        ("networks", "sampling"),
        ("prompts",),
        ("checkpoints",),
        ("diffusers_compat", "diffusion_model", "viewing"),
        ("generation",),
        ("stable_diffusion",),
        ("figures", "model_parts"),
        ("ui",),
        ("__init__", "cli"),
        ("__main__",),
    ),
    "finetune": (
        ("adapters", "options", "seeds"),
        ("data", "hypernetwork", "textual_inversion", "training", "vae_decoder"),
        ("lora", "recipe"),
        (
            "train_hypernetwork",
            "train_lora",
            "train_textual_inversion",
            "train_unet",
            "train_vae_decoder",
        ),
        ("__init__",),
        ("pretrain",),
    ),
}
"""The rooms (folders and files at the top) of each package, from the lowest floor up. A room imports lower floors."""

PROMPT_TO_PICTURE = (
    "sdkit/stable_diffusion.py",  # text_to_image
    "sdkit/generation/request.py",  # what is asked, checked
    "sdkit/generation/conditioning.py",  # prompts read and encoded
    "sdkit/prompts/tags.py",
    "sdkit/prompts/encoding.py",
    "sdkit/prompts/tokens.py",
    "sdkit/prompts/emphasis.py",
    "sdkit/generation/noise.py",
    "sdkit/generation/generate.py",  # the stages
    "sdkit/generation/prediction.py",  # the network's calls
    "sdkit/sampling/plan.py",  # the loop
    "sdkit/sampling/guidance.py",
    "sdkit/networks/unet.py",
    "sdkit/networks/vae.py",
    "sdkit/images/pixels.py",
)
"""Where a prompt's words, its noise and its latents are worked on, in order."""


# The graph


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """For each file of our packages, by its path, the files of ours that it imports anywhere, for types too."""
    files = {
        ".".join((package, *file.relative_to(root / folder).with_suffix("").parts)): file
        for package, folder in HOMES.items()
        for file in sorted((root / folder).rglob("*.py"))
    }
    return {
        str(file.relative_to(root)): {str(files[m].relative_to(root)) for m in _imports(file, module, files)}
        for module, file in files.items()
    }


def _imports(file: Path, module: str, files: Mapping[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {_module_of(alias.name, files) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module, file)
            found |= {_module_of(f"{base}.{alias.name}", files) or _module_of(base, files) for alias in node.names}
    return {name for name in found if name} - {module}


def _base(node: ast.ImportFrom, module: str, file: Path) -> str:
    """The module that a from-import names, relative ones resolved."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    if file.name == "__init__.py":
        package = package[:-1]
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _module_of(name: str, files: Mapping[str, Path]) -> str:
    """The module that lies in a file, for a module's or a package's name; "" for what is none of ours."""
    return name if name in files else f"{name}.__init__" if f"{name}.__init__" in files else ""


def rooms(graph: Mapping[str, Iterable[str]], package: str) -> dict[str, set[str]]:
    """The graph of a package's rooms: folders, and files at its top."""
    found: dict[str, set[str]] = {}
    for file, targets in graph.items():
        if file.startswith(f"{package}/"):
            room = room_of(file)
            inside = {room_of(target) for target in targets if target.startswith(f"{package}/")}
            found.setdefault(room, set()).update(inside - {room})
    return found


def room_of(file: str) -> str:
    """sdkit/networks/unet.py -> networks; sdkit/errors.py -> errors."""
    return file.split("/")[1].removesuffix(".py")


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Every set of nodes that reach each other (Tarjan's algorithm), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])

        if low[node] == index[node]:
            circle: list[str] = []
            while not circle or circle[-1] != node:
                circle.append(stack.pop())
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def arrows_up(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Every arrow from a room to one that does not lie on a lower floor, and every room without a floor."""
    found: list[str] = []
    for package, floors in FLOORS.items():
        floor = {room: number for number, level in enumerate(floors) for room in level}
        for room, targets in rooms(graph, package).items():
            if room not in floor:
                found.append(f"{package}/{room} has no floor")
                continue
            found += [
                f"{package}/{room} imports {target}"
                for target in sorted(targets)
                if floor.get(target, 99) >= floor[room]
            ]
    return found


# How many files one opens


def opened(graph: Mapping[str, set[str]], stations: Iterable[str]) -> list[str]:
    """The files to open so that each station is imported by a file that is open already."""
    first, *rest = stations
    files = [first]
    for station in rest:
        if station not in files:
            files += _path(graph, files, station)
    return files


def _path(graph: Mapping[str, set[str]], starts: list[str], end: str) -> list[str]:
    """The shortest chain of imports from one of ``starts``, which is left out, to ``end``."""
    before: dict[str, str | None] = dict.fromkeys(starts)
    queue = deque(starts)
    while queue:
        node = queue.popleft()
        for target in sorted(graph.get(node, ())):
            if target in before:
                continue
            before[target] = node
            queue.append(target)
            if target == end:
                path = [end]
                while (previous := before[path[-1]]) is not None:
                    path.append(previous)
                return path[-2::-1]
    raise LookupError(f"{end} is not imported from {starts}")


def naming(pattern: str, folders: Iterable[str], root: Path = ROOT) -> list[str]:
    """The files below ``folders`` whose code has a word that the regular expression ``pattern`` is found in."""
    found: list[str] = []
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            if re.search(pattern, file.read_text(encoding="utf-8")):
                found.append(str(file.relative_to(root)))
    return found


def importers(graph: Mapping[str, set[str]], target: str) -> list[str]:
    """The files that import ``target``, a file or a folder (which ends in /), from outside of it."""
    inside = target if target.endswith("/") else None
    return sorted(
        file
        for file, targets in graph.items()
        if not (inside and file.startswith(inside))
        and any(t.startswith(inside) if inside else t == target for t in targets)
    )


def counts(root: Path = ROOT) -> dict[str, list[str]]:
    """What one does -> the files that it takes, each measured on something that is there."""
    graph = import_graph(root)
    return {
        "follow a prompt to its picture": opened(graph, PROMPT_TO_PICTURE),
        "add a sampler (as dpm2_a)": naming(r"\bdpm2_a\b", ["sdkit"], root),
        "add a kernel (as add_noise)": naming(
            r"\bdef add_noise\b|\"add_noise\"|import add_noise\b", ["kernels/sdkernels"], root
        ),
        "add an adapter kind (as hypernetwork)": [
            "finetune/hypernetwork/",
            *naming(r"finetune\.hypernetwork\.verbs\b", ["sdkit", "finetune"], root),
        ],
        "add a file format (as the single file)": [
            "sdkit/checkpoints/single_file.py",
            *importers(graph, "sdkit/checkpoints/single_file.py"),
        ],
    }


# Air


def blank_shares(root: Path = ROOT, over: int = 15) -> dict[str, float]:
    """The share of blank lines, docstring left out, of every function of more than ``over`` lines, by FILE:LINE."""
    found: dict[str, float] = {}
    for folder in (*HOMES.values(), "bench"):
        for file in sorted((root / folder).rglob("*.py")):
            lines = file.read_text(encoding="utf-8").splitlines()
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= over:
                    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                    inside = lines[body[0].lineno - 1 : node.end_lineno] if body else []
                    found[f"{file.relative_to(root)}:{node.lineno}"] = sum(not line.strip() for line in inside) / (
                        len(inside) or 1
                    )
    return found


def unstaged_kernels(root: Path = ROOT, over: int = 25) -> list[str]:
    """Functions of a Triton kernel of more than ``over`` lines without two comments that name stages, as FILE:LINE."""
    found: list[str] = []
    for file in sorted((root / HOMES["sdkernels"]).glob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                inside = lines[node.lineno - 1 : node.end_lineno]
                if len(inside) > over and sum(line.strip().startswith("#") for line in inside) < 2:
                    found.append(f"{file.relative_to(root)}:{node.lineno}")
    return found


def main() -> None:
    """Print the counts, and the median share of blank lines."""
    for purpose, files in counts().items():
        print(f"{len(files):3}  {purpose}: {', '.join(files)}")
    print(f"{statistics.median(blank_shares().values()):.1%} of a function's lines are blank, in the median")


if __name__ == "__main__":
    main()
