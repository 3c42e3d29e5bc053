"""`python -m flatmin.orchestrator`: the command line without its installed script."""

from flatmin.orchestrator.cli import main

main()
