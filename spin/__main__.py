"""`python -m spin`, and the command `spin` of the installed package."""

from spin.run import main

if __name__ == "__main__":
    main()
