"""The `torchquant` command. `main.py` imports no torch; `commands.py` is what its commands do."""
