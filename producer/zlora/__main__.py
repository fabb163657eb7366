"""`python -m zlora`: the command line, for processes that must not search for the program."""

from zlora.cli import main

main()
