"""`python -m spin store`: the command line of the store."""

import sys

from spin.runtime.output import open_streams
from spin.runtime.store_cli import main

if __name__ == "__main__":
    open_streams()
    if sys.argv[1:2] != ["store"]:
        sys.exit("usage: python -m spin store [--help]: list the stages that a store holds, or remove unused ones")
    main(sys.argv[2:])
