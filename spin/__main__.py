"""`python -m spin`, and the command `spin` of the installed package: plays games; with `store` first, keeps the store."""

import sys


def main() -> None:
    if sys.argv[1:2] == ["store"]:
        from spin.runtime.output import open_streams
        from spin.runtime.store_cli import main as keep_store

        open_streams()
        keep_store(sys.argv[2:])
    else:
        from spin.run import main as play

        play()


if __name__ == "__main__":
    main()
