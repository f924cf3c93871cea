"""Read the names of vLLM's interface from its wheel, without installing it: the record that our calls are checked against.

pip download --no-deps --only-binary=:all: vllm==0.33.0
python tests/generation/vllm_interface.py vllm-0.33.0-*.whl > tests/generation/vllm_interface.json
"""

import ast
import hashlib
import json
import sys
import zipfile
from pathlib import Path


def classes(source: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}


def fields(node: ast.ClassDef) -> list[str]:
    return [
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    ]


def arguments(node: ast.ClassDef, method: str) -> list[str]:
    (found,) = (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == method)
    return [a.arg for a in (*found.args.args, *found.args.kwonlyargs) if a.arg != "self"]


def value(source: str, name: str) -> list:
    """The entries of a tuple or a `Literal[...]` that a module assigns to `name`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            entries = node.value.slice if isinstance(node.value, ast.Subscript) else node.value
            return list(ast.literal_eval(entries))
    raise LookupError(name)


def record(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:

        def text(path: str) -> str:
            return archive.read(f"vllm/{path}").decode()

        llm = classes(text("entrypoints/llm.py"))["LLM"]
        return {
            "wheel": wheel.name,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "LLM": arguments(llm, "__init__"),
            "EngineArgs": fields(classes(text("engine/arg_utils.py"))["EngineArgs"]),  # LLM's further arguments
            "LLM.generate": arguments(llm, "generate"),
            "SamplingParams": fields(classes(text("sampling_params.py"))["SamplingParams"]),
            "TokensPrompt": fields(classes(text("inputs/llm.py"))["TokensPrompt"]),
            "LoRARequest": fields(classes(text("lora/request.py"))["LoRARequest"]),
            "CompletionOutput": fields(classes(text("outputs.py"))["CompletionOutput"]),
            "RequestOutput": arguments(classes(text("outputs.py"))["RequestOutput"], "__init__"),
            "finish reasons": value(text("v1/engine/__init__.py"), "FINISH_REASON_STRINGS"),
            "LoRA ranks": value(text("config/lora.py"), "MaxLoRARanks"),
            "exported": sorted(
                {"LLM", "SamplingParams", "TokensPrompt"} & {w.strip('",: ') for w in text("__init__.py").split()}
            ),
        }


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1])), indent=1))
