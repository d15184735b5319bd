"""`python -m im2win_tvm`: the command `im2win` without installing it."""

from .cli import main

if __name__ == "__main__":
    main()
