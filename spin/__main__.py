"""Entry point of `python -m spin` and of the installed command `spin`."""

from spin.run import main

if __name__ == "__main__":
    main()
