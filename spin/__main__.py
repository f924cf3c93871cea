"""Command-line tools: `python -m spin store` and `python -m spin memory`."""

import sys

USAGE = """usage: python -m spin {store,memory} [options]

  store   list the stages that a store holds, or remove those that no run uses
  memory  print which settings fit on which GPU"""


def main(arguments: list[str]) -> None:
    """Run the tool that the first argument names."""
    tool = arguments[0] if arguments else ""
    if tool == "store":
        from spin.runtime.store_cli import main as run_tool
    elif tool == "memory":
        from spin.engines.memory_table import main as run_tool
    elif tool in ("-h", "--help"):
        print(USAGE)
        return
    else:
        sys.exit(USAGE)
    run_tool(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
