"""Play the game: `python run.py model=zephyr iter=2 loss.beta=0.1`. All of it is in spin/run.py."""

from spin.run import main

if __name__ == "__main__":
    main()
