"""`python -m im2win_tvm.cli`: the command `im2win` without installing it."""

from . import main

if __name__ == "__main__":
    main()
